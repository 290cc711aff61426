"""The processes of a run: they join and leave their group, agree on errors, and stop together."""

import contextlib
import ctypes
import os
import re
import signal
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from fastdit.config import ParallelConfig, RankError, UserError

T = TypeVar("T")


class World(NamedTuple):
    """This process among all: its rank, how many there are, the same within its node, and its device."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device


def init(config: ParallelConfig) -> World:
    """Join the process group that torchrun describes; without torchrun, a group of one. Raises UserError."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if size % (config.shard or local_size):
        raise UserError(f"--parallel.shard {config.shard or local_size} does not divide the {size} ranks")
    if config.deterministic:
        deterministic()
    if torch.cuda.is_available():
        if local_size > torch.cuda.device_count():
            raise UserError(f"{local_size} processes on this node, which has {torch.cuda.device_count()} GPUs")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "cuda:nccl,cpu:gloo"
        torch.set_float32_matmul_precision("high")  # what stays fp32 on a GPU may use TF32
    else:
        device, backend = torch.device("cpu"), "gloo"
        # torchrun sets OMP_NUM_THREADS=1, which would leave all but one core per rank idle.
        torch.set_num_threads(config.threads or max(1, len(os.sched_getaffinity(0)) // local_size))
        keep_freed_memory()
    if not dist.is_initialized():
        timeout = timedelta(minutes=config.timeout_minutes)
        if "RANK" in os.environ and size == local_size:
            # torchrun --max-restarts gives restarted ranks the store of those that died, whose addresses would be taken for
            # theirs. Nodes count restarts each for itself; for several TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes a new store.
            store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
            store = dist.PrefixStore(f"restart{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        elif "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return World(rank, size, local_rank, local_size, device)


def deterministic() -> None:
    """Have every op give the same bits each time it is given the same numbers. An op that cannot raises RuntimeError.

    A GPU sums in whatever order its blocks finish in: the backward of attention and of an embedding, some of cuBLAS's products.
    To be called before the first product: cuBLAS reads its variable once. flash-attn has its own flag (attention.py).
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a pass over each allocation, to find bugs
    torch.backends.cudnn.benchmark = False  # it times algorithms, and takes another one another time
    # PyTorch's own flash attention has a deterministic backward; these two have none.
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def keep_freed_memory() -> None:
    """Have glibc keep what tensors on the CPU free, for the next step asks for the same again.

    By default every tensor above 32 MB, and most above 128 kB, is mapped anew and its pages zeroed one by one as they are
    touched: for DiT-B/2 at batch 8, 176,000 page faults and a seventh of the processor time of each step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # another C library has none
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: map nothing, all comes from the heap
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: and the heap never shrinks
        mallopt(-8, 1)  # M_ARENA_MAX: autograd's thread allocates from the same heap


def shutdown() -> None:
    """Leave together: a rank that destroys its group while another still uses it can abort the other."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


# --- all ranks as one ---


def gather(world: World, value: T) -> list[T]:
    """The values of all ranks, on every rank. Small objects; never in the training step."""
    gathered: list[Any] = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(gathered, value)
    return gathered


def every(world: World, function: Callable[[], T]) -> T:
    """function() on every rank. If it raises a UserError or an OSError on one rank, all ranks raise the same UserError."""
    error, unforeseen = "", None
    try:
        result = function()
    except UserError as e:
        error = str(e)
    except OSError as e:
        error = reason(e)
    except Exception as e:  # the others wait for an answer, whatever it is
        error, unforeseen = f"rank {world.rank}: {type(e).__name__}: {e}", e
    errors = [e for e in gather(world, error) if e]
    if unforeseen:
        raise unforeseen
    if errors:
        raise UserError(errors[0])
    return result


def once(world: World, function: Callable[[], T]) -> T:
    """function() of rank 0, on every rank."""
    result = every(world, lambda: function() if world.rank == 0 else None)
    return gather(world, result)[0]  # type: ignore[return-value]


def reason(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)


def as_one(verb: Callable[[], T]) -> T:
    """verb(), such that a failure on one rank ends all: that rank prints its error, the others that they lost it.

    Raises UserError where all ranks failed with the same error, after they left the group; RankError for an error of this rank.
    """
    try:
        return verb()
    except RankError:
        raise
    except UserError:
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError):  # those that were faster are gone
                # On the CPU, and not for ever: should a rank have failed by itself after all, its line is not to wait.
                dist.all_reduce(torch.zeros(1), async_op=True).wait(timedelta(seconds=5))
                dist.destroy_process_group()
        raise
    except OSError as error:  # a full disk under metrics.jsonl, say
        raise RankError(reason(error)) from None
    except RuntimeError as error:
        if not (said := lost(error)):
            raise
        raise RankError(f"{said}; the same command goes on from the newest checkpoint") from None


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def lost(error: RuntimeError) -> str:
    """What the error of a collective says of the other ranks; empty for any other error."""
    text = str(error)
    if not isinstance(error, dist.DistError) and not re.search(r"gloo|NCCL|[Ss]tore|[Bb]arrier", text):
        return ""
    if re.search("[Tt]im(ed|e) ?out", text):
        return "another rank has been silent for --parallel.timeout_minutes"
    return f"another rank has ended ({text.rpartition('] ')[2].partition('. ')[0][:100]})"


class Stop:
    """SIGTERM, SIGINT, SIGHUP or SIGUSR1 to any rank stops all of them after the same step, without waiting in any step.

    Each step starts a vote, a reduction of one number on the CPU, and reads the result of the previous step's vote.
    """

    SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)

    def __init__(self, world: World, timeout: timedelta):
        self.received = 0
        self.vote = torch.zeros(1, dtype=torch.int32)
        self.under_way: dist.Work | None = None
        # A group of its own: its messages must not queue behind gradients.
        self.group: Any = dist.new_group(backend="gloo", timeout=timeout) if world.size > 1 else None
        for number in self.SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup wants it ignored
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def agreed(self) -> int:
        """The signal to stop for, the same on all ranks, or 0. Call once a step."""
        if self.group is None:
            return self.received
        if self.under_way is not None:
            self.under_way.wait()
            if outcome := int(self.vote):
                return outcome
        self.vote.fill_(self.received)
        self.under_way = dist.all_reduce(self.vote, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
        return 0
