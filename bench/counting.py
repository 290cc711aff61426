"""What a call does: the ops that reach the device, and the bytes of those that memory binds. Counted, not timed.

Ops are counted where PyTorch dispatches them, and those that torch.compile writes itself by Inductor, which schedules them.
Matrix products, attention and our kernels are not computed, so that a machine slow at them, or without a GPU, counts as fast.
"""

import logging
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._inductor import metrics
from torch._inductor.compile_fx import inductor_metrics_log
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# What moves nothing, among what the compiler fuses.
VIEWS = re.compile("<|view|reshape|permute|split|squeeze|unsqueeze|expand|slice|select|unbind|convert_element_type")

# Bound by arithmetic.
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product", "_flash", "_fwd", "_bwd")
OVERWRITES = ("copy_", "fill_", "zero_", "normal_", "uniform_", "_foreach_copy_", "_foreach_zero_")
NOTHING = ("empty", "new_empty", "detach", "_unsafe_view", "_reshape_alias")  # neither read nor write


class Count(TorchDispatchMode):
    """Within, every op that reaches a device is counted. `memory` holds those that memory binds: (calls, bytes) by name.

    An op reads each tensor it is given once, unless only to write it, and writes each it makes or changes once; an expanded one
    counts as what is stored of it.
    `host_reads` are those for which the host waits for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops = self.host_reads = 0
        self.memory: dict[str, tuple[int, int]] = {}

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.memory.values())

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # what was compiled stays so; else PyTorch would run it op by op

    def add(self, name: str, size: int) -> None:
        calls, before = self.memory.get(name, (0, 0))
        self.memory[name] = calls + 1, before + size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.__name__.partition(".")[0]
        product = name.startswith(PRODUCTS)
        slow = (product or func.namespace == "fastdit") and not torch.cuda.is_available()
        out = pretend(func, args, kwargs) if slow else func(*args, **kwargs)
        if func.is_view or func.namespace == "profiler" or name.startswith(NOTHING):
            return out
        self.ops += 1
        self.host_reads += name == "_local_scalar_dense"
        if not product:
            self.add(name, moved(func._schema, name, args, kwargs, out))
        return out


def moved(schema: Any, name: str, args: Any, kwargs: Any, out: Any) -> int:
    """Bytes that one call of an op of this schema reads and writes."""
    given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
    found = 0
    for argument in schema.arguments:
        size = stored(given.get(argument.name))
        written = argument.alias_info is not None and argument.alias_info.is_write
        if argument.name == "grads" and name.startswith("_fused") and given.get("grad_scale") is None:
            written = False  # PyTorch's fused optimizers write gradients back only to scale them
        overwritten = argument.is_out or name.startswith(OVERWRITES) or (name, argument.name) == ("adamw_ema", "copies")
        found += size * (written + (not (written and overwritten)))
    made = out if isinstance(out, tuple) and len(schema.returns) > 1 else (out,)
    return found + sum(stored(t) for t, r in zip(made, schema.returns, strict=False) if r.alias_info is None)


def stored(value: Any) -> int:
    """Bytes behind the tensors of a value."""
    tensors = [t for t in tree_leaves(value) if isinstance(t, Tensor)]
    return sum(min(t.numel() * t.itemsize, t.untyped_storage().nbytes()) for t in tensors)


def pretend(func: Any, args: Any, kwargs: Any) -> Any:
    """What the op would return, holding zeros."""
    if "out" in kwargs:
        return kwargs["out"]
    device = next(t.device for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))

    def like(t: Any, device: torch.device | str) -> Any:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device) if isinstance(t, Tensor) else t

    made = func(*tree_map(lambda t: like(t, "meta"), args), **tree_map(lambda t: like(t, "meta"), kwargs))
    return tree_map(lambda t: like(t, device).zero_() if isinstance(t, Tensor) else t, made)


def count(call: Callable[[], object]) -> Count:
    """One call, counted after another one that compiled what `call` compiles. What is compiled must run once in a call."""
    monitor = inductor_metrics_log  # Inductor counts where this one speaks
    level = monitor.level
    metrics.reset()
    monitor.setLevel(logging.INFO)
    try:
        anew = torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False)
        with anew[0], anew[1], Count():
            call()
    finally:
        monitor.setLevel(level)
    own = [(node, 4 * words) for node, words in metrics.nodes_num_elem if not node.is_extern() and words]
    metrics.reset()
    with Count() as counted:
        call()
    for node, size in own:
        counted.ops += 1
        counted.add(fused_name(node), size)
    return counted


def fused_name(node: Any) -> str:
    """What an op of the compiler's own was fused of, by PyTorch's names."""
    origins = {str(o.target) for part in node.get_nodes() if part.node for o in part.node.origins}
    short = sorted({o.removeprefix("aten.").removeprefix("prims.").partition(".")[0] for o in origins})
    return "fused " + ("+".join(s for s in short if not VIEWS.match(s)) or "copy")
