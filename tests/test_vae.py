"""The autoencoder: moments and pictures against diffusers' own in fp64, the scale in one place, errors in one line."""

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from fastdit.config import DataConfig, UserError
from fastdit.data import vae

CPU = torch.device("cpu")


def tiny(**options) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 16],
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=4,
        **options,
    )


@pytest.fixture(
    params=[{"scaling_factor": 0.5}, {"scaling_factor": 0.3611, "shift_factor": 0.1159}], ids=["scale", "scale and shift"]
)
def folder(request, tmp_path):
    tiny(**request.param).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(5, 3, 12, 20, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_what_the_config_says_is_readable(folder):
    loaded = vae.load(DataConfig(vae=str(folder)), CPU)
    assert (loaded.channels, loaded.factor, loaded.revision) == (3, 2, "")
    assert (loaded.scale, loaded.shift) in [(0.5, 0.0), (0.3611, 0.1159)]
    assert not any(p.requires_grad for p in loaded.autoencoder.parameters())


def test_moments_and_decode_equal_the_autoencoder_in_fp64(folder, images):
    loaded, truth = (
        vae.load(DataConfig(vae=str(folder)), CPU),
        AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).double(),
    )
    config = truth.config
    with torch.no_grad():
        moments = truth.encode(images.double()).latent_dist.parameters
        latents = (moments[:, :3] - (config.shift_factor or 0)) * config.scaling_factor
        pictures = truth.decode(latents / config.scaling_factor + (config.shift_factor or 0)).sample
    found = loaded.moments(images)
    assert found.shape == (5, 6, 6, 10)
    assert (found.double() - moments).abs().max() < 1e-5 * moments.abs().max()
    assert (loaded.decode(latents.float()).double() - pictures).abs().max() < 1e-5 * pictures.abs().max()


def test_batches_are_split_without_a_trace(folder, images, monkeypatch):
    loaded = vae.load(DataConfig(vae=str(folder)), CPU)
    whole, latents = loaded.moments(images), torch.randn(5, 3, 6, 10, generator=torch.Generator().manual_seed(2))
    pictures = loaded.decode(latents)
    monkeypatch.setattr(vae, "PIXELS", 500)  # two images of 240 at a time, and one left over
    torch.testing.assert_close(loaded.moments(images), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(loaded.decode(latents), pictures, rtol=0, atol=1e-5)


def test_the_clamp_of_the_posterior_is_diffusers():
    """What fastdit/data/pack.py clamps log-variances to is what the autoencoder was trained with."""
    moments = torch.tensor([0.0, 1e4, 0.0, -1e4]).view(2, 2, 1, 1)
    assert DiagonalGaussianDistribution(moments).logvar.flatten().tolist() == [20.0, -30.0]


def test_only_safetensors_are_loaded(tmp_path):
    tiny().save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(UserError, match=r"--data\.vae .*safetensors") as caught:
        vae.load(DataConfig(vae=str(tmp_path)), CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["no weights", "cut short", "config is no JSON", "another model"])
def test_a_damaged_folder_is_one_line(tmp_path, damage):
    tiny().save_pretrained(tmp_path)
    weights, config = tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "config.json"
    if damage == "no weights":
        weights.unlink()
    elif damage == "cut short":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "config is no JSON":
        config.write_text("{")
    else:
        config.write_text(config.read_text().replace('"latent_channels": 3', '"latent_channels": 4'))
    with pytest.raises(UserError, match=rf"--data\.vae {tmp_path}: ") as caught:
        vae.load(DataConfig(vae=str(tmp_path)), CPU)
    assert "\n" not in str(caught.value)


def test_a_vae_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"--data\.vae nobody/none: no such folder, and not loaded from the hub: ") as caught:
        vae.load(DataConfig(vae="nobody/none"), CPU)
    assert "\n" not in str(caught.value)
