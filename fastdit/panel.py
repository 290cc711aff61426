"""What is about to run, printed once before the first step: a panel, or plain lines where the output is no terminal."""

from pathlib import Path

import torch
from fastdit_kernels.attention import eager, sdpa, sdpa_cudnn_first
from fastdit_kernels.cpu import CPU
from fastdit_kernels.reference import REFERENCE
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel

from fastdit.config import Config, plain
from fastdit.data.pack import Pack
from fastdit.meter import count, plural
from fastdit.model import choose_ops
from fastdit.runtime import sharding
from fastdit.runtime.hardware import has_bf16, peak_tflops, precision
from fastdit.runtime.ranks import World


def facts(
    config: Config, folder: Path, world: World, pack: Pack, parameters: int, flops_per_image: float, images_seen: int
) -> dict[str, str]:
    """The lines of the panel, by their names. flops_per_image is a training step's, forward and backward."""
    t, data = config.train, pack.manifest
    gpu = world.device.type == "cuda"
    name = torch.cuda.get_device_name(world.device) if gpu else "CPU"
    peak = peak_tflops(name, config.log.peak_tflops)
    ranks, micro = plural(world.size, "rank"), plural(t.grad_accum, "micro-step")
    batch = t.batch * world.size * t.grad_accum
    return {
        "run": f"{config.run.name} in {folder}" + (f", resumed at {images_seen:,} images" if images_seen else ""),
        "device": f"{world.size} × {name}" + ("" if gpu else f" ({torch.get_num_threads()} threads each)"),
        "data": f"{data.count:,} images, {data.num_classes} classes, {'resident' if pack.resident else 'read ahead from disk'}",
        "model": f"{count(parameters)} parameters, {flops_per_image / 1e9:.4g} GFLOP per training image",
        "batch": f"{t.batch} per rank × {ranks} × {micro} = {batch:,} images",
        "length": f"{t.images:,} images = {plural(-(-t.images // batch), 'step')}",
        "numbers": numbers(config, world.device, data.lengths),
        "MFU": f"of {peak:g} TFLOP/s per device" if peak else "not shown: unknown peak of this device",
    }


def numbers(config: Config, device: torch.device, lengths: bool = False) -> str:
    """What the network computes in and with. lengths: whether samples have padding."""
    chosen, dtype = choose_ops(config, device), precision(config.parallel.precision, device)
    if not has_bf16(device):
        dtype += " (no bf16 in this device)" if dtype == "fp32" else " (not in this device's instructions: fp32 is much faster)"
    if sharding.compiles(config.parallel, device):
        dtype += ", compiled"
    kernels = {REFERENCE.ln_modulate: "PyTorch reference", CPU.ln_modulate: "PyTorch"}.get(chosen.ln_modulate, "Triton")
    attention = (
        "eager" if chosen.attention is eager else "SDPA" if chosen.attention in (sdpa, sdpa_cudnn_first) else "flash-attn"
    )
    if lengths:
        attention = "SDPA with a mask of the padding" + (" (flash-attn takes none)" if attention == "flash-attn" else "")
    return f"{dtype}, {kernels} kernels, {attention}{'' if lengths else ' attention'}"


def show(facts: dict[str, str], console: Console | None = None) -> None:
    text = "\n".join(f"{name:<8}{plain(value, 1000)}" for name, value in facts.items())
    console = console or Console()
    if console.is_terminal:
        console.print(Panel(escape(text), title="fastdit", title_align="left", expand=False), highlight=False)
    else:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
