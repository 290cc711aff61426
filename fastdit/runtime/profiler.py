"""Where a training step's time goes: a trace of a few steps for a viewer, and one screen that says it by kind of op."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

# The first pattern that a name of an op (on a CPU) or of a kernel (on a GPU) contains says its kind.
KINDS = {
    "communication": r"nccl|gloo|c10d|record_param_comms|all_?gather(?!_copy)|reduce_scatter(?!_copy)|all_?reduce",
    "sharding's copies": r"fsdp::|chunk_cat|split_with_sizes_copy",
    "optimizer and EMA": r"adam|fused_sgd|foreach|multi_tensor|lpnorm",
    "attention": r"scaled_dot|flash|fmha|attention|sdpa|compute_dot_do_o|softmax|\bbmm|baddbmm",
    "GELU and convolution": r"gelu|dwconv|conv(?!ert)|[dw]grad|fprop|implicit_gemm",
    "norms and residuals": r"ln_modulate|sum_partials|layer_norm|layernorm|rms_norm|addcmul",
    "matrix products": r"gemm|cutlass|nvjet|xmma|\baddmm|\bmm\b|::linear|matmul|mkldnn_linear",
    "compiled pointwise": r"triton_|cpp_fused",
    "random numbers and data": r"normal_|uniform_|randn|rand\b|distribution|index_select|gather|Dataloader",
    "copies and casts": r"copy|clone|contiguous|memcpy|memset|cat\b|stack|fill_|zero_|::to\b|pad",
    "sums and elementwise": r"elementwise|reduce_kernel|sum|::(mul|add|sub|div|neg|pow|r?sqrt|exp|cos|sin|silu|where|mean|mse)",
}
OTHER = "everything else"


class Kind(NamedTuple):
    """One kind of op in a traced step: its own time, how many there are, and the op that takes most of it."""

    name: str
    seconds: float
    calls: float
    largest: str


class Profiler:
    """Traces `steps` training steps after the first WARM + 1. Call `step` after each one. With steps 0 it does nothing at all.

    Written to folder: IMAGES.json.gz, for ui.perfetto.dev or chrome://tracing, and IMAGES.txt, the table that `say` also gets.
    """

    WARM = 3  # compiling, and the first allocations; the profiler's own first step follows and is not counted either

    def __init__(self, folder: Path, steps: int, device: torch.device, say: Callable[[str], None]):
        self.folder, self.steps, self.device, self.say = folder, steps, device, say
        self.done, self.trace = 0, None
        if steps:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
            when = schedule(wait=self.WARM, warmup=1, active=steps, repeat=1)
            self.trace = profile(activities=activities, schedule=when, on_trace_ready=self._write, acc_events=True)
            self.trace.start()

    def step(self, images_seen: int) -> None:
        if self.trace is None:
            return
        self.done, self.images_seen = self.done + 1, images_seen
        if self.done > self.WARM and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.done == self.WARM + 1:
            self.started = perf_counter()
        self.now = perf_counter()
        self.trace.step()
        if self._complete():
            self.close()

    def close(self) -> None:
        """Stop tracing, if it is still on because the run ended first."""
        if self.trace is not None:
            self.trace.stop()
            self.trace = None

    def _complete(self) -> bool:
        return self.done == self.WARM + 1 + self.steps

    def _write(self, trace: profile) -> None:
        if not self._complete():  # the run ended first
            return
        seconds = (self.now - self.started) / self.steps
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.images_seen:09d}.json.gz"
        trace.export_chrome_trace(str(path))
        text = table(kinds(own_times(trace.key_averages(), self.device), self.steps), seconds, self.steps)
        path.with_name(f"{self.images_seen:09d}.txt").write_text(text + "\n", encoding="utf-8")
        self.say(f"{text}\n{path}")


def own_times(events: Any, device: torch.device) -> dict[str, tuple[float, int]]:
    """Seconds that each op (on a GPU, each kernel) itself took in all, and how often it ran."""
    found: dict[str, tuple[float, int]] = {}
    for event in events:
        on_gpu = event.device_type == DeviceType.CUDA
        if on_gpu == (device.type == "cuda") and not event.key.startswith("ProfilerStep"):
            own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            found[event.key] = (own * 1e-6, event.count)
    return found


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), OTHER)


def kinds(times: Mapping[str, tuple[float, int]], steps: int) -> list[Kind]:
    """The kinds by the time they take of one step, longest first."""
    grouped: dict[str, dict[str, tuple[float, int]]] = {}
    for name, time in times.items():
        grouped.setdefault(kind_of(name), {})[name] = time
    found = [
        Kind(
            kind,
            sum(s for s, _ in ops.values()) / steps,
            sum(n for _, n in ops.values()) / steps,
            max(ops, key=lambda n: ops[n][0]),
        )
        for kind, ops in grouped.items()
    ]
    return sorted(found, key=lambda kind: -kind.seconds)


def table(found: list[Kind], seconds: float, steps: int) -> str:
    """One screen. `seconds` is a step's wall time; what no op accounts for is waiting and the interpreter's own time."""
    lines = [f"one step of {steps} traced: {seconds * 1000:,.2f} ms; tracing itself slows it a little"]
    lines.append(f"{'kind of op':26}{'ms':>10}{'share':>8}{'calls':>9}  largest")
    for kind in found:
        lines.append(
            f"{kind.name:26}{kind.seconds * 1000:>10.2f}{kind.seconds / seconds:>8.1%}{kind.calls:>9,.0f}  {kind.largest[:60]}"
        )
    idle = seconds - sum(kind.seconds for kind in found)
    lines.append(f"{'not in any op':26}{idle * 1000:>10.2f}{idle / seconds:>8.1%}")
    return "\n".join(lines)
