"""Forks ranks for tests. A torchrun start costs 6–9 s; a fork of this process, which has imported torch and run nothing, 20 ms.

Started by the `run_ranks` fixture with one request per line on stdin and one answer per line on stdout; it has a single
thread, so that forking it is safe whatever pytest's own process has running.
"""

import contextlib
import importlib.util
import json
import os
import pickle
import select
import signal
import socket
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what DTensor imports on first use, 0.6 s per rank
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor

modules: dict[str, Any] = {}


def load(path: str) -> Any:
    """The test file as a module, imported once here so that no rank pays for its imports."""
    if path not in modules:
        spec = importlib.util.spec_from_file_location(f"ranks_{Path(path).stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        modules[path] = module
    return modules[path]


def free_port() -> int:
    """A port nobody listens on, below the range from which the system hands out ports to gloo's own connections."""
    while True:
        port = 10_000 + int.from_bytes(os.urandom(2), "little") % 20_000
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def rank_main(request: dict, rank: int, port: int) -> int:
    """In the forked child: run the function as one rank; its value or its traceback goes to a file. Returns the exit code."""
    world, folder = request["world"], Path(request["folder"])
    os.setpgid(0, 0)  # one kill reaches whatever the rank itself starts
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(request["env"], MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    # Ranks are processes on the CPU: one GPU is not enough for several.
    os.environ.update(CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1")
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    try:
        function = getattr(modules[request["path"]], request["name"])
        args = pickle.loads((folder / "args").read_bytes())
        if request["init"]:
            dist.init_process_group("gloo", init_method="env://", rank=rank, world_size=world)
        value = function(*args)
        (folder / f"{rank}.value").write_bytes(pickle.dumps(value))
        if dist.is_initialized():
            # Without the barrier, ranks that leave first make the last ones' gloo threads abort.
            if request["init"]:
                dist.barrier()
            dist.destroy_process_group()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        (folder / f"{rank}.exit").write_text(str(code))
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def serve(request: dict) -> dict:
    """Fork the ranks and wait for them; kill those left `grace` seconds after the first failure, or after `timeout`."""
    load(request["path"])
    port = free_port()
    pids = []
    for rank in range(request["world"]):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = rank_main(request, rank, port)
            finally:
                os._exit(code)  # the atexit handlers are this server's, not the rank's
        pids.append(pid)
    codes: dict[int, int] = {}
    deadline, timed_out = time.monotonic() + request["timeout"], False
    ended: dict[int, float] = {}
    start = time.monotonic()
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid], ended[pid] = os.waitstatus_to_exitcode(status), time.monotonic() - start
                    if codes[pid] != 0:
                        deadline = min(deadline, time.monotonic() + request["grace"])
        # A closed stdin means that pytest is gone: leave nobody behind.
        gone = bool(select.select([0], [], [], 0.005)[0])
        if gone or time.monotonic() > deadline:
            timed_out = True
            for pid in pids:
                if pid not in codes:
                    kill(pid)
    for pid in pids:
        kill(pid)
    return {"codes": [codes[p] for p in pids], "seconds": [ended[p] for p in pids], "timed_out": timed_out}


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def main() -> None:
    # Answers go out on a private copy of stdout: a test file that prints while it is imported must not break the protocol.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is pytest's to handle; it then closes our stdin
    # Unbuffered, so that select() above sees what there is.
    buffer = b""
    while data := os.read(0, 65536):
        buffer += data
        while b"\n" in buffer:
            line, buffer = buffer.split(b"\n", 1)
            try:
                answer = serve(json.loads(line))
            except Exception:
                answer = {"error": traceback.format_exc()}
            print(json.dumps(answer), file=out, flush=True)
    os._exit(0)  # nothing to clean up; taking torch down takes a second


if __name__ == "__main__":
    main()
