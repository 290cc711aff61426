"""The launch in a GPU's place: it compiles a kernel (ptx_compiler.py) and executes it (ptx.py). And the worst errors, kept."""

import json
import platform
import sys
from collections import Counter
from pathlib import Path

import ptx
import ptx_compiler
import torch
import triton
from fastdit_kernels import launch


class Table:
    """The worst errors seen, by kernel, architecture and types, and how often each mnemonic was executed."""

    def __init__(self) -> None:
        self.kernels: dict[str, dict[str, float]] = {}
        self.mnemonics: Counter[str] = Counter()

    def add(self, kernel: str, error: float, bar: float) -> None:
        row = self.kernels.setdefault(kernel, {"compared": 0, "worst_error": 0.0, "worst_share_of_bar": 0.0})
        row["compared"] += 1
        row["worst_error"] = max(row["worst_error"], float(f"{error:.3g}"))
        row["worst_share_of_bar"] = max(row["worst_share_of_bar"], float(f"{error / bar:.3g}"))

    def save(self, path: Path) -> None:
        found = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
        found |= {"kernels": dict(sorted(self.kernels.items())), "mnemonics": dict(sorted(self.mnemonics.items()))}
        path.write_text(json.dumps(found, indent=1) + "\n")


class Compiled:
    """A Launch of the code compiled for one architecture. edit changes the PTX; skip names kernels that are not run.

    changes: arguments to launch with instead. reachable: tensors, by name, whose addresses lie in memory.
    """

    def __init__(self, compiler, table, arch, sign, edit=None, skip=()):
        self.compiler, self.table, self.arch, self.sign, self.edit, self.skip = compiler, table, arch, sign, edit, skip
        self.changes, self.reachable, self.launches = {}, {}, []

    def __call__(self, kernel, grid, *settings, **args):
        name = kernel.__name__
        self.launches.append(name)
        if name in self.skip:
            return
        args |= self.changes
        described = {k: (v.dtype, v.data_ptr() % 16) if isinstance(v, torch.Tensor) else v for k, v in args.items()}
        request = ptx_compiler.Request(kernel.fn.__module__, name, self.arch, settings, described)
        code = self.compiler(request)
        text = self.edit(code.ptx) if self.edit else code.ptx
        arguments = {parameter: args[parameter] for parameter in code.parameters}
        self.table.mnemonics.update(ptx.execute(text, code.shared_bytes, grid, arguments, self.reachable, self.sign))


def put_in_place(patch, launched: Compiled) -> None:
    """Let every op call this launch, and ask for what a GPU runs."""
    patch.setattr(triton.knobs.runtime, "interpret", False)
    for name, module in list(sys.modules.items()):
        if name.startswith("fastdit_kernels.") and module is not launch:
            found = getattr(module, "run", None)
            if found is launch.run or isinstance(found, Compiled):
                patch.setattr(module, "run", launched)
