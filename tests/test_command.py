"""A command line answers at once, and on any terminal: forty columns, ASCII alone."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
VERBS = ("train", "encode", "sample", "evaluate", "report", "plan", "convert", "export")
ASCII = {"LANG": "C", "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "TERM": "xterm"}


def environment(*first: Path, **changes: str) -> dict[str, str]:
    path = os.pathsep.join(map(str, [*first, ROOT, ROOT / "kernels"]))
    return {**os.environ, "PYTHONPATH": path, **changes}


@pytest.fixture
def no_torch(tmp_path) -> Path:
    """A folder whose `torch` ends the process as soon as it is imported."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import os\nos._exit(7)\n")
    return tmp_path


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(
    ("args", "rank", "code", "out", "error"),
    [
        ([], "0", 7, "starting: loading PyTorch\n", ""),
        ([], "1", 7, "", ""),
        (["--nonsense", "1"], "0", 2, "", "error: unknown option --nonsense"),
        (["--nonsense", "1"], "1", 2, "", ""),
        (["--train.batch", "0"], "0", 2, "", "error: --train.batch"),
        (["cat"], "0", 2, "", "error: unknown recipe 'cat'; did you mean cats?"),
        (["--help"], "0", 0, "Train a Diffusion Transformer", ""),
        (["--help", "all"], "0", 0, "usage: python fastdit/train.py", ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_the_first_word_comes_before_torch(no_torch, args, rank, code, out, error, encoding):
    env = environment(no_torch, RANK=rank, PYTHONIOENCODING=encoding)
    ran = subprocess.run([sys.executable, ROOT / "fastdit" / "train.py", *args], env=env, capture_output=True, text=True)
    assert ran.returncode == code, ran.stderr
    assert ran.stdout.startswith(out)
    assert bool(ran.stdout) == bool(out)
    assert ran.stderr.startswith(error)
    assert ran.stderr.count("\n") == bool(error)


@pytest.mark.parametrize("verb", VERBS)
def test_help_and_errors_of_every_verb_come_before_torch(no_torch, verb):
    for args, code in ((["--help"], 0), (["--nonsense", "1"], 2)):
        line = [sys.executable, ROOT / "fastdit" / f"{verb}.py", *args]
        ran = subprocess.run(line, env=environment(no_torch), capture_output=True, text=True)
        assert ran.returncode == code, (args, ran.stderr)
        assert ("--" in ran.stdout) == (code == 0)
        assert ran.stderr.startswith("error: unknown option --nonsense") == (code == 2)
    ran = subprocess.run([sys.executable, "-c", f"import fastdit.{verb}", "--help"], env=environment(no_torch))
    assert ran.returncode == 7  # elsewhere the command line is somebody else's


@pytest.mark.parametrize("columns", ["20", "200"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--train.lr", "abc"], "Error parsing --train.lr: could not convert string to float: 'abc'"),
        (
            ["--parallel.precision", "a-long-word-that-no-line-holds"],
            "invalid choice 'a-long-word-that-no-line-holds' for argument '--parallel.precision'. "
            "Expected one of ('auto', 'bf16', 'fp32').",
        ),
        (["--data.image_size", "3"], "Missing value for argument '--data.image_size'. Expected 2 values."),
    ],
    ids=["type", "choice", "count"],
)
def test_an_error_is_whole_whatever_the_terminal(no_torch, args, said, columns, encoding):
    env = environment(no_torch, COLUMNS=columns, PYTHONIOENCODING=encoding)
    ran = subprocess.run([sys.executable, ROOT / "fastdit" / "train.py", *args], env=env, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (2, f"error: {said}\n")


def test_the_installed_program_answers_as_fast(no_torch):
    """fastdit-train imports fastdit.train; its name on the command line says that it is a program."""
    code = "import sys; sys.argv[0] = '/bin/fastdit-train'; from fastdit.train import main; main()"
    for args, out in (([], "starting: loading PyTorch\n"), (["--help"], "Train a Diffusion Transformer")):
        ran = subprocess.run([sys.executable, "-c", code, *args], env=environment(no_torch), capture_output=True, text=True)
        assert ran.stdout.startswith(out), ran.stderr
    importing = "import fastdit.train"  # elsewhere the command line is somebody else's
    ran = subprocess.run([sys.executable, "-c", importing, "--help"], env=environment(no_torch), capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (7, "")


def on_terminal(command: list[str], columns: int, env: dict[str, str]) -> tuple[int, bytes]:
    """The exit status, and what a terminal of so many columns was sent."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    said = b""
    while True:
        try:
            said += os.read(ours, 65536)
        except OSError:  # EIO: the other end is closed
            break
    os.close(ours)
    return child.wait(), said


@pytest.mark.parametrize("verb", VERBS)
def test_help_on_a_narrow_ascii_terminal(verb):
    command = [sys.executable, str(ROOT / "fastdit" / f"{verb}.py"), "--help"]
    code, said = on_terminal(command, 40, environment(**ASCII, COLUMNS="40"))
    assert code == 0, said
    assert said.isascii()
    assert b"Traceback" not in said
    assert b"--" in said
