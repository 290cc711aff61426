"""One model over the devices of a run: compiled block by block, then sharded (FSDP2), from one CPU to nodes of GPUs.

Order matters: blocks recompute inside what is compiled, and are compiled before they are sharded, then the root.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter
from torch.distributed.tensor import DTensor, distribute_tensor

from fastdit.config import ParallelConfig
from fastdit.runtime.hardware import compute_dtype
from fastdit.runtime.ranks import World


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


def fill(parameter: Tensor, full: Tensor) -> None:
    """Copy a whole tensor into a parameter. Of a sharded one each rank keeps its own part: no message passes."""
    if isinstance(parameter, DTensor):
        full = full.to(parameter.device_mesh.device_type)
        full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(full)
