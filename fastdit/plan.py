"""What a run will need, said before a GPU is rented: memory, arithmetic, traffic, messages, hours and energy of a recipe.

Every figure is a count, or a bound from data sheets; nothing is measured, no GPU is needed, and a real step takes longer.
"""

import fastdit  # noqa: F401  # isort: skip  before torch
from fastdit import command  # isort: skip
from fastdit.options import Plan as Options  # isort: skip

if command.is_program("plan", __name__):
    command.at_once(lambda argv: command.parse_over(Options, argv, "fastdit/plan.py", __doc__ or ""))  # before torch

import dataclasses
import difflib
import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from fastdit.config import UserError
from fastdit.planning import costs
from fastdit.planning import memory as footprint
from fastdit.planning.costs import Bound, Cluster
from fastdit.planning.flops import mean_flops_per_image
from fastdit.planning.gpus import GPUS
from fastdit.recipes import RECIPES
from fastdit.runtime.validation import validate

GIB = 2**30


def main() -> None:
    """python fastdit/plan.py [RECIPE] [--gpus N] [--gpu NAME] [--field VALUE …]"""
    command.run(plan, parse)


def parse(argv: Sequence[str]) -> Options:
    """[RECIPE] [--field VALUE …] → what to plan. Raises UserError, one line, for anything else."""
    options = command.parse_over(Options, argv, "fastdit/plan.py", __doc__ or "")
    validate(options)
    if options.gpu not in GPUS:
        near = difflib.get_close_matches(options.gpu, GPUS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"unknown --gpu {options.gpu!r}{hint}; known are {', '.join(GPUS)}")
    for name in ("gpus", "network"):
        if getattr(options, name) <= 0:
            raise UserError(f"--{name} is {getattr(options, name)}; it must be positive")
    if not all(0 < share <= 1 for share in options.efficiency):
        raise UserError(f"--efficiency is {options.efficiency}; each must be above 0 and at most 1")
    return options


def cluster(options: Options) -> Cluster:
    """Where it would run. Raises UserError where the GPUs cannot be spread or the weights not sharded as asked."""
    nodes = options.nodes or -(-options.gpus // 8)
    if options.gpus % nodes:
        raise UserError(f"--gpus {options.gpus} do not spread evenly over --nodes {nodes}")
    shard = options.parallel.shard or options.gpus // nodes
    if options.gpus % shard:
        raise UserError(f"--parallel.shard {shard} does not divide the {options.gpus} ranks")
    return Cluster(GPUS[options.gpu], options.gpus, nodes, options.network)


def plan(options: Options) -> None:
    """Print it."""
    if options.table:
        print(scaling(options))
        return
    where = cluster(options)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    bound = costs.bound(options, where)
    t = options.train
    console.print(verdict(options, where, bound) + "\n")
    console.print(
        f"[b]{options.run.name}[/b] on {where.gpus} × {where.gpu.device} in {where.nodes} node{'s'[: where.nodes - 1]}: "
        f"{t.batch} images × {t.grad_accum} × {where.gpus} ranks = {bound.images:,} a step.\n"
        f"Counts and bounds, not measurements. {describe(where)}."
        + (f" {where.network:g} GB/s between nodes for each GPU: assumed." if where.nodes > 1 else "")
    )
    for table in (memory_table(options, where), parts_table(options, where), bound_table(bound, options, where)):
        console.print()
        console.print(table)
    console.print()
    console.print("\n".join(run_lines(options, where, bound)))


def verdict(options: Options, where: Cluster, bound: Bound) -> str:
    """Whether it fits, how long it takes at half of the bound, and the batch that fills the memory."""
    ranks, capacity = options.parallel.shard or where.local, where.gpu.memory_gb * 1e9
    held = sum(footprint.state_bytes(options, ranks).values()) + footprint.RESERVED
    need = held + sum(footprint.batch_bytes(options, options.train.batch).values())
    fits = footprint.largest_batch(options, ranks, capacity)
    again = footprint.largest_batch(footprint.recomputing(options, True), ranks, capacity)
    place, gb = f"on {where.gpus} × {where.gpu.device}", f"{need / 1e9:,.0f} of {where.gpu.memory_gb:g} GB each"
    if need <= capacity:
        hours = options.train.images / (bound.images / bound.step_s / 2) / 3600
        takes = f"{options.train.images:,} images take about {duration(hours)} at half of the bound"
        line = f"[b]{options.run.name} fits {place}, in {gb}, and {takes}.[/b]"
    else:
        line = f"[b]{options.run.name} does not fit {place}: it takes {gb}.[/b]"
    if not again:
        return line + " No batch fits: shard the weights over more GPUs, or take a smaller model."
    kept = f"--train.batch {fits:,} fills the memory" if fits else "No batch fits with activations kept"
    return f"{line} {kept}, {again:,} with --parallel.checkpoint_activations."


def duration(hours: float) -> str:
    """As people say it: 40 s, 25 min, 3 h 20 min, 2.5 days."""
    seconds = hours * 3600
    if seconds < 120:
        return f"{seconds:.0f} s"
    if hours < 2:
        return f"{seconds / 60:.0f} min"
    if hours < 10:
        whole, minutes = divmod(round(seconds / 60), 60)
        return f"{whole} h {minutes} min" if minutes else f"{whole} h"
    return f"{hours:.0f} h" if hours < 48 else f"{hours / 24:.1f} days"


def describe(where: Cluster) -> str:
    gpu = where.gpu
    return (
        f"{gpu.flops / 1e12:g} TFLOP/s, {gpu.memory_gb_per_s:,g} GB/s, {gpu.memory_gb:g} GB, "
        f"{gpu.link_gb_per_s:g} GB/s each way in a node, {gpu.watts} W ({gpu.source})"
    )


def memory_table(options: Options, where: Cluster) -> Table:
    """GiB on one rank, as configured and with blocks recomputed, and the batch that would fit."""
    ranks, capacity = options.parallel.shard or where.local, where.gpu.memory_gb * 1e9
    variants = [footprint.recomputing(options, on) for on in (False, True)]
    table = _table("memory of one rank, GiB", "kept activations", "recomputed")
    state = footprint.state_bytes(options, ranks)
    for name, size in state.items():
        table.add_row(name, *[f"{size / GIB:.2f}"] * 2)
    moving = [footprint.batch_bytes(variant, options.train.batch) for variant in variants]
    for name in moving[0]:
        table.add_row(f"{name}, batch {options.train.batch}", *(f"{m[name] / GIB:.2f}" for m in moving))
    held = sum(state.values()) + footprint.RESERVED
    table.add_row("CUDA, NCCL, allocator: reserved", *[f"{footprint.RESERVED / GIB:.2f}"] * 2)
    totals = [held + sum(m.values()) for m in moving]
    table.add_row("[b]in all[/b]", *(f"[b]{x / GIB:.2f}[/b]{'' if x <= capacity else ' too much'}" for x in totals))
    table.add_row(f"of the {capacity / GIB:.1f} there are", *(f"{x / capacity:.0%}" for x in totals))
    fits = [footprint.largest_batch(variant, ranks, capacity) for variant in variants]
    table.add_row("largest batch that fits", *(f"{n:,}" if n else "none" for n in fits))
    table.caption = "The data's pack is not in it. It stays on the device if it has at most 16 GiB."
    return table


def parts_table(options: Options, where: Cluster) -> Table:
    """FLOPs, bytes and the least time of each part of a rank's step."""
    images = options.train.batch * options.train.grad_accum
    table = _table("one step, one rank", "GFLOP / image", "GB", "ms at the peak", "ms at the bandwidth", "bound, ms")
    step = costs.parts(options, where, dropped=options.model.token_drop)
    for p in sorted(step, key=lambda part: -part.bound_s):
        table.add_row(
            p.name, f"{p.flops / images / 1e9:.2f}", f"{p.bytes / 1e9:.2f}", *map(_ms, (p.compute_s, p.memory_s, p.bound_s))
        )
    flops, moved, compute, memory, least = (sum(column) for column in zip(*((*p[1:], p.bound_s) for p in step), strict=True))
    table.add_row("[b]in all[/b]", f"{flops / images / 1e9:.2f}", f"{moved / 1e9:.2f}", *map(_ms, (compute, memory, least)))
    table.add_section()
    sent = costs.messages(options, where)
    for message in sent:
        table.add_row(f"{message.name}", "", f"{message.bytes / 1e9:.2f}", "", "", f"{_ms(message.seconds)} network")
    if not sent:
        table.add_row("messages", "", "0", "", "", "none: one rank")
    return table


def bound_table(bound: Bound, options: Options, where: Cluster) -> Table:
    """The step's bounds and the throughput they allow."""
    table = _table(f"bounds of the step ({bound.binds} binds)", "ms", "img/s", "MFU")
    useful = mean_flops_per_image(options) / (where.gpus * where.gpu.flops)

    def row(name: str, seconds: float, alone: bool = False) -> None:
        rate = bound.images / seconds
        table.add_row(name, _ms(seconds), f"{rate:,.0f}", "" if alone else f"{rate * useful:.0%}")

    row("compute: every FLOP at the peak", bound.compute_s)
    row("memory: every byte at the bandwidth", bound.memory_s, alone=True)
    if bound.network_s:
        row("network: every message at the links' bandwidth", bound.network_s, alone=True)
    row("device: part after part, each at its own bound", bound.device_s)
    row("[b]the step: device or network, whichever is longer[/b]", bound.step_s)
    table.add_section()
    for share in options.efficiency:
        row(f"supposing {share:.0%} of that", bound.step_s / share)
    return table


def run_lines(options: Options, where: Cluster, bound: Bound) -> Iterable[str]:
    """Hours and energy to the run's last image, at the supposed efficiencies."""
    watts = where.gpus * where.gpu.watts
    for share in options.efficiency:
        hours = options.train.images / (bound.images / bound.step_s * share) / 3600
        yield f"{options.train.images:,} images at {share:.0%}: {duration(hours)}, {watts * hours / 1000:,.1f} kWh"
    if options.hours:
        for share in options.efficiency:
            images = bound.images / bound.step_s * share * options.hours * 3600
            energy = watts * options.hours / 1000
            yield f"{options.hours:g} h at {share:.0%}: {images:,.0f} images, {energy:,.1f} kWh"
    yield f"Energy: {where.gpus} GPUs at their TDP of {where.gpu.watts} W, the rest of the machine and cooling not counted."


# --- the table of docs/scaling.md ---

SCALES = (1, 8, 64, 512)
MODELS = {"B/2": "cats-256", "XL/2": "imagenet-256-xl"}


def scaling(options: Options) -> str:
    """Markdown: both models on one GPU to 512, at their recipes' batch per GPU, with what is supposed."""
    share = options.efficiency[1]
    lines = [
        "# Scaling on paper",
        "",
        "Made by `python fastdit/plan.py --table`. Counts and bounds from data sheets: **nothing here is measured**, and a",
        "real step takes longer. `python fastdit/plan.py RECIPE --gpu NAME --gpus N` says where each figure comes from.",
        "",
        "What is supposed:",
        "",
        "- 32 images per GPU, so the global batch grows with the GPUs; bf16; weights sharded inside a node of 8 and replicated",
        "  across nodes (HSDP), gathered once a step; activations kept; fused kernels at their floors.",
        f"- {options.network:g} GB/s between nodes for each GPU, each direction, and all of a node's links used at once.",
        "- Messages hide behind computation entirely: the bound is whichever of the two is longer. At a bound, every matrix",
        "  product runs at the data sheet's peak and every other part at the memory's full bandwidth.",
        f"- Hours and kWh are to the recipe's last image at {share:.0%} of the bound, GPUs at their TDP and nothing else",
        "  counted. A larger batch may need more images for the same quality; that is not in it.",
        "",
    ]
    for name in ("a100-80gb", "h100"):
        gpu = GPUS[name]
        lines += [
            f"## {gpu.device}",
            "",
            describe(Cluster(gpu, 8, 1, options.network)) + ".",
            "",
            "| model | GPUs | global batch | GiB per GPU | GB sent per GPU and step | device, ms | network, ms | binds | "
            f"bound, img/s | at {share:.0%}, img/s | hours | kWh |",
            "|---|--:|--:|--:|--:|--:|--:|---|--:|--:|--:|--:|",
        ]
        for model, recipe in MODELS.items():
            moving = sum(footprint.batch_bytes(RECIPES[recipe], RECIPES[recipe].train.batch).values())
            for gpus in SCALES:
                lines.append("| " + " | ".join((model, *_scale(options, name, recipe, gpus, moving, share))) + " |")
        lines.append("")
    return "\n".join(lines).rstrip()


def _scale(options: Options, gpu: str, recipe: str, gpus: int, moving: int, share: float) -> list[str]:
    config = RECIPES[recipe]
    groups = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    here = dataclasses.replace(options, **groups, gpu=gpu, gpus=gpus, nodes=0)
    where = cluster(here)
    bound = costs.bound(config, where)
    held = sum(footprint.state_bytes(config, where.local).values()) + moving + footprint.RESERVED
    rate = bound.images / bound.step_s
    hours = config.train.images / (rate * share) / 3600
    sent = sum(message.bytes for message in costs.messages(config, where))
    return [
        f"{gpus}", f"{bound.images:,}", f"{held / GIB:.1f}", f"{sent / 1e9:.2f}", _ms(bound.device_s), _ms(bound.network_s),
        bound.binds, f"{rate:,.0f}", f"{rate * share:,.0f}", f"{hours:.3g}", f"{hours * gpus * where.gpu.watts / 1000:,.1f}",
    ]  # fmt: skip


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.2f}" if seconds < 1 else f"{seconds * 1000:,.0f}"


if __name__ == "__main__":
    main()
