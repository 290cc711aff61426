"""The Diffusion Transformer (DiT, arXiv 2212.09748), with a depthwise convolution in its MLP (LocalViT, arXiv 2104.05707).

B batch, T tokens = patches of a sequence, an image or a video, D width, F hidden width of the MLP, H heads, K head dim,
C channels, L blocks. Every op a kernel can replace comes in through `Ops`; the module tree and its parameter names are the
same for all of them.
"""

from typing import Any, NoReturn

import torch
from fastdit_kernels import Ops
from fastdit_kernels.attention import QKV, choose_attention, masked
from fastdit_kernels.cpu import CPU
from fastdit_kernels.reference import REFERENCE
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastdit.config import Config, ModelConfig, UserError
from fastdit.embeddings import (
    ConditionEmbedder,
    num_frequencies,
    out_channels,
    patchify,
    position_embedding,
    timestep_embedding,
    unpatchify,
    valid_tokens,
    within,
)
from fastdit.runtime.hardware import compute_dtype
from fastdit.runtime.rng import generator
from fastdit.runtime.sharding import fill
from fastdit.tokendrop import Fusion, ends, thin

OFF = -1e4  # GELU of it is 0 to the last bit that any sum of activations keeps; fp16 holds it


class Attention(nn.Module):
    """qkv → attention → proj, without proj's bias: the gated residual that follows adds it."""

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        D, self.num_heads = config.width, config.num_heads
        self.attention = ops.attention
        self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D)
        self.q_norm = nn.RMSNorm(D // self.num_heads, eps=1e-6) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(D // self.num_heads, eps=1e-6) if config.qk_norm else None

    def forward(self, m: Tensor, valid: Tensor | None = None) -> Tensor:
        B, T, _ = m.shape
        qkv: QKV = self.qkv(m).view(B, T, 3, self.num_heads, -1)  # [B, T, 3, H, K]
        if self.q_norm is not None and self.k_norm is not None:
            assert isinstance(qkv, Tensor)
            q, k, v = qkv.unbind(2)
            qkv = self.q_norm(q), self.k_norm(k), v
        out = self.attention(qkv) if valid is None else masked(qkv, valid)
        return F.linear(out, self.proj.weight)


class DepthwiseMLP(nn.Module):
    """fc1 → GELU → depthwise convolution on the token grid → fc2. fc1's bias is added inside the fused op, fc2's after it."""

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        D, F_, K = config.width, config.mlp_ratio * config.width, config.conv_kernel
        self.gelu_dwconv = ops.gelu_dwconv
        self.grid, self.num_tokens = config.grid, config.num_tokens
        self.fc1 = nn.Linear(D, F_)
        of_grid = nn.Conv1d if len(self.grid) == 1 else nn.Conv2d  # a video is convolved frame by frame
        self.conv = of_grid(F_, F_, K, groups=F_)  # holds the parameters; the op computes
        self.fc2 = nn.Linear(F_, D)

    def forward(self, m: Tensor, valid: Tensor | None = None) -> Tensor:
        assert self.conv.bias is not None
        h = F.linear(m, self.fc1.weight)  # [B, T, F]
        if valid is not None:  # the convolution then sees beyond a sequence's end what it sees beyond the grid
            h = h.masked_fill(~valid.unsqueeze(2), OFF)
        # With token drop, also a grid of half the rows and columns.
        grid = self.grid if h.shape[1] == self.num_tokens else tuple(side // 2 for side in self.grid)
        z = self.gelu_dwconv(h, self.fc1.bias, self.conv.weight, self.conv.bias, *grid)
        return F.linear(z, self.fc2.weight)


class MLP(nn.Module):
    """fc1 → GELU → fc2, as in the DiT paper. fc2's bias is added after it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, F_ = config.width, config.mlp_ratio * config.width
        self.fc1 = nn.Linear(D, F_)
        self.fc2 = nn.Linear(F_, D)

    def forward(self, m: Tensor, valid: Tensor | None = None) -> Tensor:
        return F.linear(F.gelu(self.fc1(m), approximate="tanh"), self.fc2.weight)


class Block(nn.Module):
    """An adaLN-Zero block, from one norm's output to the next one's, so that each gated residual is one op with its norm.

    All blocks have this one signature: the compiler then makes one graph for all of them.
    """

    recompute = False  # the activations in the backward, instead of keeping them

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        self.ops = ops
        self.attn = Attention(config, ops)
        self.mlp = DepthwiseMLP(config, ops) if config.conv_kernel else MLP(config)

    def forward(self, x: Tensor, m: Tensor, modulation: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, T, D], and m [B, T, D], which is x normed and modulated for attention. Returns both for the next block.

        modulation [B, 6, D]: attention's gate; the MLP's shift, scale and gate; shift and scale of the norm that follows, the
        next block's or the final layer's. valid: bool [B, T], the tokens that are no padding; None: all.
        """
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._run, x, m, modulation, valid, use_reentrant=False)
        return self._run(x, m, modulation, valid)

    def _run(self, x: Tensor, m: Tensor, modulation: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        gate_msa, shift_mlp, scale_mlp, gate_mlp, shift_next, scale_next = modulation.unbind(1)
        dtype = modulation.dtype  # what attention and MLP compute in; x may be kept wider; where it is not, no `to` copies
        # The last matrices' biases go to the op that adds y: its backward holds the sum that is their gradient.
        y = self.attn(m.to(dtype), valid).to(x.dtype)
        x, m = self.ops.gate_residual_ln_modulate(x, y, gate_msa, shift_mlp, scale_mlp, self.attn.proj.bias)
        y = self.mlp(m.to(dtype), valid).to(x.dtype)
        return self.ops.gate_residual_ln_modulate(x, y, gate_mlp, shift_next, scale_next, self.mlp.fc2.bias)


class FinalLayer(nn.Module):
    """Its norm and modulation are the last block's last op."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.linear = nn.Linear(config.width, config.patch_size * out_channels(config))

    def forward(self, m: Tensor) -> Tensor:
        return self.linear(m)


class DiT(nn.Module):
    """The whole network. `ops` computes its fused parts."""

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        self.config, self.ops = config, ops
        self.run: Config | None = None  # of the run that trained it, where it was loaded
        self.class_names: list[str] = []  # as that run knew them
        self.normaliser: Any = None  # data.normaliser.Normaliser of a model of arrays or of latents, where it was loaded
        self.latents_by = ""  # beginning of the SHA-256 of the autoencoder of its latents, where the run says it
        D, L = config.width, config.depth
        self.x_embedder = nn.Linear(config.channels * config.patch_size, D)
        self.pos_embed = nn.Parameter(torch.empty(config.num_tokens, D), requires_grad=config.position == "learned")
        between = nn.GELU(approximate="tanh") if config.time_embedding == "seed" else nn.SiLU()
        self.t_embedder = nn.Sequential(nn.Linear(num_frequencies(config), D), between, nn.Linear(D, D))
        self.jump_embedder: nn.Sequential | None = None
        if config.jumps:
            self.jump_embedder = nn.Sequential(nn.Linear(num_frequencies(config), D), nn.SiLU(), nn.Linear(D, D))
        num_rows = config.num_classes + (config.class_dropout > 0)  # the last row is the null class
        self.y_embedder = nn.Embedding(num_rows, D) if config.num_classes else None
        self.c_embedder = ConditionEmbedder(config.condition, D, config.class_dropout > 0) if config.condition else None
        # One projection makes every block's six vectors and the final layer's two: they all read the same SiLU(c).
        self.adaLN_modulation = nn.Linear(D, (6 * L + 2) * D)
        self.blocks = nn.ModuleList(Block(config, ops) for _ in range(L))
        self.fusion = Fusion(D) if config.token_drop else None
        self.final_layer = FinalLayer(config)

    @classmethod
    def from_pretrained(cls, *_: object, **__: object) -> NoReturn:
        raise AttributeError("fastdit.load(source) loads a DiT: from a run's folder, a checkpoint, an export or a hub id")

    def condition(self, t: Tensor, y: Tensor | None, jump: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """The modulation of all blocks, [B, 6·L + 2, D], from timesteps t [B] and labels y [B] (None: unconditional).

        jump: the length of the step that follows [B], in timesteps, for a network that knows jumps; None: 0, plain flow.
        condition [B, K], normalised, for a model that has one: a row of NaN is the null condition.
        """
        dtype, whose = self.x_embedder.weight.dtype, self.config.time_embedding
        t = t / 1000 if whose == "sit" else t
        sinusoids = timestep_embedding(t, num_frequencies(self.config), endpoint=whose in ("diffusers", "seed"))
        c = self.t_embedder(sinusoids.to(dtype))
        if self.jump_embedder is not None:
            jump = torch.zeros_like(t) if jump is None else jump
            of_length = self.jump_embedder(timestep_embedding(jump, num_frequencies(self.config)).to(dtype))
            # Times the length: at 0 the network is the one without jumps, to the bit, and near 0 it is near that one.
            c = c + (jump / 1000).to(dtype)[:, None] * of_length
        if self.y_embedder is not None:
            assert y is not None, "a class-conditional model needs labels"
            c = c + self.y_embedder(y)
        if self.c_embedder is not None:
            c = c + self.c_embedder(condition)
        return self.adaLN_modulation(F.silu(c)).view(len(c), -1, self.config.width)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        modulation: Tensor | None = None,
        jump: Tensor | None = None,
        condition: Tensor | None = None,
        length: Tensor | None = None,
        corners: Tensor | None = None,
    ) -> Tensor:
        """Predict noise (or v, x0, velocity) from x [B, C, *input_size] at t [B], 0 … timesteps, for labels y [B].

        Returns fp32 [B, C, *input_size], or 2·C channels with learn_sigma: the prediction, then the variance.
        modulation: `condition(t, y, jump)` computed before, where they repeat across calls, as they do in sampling.
        jump: as `condition` takes it. The prediction is then of the whole step from t to t - jump.
        condition: as `condition` takes it. length [B]: positions along the input's first axis that are no padding. What x
        holds beyond them changes nothing within them, and what is returned there means nothing.
        corners: int64 [B, rows/2, columns/2], which token of each 2×2 cell the middle blocks see; None: all.
        """
        valid = None
        if length is not None:
            x, valid = torch.where(within(x, length), x, 0), valid_tokens(length, self.config)
        patches = patchify(x, self.config).to(self.x_embedder.weight.dtype)
        h = self.x_embedder(patches) + self.pos_embed
        if modulation is None:
            # After the patches, so that in the backward the modulation's gradient is whole, and on its way, before theirs.
            # Not self.condition: FSDP hooks that one, and hooks within hooks would free the weights and gather them twice.
            modulation = DiT.condition(self, t, y, jump, condition)
        # Two rows for the first norm. Then six a block, of which the last two are for the norm that follows.
        first, *per_block = modulation.split([2] + [6] * self.config.depth, dim=1)
        m = self.ops.ln_modulate(h, *first.unbind(1))
        first_middle, first_last = ends(self.config.depth), self.config.depth - ends(self.config.depth)
        before = h
        for number, (block, vectors) in enumerate(zip(self.blocks, per_block, strict=True)):
            if self.fusion is not None and number == first_middle:
                before = h
                h, m = (h, m) if corners is None else (thin(h, corners), thin(m, corners))
            elif self.fusion is not None and number == first_last:
                h = self.fusion(before, h, corners)
                m = self.ops.ln_modulate(h, *per_block[number - 1][:, 4:].unbind(1))
            h, m = block(h, m, vectors) if valid is None else block(h, m, vectors, valid)
        out = self.final_layer(m.to(modulation.dtype)).float()
        return unpatchify(out, self.config)

    def fixed(self) -> dict[str, Tensor]:
        """The position embedding, where it is not learned: no training changes it, and files of weights may lack it."""
        if self.config.position == "learned":
            return {}
        return {"pos_embed": position_embedding(self.config.grid, self.config.width)}

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Set every parameter, sharded or not, to its starting value: a function of the seed and its name alone.

        As in the DiT paper: Xavier-uniform matrices, N(0, 0.02) embeddings, zeros in the modulation and the final layer
        (so a new model predicts zeros), and a sinusoidal start for the learnable position embedding.
        """
        for name, parameter in self.named_parameters():
            # Each rank makes the whole tensor and keeps its part, so nothing depends on the world size.
            fill(parameter, self.initial(name, parameter.shape, seed))

    def initial(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        """The whole starting value of a parameter, on the CPU."""
        rng = generator("cpu", seed, "init", name)
        if name == "pos_embed":
            return position_embedding(self.config.grid, self.config.width)
        value = torch.zeros(shape)
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            return value.fill_(1)
        if "conv." in name:  # torch.nn's default: uniform within ±1/√taps
            bound = self.config.conv_taps**-0.5
            return nn.init.uniform_(value, -bound, bound, generator=rng)
        if name.startswith(("adaLN_modulation", "final_layer", "jump_embedder.2")) or name.endswith("bias"):
            return value
        if name.startswith("fusion"):  # as long as the middle blocks change nothing, so does the fusion where tokens are kept
            return torch.eye(shape[0]) / 2
        if name.startswith(("t_embedder", "y_embedder", "c_embedder.null", "jump_embedder")):
            return nn.init.normal_(value, std=0.02, generator=rng)
        return nn.init.xavier_uniform_(value, generator=rng)


def choose_ops(config: Config, device: torch.device) -> Ops:
    """The kernels that --kernels and --attention mean on this device. Raises UserError."""
    m, dtype = config.model, compute_dtype(config.parallel.precision, device)
    try:
        attention = choose_attention(config.attention, device, dtype, m.width // m.num_heads, m.num_tokens)
    except ValueError as error:
        raise UserError(str(error)) from None
    if config.kernels == "reference":
        return REFERENCE._replace(attention=attention)
    if not on_kernels(config, device):
        return CPU._replace(attention=attention)
    from fastdit_kernels.triton_ops import TRITON  # here: it imports triton, which only Linux has

    return TRITON._replace(attention=attention)


def on_kernels(config: Config, device: torch.device) -> bool:
    """Whether --kernels means the Triton kernels on this device."""
    return config.kernels == "triton" or (config.kernels == "auto" and device.type == "cuda")
