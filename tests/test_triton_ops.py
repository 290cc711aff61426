"""TRITON in the place of REFERENCE: the same signatures, and a whole block trained through either, eager and compiled."""

import inspect
import re

import pytest
import torch
from fastdit_kernels import Ops, gate_residual_ln_modulate, gelu_dwconv, gelu_dwconv1d, ln_modulate
from fastdit_kernels.reference import REFERENCE
from fastdit_kernels.triton_ops import TRITON
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._inductor.utils import run_fw_bw_and_get_code
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastdit.config import ModelConfig
from fastdit.model import Block as DiTBlock
from fastdit.model import DiT

pytestmark = pytest.mark.gpu

B, T, D = 2, 13, 40


class Block(nn.Module):
    """Two sub-blocks and the norm after them, their residuals carried from op to op, the modulation one packed projection."""

    def __init__(self, ops: Ops):
        super().__init__()
        self.ops = ops
        self.modulation = nn.Linear(D, 6 * D)
        self.mix, self.fc1, self.fc2 = (nn.Linear(*io, bias=False) for io in ((D, D), (D, 4 * D), (4 * D, D)))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).view(B, 6, D).unbind(1)
        m = self.ops.ln_modulate(x, shift1, scale1)
        x, m = self.ops.gate_residual_ln_modulate(x, self.mix(m), gate1, shift2, scale2)
        _, m = self.ops.gate_residual_ln_modulate(x, self.fc2(F.relu(self.fc1(m))), gate2, shift1, scale1)
        return m


@pytest.fixture
def train(device):
    """train(ops, compile=): (loss, gradients by parameter, code), of the same block on the same inputs."""

    def train(ops: Ops, compile: bool = False):
        torch.manual_seed(0)
        block, x, c = Block(ops).to(device), torch.randn(B, T, D, device=device), torch.randn(B, D, device=device)
        x.requires_grad_()
        forward = torch.compile(block, fullgraph=True) if compile else block
        code: list[str] = []
        if compile:
            loss, code = run_fw_bw_and_get_code(lambda: forward(x, c).square().mean())
        else:
            loss = forward(x, c).square().mean()
            loss.backward()
        return loss.detach(), {"x": x.grad} | {name: p.grad for name, p in block.named_parameters()}, code

    return train


@pytest.mark.parametrize("op", Ops._fields)
def test_both_sides_have_one_signature(op):
    def signature(ops):
        """What the model may pass; a kernel may have keywords of its own that it never needs."""
        parameters = inspect.signature(getattr(ops, op)).parameters.values()
        return [(p.name, p.annotation) for p in parameters if p.kind != p.KEYWORD_ONLY]

    assert signature(TRITON) == signature(REFERENCE)


def test_a_block_has_the_references_loss_and_gradients(train):
    loss, gradients, _ = train(TRITON)
    expected_loss, expected, _ = train(REFERENCE)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    for name in expected:
        error = (gradients[name] - expected[name]).norm() / expected[name].norm()
        assert error <= 1e-5, (name, error)


def test_a_block_recomputed_in_backward_has_the_same_gradients(train, device):
    """Activation checkpointing hands each saved tensor out once."""
    torch.manual_seed(0)
    block, x, c = Block(TRITON).to(device), torch.randn(B, T, D, device=device), torch.randn(B, D, device=device)
    checkpoint(block, x.requires_grad_(), c, use_reentrant=False).square().mean().backward()
    _, expected, _ = train(TRITON)
    assert torch.equal(x.grad, expected["x"])
    for name, parameter in block.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


def test_a_block_compiles_whole_with_no_copy_of_a_modulation_view(train):
    loss, gradients, (forward, backward) = train(TRITON, compile=True)
    expected_loss, expected, _ = train(TRITON)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    for name in expected:
        error = (gradients[name] - expected[name]).norm() / expected[name].norm()
        assert error <= 1e-5, (name, error)

    calls = "\n".join(re.findall(r"torch\.ops\.fastdit\..*", forward))
    views = re.findall(rf"reinterpret_tensor\((\w+), \({B}, {D}\), \({6 * D}, 1\), (\d+)\)", calls)
    assert len({buffer for buffer, _ in views}) == 1  # all into the one projection
    assert [int(offset) // D for _, offset in views] == [0, 1, 2, 3, 4, 5, 0, 1]
    for code in (forward, backward):
        assert not re.search(rf"empty_strided\w*\(\({B}, {D}\)", code)  # nor is a modulation, or its gradient, built anywhere
        assert "fastdit" in code
    assert len(re.findall(r"torch\.ops\.fastdit\.\w+_backward\.default\(", backward)) == 3
    assert "gate_residual_ln_modulate_backward.default(None," in backward  # nothing reads the last residual: no zeros stand in


def random_weights(module: nn.Module) -> None:
    """Random parameters by name: adaLN-Zero's zeros would hide most of what the kernels do."""
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * 0.1)


@pytest.mark.parametrize(
    ("input_size", "conv_kernel"), [*(((10, 6), K) for K in (0, 3, 4, 5)), ((18,), 3), ((18,), 7), ((2, 6, 4), 4)]
)
def test_the_whole_model_has_the_references_loss_and_every_gradient(device, input_size, conv_kernel):
    """Images, sequences and a video."""
    config = ModelConfig(
        input_size=input_size, channels=4, num_classes=3, patch=2, depth=3, width=40, num_heads=2, conv_kernel=conv_kernel
    )
    rng = torch.Generator().manual_seed(4)
    x, target = (torch.randn(3, 4, *input_size, generator=rng).to(device) for _ in range(2))
    t, y = torch.tensor([5, 400, 999], device=device), torch.tensor([0, 2, 1], device=device)

    def loss_and_gradients(ops: Ops) -> tuple[Tensor, dict[str, Tensor]]:
        model = DiT(config, ops)
        random_weights(model)
        loss = F.mse_loss(model.to(device)(x, t, y), target)
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters()}

    loss, gradients = loss_and_gradients(TRITON)
    expected_loss, expected = loss_and_gradients(REFERENCE)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        error = (gradients[name] - gradient).norm() / gradient.norm()
        assert error <= 2e-5, (name, error)


def test_the_models_own_block_compiles_whole_with_every_kernel(device):
    """As parallel.shard compiles it: in place, fullgraph, on views of the packed modulation."""
    config = ModelConfig(input_size=(10, 6), channels=4, patch=2, depth=2, width=40, num_heads=2)
    rng = torch.Generator().manual_seed(5)
    x, y = (torch.randn(2, 15, 40, generator=rng).to(device) for _ in range(2))
    packed = torch.randn(2, 14, 40, generator=rng).to(device)
    results = []
    for compile in (False, True):
        block = DiTBlock(config, TRITON)
        random_weights(block)
        block.to(device)
        if compile:
            block.compile(fullgraph=True)
        leaf = packed[:, 5:11].detach().requires_grad_()  # strided: rows 5 to 10 of 14
        out, m = block(x, y, leaf)
        (out.square().mean() + m.square().mean()).backward()
        results.append([out, m, leaf.grad, *(p.grad for p in block.parameters())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)


@pytest.fixture
def unlaunched(monkeypatch):
    """Ops that allocate their outputs and compute nothing: what a compiler makes of them does not depend on their values."""
    for module in (ln_modulate, gate_residual_ln_modulate, gelu_dwconv, gelu_dwconv1d):
        monkeypatch.setattr(module, "run", lambda *_, **__: None)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


SHARES = [global_batch // world for global_batch in (16, 24) for world in (1, 2, 8)]  # images of one rank


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile looks at that of each tensor it is given
@pytest.mark.usefixtures("unlaunched")
@pytest.mark.parametrize("input_size", [(8, 8), (32,), (2, 8, 4)])  # 16 tokens each
def test_any_number_of_batch_sizes_makes_one_static_and_one_dynamic_graph(device, input_size):
    """Of each grad mode, for training and drawing in turns, with and without guidance, at the batch sizes of 1, 2 and 8 ranks.

    A batch of one has a graph of its own: the compiler makes every size of 1 a constant. Three graphs of two modes are within
    its limit of eight; with a graph for each way of splitting the work they were not, and the run died.
    """
    config = ModelConfig(input_size=input_size, channels=4, num_classes=3, patch=2, depth=2, width=64, num_heads=2)
    model = DiT(config, TRITON).to(device)
    compiled: list[tuple[bool, int]] = []  # whether with gradients, and the batch size it was made at

    def backend(graph, inputs):
        sizes = [int(t.shape[0]) for t in inputs if isinstance(t, Tensor) and t.ndim == 3 and t.shape[1:] == (16, 64)]
        compiled.append((torch.is_grad_enabled(), sizes[0]))
        return lookup_backend("aot_eager")(graph, inputs)

    for block in model.blocks:
        block.compile(fullgraph=True, backend=backend)

    def run(batch: int) -> Tensor:
        noise, times = torch.randn(batch, 4, *input_size, device=device), torch.zeros(batch, device=device)
        return model(noise, times, torch.zeros(batch, dtype=torch.int64, device=device))

    def draw(batch: int) -> None:
        with torch.no_grad():
            run(batch)
            run(2 * batch)  # guidance, in part of the steps

    for batch in SHARES:
        run(batch).sum().backward()
        for number in (9, 100, 4, 1):  # a grid, an evaluation and its last batch, one picture
            draw(number)
    for batch in (1, 7, 33, 5):
        run(batch).sum().backward()
    for with_gradients in (True, False):
        sizes = [size for grad, size in compiled if grad == with_gradients]
        assert len([size for size in sizes if size > 1]) <= 2, compiled
        assert sizes.count(1) <= 1, compiled
