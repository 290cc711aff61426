"""The arithmetic of a forward and of a training step, counted from the config alone."""

from fastdit.config import Config, ModelConfig
from fastdit.embeddings import num_frequencies, out_channels
from fastdit.tokendrop import ends


def macs_per_image(config: ModelConfig, dropped: bool = False) -> dict[str, int]:
    """Multiply-adds of one forward pass on one image, or other sample, by part: what the DiT paper calls Gflops.

    dropped: in training with token drop, where the middle blocks see one token in four.
    """
    D, L, T, p, r = config.width, config.depth, config.num_tokens, config.patch_size, config.mlp_ratio
    # Blocks' worth of work that grows with the tokens, and with their square.
    middle = L - 2 * ends(L) if dropped else 0
    linear, square = (L - middle) * T + middle * T // 4, (L - middle) * T * T + middle * (T // 4) ** 2
    return {
        "embed": T * config.channels * p * D + (num_frequencies(config) + D + config.condition) * D,
        "modulation": (6 * L + 2) * D * D,  # per image, not per token
        "qkv and proj": 4 * linear * D * D,
        "attention": 2 * square * D,
        "mlp": 2 * r * linear * D * D,
        "convolution": config.conv_taps * linear * r * D,
        "fusion": (T + (T // 4 if dropped else T)) * D * D * config.token_drop,
        "final": T * D * p * out_channels(config),
    }


def train_flops_per_image(config: ModelConfig, dropped: bool = False) -> int:
    """FLOPs of forward and backward on one image: 2 per multiply-add, and the backward twice the forward."""
    return 6 * sum(macs_per_image(config, dropped).values())


def mean_flops_per_image(config: Config) -> float:
    """The same on average over a run, of which with token drop the last part trains on all tokens."""
    whole = config.train.whole_share if config.model.token_drop else 1.0
    return sum(share * train_flops_per_image(config.model, dropped) for share, dropped in ((whole, False), (1 - whole, True)))
