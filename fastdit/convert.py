"""Bring weights in: from facebookresearch/DiT, SiT, REPA, diffusers' DiTTransformer2DModel, the seed repository.

The result is a folder that sample.py, train.py --train.init_from and fastdit.load open; its outputs are the original's, to fp32
rounding. No code in a file is run: safetensors, or torch.save's files by torch.load(weights_only=True).
"""

import fastdit  # noqa: F401  # isort: skip  before torch
from fastdit import command  # isort: skip
from fastdit.options import Convert as Options  # isort: skip

if command.is_program("convert", __name__):
    command.at_once(lambda argv: command.parse_args(Options, argv, "fastdit/convert.py", __doc__ or ""))  # before torch

from pathlib import Path

from fastdit.config import UserError
from fastdit.weights import folder
from fastdit.weights.sources import configured, open_foreign


def main() -> None:
    """python fastdit/convert.py SOURCE [--field VALUE …]"""
    command.run(convert, lambda argv: command.parse_args(Options, argv, "fastdit/convert.py", __doc__ or ""))


def convert(options: Options) -> Path:
    """Read, rename, write. Returns the folder. Raises UserError, one line."""
    source = Path(options.source)
    if not source.exists():
        raise UserError(f"{source} does not exist; name a file of weights, or a diffusers folder")
    out = Path(options.out) if options.out else source.with_name(f"{source.name if source.is_dir() else source.stem}-fastdit")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; choose another --out")
    found = open_foreign(
        source,
        options.kind,
        which=options.weights,
        num_heads=options.num_heads,
        num_classes=options.num_classes,
        patch=options.patch,
    )
    run = configured(found.run, found.weights, options.vae, out.resolve().name)
    folder.save_folder(out, found.weights.tensors, run, {"converted_from": source.name})
    count = sum(t.numel() for t in found.weights.tensors.values())
    for note in found.notes:
        print(f"note: {note}")
    print(f"{out}: {count:,} parameters, {run.model.depth} blocks of width {run.model.width}, {run.model.num_classes} classes")
    return out


if __name__ == "__main__":
    main()
