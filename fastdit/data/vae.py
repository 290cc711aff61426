"""The autoencoder between pixels and latents: diffusers' AutoencoderKL, by folder or hub id. Never trained here."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdit.config import Config, DataConfig, UserError, plain
from fastdit.data.normaliser import Affine, Normaliser

PIXELS = 1 << 20  # that pass through at once: 16 images of 256×256 take about 3 GB in fp32


class VAE:
    """A frozen AutoencoderKL, fp32. Latents are scaled where they leave and unscaled where they return, nowhere else.

    C, latent channels; `factor`, pixels per latent along a side; `scale` and `shift`: z = (latent - shift)·scale.
    normaliser: in place of those, what brings latents to mean 0 and deviation 1, per channel. A pack of DataConfig.latents
    "channel" makes it, and it goes with the weights: of what the autoencoder's config says, `own`, or else of the pack's own
    latents.
    """

    def __init__(
        self,
        autoencoder: Any,
        device: torch.device,
        name: str = "",
        revision: str = "",
        normaliser: Normaliser | None = None,
        latents: str = "scalar",
    ) -> None:
        config = autoencoder.config
        self.name = name  # the folder or hub id it was loaded from
        self.autoencoder = autoencoder.to(device).requires_grad_(False).eval()
        self.device = device
        self.revision = revision  # the hub's commit; empty for a folder
        self.channels = int(config.latent_channels)
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.scale = float(config.scaling_factor)
        self.shift = float(config.get("shift_factor") or 0.0)
        self.normaliser, self.latents = normaliser, latents
        self.own = _own(config)

    def sha256(self) -> str:
        """A hash of the weights and of the scale: another autoencoder has another one, wherever it lies. About 1 s for SD's."""
        digest = hashlib.sha256(repr((self.scale, self.shift)).encode())
        for name, tensor in sorted(self.autoencoder.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Images in [-1, 1], [B, 3, H, W] → mean and log-variance of their latents, unscaled, fp32 [B, 2·C, h, w]."""
        parts = images.float().split(max(1, PIXELS // images[0, 0].numel()))
        return torch.cat([self.autoencoder.encode(part).latent_dist.parameters for part in parts])

    def scaled(self, latents: Tensor) -> Tensor:
        """Latents as `moments` has them → as the network sees them, fp32 [B, C, h, w]."""
        if self.normaliser is not None:
            return self.normaliser.x.normalise(latents)
        return (latents.float() - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] → images fp32 [B, 3, h·factor, w·factor], about [-1, 1] (not clipped)."""
        normaliser = self.normaliser
        unscaled = latents.float() / self.scale + self.shift if normaliser is None else normaliser.x.physical(latents)
        parts = unscaled.split(max(1, PIXELS // (latents[0, 0].numel() * self.factor**2)))
        return torch.cat([self.autoencoder.decode(part).sample for part in parts])


def _own(config: Any) -> Normaliser | None:
    """What an autoencoder's config says of each channel: z = (latent - latents_mean) / latents_std. None: nothing.

    Its scaling_factor is no part of that. Beside statistics it is either left at the class's default, as in GLM-Image, or is
    the deviation that one sampler wants, as in Playground 2.5. Raises ValueError for what is no mean and deviation.
    """
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return None
    offset, scale = [float(x) for x in mean], [float(x) for x in std]
    found = Normaliser.from_dict({"kind": "mean_std", "x": {"offset": offset, "scale": scale}})
    if len(found.x.scale) != int(config.latent_channels):
        raise ValueError(f"latents_mean has {len(found.x.scale)} numbers for {config.latent_channels} channels")
    return found


def per_channel(mean: Tensor, std: Tensor) -> Normaliser:
    """The normaliser of latents with this mean and deviation, fp64 [C]. A channel that never changes keeps its scale."""
    return Normaliser("mean_std", Affine(tuple(mean.tolist()), tuple(torch.where(std > 0, std, 1.0).tolist())))


def of(config: Config, device: torch.device, made_by: str = "", normaliser: Normaliser | None = None) -> VAE | None:
    """The autoencoder of a model's latents; None for a model of pixels. Raises UserError, also where it is another's.

    made_by: the beginning of the SHA-256 of the one that made the latents the model was trained on; empty: not known.
    normaliser: what goes with the model's weights; None where its latents have one scale.
    """
    if not config.data.vae:
        return None
    loaded = load(config.data, device, normaliser)
    if loaded.channels != config.model.channels:
        ours, where = config.model.channels, plain(config.data.vae)
        raise UserError(f"--data.vae {where} has latents of {loaded.channels} channels, the model's have {ours}")
    require_same(loaded, made_by)
    return loaded


def decoder(config: Config, device: torch.device, made_by: str, normaliser: Normaliser | None) -> VAE | Normaliser | None:
    """What makes pixels of a model's latents, or physical units of its arrays; None for a model of pixels. As `of` has it."""
    return of(config, device, made_by, normaliser) or normaliser


def require_same(autoencoder: VAE, made_by: str) -> None:
    """Raise UserError where another autoencoder made the latents, by the beginning of its SHA-256; empty: not known."""
    if made_by and not (now := autoencoder.sha256()).startswith(made_by):
        raise UserError(
            f"--data.vae {plain(autoencoder.name)} is not the autoencoder that made the latents (SHA-256 {made_by[:16]} then, "
            f"{now[:16]} now); restore it, or name its revision: ID@REVISION"
        )


def load(data: DataConfig, device: torch.device, normaliser: Normaliser | None = None) -> VAE:
    """The autoencoder that --data.vae names, from safetensors alone. Raises UserError, one line, where it cannot be had."""
    from diffusers import AutoencoderKL  # here: it takes seconds to import, and a run on pixels needs none of it

    assert data.vae is not None
    name, revision = vae_name(data.vae)
    repository, subfolder = _parts(name)
    try:
        autoencoder = AutoencoderKL.from_pretrained(
            repository,
            subfolder=subfolder or None,
            revision=revision,
            variant=_variant(Path(name)),
            use_safetensors=True,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
        )
        commit = _commit(repository, subfolder, revision)
        return VAE(autoencoder, device, name, commit or revision or "", normaliser, data.latents)
    except Exception as error:  # of the network, the hub, the cache or the files: all are about what was asked for
        reason = plain(" ".join(str(error).split())) or type(error).__name__
        where = "" if Path(name).is_dir() else "no such folder, and not loaded from the hub: "
        raise UserError(f"--data.vae {plain(data.vae)}: {where}{reason}") from None


def _variant(folder: Path) -> str | None:
    """ "fp16" and the like, where a folder has a variant's weights alone: diffusion_pytorch_model.fp16.safetensors."""
    plain_one, *others = sorted(path.name for path in folder.glob("diffusion_pytorch_model*.safetensors")) or [""]
    parts = plain_one.split(".")
    return parts[1] if len(parts) == 3 and "diffusion_pytorch_model.safetensors" not in others else None


def vae_name(vae: str) -> tuple[str, str | None]:
    """ID[/SUBFOLDER][@REVISION] → id and subfolder, revision; a folder is taken whole."""
    name, _, revision = (vae, "", "") if Path(vae).exists() else vae.partition("@")
    return name, revision or None


def _parts(name: str) -> tuple[str, str]:
    """OWNER/NAME/SUBFOLDER → OWNER/NAME, SUBFOLDER, which is empty for a folder and for most repositories."""
    if Path(name).exists():
        return name, ""
    owner, *rest = name.split("/")
    return "/".join([owner, *rest[:1]]), "/".join(rest[1:])


def _commit(repository: str, subfolder: str, revision: str | None) -> str:
    """The commit of the hub's repository that was loaded, from the cache it was loaded from."""
    from huggingface_hub import try_to_load_from_cache

    if Path(repository).exists():
        return ""
    cached = try_to_load_from_cache(repository, f"{subfolder}/config.json".lstrip("/"), revision=revision)
    return Path(cached.removesuffix(f"{subfolder}/config.json")).name if isinstance(cached, str) else ""
