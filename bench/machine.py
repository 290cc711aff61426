"""What a result was measured on, and of what."""

import functools
import re
import subprocess
from pathlib import Path

import torch

from fastdit.runtime.hardware import has_bf16


def kind() -> str:
    """The kind of device."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def device() -> str:
    """The GPU by name; or the CPU, its instructions and the threads PyTorch uses of it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    instructions, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return f"CPU, {names[0] if names else 'unknown'}, {instructions}, {threads} thread{'s' if threads > 1 else ''}"


def slug() -> str:
    """The kind of device as a file's name has it. A CPU without bf16 is one of its own."""
    fp32 = "" if torch.cuda.is_available() or has_bf16(torch.device("cpu")) else " fp32"
    return re.sub(r"[^a-z0-9]+", "-", (kind() + fp32).lower()).strip("-")


@functools.cache
def commit() -> str:
    """What is measured; a copy of the files without their repository does not know."""

    def git(*args: str) -> str:
        where = Path(__file__).parent
        return subprocess.run(["git", *args], cwd=where, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":/", ":(top,exclude)bench/results", ":(top,exclude)docs/*.png")
        return git("rev-parse", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
