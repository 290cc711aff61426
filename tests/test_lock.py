"""Two starts in one folder: the second ends with a line that names the first, and the kernel lets go of the lock."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastdit.config import UserError
from fastdit.runtime import saved
from fastdit.runtime.lock import Lock

ROOT = Path(__file__).parent.parent


def try_ten_times(path: Path, first: Path) -> list[str]:
    """As rank 1: what ten starts are told while rank 0 holds the lock; as rank 0: hold it meanwhile."""
    if os.environ["RANK"] == "0":
        Lock(path).take()
        first.touch()
        while not first.with_suffix(".over").exists():
            time.sleep(0.05)
        return []
    while not first.exists():
        time.sleep(0.05)
    told = []
    for _ in range(10):
        with pytest.raises(UserError) as refused:
            Lock(path).take()
        told.append(str(refused.value))
    first.with_suffix(".over").touch()
    return told


def test_ten_of_ten_second_starts_name_the_first(run_ranks, tmp_path):
    _, told = run_ranks(2, try_ten_times, tmp_path / "lock", tmp_path / "first", init=False)
    holder = rf"process \d+ on {re.escape(socket.gethostname())} since 20\S+"
    pattern = rf"{re.escape(str(tmp_path))} is in use by {holder}; wait for it.*"
    assert len(told) == 10
    assert all(re.fullmatch(pattern, line) for line in told), told


def killed_with_a_child_left(path: Path) -> None:
    Lock(path).take()
    if os.fork() == 0:
        os.setsid()
        time.sleep(3)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_holder_holds_nothing_even_if_its_child_lives(run_ranks, tmp_path):
    [end] = run_ranks.outcomes(1, killed_with_a_child_left, tmp_path / "lock", init=False)
    assert end.code == -signal.SIGKILL
    lock = Lock(tmp_path / "lock")
    assert lock.take() == ""
    lock.release()


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    def none(*args) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    said = Lock(tmp_path / "lock").take()
    assert said == f"{tmp_path}: this file system has no locks; do not start a second run in this folder"


def test_no_link_is_followed(tmp_path):
    (tmp_path / "other").write_text("other")
    (tmp_path / "lock").symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="lock"):
        Lock(tmp_path / "lock").take()
    assert (tmp_path / "other").read_text() == "other"


def test_a_second_start_of_one_command_loses_nothing(tmp_path):
    arguments = ["--data.num_images", "64", "--model.patch", "8", "--model.depth", "1", "--model.width", "64"]
    arguments += ["--train.images", "64000000", "--train.batch", "8", "--log.sample_every", "1000000000"]
    arguments += ["--log.save_every", "80", "--run.folder", str(tmp_path / "runs"), "--data.packs", str(tmp_path / "packs")]
    command = [sys.executable, str(ROOT / "fastdit" / "train.py"), *arguments]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    run = tmp_path / "runs" / "cats"
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": path})
        end = time.monotonic() + 120
        while saved.newest(run / "checkpoints") is None and first.poll() is None and time.monotonic() < end:
            time.sleep(0.2)
        second = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False)
        assert first.poll() is None, (tmp_path / "log").read_text()
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 128 + signal.SIGTERM
    assert second.returncode == 2
    assert re.fullmatch(rf"error: {run} is in use by process {first.pid} on .*\n", second.stderr), second.stderr
    images = [json.loads(line)["images"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert images == sorted(set(images))
