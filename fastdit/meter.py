"""What a run reports: a progress bar or plain lines, metrics.jsonl, TensorBoard, Weights & Biases. The step never waits for it.

Every figure is of the interval since the line before, training only: sampling and saving run inside paused().
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Column
from torch import Tensor

from fastdit.config import Config, UserError, plain
from fastdit.runtime.files import read_file, write_text
from fastdit.runtime.hardware import Energy, memory_gib, peak_tflops
from fastdit.runtime.ranks import World
from fastdit.runtime.trackers import Trackers, require_wandb

REFRESH_S = 0.5  # seconds between two drawings of the progress bar
LIMIT = 1 << 28  # bytes of metrics.jsonl


class Meter:
    """The figures of one run. Every rank makes one and calls add, due, report and paused; only rank 0's shows anything.

    batch_images is the images of one optimizer step over all ranks, flops_per_image a training step's, forward and backward.
    The energy is that of this node's GPUs.
    Lines of metrics.jsonl beyond resumed_images are dropped: they will come again.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        world: World,
        *,
        batch_images: int,
        flops_per_image: float,
        resumed_images: int = 0,
        console: Console | None = None,
    ):
        log = config.log
        require_wandb(log.wandb)
        self.total_images, self.batch_images, self.flops_per_image = config.train.images, batch_images, flops_per_image
        self.rank, self.world, self.device = world.rank, world.size, world.device
        self.print_every = max(log.print_every or self.total_images // 200, 1)
        self.window = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss · images, norm · images, images
        self.seen = resumed_images  # at the last line
        self.seconds = 0.0  # of training, over all runs of the folder, at the last line
        self.paused_s = self.paused_j = 0.0  # since the last line
        self.averaged_images, self.averaged_s = 0, 0.0  # over all lines but the first, which compiles
        self.first = True
        if self.rank:
            return

        self.console = console or Console()
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        self.peak = peak_tflops(name, log.peak_tflops)
        local_gpus = min(torch.cuda.device_count(), world.local_size) if self.device.type == "cuda" else 0
        self.local_share = local_gpus / world.size  # of the images that the GPUs whose energy is read have seen
        self.energy = Energy(local_gpus)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        last = _keep_lines(self.path, resumed_images)
        if last is not None:
            self.seconds = last.get("seconds", 0.0)
        self.trackers = Trackers(folder, log.wandb, resumed_images, dataclasses.asdict(config), self.say)
        self.bar: Progress | None = None
        if self.console.is_terminal:
            figures = TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=False))
            columns = TaskProgressColumn(), BarColumn(bar_width=12), figures
            # No thread refreshes it: that would take the interpreter from the step ten times a second.
            self.bar = Progress(*columns, console=self.console, auto_refresh=False)
            self.task = self.bar.add_task("", total=self.total_images, completed=resumed_images, figures="starting")
            self.refreshed = 0.0  # when the bar was last drawn
        self._start_interval()

    def add(self, loss: Tensor, grad_norm: Tensor, images: int) -> None:
        """Count one optimizer step: its mean loss over this rank's `images`, and the norm. Both stay on the device.

        A step that is not finite counts in no mean.
        """
        both = torch.stack([loss.detach().double(), grad_norm.detach().double(), torch.ones_like(loss, dtype=torch.float64)])
        self.window += torch.where(both.isfinite().all(), both * images, 0.0)
        if not self.rank and self.bar is not None:
            self.bar.advance(self.task, self.batch_images)
            if perf_counter() - self.refreshed > REFRESH_S:
                self._refresh()

    def restore(self, windows: list[list[float]]) -> None:
        """Continue an interrupted interval from each rank's `window`. On another number of ranks rank 0 gets the sum."""
        if len(windows) == self.world:
            self.window += torch.tensor(windows[self.rank], dtype=torch.float64).to(self.device)
        elif windows and not self.rank:
            self.window += torch.tensor(windows, dtype=torch.float64).sum(0).to(self.device)

    def due(self, images_seen: int) -> bool:
        """Whether a line is due: after the first step, whenever print_every more images are seen, and at the end."""
        before = images_seen - self.batch_images
        crossed = images_seen // self.print_every > before // self.print_every
        return crossed or before <= 0 or images_seen >= self.total_images

    def report(self, images_seen: int, *, lr: float, data_wait_s: float = 0.0, skipped: int = 0) -> dict[str, Any] | None:
        """Write the line of the interval that ends here, and return it to rank 0. Every rank calls it: it averages over them.

        data_wait_s is rank 0's wait for data in this interval, skipped the steps skipped in the whole run.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.window)
        loss, grad_norm, counted = self.window.tolist()  # the interval's one wait for the device
        self.window.zero_()
        images, self.seen = images_seen - self.seen, images_seen
        if self.rank:
            return None

        seconds = perf_counter() - self.started - self.paused_s
        joules = self.energy.joules()
        if joules is not None:
            joules -= self.started_j + self.paused_j
        rate = images / seconds
        self.seconds += seconds
        if not self.first:
            self.averaged_images += images
            self.averaged_s += seconds
        self.first = False
        line = {
            "images": images_seen,
            "step": images_seen // self.batch_images,
            "loss": loss / counted if counted else None,
            "grad_norm": grad_norm / counted if counted else None,
            "lr": lr,
            "img_per_s": rate,
            "ms_per_step": 1000 * seconds * self.batch_images / images,
            "data_wait_ms": 1000 * data_wait_s * self.batch_images / images,
            "data_wait_share": data_wait_s / seconds,
            "mfu": self.flops_per_image * rate / (self.world * self.peak * 1e12) if self.peak else None,
            "memory_gib": memory_gib(self.device),
            "watts": None if joules is None else joules / seconds,  # of this node's GPUs together
            "j_per_img": None if joules is None else joules / (images * self.local_share),
            "skipped": skipped,
            "seconds": self.seconds,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        self._show(line)
        self._start_interval()
        return line

    def eta(self) -> float:
        """Seconds of training left at the average pace so far. The first interval counts only while it is the only one."""
        rate = self.averaged_images / self.averaged_s if self.averaged_s else self.pace
        return max(self.total_images - self.seen, 0) / rate

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within, neither time nor energy is counted: for sampling and saving."""
        if self.rank:
            yield
            return
        self._synchronize()
        start, start_j = perf_counter(), self.energy.joules()
        try:
            yield
        finally:
            self._synchronize()
            self.paused_s += perf_counter() - start
            end_j = self.energy.joules()
            if start_j is not None and end_j is not None:
                self.paused_j += end_j - start_j

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if not self.rank:
            self.console.print(plain(text, 4000), markup=False, highlight=False, soft_wrap=True)

    def image(self, images_seen: int, path: Path) -> None:
        """Show an image file, a grid of samples, in TensorBoard and Weights & Biases."""
        if not self.rank:
            self.trackers.image(images_seen, path)

    def close(self) -> None:
        if self.rank:
            return
        if self.bar is not None:
            self.bar.stop()
        self.trackers.close()

    def _start_interval(self) -> None:
        self.started, self.started_j = perf_counter(), self.energy.joules() or 0.0
        self.paused_s = self.paused_j = 0.0

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _refresh(self) -> None:
        assert self.bar is not None
        if not self.bar.live.is_started:
            self.console.print()  # between the panel and the bar
            self.bar.start()
        self.bar.refresh()
        self.refreshed = perf_counter()

    def _show(self, line: dict[str, Any]) -> None:
        self.pace = line["img_per_s"]
        figures = _figures(line, self.total_images, self.eta())
        if self.bar is not None:
            self.bar.update(self.task, completed=line["images"], figures=escape(figures))
            self._refresh()
        else:
            self.say(f"{100 * min(line['images'] / self.total_images, 1):5.1f} %  {figures}")
        scalars = {k: v for k, v in line.items() if k not in ("images", "step", "time") and v is not None}
        self.trackers.scalars(line["images"], scalars)


def _figures(line: Mapping[str, Any], total_images: int, eta: float) -> str:
    """The line of metrics.jsonl for a person to read; unknown figures are left out."""
    figures = [f"{line['images']:,}/{total_images:,} images"]
    if line["loss"] is None:
        figures.append("loss not finite")
    for name, show in {
        "loss": lambda x: f"loss {x:.4f}",
        "grad_norm": lambda x: f"grad {_number(x)}",
        "img_per_s": lambda x: f"{_number(x)} img/s",
        "mfu": lambda x: f"MFU {x:.1%}",
        "memory_gib": lambda x: f"{x:.2f} GiB",
        "watts": lambda x: f"{x:,.0f} W",
        "j_per_img": lambda x: f"{_number(x)} J/img",
    }.items():
        if line[name] is not None:
            figures.append(show(line[name]))
    if line["data_wait_share"] >= 0.005:
        figures.append(f"data wait {line['data_wait_share']:.0%}")
    if line["skipped"]:
        figures.append(f"{plural(line['skipped'], 'step')} skipped")
    return "  ".join([*figures, f"ETA {_duration(eta)}"])


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def count(number: float) -> str:
    return f"{number / 1e9:.3g} B" if number >= 1e9 else f"{number / 1e6:.3g} M" if number >= 1e6 else f"{number:,}"


def plural(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _keep_lines(path: Path, images: int) -> dict[str, Any] | None:
    """Drop the lines beyond `images` and an incomplete one, in one atomic write. Returns the last line kept, if any."""
    if not path.exists():
        return None
    kept, last = [], None
    try:
        content = read_file(path, LIMIT).decode(errors="replace")
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    for text in content.splitlines():
        line = _line(text)
        if line is None or line["images"] > images:  # a kill cut it, and nothing after it can be trusted
            break
        kept.append(text + "\n")
        last = line
    write_text(path, "".join(kept))
    return last


def _line(text: str) -> dict[str, Any] | None:
    """A line as `report` writes it, or None."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("images")) is not int:
        return None
    seconds = line.get("seconds", 0.0)
    return line if type(seconds) in (int, float) and 0 <= seconds < 1e12 else None
