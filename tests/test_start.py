"""A run that starts from a trained model takes what fits, and says what it did not take."""

import shutil
from pathlib import Path

import pytest
import torch
from fastdit_kernels.reference import REFERENCE
from torch.nn import functional as F

from fastdit import config as C
from fastdit import train
from fastdit.checkpoint import Checkpoints
from fastdit.config import Config, UserError
from fastdit.model import DiT
from fastdit.recipes import RECIPES
from fastdit.runtime.run import load_config, save_config
from fastdit.weights.folder import save_pretrained
from fastdit.weights.start import adopt, start_from

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"input_size": (8, 8), "num_classes": 5, "patch": 2, "depth": 2, "width": 48, "num_heads": 3}


def config_of(**model) -> Config:
    model = {**SMALL, **model}
    data = {
        "image_size": model["input_size"],
        **({"vae": "x", "image_size": (64, 64)} if model.get("channels", 3) != 3 else {}),
    }
    base = RECIPES["cats"]
    data |= {"path": "photos"}
    return C.replace(
        base,
        data=data,
        model={"conv_kernel": 3, **model},
        diffusion={"kind": "ddpm", "prediction": "epsilon", "clip_x0": False},
    )


@pytest.fixture
def trained(tmp_path):
    """trained(model fields …): an exported folder, and its random model."""

    def trained(**model) -> tuple[Path, DiT, Config]:
        config = config_of(**model)
        theirs = DiT(config.model, REFERENCE)
        rng = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in theirs.parameters():
                p.copy_(torch.randn(p.shape, generator=rng) * 0.2)
            for name, value in theirs.fixed().items():
                theirs.get_parameter(name).copy_(value)
        save_pretrained(theirs, tmp_path / "theirs", config)
        return tmp_path / "theirs", theirs.eval(), config

    return trained


def started(source: Path, config: Config, theirs: Config) -> tuple[DiT, DiT, str]:
    """The started model, the same without a start, and what was said."""
    config = adopt(config, theirs.model, str(source))
    model, fresh = DiT(config.model, REFERENCE), DiT(config.model, REFERENCE)
    model.init_weights(7)
    fresh.init_weights(7)
    config = C.replace(config, run={"seed": 7})
    said = start_from(model, str(source), config)
    assert "\n" not in said
    return model.eval(), fresh, said


def inputs(channels: int = 3, side: int = 8):
    rng = torch.Generator().manual_seed(2)
    return torch.randn(3, channels, side, side, generator=rng), torch.tensor([0.0, 500.0, 999.0])


@torch.no_grad()
def test_what_no_shape_tells_comes_from_the_source(trained):
    source, theirs, config = trained(num_heads=4, time_embedding="diffusers", position="fixed")
    model, _, said = started(source, config_of(num_heads=3), config)
    x, t = inputs()
    assert torch.equal(model(x, t, torch.tensor([0, 4, 2])), theirs(x, t, torch.tensor([0, 4, 2])))
    assert said == f"started from {source}: 32 of 32 tensors taken as they are"
    unadopted = DiT(config_of(num_heads=3).model, REFERENCE)
    with pytest.raises(UserError, match="has other num_heads"):
        start_from(unadopted, str(source), config_of(num_heads=3))


@torch.no_grad()
def test_other_classes_are_initialised_and_the_null_class_is_taken(trained):
    source, theirs, config = trained(class_dropout=0.1)
    model, fresh, said = started(source, config_of(num_classes=7, class_dropout=0.2), config)
    assert torch.equal(model.y_embedder.weight[:7], fresh.y_embedder.weight[:7])
    x, t = inputs()
    null = torch.full((3,), 7)
    assert torch.equal(model(x, t, null), theirs(x, t, torch.full((3,), 5)))
    assert said.endswith("31 of 32 tensors taken as they are; 5 classes there: 7 initialised, the null class taken")


@torch.no_grad()
@pytest.mark.parametrize("dropout", [0.1, 0.0])
def test_without_classes_the_model_is_the_unlabelled_one(trained, dropout):
    source, theirs, config = trained(class_dropout=dropout)
    model, _, said = started(source, config_of(num_classes=0), config)
    x, t = inputs()
    if dropout:
        wanted = theirs(x, t, torch.full((3,), 5))
        assert (model(x, t) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert ("the null class is what" if dropout else "their mean is what") in said


@torch.no_grad()
def test_another_size_interpolates_the_position_embedding(trained):
    source, theirs, config = trained()
    model, _, said = started(source, config_of(input_size=(16, 8)), config)
    grid = theirs.pos_embed.T.reshape(1, 48, 4, 4)
    assert torch.equal(model.pos_embed, F.interpolate(grid, size=(8, 4), mode="bicubic")[0].flatten(1).T)
    assert said.endswith("31 of 32 tensors taken as they are; position embedding interpolated from 4×4 to 8×4 tokens")
    fixed = config_of(position="fixed")
    theirs = DiT(fixed.model, REFERENCE)
    theirs.init_weights(1)
    save_pretrained(theirs, source.parent / "fixed", fixed)
    model, _, said = started(source.parent / "fixed", config_of(input_size=(16, 8)), fixed)
    assert torch.equal(model.pos_embed, model.fixed()["pos_embed"])


@torch.no_grad()
def test_other_channels_take_those_that_both_have(trained):
    source, theirs, config = trained(learn_sigma=True)
    model, fresh, said = started(source, config_of(channels=4), config)
    x, t = inputs(4)
    assert torch.equal(model.x_embedder.weight.view(48, 4, 4)[:, :3], theirs.x_embedder.weight.view(48, 3, 4))
    assert torch.equal(model.x_embedder.weight.view(48, 4, 4)[:, 3], fresh.x_embedder.weight.view(48, 4, 4)[:, 3])
    x[:, 3] = 0  # what the new channel adds is nothing then
    y = torch.tensor([0, 4, 2])
    wanted = theirs(x[:, :3], t, y)[:, :3]
    assert (model(x, t, y)[:, :3] - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert "3 channels there, 4 here: 3 taken, the rest initialised" in said
    assert "the learned variance is left out" in said
    assert "it saw latents of no autoencoder" in said


def test_another_architecture_is_refused_by_name(trained):
    source, _, config = trained()
    with pytest.raises(UserError, match=r"starts a run with --model.depth 2 --model.conv_kernel 3\Z"):
        adopt(config_of(depth=3, conv_kernel=0), config.model, str(source))
    model = DiT(config.model, REFERENCE)
    weights = source / "model.safetensors"
    for name, said in (("gone.safetensors", "does not exist"), ("lone.safetensors", "no config.json beside it")):
        lone = source.parent / "elsewhere" / name
        lone.parent.mkdir(exist_ok=True)
        if name.startswith("lone"):
            shutil.copy(weights, lone)
        with pytest.raises(UserError, match=said):
            start_from(model, str(lone), config)


@torch.no_grad()
def test_runs_checkpoints_exports_and_files_start_alike(trained, tmp_path):
    source, theirs, config = trained()
    run = tmp_path / "run"
    checkpoints = Checkpoints(run / "checkpoints", 3)
    for images in (64, 128):
        values = {n: p.detach() + (images != 128) for n, p in theirs.named_parameters()}
        checkpoints.save(images, {f"model.{n}": p for n, p in values.items()}, {}, weights=values)
        checkpoints.wait()
    save_config(config, run / "config.json")
    (run / "checkpoints" / "000000000256").mkdir()  # incomplete
    newest = run / "checkpoints" / "000000000128"
    for kind in (source, source / "model.safetensors", run, newest, newest / "ema.safetensors"):
        model, _, said = started(kind, config, config)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), theirs.parameters(), strict=True)), kind
        assert said.startswith(f"started from {kind}: 32 of 32")


def whole_run(config: Config) -> int:
    return train.train(config)


def test_after_the_first_checkpoint_the_source_may_go(trained, run_ranks, tmp_path):
    source, _, _ = trained(num_classes=15, patch=8, input_size=(32, 32), num_heads=4, time_embedding="diffusers")
    config = C.replace(
        RECIPES["cats"],
        run={"name": "tuned", "folder": str(tmp_path)},
        data={"num_images": 64, "packs": str(tmp_path / "packs")},
        model={"patch": 8, "depth": 2, "width": 48, "num_heads": 3},
        sample={"num": 2, "steps": 2},
        train={"images": 32, "batch": 16, "warmup_images": 16, "lr_decay": "constant", "init_from": str(source)},
        parallel={"precision": "fp32"},
    )
    [first] = run_ranks.outcomes(1, whole_run, config, init=False)
    assert first.code == 0, first.error
    assert f"started from {source}: 32 of 32 tensors" in first.output
    saved = load_config(tmp_path / "tuned" / "config.json")
    assert (saved.model.num_heads, saved.model.time_embedding) == (4, "diffusers")
    shutil.rmtree(source)
    for init_from in (str(source), None):
        longer = C.replace(config, train={"images": 64 if init_from else 96, "init_from": init_from})
        [later] = run_ranks.outcomes(1, whole_run, longer, init=False)
        assert later.code == 0, later.error
        assert "started from" not in later.output
        assert load_config(tmp_path / "tuned" / "config.json").train.init_from == str(source)
