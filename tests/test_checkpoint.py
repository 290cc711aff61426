"""Checkpoints under everything that happens to disks and processes: killed anywhere, damaged, full, resharded, forged."""

import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fastdit import checkpoint
from fastdit.checkpoint import Checkpoints
from fastdit.config import TrainConfig, UserError
from fastdit.optim import Optimizer
from fastdit.runtime import files, saved
from fastdit.runtime.tensors import load_weights, save_weights

# Rows that no world size divides, fewer rows than ranks, one element, other dtypes; the second is sharded by columns.
SHAPES = {
    "model.w": ((7, 5), torch.float32, Shard(0)),
    "exp_avg.w": ((3, 10), torch.float32, Shard(1)),
    "ema.bias": ((2,), torch.float32, Shard(0)),
    "tiny": ((1,), torch.float64, Shard(0)),
    "half": ((9, 1, 3), torch.bfloat16, Shard(0)),
    "everywhere": ((4,), torch.int64, Replicate()),
    "step.w": ((1,), torch.float32, None),
}


def values(seed: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    whole = {n: torch.randn(shape, generator=rng) for n, (shape, _, _) in SHAPES.items()}
    return {n: (t * 100).to(SHAPES[n][1]) for n, t in whole.items()}


def spread(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sharded as SHAPES says over the ranks there are; plain without a process group."""
    if not dist.is_initialized():
        return tensors
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    placed = {}
    for name, t in tensors.items():
        placement = SHAPES[name][2]
        placed[name] = t if placement is None else distribute_tensor(t, mesh, [placement])
    return placed


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(hashed(a[n]) == hashed(b[n]) for n in a)


def hashed(t: torch.Tensor) -> tuple[str, torch.dtype, tuple[int, ...]]:
    data = t.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data).hexdigest(), t.dtype, tuple(t.shape)


def save_one(folder: Path, seen: int, keep: int = 3) -> None:
    tensors = spread(values(seen))
    run = Checkpoints(folder, keep)
    state = {"seen": seen, "losses": [0.1, 1e-300]}
    run.save(seen, tensors, state, {"w": torch.full((2, 3), float(seen))})
    for t in tensors.values():  # training goes on
        t.zero_()
    run.wait()


def load_newest(folder: Path) -> tuple[int | None, dict, dict[str, torch.Tensor], list[str]]:
    said: list[str] = []
    run = Checkpoints(folder, 3, say=said.append)
    tensors = spread({n: torch.full_like(t, 77) for n, t in values(0).items()})
    state = run.load(tensors)
    return state["seen"], state, whole(tensors), said


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture
def three(folder):
    for seen in (100, 200, 300):
        save_one(folder, seen)
    return folder


# --- what is saved comes back ---


@pytest.mark.parametrize(("writers", "readers"), [(1, 1), (3, 2), (4, 1), (4, 2), (4, 3), (4, 4), (1, 4), (2, 4), (3, 4)])
def test_any_number_of_ranks_reads_what_any_number_wrote(run_ranks, folder, writers, readers):
    run_ranks(writers, save_one, folder, 1234)
    for seen, state, found, said in run_ranks(readers, load_newest, folder):
        assert seen == 1234
        assert state == {"seen": 1234, "losses": [0.1, 1e-300]}
        assert equal(found, values(1234))
        assert said == []
    assert sorted(p.name for p in folder.iterdir()) == ["000000001234"]
    assert load_weights(folder / "000000001234" / "ema.safetensors")[0]["w"].tolist() == [[1234.0] * 3] * 2


def test_without_a_process_group(run_ranks, folder):
    """A single process needs none, and reads what four ranks wrote."""
    save_one(folder, 5)
    assert equal(load_newest(folder)[2], values(5))
    run_ranks(4, save_one, folder, 6)
    assert equal(load_newest(folder)[2], values(6))


def hybrid_save(folder: Path) -> list[str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    t = distribute_tensor(values(0)["model.w"], mesh, [Replicate(), Shard(0)])
    run = Checkpoints(folder, 3)
    run.save(1, {"w": t}, {})
    run.wait()
    return sorted(p.name for p in (folder / "000000000001" / "shards").iterdir())


def test_replicas_are_written_once(run_ranks, folder):
    files = run_ranks(4, hybrid_save, folder)[0]
    assert files == ["00000-of-00004.safetensors", "00001-of-00004.safetensors"]
    t = {"w": torch.zeros(7, 5)}
    Checkpoints(folder, 3).load(t)
    assert torch.equal(t["w"], values(0)["model.w"])


def test_files_are_what_others_read(run_ranks, folder):
    """torch's own reader reads the shards, safetensors the weights, and sha256sum the manifest; no file is a pickle."""
    run_ranks(2, save_one, folder, 7)
    inside = folder / "000000000007"
    found = {n: torch.zeros_like(t) for n, t in values(7).items()}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(inside / "shards")))
    assert equal(found, values(7))
    assert load_file(inside / "ema.safetensors")["w"].tolist() == [[7.0] * 3] * 2
    assert os.system(f"cd {inside} && sha256sum --quiet --strict -c SHA256SUMS") == 0
    assert sorted(str(p.relative_to(inside)) for p in inside.rglob("*") if p.is_file()) == [
        "SHA256SUMS",
        "checkpoint.json",
        "ema.safetensors",
        "shards/00000-of-00002.safetensors",
        "shards/00001-of-00002.safetensors",
    ]
    about = json.loads((inside / "checkpoint.json").read_text())
    assert (about["format"], about["images_seen"], about["world_size"]) == (1, 7, 2)


def test_saving_returns_before_the_disk_has_it_and_the_next_save_waits(folder, monkeypatch):
    release, fsync = time.monotonic() + 0.5, os.fsync

    def slow(fd):
        time.sleep(max(0.0, release - time.monotonic()))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", slow)
    run, tensors = Checkpoints(folder, 3), values(1)
    run.save(1, tensors, {})
    assert time.monotonic() < release
    assert not (folder / "000000000001").exists()
    tensors["model.w"].fill_(9)
    run.save(2, tensors, {})
    assert time.monotonic() > release
    assert (folder / "000000000001" / "SHA256SUMS").exists()
    assert run.latest() == 2
    found = values(0)
    run.load(found)
    assert (found["model.w"] == 9).all()


def test_many_saves_leave_no_threads_files_or_memory_behind(folder):
    run, tensors = Checkpoints(folder, 2), values(1)

    def counts():
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    run.save(1, tensors, {})
    run.wait()
    before, buffers = counts(), {n: b.data_ptr() for n, b in run._buffers.items()}
    for seen in range(2, 30):
        run.save(seen, tensors, {})
    run.wait()
    assert counts() == before
    assert {n: b.data_ptr() for n, b in run._buffers.items()} == buffers
    assert sorted(os.listdir(folder)) == ["000000000028", "000000000029"]


def train(folder: Path, first: int, last: int, save: bool) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Steps first … last - 1 of a sharded model with rows that do not divide; loaded, or saved, in the folder."""
    torch.manual_seed(first)  # a fresh start has other weights
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    for layer in (net[0], net[2]):
        fully_shard(layer, reshard_after_forward=False)
    fully_shard(net, reshard_after_forward=False)
    optimizer = Optimizer(net, TrainConfig(images=1000, lr=1e-2, warmup_images=16), 8)
    run = Checkpoints(folder, 3)
    if first:
        assert run.load(optimizer.tensors()) == {"step": first}
    norms = []
    for step in range(first, last):
        (net(torch.ones(2, 5)) - step - dist.get_rank()).square().mean().backward()
        norms.append(float(optimizer.step(optimizer.rates(step * 8))))
        if save and step == 2:
            run.save((step + 1) * 8, optimizer.tensors(), {"step": step + 1}, optimizer.ema.full_tensors())
    run.wait()
    return whole(optimizer.tensors()), norms


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_resumed_optimizer_goes_on_to_the_bit(run_ranks, folder, world):
    """And saving in the middle did not change the run that was saved from."""
    plain = run_ranks(world, train, folder, 0, 6, False)
    for (tensors, norms), (expected, norms_expected) in zip(run_ranks(world, train, folder, 0, 6, True), plain, strict=True):
        assert equal(tensors, expected)
        assert norms == norms_expected
    for (tensors, norms), (expected, norms_expected) in zip(run_ranks(world, train, folder, 3, 6, False), plain, strict=True):
        assert equal(tensors, expected)
        assert norms == norms_expected[3:]
    assert set(load_weights(folder / "000000000024" / "ema.safetensors")[0]) == {"0.weight", "0.bias", "2.weight", "2.bias"}


# --- killed at any moment ---


def save_until_killed(folder: Path, points: int) -> int:
    """Save 1, 2, … and be killed at the points-th call that reaches the disk; returns their number if there are fewer."""
    calls = 0
    for name in ("open", "write", "fsync", "rename", "mkdir", "rmdir", "unlink", "close"):
        real = getattr(os, name)

        def counted(*args, real=real, **kwargs):
            nonlocal calls
            calls += 1
            if calls == points:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(os, name, counted)
    run = Checkpoints(folder, 2)
    first = (run.latest() or 0) + 1
    for seen in range(first, first + 3):
        run.save(seen, values(seen), {"seen": seen}, {"w": torch.ones(3)})
    run.wait()
    return calls


def check_after_kill(folder: Path) -> int:
    """What is named as a checkpoint is whole, and the newest comes back. Returns images seen, 0 if none was reached."""
    said: list[str] = []
    run = Checkpoints(folder, 2, say=said.append)
    newest = run.latest() or 0
    assert said == []
    if newest:
        found = {n: torch.zeros_like(t) for n, t in values(0).items()}
        assert run.load(found) == {"seen": newest}
        assert equal(found, values(newest))
    return newest


def test_killed_at_any_point_of_a_save_the_newest_whole_one_loads(run_ranks, folder):
    [total] = run_ranks(1, save_until_killed, folder, 0, init=False)
    assert total > 60
    shutil.rmtree(folder)
    reached = [0]
    # Each run goes on where the last was killed, over what it left.
    for point in random.Random(0).choices(range(1, total + 1), k=40):
        [end] = run_ranks.outcomes(1, save_until_killed, folder, point, init=False)
        assert end.code == (-signal.SIGKILL if end.value is None else 0)
        assert not end.error
        newest = check_after_kill(folder)
        assert reached[-1] <= newest <= reached[-1] + 3
        reached.append(newest)
    assert reached[-1] > 20
    run_ranks(1, save_until_killed, folder, 0, init=False)
    assert sorted(os.listdir(folder)) == [f"{reached[-1] + i:012d}" for i in (2, 3)]  # nothing is left of the kills


def kill_rank(folder: Path, victim: int, point: int) -> str:
    """Two ranks save; one is killed at a point of its second save. The other must notice, not hang."""
    save_one(folder, 1)
    calls, real = 0, os.write

    def counted(*args):
        nonlocal calls
        calls += 1
        if dist.get_rank() == victim and calls == point:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    os.write = counted
    save_one(folder, 2)
    return "saved"


@pytest.mark.parametrize("victim", [0, 1])
def test_one_rank_killed_inside_a_save(run_ranks, folder, victim):
    ends = run_ranks.outcomes(2, kill_rank, folder, victim, 2)
    assert ends[victim].code == -signal.SIGKILL
    assert ends[1 - victim].code == 1
    assert ends[1 - victim].seconds < ends[victim].seconds + 5
    assert [e[0] for e in run_ranks(2, load_newest, folder)] == [1, 1]


# --- damage ---


def newest_file(folder: Path, name: str) -> Path:
    return folder / "000000000300" / name


FILES = ["SHA256SUMS", "checkpoint.json", "ema.safetensors", "shards/00000-of-00001.safetensors"]


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.soak)])
def test_every_flipped_bit_is_noticed(three, count, soaked):
    rng = random.Random(0)
    for trial in range(count):
        path = newest_file(three, FILES[trial % len(FILES)])
        data = bytearray(path.read_bytes())
        kept, bit = bytes(data), rng.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        seen, _, found, said = load_newest(three)
        assert (seen, len(said)) == (200, 1), f"bit {bit} of {path.name}"
        assert said[0].startswith("checkpoint 000000000300 is passed over: ")
        assert equal(found, values(200))
        path.write_bytes(kept)
    assert load_newest(three)[0] == 300
    soaked("6: flipped bits found before a weight changes", required=500, passed=count)


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_and_deletion_is_noticed_by_name(three, name):
    path = newest_file(three, name)
    kept = path.read_bytes()
    for length in {0, 1, 7, 8, 9, len(kept) // 2, len(kept) - 65, len(kept) - 1} | set(range(0, len(kept), len(kept) // 8)):
        path.write_bytes(kept[:length])
        seen, _, _, said = load_newest(three)
        assert seen == 200, length
        assert len(said) == 1
        assert name in said[0] or name == "SHA256SUMS", said
    path.write_bytes(kept + b"\0")
    assert load_newest(three)[0] == 200
    path.unlink()
    seen, _, _, said = load_newest(three)
    assert seen == 200
    assert name in said[0]


def test_swapped_and_foreign_shards_are_noticed(run_ranks, folder):
    run_ranks(2, save_one, folder, 100)
    run_ranks(2, save_one, folder, 200)
    a, b = sorted((folder / "000000000200" / "shards").iterdir())
    a_bytes, b_bytes = a.read_bytes(), b.read_bytes()
    a.write_bytes(b_bytes)
    b.write_bytes(a_bytes)
    for seen, _, found, said in run_ranks(2, load_newest, folder):
        assert seen == 100
        assert equal(found, values(100))
        assert all("0-of-00002.safetensors" in line or "1-of-00002.safetensors" in line for line in said)
    a.write_bytes((folder / "000000000100" / "shards" / a.name).read_bytes())
    b.write_bytes(b_bytes)
    assert load_newest(folder)[0] == 100
    a.write_bytes(a_bytes)
    assert load_newest(folder)[0] == 200
    (a.parent / "00002-of-00002.safetensors").write_bytes(a_bytes)
    assert "is not listed" in load_newest(folder)[3][0]


def test_all_damaged_is_an_error_and_none_is_not(three, tmp_path):
    assert Checkpoints(tmp_path / "nowhere", 3).latest() is None
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(UserError, match="there is no checkpoint in"):
        load_newest(tmp_path / "nowhere")
    for inside in three.iterdir():
        (inside / "checkpoint.json").unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* is usable; checkpoint 000000000300 .* move the folder away"):
        load_newest(three)


# --- retention ---


def test_incomplete_and_damaged_newer_ones_neither_outrank_nor_evict(three):
    (three / "000000000400").mkdir()
    (three / "000000000500").mkdir()
    shutil.copytree(three / "000000000300", three / "000000000600")
    (three / "000000000600" / "ema.safetensors").write_bytes(b"no")
    run = Checkpoints(three, 2, say=lambda line: None)
    assert run.latest() == 300
    run.save(350, values(350), {"seen": 350})
    run.wait()
    assert sorted(os.listdir(three)) == [f"{n:012d}" for n in (300, 350, 400, 500, 600)]
    run.save(600, values(600), {"seen": 600})  # over the damaged one
    run.wait()
    assert run.latest() == 600
    assert sorted(os.listdir(three)) == [f"{n:012d}" for n in (350, 400, 500, 600)]


def test_only_exact_names_are_removed(folder, tmp_path):
    folder.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("x")
    strangers = ["best", "00000000010", "0000000000100", "000000000001.bak", "000000000001.tmp.old", "x000000000001.tmp"]
    for name in strangers:
        (folder / name).mkdir()
        (folder / name / "file").write_text("x")
    for name in ("000000000001", "000000000002.tmp"):
        os.symlink(tmp_path / "elsewhere", folder / name)
    (folder / "000000000003.tmp").write_text("a file")
    for name in ("000000000004.tmp", "000000000005.old.tmp", "000000000006.0123abcd.tmp"):  # what kills leave
        (folder / name).mkdir()
    for seen in (10, 20, 30):
        save_one(folder, seen, keep=1)
    left = {*strangers, "000000000001", "000000000002.tmp", "000000000003.tmp", "000000000030"}
    assert set(os.listdir(folder)) == left
    assert (tmp_path / "elsewhere" / "precious").exists()


def test_beside_another_process_only_what_it_made_itself_is_removed(folder):
    """Where no lock says that this process is alone, a folder that is being written may be another's."""
    others = ("000000000001.tmp", "000000000002.0123abcd.tmp", "000000000003.old.0123abcd.tmp")
    for name in others:
        (folder / name / "shards").mkdir(parents=True)
    run = Checkpoints(folder, 1, alone=lambda: False)
    for seen in (1, 2):
        run.save(seen, values(seen), {})
    run.wait()
    assert set(os.listdir(folder)) == {*others, "000000000002"}
    run = Checkpoints(folder, 1)
    run.save(3, values(3), {})
    run.wait()
    assert os.listdir(folder) == ["000000000003"]


def test_a_disk_that_goes_while_a_run_goes_on_is_not_made_up(folder):
    run = Checkpoints(folder, 3)
    run.save(1, values(1), {"seen": 1})
    run.wait()
    folder.rename(folder.parent / "gone")
    run.save(2, values(2), {"seen": 2})
    with pytest.raises(UserError, match=r"2 was not saved: rank 0: No such file or directory \(.*/checkpoints/"):
        run.wait()
    assert not folder.exists()
    (folder.parent / "gone").rename(folder)
    run.save(3, values(3), {"seen": 3})
    run.wait()
    assert sorted(os.listdir(folder)) == ["000000000001", "000000000003"]


def save_in_turn(folder: Path, seen: int) -> None:
    """Two processes save the same images, each for itself and both at once."""
    rank = os.environ["RANK"]
    write = checkpoint.write_shard

    def together(path, pieces):
        (folder.parent / f"ready{rank}").touch()
        while len(list(folder.parent.glob("ready?"))) < 2:
            time.sleep(0.01)
        return write(path, pieces)

    checkpoint.write_shard = together
    run = Checkpoints(folder, 3, alone=lambda: False)
    run.save(seen, values(seen), {"seen": seen})
    run.wait()


def test_two_processes_that_save_the_same_step_leave_one_sound_checkpoint(run_ranks, folder):
    ends = run_ranks.outcomes(2, save_in_turn, folder, 5, init=False)
    assert [end.code for end in ends] == [0, 0], ends
    assert os.listdir(folder) == ["000000000005"]
    assert equal(load_newest(folder)[2], values(5))


def test_saving_the_same_images_again_keeps_the_sound_one(three):
    path = newest_file(three, "shards/00000-of-00001.safetensors")
    before = path.stat().st_mtime_ns, path.stat().st_ino
    save_one(three, 300)
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before
    path.write_bytes(b"damaged")
    save_one(three, 300)
    assert load_newest(three)[0] == 300


# --- full disks ---


def save_on_full_disk(folder: Path, victim: int, limit: int) -> tuple[str, float, list[str]]:
    """`limit` bytes into one rank's file the disk is full. Returns the error, the seconds it took, and what is left."""
    save_one(folder, 1)
    real, written = os.write, 0

    def filling(fd, data):
        nonlocal written
        if dist.get_rank() != victim:
            return real(fd, data)
        if written == limit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = real(fd, data[: limit - written])
        written += count
        return count

    os.write = filling
    start = time.monotonic()
    try:
        save_one(folder, 2)
        said = ""
    except UserError as error:
        said = str(error)
    seconds = time.monotonic() - start
    os.write = real
    dist.barrier()
    return said, seconds, sorted(os.listdir(folder))


SOAKED = [pytest.param(v, n, marks=pytest.mark.soak) for n in (1, 8, 100, 250, 350, 500, 600, 700) for v in (0, 1)][:15]


@pytest.mark.parametrize(("victim", "limit"), [(0, 0), (0, 400), (0, 1200), (1, 0), (1, 300), *SOAKED])
def test_a_full_disk_on_one_rank_is_one_error_on_all(run_ranks, folder, victim, limit, soaked):
    for said, seconds, left in run_ranks(2, save_on_full_disk, folder, victim, limit):
        assert f"checkpoint 000000000002 was not saved: rank {victim}: No space left on device (" in said
        assert "\n" not in said
        assert seconds < 5
        assert left == ["000000000001"]
    assert [e[0] for e in run_ranks(2, load_newest, folder)] == [1, 1]
    soaked(f"8: disk of rank {victim} full after {limit} bytes", passed=1)


def save_beyond_file_size(folder: Path) -> str:
    """The system itself refuses the bytes, on rank 1."""
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
    try:
        save_one(folder, 2)
    except UserError as error:
        dist.barrier()
        return str(error)
    return ""


def test_the_systems_own_limit(run_ranks, folder):
    assert all("rank 1: File too large" in said for said in run_ranks(2, save_beyond_file_size, folder))
    assert os.listdir(folder) == []


def save_where_one_rank_sees_nothing(folder: Path) -> str:
    mine = folder if dist.get_rank() == 0 else folder.with_name("another node's disk")
    try:
        save_one(mine, 2)
    except UserError as error:
        return str(error)
    return ""


def test_a_folder_that_ranks_do_not_share(run_ranks, folder):
    assert all("rank 1: No such file or directory" in s for s in run_ranks(2, save_where_one_rank_sees_nothing, folder))


# --- what does not fit, and what is forged ---


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.update({"model.w": torch.zeros(7, 6)}), "model.w is 7×5 float32 there and 7×6 float32 here"),
        (lambda t: t.update({"model.w": torch.zeros(35)}), "model.w is 7×5 float32 there and 35 float32 here"),
        (lambda t: t.update(half=t["half"].float()), "half is 9×1×3 bfloat16 there and 9×1×3 float32 here"),
        (lambda t: t.update(new=torch.zeros(1)), "new is not in it"),
        (lambda t: t.pop("tiny"), "it holds tiny, for which there is no place here"),
        (lambda t: (t.pop("tiny"), t.pop("half"), t.update(new=torch.zeros(1))), "new is not in it (and 2 more differences)"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(folder, change, expected):
    save_one(folder, 5)
    tensors = {n: torch.full_like(t, 77) for n, t in values(0).items()}
    change(tensors)
    before = {n: t.clone() for n, t in tensors.items()}
    with pytest.raises(UserError) as refused:
        Checkpoints(folder, 3).load(tensors)
    assert str(refused.value) == f"checkpoint 000000000005 cannot be resumed: {expected}"
    assert equal(before, tensors)


def test_another_configuration_is_refused(folder):
    run = Checkpoints(folder, 3, fingerprint="abc")
    run.save(1, values(1), {})
    run.wait()
    with pytest.raises(UserError, match=r"saved under another configuration \(abc, here def\)"):
        Checkpoints(folder, 3, fingerprint="def").load(values(1))


def load_mismatched(folder: Path) -> str:
    tensors = spread(values(0))
    if dist.get_rank() == 1:
        del tensors["tiny"]
    try:
        Checkpoints(folder, 3).load(tensors)
    except UserError as error:
        return str(error)
    return ""


def test_a_misfit_on_one_rank_is_refused_by_all(run_ranks, folder):
    save_one(folder, 5)
    assert all("it holds tiny" in said for said in run_ranks(2, load_mismatched, folder))


def test_tensors_that_cannot_be_saved(folder):
    for t in (torch.zeros(()), torch.zeros(0, 3), torch.zeros(2, dtype=torch.complex64)):
        with pytest.raises(ValueError, match=r"x is .* a checkpoint wants elements and dimensions"):
            Checkpoints(folder, 3).save(1, {"x": t}, {})
    with pytest.raises(ValueError, match="not JSON compliant"):
        Checkpoints(folder, 3).save(1, values(0), {"loss": float("nan")})
    with pytest.raises(ValueError, match="not a number of images seen"):
        Checkpoints(folder, 3).save(10**12, values(0), {})
    assert not folder.exists()


def forge(inside: Path) -> None:
    """Make the hashes right again, as whoever wrote the files could."""
    names = [str(p.relative_to(inside)) for p in sorted(inside.rglob("*")) if p.is_file() and p.name != "SHA256SUMS"]
    about = json.loads((inside / "checkpoint.json").read_text())
    about["files"] = {n: (inside / n).stat().st_size for n in names if n != "checkpoint.json"}
    (inside / "checkpoint.json").write_text(json.dumps(about))
    sums = {n: hashlib.sha256((inside / n).read_bytes()).hexdigest() for n in names}
    (inside / "SHA256SUMS").write_text("".join(f"{h}  {n}\n" for n, h in sums.items()))


SHARD = "shards/00000-of-00001.safetensors"


def rename_file(name):
    def change(inside: Path) -> None:
        secret = inside.parent.parent / "secret"
        secret.write_bytes((inside / SHARD).read_bytes())
        (inside / SHARD).unlink()
        target = str(secret) if name == "absolute" else name
        sums = (inside / "SHA256SUMS").read_text().replace(SHARD, target)
        (inside / "SHA256SUMS").write_text(sums)

    return change


def link_file(inside: Path) -> None:
    outside = inside.parent.parent / "outside"
    outside.write_bytes((inside / SHARD).read_bytes())
    (inside / SHARD).unlink()
    os.symlink(outside, inside / SHARD)


def link_folder(inside: Path) -> None:
    (inside / "shards").rename(inside.parent.parent / "outside")
    os.symlink(inside.parent.parent / "outside", inside / "shards")


def pipe(inside: Path) -> None:
    (inside / SHARD).unlink()
    os.mkfifo(inside / SHARD)


def pipe_for_sums(inside: Path) -> None:
    (inside / "SHA256SUMS").unlink()
    os.mkfifo(inside / "SHA256SUMS")


def rewrite(name: str, data: bytes):
    def change(inside: Path) -> None:
        (inside / name).write_bytes(data)
        forge(inside)

    return change


def about(**fields):
    def change(inside: Path) -> None:
        found = json.loads((inside / "checkpoint.json").read_text())
        (inside / "checkpoint.json").write_text(json.dumps(found | fields))
        sums = (inside / "SHA256SUMS").read_text().splitlines()
        new = hashlib.sha256((inside / "checkpoint.json").read_bytes()).hexdigest()
        lines = [f"{new}  checkpoint.json" if line.endswith("checkpoint.json") else line for line in sums]
        (inside / "SHA256SUMS").write_text("\n".join(lines) + "\n")

    return change


def header(size: int, body: bytes) -> bytes:
    return size.to_bytes(8, "little") + body


def shard(tensors, **offsets):
    def change(inside: Path) -> None:
        info = json.dumps({n: {"saved_offsets": o} for n, o in offsets.items()})
        save_file(tensors, inside / SHARD, {"DCP_SHARDING_INFO": info})
        forge(inside)

    return change


W = torch.zeros(7, 5)
PASSED_OVER = {
    "a name that climbs": rename_file("../../secret"),
    "a name that climbs from shards": rename_file("shards/../../../secret"),
    "an absolute name": rename_file("absolute"),
    "a linked file": link_file,
    "a linked folder": link_folder,
    "a pipe": pipe,
    "a pipe for SHA256SUMS": pipe_for_sums,
    "a huge SHA256SUMS": lambda inside: (inside / "SHA256SUMS").write_bytes(b"0" * (2 << 20)),
    "a name twice": lambda inside: (inside / "SHA256SUMS").write_text((inside / "SHA256SUMS").read_text() * 2),
    "a huge checkpoint.json": about(state={"x": "y" * (17 << 20)}),
    "another program's checkpoint.json": about(state=[]),
    "another format": about(format=2),
    "another number of images": about(images_seen=301),
    "true for a number": about(format=True),
}
REFUSED = {
    "a pickle as shard": rewrite(SHARD, b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR."),
    "an empty shard": rewrite(SHARD, b""),
    "a huge header": rewrite(SHARD, header(2**60, b"{}")),
    "a header beyond the file": rewrite(SHARD, header(100, b"{}")),
    "a header that is no JSON": rewrite(SHARD, header(8, b"\xff" * 8)),
    "a deep header": rewrite(SHARD, header(200_000, b"[" * 200_000)),
    "a bomb": rewrite(SHARD, header(72, b'{"w":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,4]}}')),
    "no offsets": lambda inside: (save_file({"model.w": W}, inside / SHARD), forge(inside)),
    "offsets of others": shard({"model.w": W}, other=[0, 0]),
    "too few offsets": shard({"model.w": W}, **{"model.w": [0]}),
    "negative offsets": shard({"model.w": W}, **{"model.w": [-1, 0]}),
    "huge offsets": shard({"model.w": W}, **{"model.w": [2**61, 0]}),
    "offsets that are words": shard({"model.w": W}, **{"model.w": ["0", "0"]}),
    "a hole": shard({"model.w": W[:6]}, **{"model.w": [1, 0]}),
    "deep offsets": lambda inside: (save_file({"w": W}, inside / SHARD, {"DCP_SHARDING_INFO": "[" * 10**6}), forge(inside)),
}


@pytest.mark.parametrize("attack", [*PASSED_OVER, *REFUSED])
def test_forged_checkpoints(three, attack, monkeypatch):
    monkeypatch.chdir(three)
    (PASSED_OVER | REFUSED)[attack](three / "000000000300")
    before = values(5)
    tensors, said = {n: t.clone() for n, t in before.items()}, []
    opened, real = [], os.open

    def watched(path, *args, **kwargs):
        opened.append(os.path.realpath(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", watched)
    run = Checkpoints(three, 3, say=said.append)
    if attack in PASSED_OVER:
        assert run.load(tensors)["seen"] == 200
        assert len(said) == 1
        assert "\n" not in said[0]
        assert len(said[0]) < 500
    else:
        with pytest.raises(UserError, match="checkpoint 000000000300 cannot be resumed: ") as refused:
            run.load(tensors)
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 500
        assert equal(before, tensors)
    assert not (three / "pwned").exists()
    assert all(path.startswith(str(three.resolve())) for path in opened)


# --- weights alone ---


def test_weights_round_trip_and_stay_whole(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    tensors = {n: t[::2] for n, t in values(3).items()} | {"flag": torch.tensor([True, False]), "none": torch.zeros(0, 3)}
    save_weights(path, tensors, {"config": "{}"})
    found, metadata = load_weights(path)
    assert equal(found, tensors)
    assert equal(load_file(path), tensors)
    assert metadata == {"format": "pt", "config": "{}"}

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"w\.safetensors was not written: No space left on device"):
        save_weights(path, {"other": torch.zeros(3)})
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["w.safetensors"]
    assert equal(load_weights(path)[0], tensors)


def test_weights_that_are_none(tmp_path):
    path = tmp_path / "w.safetensors"
    for data in (b"", b"\x80\x04.", header(2**60, b"{}"), header(2, b"[]"), b"\0" * 100):
        path.write_bytes(data)
        with pytest.raises(UserError, match="is not a readable safetensors file: ") as refused:
            load_weights(path)
        assert "\n" not in str(refused.value)
    for other in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="is not a readable safetensors file: "):
            load_weights(other)
    with pytest.raises(ValueError, match=r"x is torch\.complex64, which safetensors cannot hold"):
        save_weights(path, {"x": torch.zeros(2, dtype=torch.complex64)})


def test_nothing_is_ever_overwritten_or_followed(tmp_path):
    (tmp_path / "file").write_text("x")
    os.symlink(tmp_path / "file", tmp_path / "link")
    for name in ("file", "link"):
        with pytest.raises(FileExistsError):
            files.write_file(tmp_path / name, [b"y"])
    assert (tmp_path / "file").read_text() == "x"
    assert saved.FORMAT == 1
