"""A block as Inductor would compile it for an A100, with no GPU and no driver: what stands beside our ops and matrix products.

Autograd cannot run on pretended CUDA tensors: it asks the driver for their streams. So forward and backward are traced together
on the CPU, where our ops and attention are opaque. What autograd made is plain ops by then, and is traced again on pretended
CUDA tensors. Inductor lowers, fuses and schedules that for the GPU it is told of. Nothing is compiled further.
"""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode
from torch.fx import Interpreter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._triton import has_triton

from fastdit.model import Block
from fastdit.recipes import dit

B, T = 32, 256
MODEL = dit("B", 2, channels=4, num_classes=0)
ELEMENTS = B * T * MODEL.width
A100 = {
    "multi_processor_count": 108, "major": 8, "regs_per_multiprocessor": 65536, "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024, "warp_size": 32,
}  # fmt: skip
BF16 = torch.bfloat16


@torch.library.custom_op("stand_in::attention", mutates_args=())
def packed(qkv: Tensor) -> Tensor:
    """Attention on one tensor, whose gradient is one, as flash-attn has it."""
    raise NotImplementedError


@torch.library.custom_op("stand_in::attention_backward", mutates_args=())
def packed_backward(dout: Tensor, qkv: Tensor) -> Tensor:
    raise NotImplementedError


@torch.library.custom_op("stand_in::attention_of_three", mutates_args=())
def three(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention on three tensors, with a gradient for each, as PyTorch has it."""
    raise NotImplementedError


@torch.library.custom_op("stand_in::attention_of_three_backward", mutates_args=())
def three_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError


packed.register_fake(lambda qkv: qkv.new_empty(*qkv.shape[:2], qkv.shape[3] * qkv.shape[4]))
packed_backward.register_fake(lambda dout, qkv: torch.empty_like(qkv))
three.register_fake(lambda q, k, v: q.new_empty(*q.shape[:2], q.shape[2] * q.shape[3]))
three_backward.register_fake(
    lambda dout, q, k, v: tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
)


def keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


packed.register_autograd(lambda ctx, dout: packed_backward(dout, *ctx.saved_tensors), setup_context=keep)
three.register_autograd(lambda ctx, dout: three_backward(dout, *ctx.saved_tensors), setup_context=keep)


class Kernel(NamedTuple):
    """What Inductor would launch: an op that it calls, by its name, or a kernel of its own, by what it is fused of."""

    name: str
    own: bool
    bytes_per_element: float


@contextlib.contextmanager
def pretended_a100() -> Iterator[None]:
    properties = SimpleNamespace(**A100, name="A100", minor=0, total_memory=80 << 30, L2_cache_size=40 << 20)
    device = DeviceProperties(type="cuda", index=0, cc=80, **A100)
    device_of = {"cuda": device, "cpu": DeviceProperties(type="cpu", index=0, multi_processor_count=2, cc=0)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
        patch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
        patch.setattr(DeviceProperties, "create", staticmethod(lambda device: device_of[device.type]))
        has_triton.cache_clear()  # PyTorch remembers that there is no GPU; afterwards it must not remember one
        yield
    has_triton.cache_clear()


def joint_graph(block: Block) -> torch.fx.GraphModule:
    """Forward and backward of the block in bf16, to every input and parameter, as ops on a pretended GPU."""
    names, D = [name for name, _ in block.named_parameters()], MODEL.width

    def both_ways(x, m, modulation, dx, dm, *parameters):
        outputs = torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x, m, modulation))
        return *outputs, *torch.autograd.grad(outputs, [x, m, modulation, *parameters], [dx, dm])

    shapes = [(B, T, D), (B, T, D), (B, 6, D), (B, T, D), (B, T, D), *(tuple(p.shape) for p in block.parameters())]
    given = [torch.empty(shape, dtype=BF16, requires_grad=i not in (3, 4)) for i, shape in enumerate(shapes)]
    on_cpu = make_fx(both_ways, decomposition_table=select_decomp_table(), tracing_mode="fake")(*given)
    with FakeTensorMode(), torch.no_grad():
        on_gpu = [torch.empty(shape, dtype=BF16, device="cuda:0") for shape in shapes]
        return make_fx(lambda *args: Interpreter(on_cpu).run(*args), tracing_mode="fake")(*on_gpu)


def kernels(ops) -> list[Kernel]:
    """What a block of B/2 on these ops launches on an A100, forward and backward, in order."""
    with torch.device("meta"):
        block = Block(MODEL, ops).to(BF16)
    graph = joint_graph(block)
    inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    with pretended_a100(), V.set_fake_mode(inputs[0].fake_mode), V.set_debug_handler(DebugContext()):
        post_grad_passes(graph, is_inference=True)
        lowering = GraphLowering(graph, example_inputs=inputs, is_inference=True)
        with V.set_graph_handler(lowering), V.set_extern_kernel_nodes([]):
            lowering.run(*inputs)
            lowering._update_scheduler()
            return [found for node in lowering.scheduler.nodes if (found := kernel(node)).bytes_per_element]


def kernel(node) -> Kernel:
    parts = [part.node for part in node.get_nodes() if part.node]
    called = [getattr(p, "op_overload", None) or getattr(p, "python_kernel_name", None) for p in parts if node.is_extern()]
    origins = sorted({str(o.target).removeprefix("aten.").partition(".")[0] for p in parts for o in p.origins})
    name = str(called[0]) if node.is_extern() else "+".join(origins)
    return Kernel(name, not node.is_extern(), node.get_read_write_buffers_sizes() / ELEMENTS)


PRODUCTS = ("aten.mm", "aten.addmm")


@pytest.mark.parametrize(
    ("attention", "assembly"), [(packed, 0), (lambda qkv: three(*qkv.unbind(2)), 12)], ids=["packed", "three"]
)
def test_beside_ops_and_products_stand_the_qkv_biases_sum_and_the_assembly_of_attentions_gradient(device, attention, assembly):
    """Bytes per bf16 element of [B, T, D]: 6 for the sum, 12 for the assembly of three gradients, and nothing else over 0.3."""
    from fastdit_kernels.triton_ops import TRITON

    found = kernels(TRITON._replace(attention=attention))
    ours = [k.name for k in found if k.name.startswith("fastdit.")]
    assert sorted(ours) == sorted(
        f"fastdit.{op}{way}.default"
        for op, times in (("gate_residual_ln_modulate", 2), ("gelu_dwconv", 1))
        for way in ("", "_backward")
        for _ in range(times)
    )
    assert len([k for k in found if not k.own and k.name.startswith(PRODUCTS)]) == 12
    own = [k for k in found if k.own]
    large = [k for k in own if k.bytes_per_element > 0.3]
    assert sum(k.bytes_per_element for k in large) == pytest.approx(6 + assembly, abs=0.2), large
    assert sum(k.bytes_per_element for k in own) <= 6 + assembly + 0.5, own
    assert [k for k in found if not k.own and not k.name.startswith((*PRODUCTS, "fastdit.", "stand_in."))] == []
    # The convolution repacks its weight by one more. Attention, whose kernels are not ours, counts as two.
    assert len(found) + 1 <= 24 + (assembly > 0)
