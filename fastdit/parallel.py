"""Processes, devices and sharding: one path from a single process on a CPU to nodes of GPUs.

Order matters: blocks recompute inside what is compiled, and are compiled before they are sharded (FSDP2), then the root.
"""

import contextlib
import ctypes
import os
import re
import signal
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

from fastdit.config import ParallelConfig, RankError, UserError
from fastdit.gauges import compute_dtype

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


def mesh(config: ParallelConfig, world: World) -> DeviceMesh:
    """Ranks the weights are sharded over; across nodes a second dimension over which they are replicated (HSDP)."""
    shard = config.shard or world.local_size
    if shard == world.size:
        return init_device_mesh(world.device.type, (shard,), mesh_dim_names=("shard",))
    return init_device_mesh(world.device.type, (world.size // shard, shard), mesh_dim_names=("replicate", "shard"))


def compiles(config: ParallelConfig, device: torch.device) -> bool:
    return config.compile == "on" or (config.compile == "auto" and device.type == "cuda")


def shard(model: nn.Module, config: ParallelConfig, world: World) -> None:
    """Compile and shard `model.blocks`, then the root, of a model built on the meta device; place it on the device, empty.

    Parameters stay fp32 in their shards; they are gathered, and activations run, in `precision`; gradients are summed in fp32.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype(config.precision, world.device),
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # t up to 999 does not survive bf16; the model casts what should be cast
    )
    # A Linear on [B, T, D] returns a view; the warning fears in-place ops on it, and the model has none.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    device_mesh = mesh(config, world)
    for block in model.get_submodule("blocks").children():
        if compiles(config, world.device):
            block.compile(fullgraph=True)  # in place, so no `_orig_mod.` enters the names
        fully_shard(block, mesh=device_mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)
    # The root holds what is needed first and last, so freeing it in between never pays.
    fully_shard(model, mesh=device_mesh, mp_policy=policy, reshard_after_forward=False)
    if world.size == 1:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_all_gather(Gathered())
                module.set_custom_reduce_scatter(Reduced())
    model.to_empty(device=world.device)
    register_fsdp_forward_method(model, "condition")  # sampling calls it on its own


class Gathered(DefaultAllGather):
    """Gathering the shards of one process: the output is its input."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> None:
        assert output_tensor.data_ptr() == input_tensor.data_ptr()


class Reduced(DefaultReduceScatter):
    """Summing the gradients of one process: FSDP asks for an input, then for an output, and copies the one to the other."""

    def __init__(self) -> None:
        self.input: Tensor | None = None

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        output, self.input = self.input, None
        if output is None:
            self.input = output = super().allocate(size, dtype=dtype, device=device)
        assert output.shape == tuple(size)
        return output


def communicate(model: nn.Module, last: bool) -> None:
    """Whether this micro-step's backward reduces gradients and frees gathered weights: only the last one of a step does."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(last)
    model.set_reshard_after_backward(last)


# --- all ranks as one ---


def gather(world: World, value: T) -> list[T]:
    """The values of all ranks, on every rank. Small objects; never in the training step."""
    gathered: list[Any] = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(gathered, value)
    return gathered


def every(world: World, function: Callable[[], T]) -> T:
    """function() on every rank. Where it fails on one, by the user's doing or the disk's, all raise the same UserError."""
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
    """verb(), so that where one rank fails none goes on: it says why in a line, and the others that they lost it.

    Raises UserError where all ranks failed alike, having left the group together; RankError for what befell this one alone.
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


def lost(error: RuntimeError) -> str:
    """What an error of a collective says of the other ranks; empty for any other error."""
    text = str(error)
    if not isinstance(error, dist.DistError) and not re.search(r"gloo|NCCL|[Ss]tore|[Bb]arrier", text):
        return ""
    if re.search("[Tt]im(ed|e) ?out", text):
        return "another rank has been silent for --parallel.timeout_minutes"
    return f"another rank has ended ({text.rpartition('] ')[2].partition('. ')[0][:100]})"


class Stop:
    """SIGTERM, SIGINT or SIGUSR1 to any rank stops all of them after the same step, without waiting in any step.

    Each step starts a vote, a reduction of one number on the CPU, and reads the outcome of the step before's.
    """

    SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)

    def __init__(self, world: World, timeout: timedelta):
        self.received = 0
        self.vote = torch.zeros(1, dtype=torch.int32)
        self.under_way: dist.Work | None = None
        # A group of its own: its messages must not queue behind gradients.
        self.group: Any = dist.new_group(backend="gloo", timeout=timeout) if world.size > 1 else None
        for number in self.SIGNALS:
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
