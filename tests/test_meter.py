"""What a run reports, against arithmetic done by hand with a clock and an energy counter that the test turns."""

import contextlib
import io
import json
import os
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from fastdit import meter
from fastdit.config import Config, LogConfig, TrainConfig, UserError
from fastdit.meter import Meter
from fastdit.runtime import hardware, trackers
from fastdit.runtime.hardware import Energy, memory_gib, peak_tflops
from fastdit.runtime.ranks import World


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(meter, "perf_counter", clock)
    return clock


@pytest.fixture(autouse=True)
def no_tensorboard(monkeypatch, request):
    if "tensorboard" not in request.node.name:
        monkeypatch.setattr(trackers, "_tensorboard", lambda folder, resumed: None)


def make(folder, log=LogConfig(print_every=200), terminal=False, **changes):  # noqa: B008
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=200)
    size, rank = changes.pop("world", 1), changes.pop("rank", 0)
    world = World(rank, size, rank, changes.pop("local_world", size), torch.device(changes.pop("device", "cpu")))
    config = Config(log=log, train=TrainConfig(images=changes.pop("total_images", 1000)))
    figures = {"batch_images": 100, "flops_per_image": 2e9, "console": console}
    return Meter(Path(folder), config, world, **(figures | changes)), out


def lines(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def scalar(x):
    return torch.tensor(float(x))


def test_the_figures_of_an_interval(tmp_path, clock):
    m, out = make(tmp_path / "run", LogConfig(print_every=200, peak_tflops=0.5))
    m.add(scalar(8.0), scalar(2.0), 100)
    clock.now += 10  # compiles
    first = m.report(100, lr=1e-3)
    for loss, norm in ((1.0, 0.5), (3.0, 1.5)):
        m.add(scalar(loss), scalar(norm), 100)
        clock.now += 2
    with m.paused():
        clock.now += 1000
    m.report(300, lr=2e-3, data_wait_s=0.5, skipped=1)
    m.close()
    got = lines(tmp_path / "run")
    assert got[0] == first
    assert first["img_per_s"] == 10
    want = {
        "images": 300,
        "step": 3,
        "loss": 2.0,
        "grad_norm": 1.0,
        "lr": 2e-3,
        "img_per_s": 50.0,
        "ms_per_step": 2000.0,
        "data_wait_ms": 250.0,
        "data_wait_share": 0.125,
        "mfu": 2e9 * 50 / 0.5e12,
        "watts": None,
        "j_per_img": None,
        "skipped": 1,
        "seconds": 14.0,
    }
    assert {k: got[1][k] for k in want} == pytest.approx(want)
    assert set(got[1]) == {*want, "memory_gib", "time"}
    assert 0.05 < got[1]["memory_gib"] < 16
    # 700 images at 50 per second: the first interval's 10 per second are compilation.
    assert m.eta() == 14.0
    printed = out.getvalue().splitlines()
    assert printed[1].startswith(" 30.0 %  300/1,000 images  loss 2.0000  grad 1  50 img/s  MFU 20.0%  ")
    assert printed[1].endswith("GiB  data wait 12%  1 step skipped  ETA 0:14")
    assert len(printed) == 2
    assert "\x1b" not in out.getvalue()


def test_what_is_not_known_is_not_printed(tmp_path, clock):
    m, out = make(tmp_path)
    m.add(scalar(0.25), scalar(1), 100)
    clock.now += 0.5
    line = m.report(100, lr=1.0)
    assert line["mfu"] is line["watts"] is line["j_per_img"] is None
    assert not any(word in out.getvalue() for word in ("MFU", "W ", "J/img", "wait", "skipped", "None"))
    assert out.getvalue().startswith(" 10.0 %  100/1,000 images  loss 0.2500  grad 1  200 img/s  ")


def test_the_interval_is_weighted_by_images_and_leaves_out_steps_that_are_not_finite(tmp_path, clock):
    m, out = make(tmp_path)
    m.add(scalar(1), scalar(10), 30)
    m.add(scalar(float("nan")), scalar(1), 100)
    m.add(scalar(2), scalar(float("inf")), 100)
    m.add(scalar(5), scalar(2), 10)
    clock.now += 1
    line = m.report(400, lr=1.0)
    assert line["loss"] == (30 * 1 + 10 * 5) / 40
    assert line["grad_norm"] == (30 * 10 + 10 * 2) / 40
    m.add(scalar(float("nan")), scalar(1), 100)
    clock.now += 1
    assert m.report(500, lr=1.0)["loss"] is None
    assert lines(tmp_path)[1]["loss"] is None
    assert "loss not finite" in out.getvalue()


def test_when_a_line_is_due(tmp_path):
    m, _ = make(tmp_path, LogConfig(print_every=250), total_images=1040)
    assert [n for n in range(100, 1101, 100) if m.due(n)] == [100, 300, 500, 800, 1000, 1100]
    assert make(tmp_path, LogConfig(), total_images=100_000)[0].print_every == 500
    assert make(tmp_path, LogConfig(), total_images=50)[0].print_every == 1


class NoSync(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


def test_add_never_waits_for_the_device(tmp_path, monkeypatch):
    def waits(*_):
        raise AssertionError("the host waits for the device")

    for name in ("tolist", "numpy", "cpu"):  # on the CPU these read memory without an op that a mode could catch
        monkeypatch.setattr(torch.Tensor, name, waits)
    m, _ = make(tmp_path, terminal=True)
    loss = torch.ones((), requires_grad=True) * 2
    with NoSync():
        m.add(loss, scalar(1), 100)
        assert not m.due(199)
    assert not m.window.requires_grad
    with NoSync(), pytest.raises(AssertionError, match="waits"):
        m.report(100, lr=1.0)
    m.close()


def test_numbers_stay_readable_at_every_size(tmp_path, clock):
    m, out = make(tmp_path, total_images=20_000_000, batch_images=20_000)
    m.add(scalar(1), scalar(1234.5), 20_000)
    clock.now += 1
    m.report(20_000, lr=1.0)
    assert "grad 1,234  20,000 img/s" in out.getvalue()
    assert out.getvalue().rstrip().endswith("ETA 16:39")
    m.add(scalar(1), scalar(0.01234), 20_000)
    clock.now += 20_000
    m.report(40_000, lr=1.0)
    assert "grad 0.0123  1 img/s" in out.getvalue()
    assert out.getvalue().rstrip().endswith("ETA 5544:26:40")


# --- resuming ---


def run(folder, clock, start, stop, **changes):
    m, _ = make(folder, resumed_images=start, **changes)
    for seen in range(start + 100, stop + 1, 100):
        m.add(scalar(seen), scalar(1), 100)
        clock.now += 1
        if m.due(seen):
            m.report(seen, lr=seen)
    m.close()


def test_a_resumed_file_is_the_uninterrupted_runs(tmp_path, clock):
    run(tmp_path / "whole", clock, 0, 1000)
    run(tmp_path / "cut", clock, 0, 900)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"images": 1000, "lo')  # a kill in the middle of a write
    run(tmp_path / "cut", clock, 400, 1000)
    whole, cut = lines(tmp_path / "whole"), lines(tmp_path / "cut")
    for line in (*whole, *cut):
        del line["time"], line["memory_gib"]
    assert [line["images"] for line in whole] == [100, 200, 400, 600, 800, 1000]
    assert cut == whole
    assert not list((tmp_path / "cut").glob("*.tmp"))


@pytest.mark.parametrize(
    ("resumed", "kept"), [(0, []), (99, []), (100, [100]), (399, [100, 200]), (5000, [100, 200, 400, 600])]
)
def test_lines_beyond_the_checkpoint_are_dropped(tmp_path, clock, resumed, kept):
    run(tmp_path, clock, 0, 600)
    make(tmp_path, resumed_images=resumed)
    assert [line["images"] for line in lines(tmp_path)] == kept


@pytest.mark.parametrize("junk", [b"\x00\xff", b"[1]", b'{"loss": 1}', b"", b"7"])
def test_junk_in_the_file_ends_what_is_kept(tmp_path, clock, junk):
    run(tmp_path, clock, 0, 200)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + junk + b"\n" + whole)
    make(tmp_path, resumed_images=1000)
    assert [line["images"] for line in lines(tmp_path)] == [100, 200]


def test_a_kill_while_dropping_lines_loses_none(tmp_path, clock, monkeypatch):
    run(tmp_path, clock, 0, 600)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, resumed_images=200)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


# --- ranks ---


def test_other_ranks_are_silent_and_leave_no_file(tmp_path, clock):
    m, out = make(tmp_path / "run", rank=1, world=2, terminal=True)
    m.add(scalar(1), scalar(1), 50)
    assert m.due(100)
    with m.paused():
        pass
    m.say("hello")
    m.image(100, tmp_path / "none.png")
    assert m.report(100, lr=1.0) is None
    m.close()
    assert out.getvalue() == ""
    assert not (tmp_path / "run").exists()


def report_twice(folder):
    trackers._tensorboard = lambda folder, resumed: None
    rank = torch.distributed.get_rank()
    m, _ = make(folder, rank=rank, world=2)
    m.add(scalar(1 + 2 * rank), scalar(5), 50)
    m.report(100, lr=1.0)
    m.add(scalar(float("nan") if rank else 4), scalar(5), 50)
    m.report(200, lr=1.0)


def test_losses_are_averaged_over_ranks(tmp_path, run_ranks):
    run_ranks(2, report_twice, tmp_path)
    assert [line["loss"] for line in lines(tmp_path)] == [2.0, 4.0]


# --- what the machine says ---


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 NVL", None),
        ("Tesla V100-SXM2-16GB", None),
        ("CPU", None),
    ],
)
def test_peaks_are_known_or_absent(name, peak):
    assert peak_tflops(name) == peak
    assert peak_tflops(name, 42.0) == 42.0


class FakeNvml(types.ModuleType):
    """Two visible GPUs of a machine of four, each with a counter in millijoules."""

    class NVMLError(Exception):
        pass

    def __init__(self, millijoules):
        super().__init__("pynvml")
        self.millijoules, self.asked = millijoules, []

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        self.asked.append(uuid)
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if self.millijoules is None:
            raise self.NVMLError
        return self.millijoules[handle]


@pytest.fixture
def nvml(monkeypatch):
    fake = FakeNvml({"GPU-aaaa": 5_000_000, "GPU-bbbb": 7_000_000})
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    uuids = ["aaaa", "bbbb"]
    monkeypatch.setattr(hardware.torch.cuda, "get_device_properties", lambda i: types.SimpleNamespace(uuid=uuids[i]))
    return fake


def test_energy_is_in_joules_and_by_uuid(nvml):
    energy = Energy(2)
    assert nvml.asked == ["GPU-aaaa", "GPU-bbbb"]
    assert energy.joules() == 12_000.0
    nvml.millijoules["GPU-bbbb"] += 1500
    assert energy.joules() == 12_001.5
    nvml.millijoules = None
    assert energy.joules() is None
    assert Energy(0).joules() is None


def test_watts_and_joules_per_image(tmp_path, clock, nvml):
    m, out = make(tmp_path, world=4, local_world=2)
    m.energy, m.local_share = Energy(2), 2 / 4  # as on a node with two of the job's four GPUs
    m._start_interval()
    m.add(scalar(1), scalar(1), 25)
    clock.now += 2
    nvml.millijoules["GPU-aaaa"] += 600_000
    nvml.millijoules["GPU-bbbb"] += 400_000
    with m.paused():
        clock.now += 50
        nvml.millijoules["GPU-aaaa"] += 9_000_000
    line = m.report(100, lr=1.0)
    assert line["watts"] == 500.0  # 1000 J in 2 s of training
    assert line["j_per_img"] == 20.0  # over the 50 of 100 images that these GPUs trained
    assert "500 W  20 J/img" in out.getvalue()
    nvml.millijoules = None  # a counter that goes away takes its figures with it, not the run
    clock.now += 1
    assert m.report(200, lr=1.0)["watts"] is None


def test_no_driver_is_no_energy(monkeypatch, nvml):
    def no_driver():
        raise nvml.NVMLError

    monkeypatch.setattr(nvml, "nvmlInit", no_driver)
    assert Energy(2).joules() is None


def test_memory_is_the_most_ever_resident():
    before = memory_gib(torch.device("cpu"))
    block = torch.ones(2**28 // 4)  # 256 MiB
    del block
    status = Path("/proc/self/status").read_text()
    peak_kib = int(status.split("VmHWM:")[1].split()[0])
    assert memory_gib(torch.device("cpu")) == pytest.approx(peak_kib / 2**20, rel=0.02)
    assert memory_gib(torch.device("cpu")) >= before


# --- on a terminal ---


def test_the_bar(tmp_path, clock):
    m, out = make(tmp_path, terminal=True)
    m.add(scalar(1), scalar(1), 100)
    clock.now += 1
    m.report(100, lr=1.0)
    m.add(scalar(1), scalar(1), 100)
    assert m.bar.tasks[0].completed == 200
    m.say("saved [bold]here")
    m.close()
    shown = out.getvalue()
    assert "100/1,000 images" in shown
    assert "saved [bold]here" in shown
    assert "ETA 0:09" in shown


# --- trackers ---


def test_tensorboard_gets_scalars_and_grids(tmp_path, clock):
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    m, _ = make(tmp_path)
    m.add(scalar(0.5), scalar(1), 100)
    clock.now += 1
    m.report(100, lr=0.125)
    Image.new("RGB", (6, 4), (255, 0, 0)).save(tmp_path / "grid.png")
    m.image(100, tmp_path / "grid.png")
    m.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    events.Reload()
    assert "watts" not in events.Tags()["scalars"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(100, 0.5)]
    assert [(e.step, e.value) for e in events.Scalars("lr")] == [(100, 0.125)]
    grid = events.Images("samples")[0]
    assert (grid.step, grid.width, grid.height) == (100, 6, 4)
    with Image.open(io.BytesIO(grid.encoded_image_string)) as image:
        assert image.getpixel((0, 0)) == (255, 0, 0)


class FakeWandb(types.ModuleType):
    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = types.SimpleNamespace()
        self.calls, self.logged = [], []

    def init(self, **arguments):
        if arguments["project"] == "broken":
            raise self.Error("api_key not configured\nsecond line")
        self.calls.append(arguments)
        return types.SimpleNamespace(log=self.logged.append, define_metric=lambda *a, **k: None, finish=lambda: None)

    def Image(self, path):
        return ("image", path)


def test_wandb(tmp_path, clock, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    for resumed in (0, 100):
        m, _ = make(tmp_path / "run", LogConfig(wandb="cats"), resumed_images=resumed)
        m.add(scalar(0.5), scalar(1), 100)
        clock.now += 1
        m.report(resumed + 100, lr=1.0)
        m.image(resumed + 100, tmp_path / "grid.png")
        m.close()
    assert [c["project"] for c in fake.calls] == ["cats", "cats"]
    assert fake.calls[0]["id"] == fake.calls[1]["id"]
    assert fake.calls[0]["config"]["train"]["images"] == 1000
    assert [entry["images"] for entry in fake.logged] == [100, 100, 200, 200]
    assert fake.logged[0]["loss"] == 0.5
    assert fake.logged[1]["samples"] == ("image", str(tmp_path / "grid.png"))
    assert "secret" not in repr(fake.calls) + repr(fake.logged)
    with pytest.raises(UserError, match=r"^--log.wandb broken: api_key not configured$"):
        make(tmp_path / "other", LogConfig(wandb="broken"))
    make(tmp_path / "silent", LogConfig(wandb="cats"), rank=1, world=2)
    assert len(fake.calls) == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_wandb_asked_for_and_missing(tmp_path, monkeypatch, rank):
    find_spec = trackers.importlib.util.find_spec
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    with pytest.raises(UserError, match=r"pip install 'fastdit\[track\]'"):
        make(tmp_path / "run", LogConfig(wandb="cats"), rank=rank)
    assert not (tmp_path / "run").exists()


def test_no_tracker_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    none = trackers.Trackers(tmp_path, "", 0, {})
    none.scalars(1, {"loss": 1.0})
    none.image(1, tmp_path / "grid.png")
    with contextlib.closing(none):
        assert none.tensorboard is None
        assert none.wandb is None


def test_what_is_computed_in_follows_the_device(monkeypatch):
    cpu = torch.device("cpu")
    for fast, name in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setitem(hardware.FAST, torch.bfloat16, fast)
        assert hardware.precision("auto", cpu) == name
        assert hardware.compute_dtype("auto", cpu) == hardware.DTYPES[name]
        assert [hardware.precision(asked, cpu) for asked in ("bf16", "fp32")] == ["bf16", "fp32"]
        assert hardware.precision("auto") == "bf16", "the GPUs that plans are made for have it"
    for capability, name in (((7, 5), "fp32"), ((8, 0), "bf16"), ((12, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert hardware.precision("auto", torch.device("cuda")) == name


# --- what may lie in a run's folder, and what may be installed ---


@pytest.mark.parametrize(
    "bad",
    ['{"images": "200"}', '{"images": 200, "seconds": "x"}', '{"images": 200, "seconds": NaN}', "[1]", "3", "[" * 100_000],
)
def test_a_line_of_another_type_or_too_deep_is_dropped_with_what_follows(tmp_path, clock, bad):
    run(tmp_path, clock, 0, 200)
    path = tmp_path / "metrics.jsonl"
    before = path.read_text()
    path.write_text(before + bad + "\n" + before)
    make(tmp_path, resumed_images=200)
    assert path.read_text() == before


def test_metrics_that_are_a_link_are_refused_in_a_line(tmp_path):
    (tmp_path / "other").write_text("")
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "other")
    with pytest.raises((UserError, OSError), match=r"metrics\.jsonl"):
        make(tmp_path, resumed_images=200)


def test_a_broken_tensorboard_costs_a_line(tmp_path, monkeypatch):
    def broken(*args):
        raise TypeError("Descriptors cannot be created directly.\nIf this call came from a _pb2.py file")

    monkeypatch.setattr(trackers, "_tensorboard", broken)
    said: list[str] = []
    ours = trackers.Trackers(tmp_path, None, 0, {}, said.append)
    ours.scalars(1, {"loss": 1.0})
    ours.close()
    assert said == ["no TensorBoard: TypeError: Descriptors cannot be created directly. If this call came from a _pb2.py file"]


def test_the_bar_is_drawn_by_no_thread_and_twice_a_second_at_most(tmp_path, clock, monkeypatch):
    before = threading.active_count()
    m, _ = make(tmp_path, terminal=True)
    draws: list[float] = []
    refresh = m.bar.refresh
    now = [0.0]
    monkeypatch.setattr(m.bar, "refresh", lambda: (draws.append(now[0]), refresh()))
    monkeypatch.setattr(meter, "perf_counter", lambda: 100.0 + now[0])
    for _ in range(1000):  # ten seconds of a tiny model
        now[0] += 0.01
        m.add(scalar(1), scalar(1), 1)
    assert 15 <= len(draws) <= 20
    assert threading.active_count() == before
    m.close()
