"""A run outlives the terminal it prints to and ends with its launcher. OpenMP's threads spin for a bounded time."""

import ast
import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest

from fastdit.runtime import process

ROOT = Path(__file__).parent.parent
VERBS = ("train", "sample", "evaluate", "encode", "export", "convert", "plan", "report")


def python(code: str, env: Mapping[str, str] | None = None, **options) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path, **(env or {})}, **options)


def wait_for(path: Path, seconds: float = 30) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path.exists() and path.read_text():
            return path.read_text()
        time.sleep(0.1)
    raise AssertionError(f"{path} did not come")


# --- OpenMP ---


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_imports_fastdit_before_all_else(verb):
    tree = ast.parse((ROOT / "fastdit" / f"{verb}.py").read_text())
    first = next(node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
    assert ast.unparse(first) == "import fastdit"


@pytest.mark.parametrize(
    ("given", "spins"), [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
def test_spinning_is_bounded_unless_the_user_says_otherwise(given, spins):
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = "import fastdit, os, sys; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    found = subprocess.run(
        [sys.executable, "-c", code], env={**clean, "PYTHONPATH": path, **given}, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == [spins, "False"]


# --- the terminal ---

PRINTING = """
import sys, pathlib
from fastdit.runtime import process
process.outlive_terminal()
for i in range(1000):
    print("x" * 100)
print("error", file=sys.stderr, flush=True)
sys.stdout.flush()
pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else {path!r}).write_text("went on")
"""


def test_a_closed_pipe_stops_nothing(tmp_path):
    reader, writer = os.pipe()
    child = python(PRINTING.format(path=str(tmp_path / "done")), stdout=writer, stderr=writer)
    os.close(writer)
    os.close(reader)
    assert child.wait(30) == 0
    assert (tmp_path / "done").read_text() == "went on"


def test_a_terminal_that_is_gone_stops_nothing(tmp_path):
    terminal, ours = pty.openpty()
    child = python(PRINTING.format(path=str(tmp_path / "done")), stdout=ours, stderr=ours)
    os.close(ours)
    os.close(terminal)
    assert child.wait(30) == 0
    assert (tmp_path / "done").read_text() == "went on"


def test_closed_streams_stop_nothing(tmp_path):
    child = python(PRINTING.format(path=str(tmp_path / "done")), preexec_fn=lambda: (os.close(1), os.close(2)))
    assert child.wait(30) == 0
    assert (tmp_path / "done").read_text() == "went on"


def test_an_ascii_terminal_gets_the_like_in_ascii_or_escapes():
    code = "from fastdit.runtime import process; process.outlive_terminal(); print('4 × CPU … é')"
    child = python(code, {"PYTHONIOENCODING": "ascii"}, stdout=subprocess.PIPE)
    assert child.communicate(timeout=30)[0] == rb"4 x CPU ... \xe9" + b"\n"


TINY = [
    *("--data.num_images", "64", "--model.patch", "8", "--model.depth", "1", "--model.width", "64"),
    *("--train.images", "64000000", "--train.batch", "8"),
    *("--log.sample_every", "1000000000", "--log.save_every", "1000000000"),
]


def test_a_terminal_that_hangs_up_has_the_run_saved(tmp_path):
    terminal, ours = pty.openpty()

    def take() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    arguments = [*TINY, "--run.folder", str(tmp_path / "runs"), "--data.packs", str(tmp_path / "packs")]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    child = subprocess.Popen(
        [sys.executable, str(ROOT / "fastdit" / "train.py"), *arguments],
        stdin=ours,
        stdout=ours,
        stderr=ours,
        start_new_session=True,
        preexec_fn=take,
        env={**os.environ, "PYTHONPATH": path, "TERM": "xterm"},
    )
    os.close(ours)
    seen, end = b"", time.monotonic() + 120
    while b"img/s" not in seen and child.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError):  # the run has ended: the assertion shows why
            if select.select([terminal], [], [], 1)[0]:
                seen += os.read(terminal, 65536)
    assert b"img/s" in seen, seen[-2000:]
    os.close(terminal)  # ssh drops
    assert child.wait(60) == 128 + signal.SIGHUP
    [checkpoint] = (tmp_path / "runs" / "cats" / "checkpoints").iterdir()
    assert json.loads((checkpoint / "checkpoint.json").read_text())["images_seen"] > 0


# --- the launcher ---

WORKER = """
import os, pathlib, signal, time
from fastdit.runtime import process
process.end_with_parent()
signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({ended!r}).write_text("ended"), os._exit(0)))
pathlib.Path({pid!r}).write_text(str(os.getpid()))
time.sleep(60)
"""


def test_a_worker_ends_when_torchrun_is_killed(tmp_path):
    worker = WORKER.format(ended=str(tmp_path / "ended"), pid=str(tmp_path / "pid"))
    launcher = python(
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}])", {"TORCHELASTIC_RUN_ID": "x"}
    )
    wait_for(tmp_path / "pid")
    launcher.kill()
    launcher.wait()
    assert wait_for(tmp_path / "ended") == "ended"


def test_what_one_thread_ignores_another_does_not_make_loud():
    """`catch_warnings` alone puts one thread's filters back while another still runs under its own."""
    first_in, second_out = threading.Event(), threading.Event()

    def second():
        first_in.wait()
        with process.ignored("noise"):
            pass
        second_out.set()

    other = threading.Thread(target=second)
    other.start()
    with process.ignored("noise", UserWarning):
        first_in.set()
        assert not second_out.wait(0.2)  # it waits until this one is done
        warnings.warn("noise, of a library's own", stacklevel=1)
    other.join()
    with pytest.raises(UserWarning, match="noise"):
        warnings.warn("noise", stacklevel=1)
    with process.ignored("noise"), pytest.raises(UserWarning, match="another"):
        warnings.warn("another", stacklevel=1)
