"""What a session of benches found: a table on the terminal, and one JSON file for each bench and kind of device."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import machine
import torch
import triton

from fastdit.runtime.files import write_text

RESULTS = Path(__file__).parent / "results"


class Row(NamedTuple):
    """One measurement, or one count. `bytes` and `flops` are what the variant moves and computes, None where not stated."""

    bench: str  # the file it came from
    op: str
    baseline: str  # which implementation this is: "fastdit", "eager", "torch.compile" …
    shape: str
    microseconds: float | None  # None: counted, not timed
    rounds: int
    bytes: int | None = None
    gb_per_s: float | None = None
    percent_of_copy: float | None = None
    flops: int | None = None
    tflop_per_s: float | None = None
    percent_of_matmul: float | None = None
    extra: dict[str, float] | None = None  # what else was measured or follows, by name with its unit


class Ceilings(NamedTuple):
    copy: float  # bytes/s, read and written
    matmul: float  # FLOP/s


@dataclass
class Session:
    """What the benches of one run of pytest found."""

    rows: list[Row] = field(default_factory=list)
    ceilings: Ceilings | None = None


def show(session: Session, write: Callable[[str], None]) -> None:
    """The table: what was timed, then what was counted."""
    timed = [row for row in session.rows if row.microseconds is not None]
    counted = [row for row in session.rows if row.microseconds is None]
    if session.ceilings is not None:
        copy, matmul = session.ceilings.copy / 1e9, session.ceilings.matmul / 1e12
        write(f"\n{machine.kind()}: copy {copy:.0f} GB/s, matrix product {matmul:.3g} TFLOP/s, measured in this run")
    if timed:
        write(
            f"{'op':36} {'implementation':28} {'shape':32} {'µs':>10} {'MB':>9} {'GB/s':>7} {'% copy':>6} {'TFLOP/s':>7}"
            " % of matrix product"
        )
    for r in timed:
        megabytes, bandwidth, of_copy = _form(r.bytes and r.bytes / 1e6, ".1f"), _form(r.gb_per_s, ".4g"), r.percent_of_copy
        arithmetic = f"{_form(r.tflop_per_s, '.3g'):>7} {_form(r.percent_of_matmul, '.0f')}"
        write(
            f"{r.op:36} {r.baseline:28} {r.shape:32} {r.microseconds:10.1f} {megabytes:>9} {bandwidth:>7} "
            f"{_form(of_copy, '.0f'):>6} {arithmetic}  {_more(r)}".rstrip()
        )
    if counted:
        write(f"\nCounted, not timed:\n{'what':48} {'implementation':30} {'MB':>9}")
    before = None
    for r in counted:
        shape = "" if (r.baseline, r.shape) == before else f"  ({r.shape})"
        before = r.baseline, r.shape
        write(f"{r.op:48} {r.baseline:30} {_form(r.bytes and r.bytes / 1e6, '.2f'):>9}  {_more(r)}{shape}")


def save(session: Session) -> list[Path]:
    """Write the rows of each bench to its file in RESULTS, with the device, the versions and the commit."""
    RESULTS.mkdir(exist_ok=True)
    about: dict[str, Any] = {
        "device": machine.device(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "commit": machine.commit(),
    }
    if session.ceilings is not None:
        about |= {"copy_gb_per_s": session.ceilings.copy / 1e9, "matmul_tflop_per_s": session.ceilings.matmul / 1e12}
    written = []
    for bench in dict.fromkeys(row.bench for row in session.rows):
        path = RESULTS / f"{bench}-{machine.slug()}.json"
        rows = [row._asdict() for row in session.rows if row.bench == bench]
        rows = merged(path, rows)
        write_text(path, json.dumps({**about, "rows": rows}, indent=1) + "\n")
        written.append(path)
    return written


def merged(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of this run, and of the file's those that it did not measure, with the commit and the device that did."""

    def key(row: dict[str, Any]) -> tuple[str, ...]:
        return row["op"], row["baseline"], row["shape"]

    measured = {key(row) for row in rows}
    before = json.loads(path.read_text()) if path.exists() else {"rows": []}
    kept = [row for row in before["rows"] if key(row) not in measured]
    return [{"commit": before.get("commit"), "device": before.get("device"), **row} for row in kept] + rows


def skipped(reports: Iterable[Any]) -> list[str]:
    """A line for each bench that was skipped, and why."""
    counts: dict[tuple[str, str], int] = {}
    for report in reports:
        key = report.nodeid.partition("[")[0], report.longrepr[2].removeprefix("Skipped: ")
        counts[key] = counts.get(key, 0) + 1
    return [f"skipped {name}{f', {times} cases' if times > 1 else ''}: {why}" for (name, why), times in counts.items()]


def _form(number: float | None, form: str) -> str:
    return "-" if number is None else format(number, form)


def _more(row: Row) -> str:
    return "  ".join(f"{value:.4g} {name}" for name, value in (row.extra or {}).items())
