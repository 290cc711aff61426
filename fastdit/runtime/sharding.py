"""One model over the devices of a run, from one CPU to nodes of GPUs: `checkpoint`, `compile`, `shard`, in this order.

Several ranks shard the weights by FSDP2. One rank has nobody to share with: it keeps fp32 parameters, and the network computes
on copies of them in `precision`, made once a step. Both ways give the same numbers to the bit.
"""

import warnings

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
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


def blocks(model: nn.Module) -> list[nn.Module]:
    return list(model.get_submodule("blocks").children())


def compiles(config: ParallelConfig, device: torch.device) -> bool:
    return config.compile == "on" or (config.compile == "auto" and device.type == "cuda")


def checkpoint(model: nn.Module, config: ParallelConfig) -> None:
    """Have each block compute its activations again in the backward instead of keeping them, where the config says so."""
    for block in blocks(model):
        block.recompute = config.checkpoint_activations  # type: ignore[assignment]


def compile(model: nn.Module, config: ParallelConfig, device: torch.device) -> None:
    """Compile each block in place, so that no `_orig_mod.` enters the names; blocks are alike, so the compiler meets few."""
    if compiles(config, device):
        for block in blocks(model):
            block.compile(fullgraph=True)


def shard(model: nn.Module, config: ParallelConfig, world: World) -> None:
    """Place a model built on the meta device on the device, empty: whole on one rank, sharded over several.

    Parameters are fp32 at rest; the network computes with them in `precision`, and gradients are summed in fp32.
    """
    dtype = compute_dtype(config.precision, world.device)
    if world.size == 1:
        model.to_empty(device=world.device)
        compute_in(model, dtype)
        return
    policy = MixedPrecisionPolicy(
        param_dtype=dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # t up to 999 does not survive bf16; the model casts what should be cast
    )
    # A Linear on [B, T, D] returns a view; the warning fears in-place ops on it, and the model has none.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    device_mesh = mesh(config, world)
    for block in blocks(model):
        fully_shard(block, mesh=device_mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)
    # The modulation's matrix is a third of B/2, and its gradient is whole before the root's: a group of its own is reduced
    # then, while the backward goes on. It and the root are needed first and last, so freeing them in between never pays.
    fully_shard(model.get_submodule("adaLN_modulation"), mesh=device_mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mesh=device_mesh, mp_policy=policy, reshard_after_forward=False)
    model.to_empty(device=world.device)
    register_fsdp_forward_method(model, "condition")  # sampling calls it on its own


def communicate(model: nn.Module, last: bool) -> None:
    """Before each micro-step: only the last one of a step reduces gradients and frees gathered weights in its backward."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)
    else:
        collect_gradients(model)  # of the micro-step before


# --- one rank: fp32 parameters, and the copies that the network computes with ---


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Put copies in this dtype in the place of the model's parameters, which stay as the copies' `main_param`."""
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p.dtype != dtype:
                copy = nn.Parameter(torch.empty_like(p, dtype=dtype), requires_grad=p.requires_grad)
                copy.main_param = p  # type: ignore[attr-defined]  # the name Megatron-LM gives it
                setattr(module, name, copy)


def main_param(parameter: nn.Parameter) -> nn.Parameter:
    """The fp32 parameter behind what the network computes with; itself, where there is no copy."""
    return getattr(parameter, "main_param", parameter)


def collect_gradients(model: nn.Module) -> None:
    """Add the copies' gradients to those of the fp32 parameters, and clear them: sums over micro-steps are fp32."""
    for copy in model.parameters():
        main = main_param(copy)
        if main is not copy and copy.grad is not None:
            if main.grad is None:
                main.grad = copy.grad.to(main.dtype)
            else:
                main.grad += copy.grad
            copy.grad = None


@torch.no_grad()
def refresh(model: nn.Module) -> None:
    """After the weights have changed: FSDP drops what it gathered of the old ones, one rank copies the new ones."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    copies = {p: main_param(p) for p in model.parameters() if main_param(p) is not p}
    if copies:
        torch._foreach_copy_([*copies], [*copies.values()])


# --- both ---


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, sharing memory; the tensor itself where it is not sharded."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    with torch.no_grad():
        return tensor.to_local()


def fill(parameter: nn.Parameter, full: Tensor) -> None:
    """Copy a whole tensor into a parameter. Of a sharded one each rank keeps its own part: no message passes."""
    if isinstance(parameter, DTensor):
        full = full.to(parameter.device_mesh.device_type)
        full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    main = main_param(parameter)
    main.copy_(full)
    if parameter is not main:
        parameter.copy_(main)


def named_shards(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by plain names: the fp32 parameters, sharded or whole, whatever compiling wraps round modules."""
    return {name: main_param(p) for name, p in named_parameters(model).items()}


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters as the modules hold them, by plain names: those the backward gives gradients."""
    refresh(model)  # FSDP's modules may hold what they gathered
    plain = {n.replace("_orig_mod.", ""): p for n, p in model.named_parameters()}
    return {name: p for name, p in plain.items() if p.requires_grad}
