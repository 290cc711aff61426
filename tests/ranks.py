"""What the `run_ranks` fixture is: it runs a function of a test file as N gloo processes, forked by rank_server.py."""

import inspect
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple


class Outcome(NamedTuple):
    """How one rank ended: what it returned, or the traceback it died with; its exit code (-9: killed); what it printed."""

    value: Any
    error: str
    code: int
    seconds: float
    output: str


class Ranks:
    """`run_ranks(world, fn, *args)` → each rank's return value, in order. Raises RankError with the child's traceback.

    fn is a module-level function of a test file; args and values are what pickle carries (numbers, strings, tensors, paths).
    Ranks run with one thread, the variables torchrun sets, warnings as errors and equal random state; `init=False` leaves
    the process group to fn. After a failure the other ranks get `grace` seconds before SIGKILL; after `timeout`, all do.
    """

    class RankError(AssertionError):
        pass

    def __init__(self, folder: Path):
        self.folder, self.calls = folder, 0
        self.server: subprocess.Popen[str] | None = None

    def __call__(self, world: int, fn, *args: Any, timeout: float = 60, init: bool = True, grace: float = 3) -> list[Any]:
        outcomes = self.outcomes(world, fn, *args, timeout=timeout, init=init, grace=grace)
        for rank in sorted(range(world), key=lambda r: outcomes[r].seconds):  # the first to end is the one to blame
            end = outcomes[rank]
            if end.code != 0:
                raise self.RankError(f"rank {rank} of {world} ended with {end.code}\n{end.error}\n{end.output}".rstrip())
        return [end.value for end in outcomes]

    def outcomes(
        self, world: int, fn, *args: Any, timeout: float = 60, init: bool = True, grace: float | None = None
    ) -> list[Outcome]:
        """The same, but a rank may die: nothing is raised, and by default the others run on until they end or `timeout`."""
        assert inspect.isfunction(fn), "run_ranks takes a plain function"
        assert fn.__qualname__ == fn.__name__, f"{fn.__qualname__} is not at the top level of its test file"
        folder = self.folder / str(self.calls)
        folder.mkdir()
        self.calls += 1
        (folder / "args").write_bytes(pickle.dumps(args))
        request = {
            "path": inspect.getfile(fn),
            "name": fn.__name__,
            "world": world,
            "folder": str(folder),
            "env": dict(os.environ),
            "timeout": timeout,
            "grace": timeout if grace is None else grace,
            "init": init,
        }
        answer = self._ask(request)
        if "error" in answer:
            raise self.RankError(answer["error"])
        if answer["timed_out"] and grace is not None and all(code in (0, -9) for code in answer["codes"]):
            logs = "\n".join(f"rank {r}: {self._read(folder, r, 'log')[-2000:]}" for r in range(world))
            raise self.RankError(f"{world} ranks did not end within {timeout:g} s\n{logs}")
        outcomes = []
        for rank in range(world):
            value = folder / f"{rank}.value"
            outcomes.append(
                Outcome(
                    pickle.loads(value.read_bytes()) if value.exists() and answer["codes"][rank] == 0 else None,
                    self._read(folder, rank, "error"),
                    answer["codes"][rank],
                    answer["seconds"][rank],
                    self._read(folder, rank, "log"),
                )
            )
        return outcomes

    @staticmethod
    def _read(folder: Path, rank: int, kind: str) -> str:
        file = folder / f"{rank}.{kind}"
        return file.read_text(errors="replace") if file.exists() else ""

    def _ask(self, request: dict) -> dict:
        if self.server is None:
            self.server = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("rank_server.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                # One thread each, also in the libraries that start a pool when they are imported: a fork keeps only one.
                env=os.environ
                | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
                | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"},
            )
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        line = self.server.stdout.readline()
        if not line:
            code = self.server.wait()
            self.server = None
            return {"error": f"the rank server ended with {code}"}
        return json.loads(line)

    def close(self) -> None:
        if self.server is not None:
            assert self.server.stdin is not None
            assert self.server.stdout is not None
            self.server.stdin.close()
            start = time.monotonic()
            while self.server.poll() is None and time.monotonic() < start + 10:
                time.sleep(0.01)
            self.server.kill()
            self.server.wait()
            self.server.stdout.close()
