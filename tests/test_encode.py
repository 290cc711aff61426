"""The encode verb: what it prints, what it exits with, and that a recipe's name is all it needs."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from fastdit import encode
from fastdit.config import replace
from fastdit.data import cats, encoding
from fastdit.data import pack as packs
from fastdit.recipes import RECIPES
from fastdit.runtime.ranks import World


def verb(*arguments: str) -> None:
    """As one rank, not yet in a process group: the verb with these arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["encode.py", *arguments])
        encode.main()


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vae")
    AutoencoderKL(block_out_channels=[8], norm_num_groups=4, latent_channels=2, scaling_factor=0.5).save_pretrained(path)
    return path


@pytest.fixture
def pictures(tmp_path) -> Path:
    (tmp_path / "pictures").mkdir()
    for n in range(20):
        pixels = np.random.default_rng(n).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{n:02d}.png")
    (tmp_path / "pictures" / "x.png").write_bytes(b"")
    return tmp_path / "pictures"


def test_the_default_recipe_on_two_ranks_is_reported_once(run_ranks, tmp_path):
    arguments = ("--data.num_images", "600", "--data.packs", str(tmp_path / "packs"))
    first, second = run_ranks.outcomes(2, verb, *arguments, init=False)
    assert (first.code, second.code) == (0, 0), first.error + second.error
    assert second.output == ""
    lines = first.output.splitlines()
    (path,) = (tmp_path / "packs").iterdir()
    assert lines[2:5] == [
        f"{path}: 600 images of 600 embedded cats, 1.8 MiB",
        "rows: uint8 [3, 32, 32]",
        f"classes: 15 ({', '.join(cats.COLOURS)})",
    ]
    assert lines[5].endswith(" s in all")
    assert packs.verify(path).count == 600
    ends = run_ranks.outcomes(1, verb, "verify", str(path), init=False)
    assert ends[0].output == f"{path}: 600 images, every checksum right\n"


def test_latents_are_reported_with_their_statistics(pictures, vae_folder, tmp_path):
    data = {"path": str(pictures), "image_size": (8, 8), "vae": str(vae_folder), "max_bad": 0.1}
    model = {"input_size": (8, 8), "channels": 2, "num_classes": 0}
    config = replace(RECIPES["cats"], data=data | {"packs": str(tmp_path / "packs")}, model=model)
    world = World(0, 1, 0, 1, torch.device("cpu"))
    path = encoding.ensure(config, world, lambda line: None)
    lines = encode.report(path)
    assert lines[1:5] == [
        f"rows: bfloat16 [2, 4, 8, 8], moments of {vae_folder}",
        "classes: 0",
        "skipped: 1 (1 × empty)",
        "  'x.png': empty",
    ]
    # Against 400 draws of every image: the mean within four standard errors, the deviation within 1 %.
    mean, std = encode.statistics(packs.read_manifest(path))
    pack = packs.Pack(path, world.device, seed=0)
    drawn = pack.batch(0, 20 * 400).x0.double().transpose(0, 1).flatten(1)  # [C, ·]
    assert ((mean - drawn.mean(1)).abs() < 4 * std / math.sqrt(drawn.shape[1])).all()
    assert ((std / drawn.std(1) - 1).abs() < 0.01).all()
    assert lines[5] == f"scaled latents, per channel: mean {encode._numbers(mean)}; std {encode._numbers(std)}"


def test_the_round_trip_is_drawn(run_ranks, pictures, vae_folder, tmp_path):
    """Eight images in the upper row, and below them what diffusers' own class decodes from their posterior's mean."""
    (pictures / "x.png").unlink()  # which is no picture
    arguments = ["cats", "--data.path", str(pictures), "--data.image_size", "8", "8"]
    arguments += ["--data.vae", str(vae_folder), "--data.packs", str(tmp_path / "packs")]
    ends = run_ranks.outcomes(1, verb, *arguments, init=False)
    assert ends[0].code == 0, ends[0].error
    [picture] = (tmp_path / "packs").glob("*.round-trip.png")
    assert f"round trip: {picture}, images above" in ends[0].output
    drawn = torch.from_numpy(np.array(Image.open(picture)))
    assert drawn.shape == (22, 82, 3)
    tiles = drawn[2:, 2:].unfold(0, 8, 10).unfold(1, 8, 10).permute(0, 1, 3, 4, 2)  # [2, 8, rows, columns, 3]
    seen = np.stack([np.array(Image.open(pictures / f"{n:02d}.png")) for n in range(8)])
    assert torch.equal(tiles[0], torch.from_numpy(seen))
    autoencoder = AutoencoderKL.from_pretrained(vae_folder)
    x = torch.from_numpy(seen).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        back = autoencoder.decode(autoencoder.encode(x).latent_dist.mean.bfloat16().float()).sample
    expected = ((back.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1)
    assert (tiles[1] - expected).abs().max() <= 1


def test_bad_input_is_one_line_and_status_2_on_every_rank(run_ranks, tmp_path):
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for arguments, words in [
        (("dogs",), "unknown recipe 'dogs'"),
        (("--data.crob", "none"), "did you mean --data.crop?"),
        (("--data.path", str(tmp_path / "none")), "no such folder"),
        (("--data.path", str(tmp_path / "empty")), "no image"),
        (("verify",), "verify takes one argument"),
        (("verify", str(tmp_path / "empty")), "not the manifest of a pack"),
    ]:
        packs_folder = () if arguments[0] == "verify" else ("--data.packs", str(tmp_path / "packs"))
        ends = run_ranks.outcomes(2, verb, *arguments, *packs_folder, init=False)
        assert [end.code for end in ends] == [2, 2], arguments
        assert ends[0].output.startswith("error: ")
        assert ends[0].output.count("\n") == 1
        assert words in ends[0].output
        assert ends[1].output == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_help_names_every_group_and_verify(run_ranks):
    (end,) = run_ranks.outcomes(1, verb, "--help", "all", init=False)
    assert end.code == 0
    assert "verify PACK" in end.output
    assert all(option in end.output for option in ("--data.path", "--data.packs", "--parallel.precision"))
