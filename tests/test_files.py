"""A file written by `files.atomic` is the old one or the whole new one, whatever fails, and nothing else is left behind."""

import ast
import errno
import os
import re
import signal
from pathlib import Path

import pytest

from fastdit import config as C
from fastdit import train
from fastdit.recipes import RECIPES
from fastdit.runtime import files
from fastdit.runtime.lock import Lock
from fastdit.runtime.run import load_config

ROOT = Path(__file__).parent.parent


def test_the_name_appears_with_the_whole_file(tmp_path):
    path = tmp_path / "file"
    with files.atomic(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    files.write_text(path, "né")
    assert path.read_text() == "né"
    assert os.listdir(tmp_path) == ["file"]


def test_mode_is_what_open_would_give(tmp_path):
    (tmp_path / "plain").write_text("")
    files.write_text(tmp_path / "aside", "")
    assert (tmp_path / "aside").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt()])
def test_a_block_that_fails_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with files.atomic(path) as file:
            file.write(b"new")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["fsync", "rename", "open"])
def test_a_full_disk_is_named_by_the_file_and_leaves_what_was_there(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    path.write_text("old")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
        files.write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_no_link_is_followed(tmp_path):
    other = tmp_path / "other"
    other.write_text("other")
    (tmp_path / "link").symlink_to(other)
    (tmp_path / f".link.{os.getpid()}.tmp").symlink_to(other)
    files.write_text(tmp_path / "link", "new")
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "link").read_text() == "new"
    assert other.read_text() == "other"


def killed(path: Path) -> None:
    with files.atomic(path) as file:
        file.write(b"new")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)


def test_killed_while_writing_it_leaves_what_was_there(run_ranks, tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    [end] = run_ranks.outcomes(1, killed, path, init=False)
    assert end.code == -signal.SIGKILL
    assert path.read_text() == "old"


def test_the_config_of_a_run_is_written_when_it_changes_and_never_cut(tmp_path, monkeypatch):
    config, path = RECIPES["cats"], tmp_path / "config.json"
    train.start_run(config, tmp_path, [], 0, Lock(tmp_path / "lock"))
    before, text = path.stat().st_ino, path.read_text()
    train.start_run(config, tmp_path, [], 0, Lock(tmp_path / "lock"))
    assert path.stat().st_ino == before  # not written again
    other = C.replace(config, run={"seed": 1})
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match=r"No space left on device: .*config\.json"):
        train.start_run(other, tmp_path, [], 0, Lock(tmp_path / "lock"))
    monkeypatch.undo()
    assert path.read_text() == text
    train.start_run(other, tmp_path, [], 0, Lock(tmp_path / "lock"))
    assert load_config(path) == other


def test_files_are_renamed_in_one_place():
    """And folders by the two that know their layout."""
    renaming = {
        str(path.relative_to(ROOT / "fastdit"))
        for path in (ROOT / "fastdit").rglob("*.py")
        if re.search(r"\.rename\(|os\.replace\(|\.replace\(path\)", path.read_text())
    }
    assert renaming == {"runtime/files.py", "checkpoint.py", "data/chunks.py"}


def test_text_is_utf_8_whatever_the_locale():
    """Under LC_ALL=C without Python's UTF-8 mode, a card with a × in it could not be written."""
    for path in sorted({*ROOT.glob("fastdit/**/*.py"), *ROOT.glob("kernels/**/*.py")}):
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            if not isinstance(call.func, ast.Attribute) or ast.unparse(call.func.value) in ("files", "os"):
                continue
            modes = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
            opens = call.func.attr == "open" and modes[:1] in (["a"], ["r"], ["w"], ["x"])
            if opens or call.func.attr in ("read_text", "write_text"):
                assert "encoding" in {keyword.arg for keyword in call.keywords}, f"{path.name}:{call.lineno}"
