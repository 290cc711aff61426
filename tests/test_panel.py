"""The panel before a run's first step."""

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastdit_kernels.reference import REFERENCE
from rich.console import Console

from fastdit import panel
from fastdit.config import replace
from fastdit.recipes import RECIPES
from fastdit.runtime.ranks import World


@pytest.fixture
def facts(monkeypatch):
    """The panel's lines for a run of two ranks on a CPU with bf16, with what the test changes."""
    monkeypatch.setattr(panel, "has_bf16", lambda device: True)
    pack = SimpleNamespace(manifest=SimpleNamespace(count=20_000, num_classes=15, lengths=False), resident=True)
    world = World(0, 2, 0, 2, torch.device("cpu"))

    def make(images_seen: int = 0, name: str = "cats", **groups) -> dict[str, str]:
        config = replace(RECIPES["cats"], run={"name": name}, train={"batch": 64, "grad_accum": 3, "images": 60_000})
        config = replace(config, parallel={"precision": "bf16"}, **groups)
        return panel.facts(config, Path("runs") / name, world, pack, 1_912_345, 2.5e9, images_seen)

    return make


def shown(facts: dict[str, str], terminal: bool, width: int) -> str:
    out = io.StringIO()
    panel.show(facts, Console(file=out, force_terminal=terminal, width=width))
    return out.getvalue()


def test_plain_lines_where_the_output_is_no_terminal(facts):
    lines = facts()
    lines["device"] = "CPU, 2 threads"
    attention = lines["numbers"].removeprefix("bf16, PyTorch kernels, ")
    assert attention in ("eager attention", "SDPA attention")
    assert shown(lines, terminal=False, width=40).splitlines() == [
        "run     cats in runs/cats",
        "device  CPU, 2 threads",
        "data    20,000 images, 15 classes, resident",
        "model   1.91 M parameters, 2.5 GFLOP per training image",
        "batch   64 per rank × 2 ranks × 3 micro-steps = 384 images",
        "length  60,000 images = 157 steps",
        f"numbers bf16, PyTorch kernels, {attention}",
        "MFU     not shown: unknown peak of this device",
    ]


def test_a_panel_in_a_terminal(facts):
    out = shown(facts(1200, "[bold]cats", log={"peak_tflops": 312.0}), terminal=True, width=100)
    assert "[bold]cats in runs/[bold]cats, resumed at 1,200 images" in out
    assert "of 312 TFLOP/s per device" in out


def test_precision_that_the_device_lacks_is_said(facts, monkeypatch):
    monkeypatch.setattr(panel, "has_bf16", lambda device: False)
    assert "not in this device's instructions" in facts()["numbers"]


def test_attention_with_padding_is_said(monkeypatch):
    config, cpu = replace(RECIPES["cats"], parallel={"precision": "bf16"}), torch.device("cpu")
    monkeypatch.setattr(panel, "has_bf16", lambda device: True)
    assert panel.numbers(config, cpu, lengths=True).endswith("kernels, SDPA with a mask of the padding")
    flash = REFERENCE._replace(attention=lambda qkv: qkv)
    monkeypatch.setattr(panel, "choose_ops", lambda config, device: flash)
    assert panel.numbers(config, cpu, lengths=True).endswith("SDPA with a mask of the padding (flash-attn takes none)")
