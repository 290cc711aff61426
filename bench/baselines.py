"""What others run: a DiT of standard modules, as in the seed repository (convolution) and as in most trainers (plain).

fp32 parameters under autocast, modulation block by block, residuals added on the spot; to be trained by `training_step`.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdit.config import ModelConfig


class PlainBlock(nn.Module):
    """A DiT block the usual way: every op its own module, modulation per block, residuals added on the spot.

    conv: the seed repository's MLP, GELU → transpose to NCHW → K = 4 convolution, padding "same" → transpose back.
    """

    def __init__(self, width: int, num_heads: int, grid: tuple[int, int], conv: bool):
        super().__init__()
        self.num_heads, self.grid = num_heads, grid
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.conv = nn.Conv2d(4 * width, 4 * width, 4, padding="same", groups=4 * width) if conv else None
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=2)
        x = x + gate1 * self.attend(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)

    def attend(self, m: Tensor) -> Tensor:
        B, T, D = m.shape
        q, k, v = (s.view(B, T, self.num_heads, -1).transpose(1, 2) for s in self.qkv(m).split(D, dim=2))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous().view(B, T, D))

    def mlp(self, m: Tensor) -> Tensor:
        h = F.gelu(self.fc1(m), approximate="tanh")
        if self.conv is not None:
            B, T, hidden = h.shape
            h = h.transpose(1, 2).view(B, hidden, *self.grid).contiguous()
            h = self.conv(h).view(B, hidden, T).transpose(1, 2).contiguous()
        return self.fc2(h)


class PlainDiT(nn.Module):
    """A DiT of standard modules, fp32 parameters, to be run under autocast. num_classes: 0 for a model without labels."""

    def __init__(
        self, size: int, channels: int, patch: int, depth: int, width: int, num_heads: int, conv: bool, num_classes: int = 0
    ):
        super().__init__()
        self.patch, side = patch, size // patch
        self.x_embedder = nn.Conv2d(channels, width, patch, stride=patch)
        self.pos_embed = nn.Parameter(torch.randn(1, side * side, width) * 0.02)
        self.y_embedder = nn.Embedding(num_classes, width) if num_classes else None
        self.t_embedder = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(PlainBlock(width, num_heads, (side, side), conv) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.linear = nn.Linear(width, patch * patch * channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        B, C, rows, columns = x.shape
        p = self.patch
        h = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        angles = t[:, None].float() * torch.exp(torch.arange(128, device=t.device) * (-9.21034 / 128))
        c = self.t_embedder(torch.cat([angles.cos(), angles.sin()], dim=1))
        if self.y_embedder is not None and y is not None:
            c = c + self.y_embedder(y)
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.modulation(c)[:, None].chunk(2, dim=2)
        out = self.linear(self.norm(h) * (1 + scale) + shift).view(B, rows // p, columns // p, p, p, C)
        return out.permute(0, 5, 1, 3, 2, 4).reshape(B, C, rows, columns)


def seed_repository(model: ModelConfig, device: torch.device) -> PlainDiT:
    """With the K = 4 convolution on NCHW between two transposes."""
    return PlainDiT(32, 4, 2, model.depth, model.width, model.num_heads, conv=True).to(device)


def standard(model: ModelConfig, device: torch.device) -> PlainDiT:
    """With a plain MLP."""
    return PlainDiT(32, 4, 2, model.depth, model.width, model.num_heads, conv=False).to(device)


class TimmBlock(PlainBlock):
    """A DiT block of timm's own attention and MLP."""

    def __init__(self, width: int, num_heads: int, grid: tuple[int, int]):
        from timm.layers import Mlp
        from timm.models.vision_transformer import Attention

        super().__init__(width, num_heads, grid, conv=False)
        del self.qkv, self.proj, self.fc1, self.fc2
        self.attn = Attention(width, num_heads, qkv_bias=True)
        self.feed_forward = Mlp(width, 4 * width, act_layer=partial(nn.GELU, approximate="tanh"))

    def attend(self, m: Tensor) -> Tensor:
        return self.attn(m)

    def mlp(self, m: Tensor) -> Tensor:
        return self.feed_forward(m)


def of_timm(model: ModelConfig, device: torch.device) -> PlainDiT:
    """With timm's attention and MLP."""
    network = standard(model, device)
    network.blocks = nn.ModuleList(TimmBlock(model.width, model.num_heads, (16, 16)) for _ in range(model.depth)).to(device)
    return network


class DiffusersDiT(nn.Module):
    """diffusers' DiTTransformer2DModel, of one class."""

    def __init__(self, model: ModelConfig):
        from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

        super().__init__()
        self.network = DiTTransformer2DModel(
            model.num_heads, model.width // model.num_heads, 4, num_layers=model.depth, num_embeds_ada_norm=1
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(x, timestep=t, class_labels=torch.zeros_like(t)).sample


def of_diffusers(model: ModelConfig, device: torch.device) -> DiffusersDiT:
    return DiffusersDiT(model).to(device)


def training_step(
    model: nn.Module, alphas_cumprod: Tensor, x0: Tensor, compiled: bool, dtype: torch.dtype = torch.bfloat16
) -> Callable[[], None]:
    """One step on x0 [B, C, rows, columns], as the DiT repository trains: autocast, clipping, AdamW, averages by a loop."""
    network = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-2)
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}

    def step() -> None:
        t = torch.randint(0, len(alphas_cumprod), (len(x0),), device=x0.device)
        noise, kept = torch.randn_like(x0), alphas_cumprod[t].view(-1, 1, 1, 1)
        noisy = kept.sqrt() * x0 + (1 - kept).sqrt() * noise
        with torch.autocast(x0.device.type, dtype, enabled=dtype != torch.float32):
            out = network(noisy, t)
        F.mse_loss(out.float(), noise).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, p in model.named_parameters():
                ema[name].mul_(0.9999).add_(p, alpha=1e-4)

    return step
