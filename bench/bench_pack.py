"""The latent store: batches of a pack that is resident, and of one read ahead from its file.

Twenty batches make one call, so that reading ahead is under way as it is in training. Beside them PyTorch's DataLoader with two
workers on the same memory-mapped rows. What the figures must beat is the step, which must not wait for them.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from fastdit.data.pack import DTYPES, Manifest, Pack, normalise, posterior

BATCHES, BATCH = 20, 32
SHAPES = {"latents": [2, 8, 32, 32], "pixels": [3, 32, 32]}


def write_pack(path: Path, rows: str, count: int) -> Path:
    """A pack of random rows, as fastdit/data/pack.py describes it."""
    path.mkdir()
    latents = rows == "latents"
    generator = torch.Generator().manual_seed(0)
    if latents:
        data = torch.randn(count, *SHAPES[rows], generator=generator).bfloat16().view(torch.uint8)
    else:
        data = torch.randint(0, 256, (count, *SHAPES[rows]), generator=generator, dtype=torch.uint8)
    content = data.numpy().tobytes()
    (path / "data.bin").write_bytes(content)
    manifest = Manifest(
        format=1, dataset="random", transform="none", vae="none" if latents else "", vae_revision="", count=count,
        shape=SHAPES[rows], dtype="bfloat16" if latents else "uint8", scale=0.18215 if latents else 1.0, shift=0.0,
        labelled=False, num_classes=0, class_names=[], chunks=[[count, hashlib.sha256(content).hexdigest()]],
        labels_sha256="", skipped=[],
    )  # fmt: skip
    (path / "manifest.json").write_text(json.dumps(asdict(manifest)))
    return path


def loader(path: Path, m: Manifest) -> Iterator[list[Tensor]]:
    """Rows of the pack in random order, for ever, as DataLoader's two workers collate them from the mapped file."""
    mapped = torch.from_file(str(path / "data.bin"), shared=False, size=m.count * m.row_bytes, dtype=torch.uint8)
    rows = mapped.view(DTYPES[m.dtype])
    data = TensorDataset(rows.view(-1, *m.shape[1:]) if m.vae else rows.view(-1, *m.shape))
    return iter(DataLoader(data, BATCH, sampler=RandomSampler(data, replacement=True, num_samples=10**9), num_workers=2))


@pytest.mark.parametrize("rows", SHAPES)
def test_batches(side_by_side, device, tmp_path, rows):
    path = write_pack(tmp_path / "pack", rows, 4096)
    packs = {
        "resident": Pack(path, device, seed=0, stride=BATCH),
        "read ahead": Pack(path, device, seed=0, device_gib=0.0, stride=BATCH),
    }
    assert packs["resident"].resident
    assert not packs["read ahead"].resident
    seen = dict.fromkeys(packs, 0)
    waited = dict.fromkeys(packs, 0.0)

    def batches(name: str) -> None:
        before = packs[name].waited_s
        for _ in range(BATCHES):
            packs[name].batch(seen[name], BATCH)
            seen[name] += BATCH
        waited[name] = packs[name].waited_s - before

    m = packs["resident"].manifest
    read = BATCHES * BATCH * m.row_bytes // (2 if rows == "latents" else 1)  # of an image and its mirror image one is read
    workers = loader(path, m)

    def collated() -> None:
        for _ in range(BATCHES):
            (given,) = next(workers)
            given = given.to(device)
            if rows == "latents":
                posterior(given, torch.randn(BATCH, *m.image_shape, device=device), m.scale, m.shift)
            else:
                normalise(given)

    side_by_side(
        {name: (lambda name=name: batches(name)) for name in packs} | {"DataLoader, 2 workers": collated},
        op=f"{BATCHES} batches of {rows}",
        shape=f"{BATCH} × {SHAPES[rows]}",
        rounds=15,
        bytes=dict.fromkeys(packs, read),
        images=BATCHES * BATCH,
        extra=lambda name, s: (
            {"batches/s": BATCHES / s} | ({"ms waited a batch": 1000 * waited[name] / BATCHES} if name in waited else {})
        ),
    )
    for pack in packs.values():
        pack.close()
