"""What is the whole process's: the launcher that started it may die, its terminal may close, its warnings are all threads'."""

import codecs
import contextlib
import ctypes
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

PR_SET_PDEATHSIG = 1  # prctl(2)
ASCII = {"×": "x", "…": "...", "·": "*", "−": "-", "–": "-", "—": "-", "’": "'"}  # what our lines hold besides ASCII

_filters = threading.RLock()


@contextlib.contextmanager
def ignored(message: str = "", category: type[Warning] = Warning) -> Iterator[None]:
    """Without a library's own warnings that begin like this, a regular expression.

    Filters are the whole process's: threads change them in turn. Else one would put its old filters back while another runs.
    """
    with _filters, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message, category)
        yield


def outlive_terminal() -> None:
    """Go on when nobody reads what this process prints: a closed pipe or terminal takes the output, and nothing fails.

    What an ASCII terminal cannot show is printed by its like in ASCII, 4 × 2 as 4 x 2, or as an escape. Streams that a program
    has put in their place stay.
    """
    codecs.register_error("ascii-like", _ascii_like)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:  # closed before the start
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  as long as the process
        elif stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):
                stream.flush()
            raw = _Lasting(number, "w", closefd=False)
            lasting = io.TextIOWrapper(
                io.BufferedWriter(raw), stream.encoding, "ascii-like", line_buffering=True, write_through=name == "stderr"
            )
            setattr(sys, name, lasting)


def _ascii_like(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    return "".join(ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text), error.end


class _Lasting(io.FileIO):
    """Standard output or error, whose writes succeed even where the other end is gone or its disk is full."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def end_with_parent() -> None:
    """Have the kernel send SIGTERM when torchrun dies, even by SIGKILL: its workers save and end, and do not run on alone."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # Linux alone has it
    if prctl is not None and "TORCHELASTIC_RUN_ID" in os.environ:
        prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
