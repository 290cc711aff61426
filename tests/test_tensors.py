"""Safetensors files from anywhere: what is no file of weights, or would cost more than it is worth, is refused in one line."""

import json
import time
from pathlib import Path

import pytest
import torch

from fastdit.config import UserError
from fastdit.runtime.tensors import load_weights, save_weights


def file(path: Path, header: bytes | dict, data: bytes = bytes(16), size: int | None = None) -> Path:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(header) if size is None else size).to_bytes(8, "little") + header + data)
    return path


def entry(start: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


TWICE = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
HOSTILE = {
    "header of 100 MB": (b"{" + b" " * (100 << 20) + b"}", "its header has 104857602 bytes"),
    "header longer than the file": ({}, "not a readable"),
    "two entries of one name": (TWICE, "two entries of one name"),
    "overlap": ({"a": entry(0, 16), "b": entry(8, 16)}, "not a readable"),
    "same bytes twice": ({"a": entry(0, 16), "b": entry(0, 16)}, "not a readable"),
    "hole": ({"a": entry(0, 4), "b": entry(8, 16)}, "not a readable"),
    "beyond the end": ({"a": entry(0, 64)}, "not a readable"),
    "shape that is another length": ({"a": entry(0, 16, [5])}, "not a readable"),
    "shape that overflows": ({"a": entry(0, 16, [2**62, 2**62])}, "not a readable"),
    "negative": ({"a": entry(0, 16, [-4])}, "not a readable"),
    "unknown dtype": ({"a": entry(0, 16, dtype="F7")}, "not a readable"),
    "nested": (b"[" * 200_000, "not a readable"),
    "no JSON": (b"\x80\x04.", "not a readable"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_in_one_line_at_once(tmp_path, kind):
    header, said = HOSTILE[kind]
    path = file(tmp_path / "x.safetensors", header, size=1 << 40 if kind == "header longer than the file" else None)
    start = time.perf_counter()
    with pytest.raises(UserError, match=rf"\A[^\n]*{said}[^\n]*\Z"):
        load_weights(path)
    assert time.perf_counter() - start < 2


def test_what_is_written_is_read(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.zeros(0, 4)}
    save_weights(tmp_path / "x.safetensors", tensors, {"made": "here"})
    found, metadata = load_weights(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], t) and found[name].dtype == t.dtype for name, t in tensors.items())
    assert metadata == {"format": "pt", "made": "here"}
