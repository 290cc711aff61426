"""The arithmetic of a forward and of a training step, counted from the config alone."""

from fastdit.config import ModelConfig
from fastdit.embeddings import num_frequencies
from fastdit.model import out_channels


def macs_per_image(config: ModelConfig) -> dict[str, int]:
    """Multiply-adds of one forward pass on one image, or other sample, by part: what the DiT paper calls Gflops."""
    D, L, T, p, r = config.width, config.depth, config.num_tokens, config.patch_size, config.mlp_ratio
    return {
        "embed": T * config.channels * p * D + (num_frequencies(config) + D + config.condition) * D,
        "modulation": (6 * L + 2) * D * D,  # per image, not per token
        "qkv and proj": L * 4 * T * D * D,
        "attention": L * 2 * T * T * D,
        "mlp": L * 2 * r * T * D * D,
        "convolution": L * config.conv_taps * T * r * D,
        "final": T * D * p * out_channels(config),
    }


def train_flops_per_image(config: ModelConfig) -> int:
    """FLOPs of forward and backward on one image: 2 per multiply-add, and the backward twice the forward."""
    return 6 * sum(macs_per_image(config).values())
