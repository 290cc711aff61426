"""Latents normalised per channel: statistics exact, the same on any number of ranks, and with the weights wherever they go."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

import fastdit
from fastdit import command, encode, export, plan, sample, train
from fastdit import config as C
from fastdit.config import Config, UserError
from fastdit.data import chunks, encoding, manifest, vae
from fastdit.data import pack as packs
from fastdit.data.normaliser import Normaliser
from fastdit.planning import costs
from fastdit.planning.gpus import GPUS
from fastdit.recipes import FAMILIES, NEWER, RECIPES, Family, derive, family
from fastdit.runtime import rng
from fastdit.runtime.ranks import World
from fastdit.runtime.run import load_config
from fastdit.weights.folder import locate, save_pretrained

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, 1, CPU)
OWN = {"latents_mean": [0.5, -1.0, 0.0, 0.25, 0.0, 2.0], "latents_std": [2.0, 0.5, 1.0, 1.5, 0.1, 3.0]}


def quiet(line: str) -> None:
    pass


def autoencoder(folder: Path, channels: int = 6, seed: int = 0, **options) -> Path:
    torch.manual_seed(seed)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    model = AutoencoderKL(
        **blocks, block_out_channels=[8, 16], norm_num_groups=4, latent_channels=channels, scaling_factor=0.5, **options
    )
    with torch.no_grad():  # so that channels differ as those of a trained one do
        model.quant_conv.bias[:channels] = torch.linspace(-3, 4, channels)
        model.quant_conv.weight[:channels] *= torch.linspace(0.5, 6, channels).view(-1, 1, 1, 1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(tmp_path) -> Path:
    for n in range(23):
        file = tmp_path / "pictures" / "ab"[n % 2] / f"{n:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
    return tmp_path / "pictures"


def config_of(tmp_path: Path, folder: Path, **groups) -> Config:
    """What a command line would give for these pictures and this autoencoder."""
    typed = C.replace(
        RECIPES["cats"],
        run={"name": "tiny", "folder": str(tmp_path / "runs")},
        data={"path": str(tmp_path / "pictures"), "image_size": (16, 16), "vae": str(folder), "packs": str(tmp_path / "packs")},
        model={"patch": 4, "depth": 1, "width": 32, "num_heads": 2},
        sample={"num": 2, "steps": 2},
        train={"images": 64, "batch": 16, "warmup_images": 16},
        log={"print_every": 16, "sample_every": 64, "save_every": 32},
        parallel={"threads": 1, "precision": "fp32"},
    )
    return C.replace(derive(typed, RECIPES["cats"]), **groups)


def rows_of(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance of a pack's latents, fp64 [C, ·]."""
    m, data = packs.open_data(path)
    rows = data.read(0, torch.empty((m.count, *m.shape), dtype=torch.bfloat16))
    mean, logvar = rows.double().transpose(0, 2).flatten(1).chunk(2)
    return mean, logvar


# --- what is known before it is loaded ---


def test_the_family_follows_from_the_config_of_a_folder_or_the_name_on_the_hub(tmp_path):
    assert family(str(autoencoder(tmp_path / "sd", 4))) == Family(4, 2, "scalar")
    assert family(str(autoencoder(tmp_path / "six"))) == Family(6, 2, "channel")
    four = {name: values[:4] for name, values in OWN.items()}
    assert family(str(autoencoder(tmp_path / "own", 4, **four))) == Family(4, 2, "channel")
    assert family("stabilityai/sd-vae-ft-mse@main") == Family(4, 8, "scalar")
    assert family("REPA-E/e2e-vavae-hf") == Family(32, 16, "channel")
    assert family("nobody/unheard-of/vae") is NEWER
    for text in ("{", "[]", "{}", '{"latent_channels": 0, "block_out_channels": [1]}', '{"latent_channels": 4}'):
        (tmp_path / "six" / "config.json").write_text(text)
        assert family(str(tmp_path / "six")) is NEWER


def test_a_command_gets_sizes_and_choice_from_the_autoencoder(tmp_path, pictures):
    config = config_of(tmp_path, autoencoder(tmp_path / "vae"))
    assert (config.model.channels, config.model.input_size, config.data.latents) == (6, (8, 8), "channel")
    typed = command.parse(["cats-256", "--data.vae", "REPA-E/e2e-vavae-hf"], "", "")
    assert (typed.model.channels, typed.model.input_size, typed.data.latents) == (32, (16, 16), "channel")
    assert command.parse(["cats"], "", "").data.latents == "scalar"


def test_every_recipe_says_of_its_autoencoder_what_its_family_is():
    for recipe in RECIPES.values():
        if recipe.data.vae:
            known = family(recipe.data.vae)
            assert known in FAMILIES.values()
            sides = tuple(side // known.factor for side in recipe.data.image_size)
            assert (recipe.model.channels, recipe.model.input_size, recipe.data.latents) == (
                known.channels,
                sides,
                known.latents,
            )


def test_the_packs_of_sds_autoencoders_keep_their_names():
    """By the names that they had before there was a choice."""
    names = {name: encoding.folder(RECIPES[name].data).name for name in ("cats-256", "imagenet-256-xl", "cats-256-fast")}
    assert names == {
        "cats-256": "huggan-cats-256x256-sd-vae-ft-mse-d9229ba77c",
        "imagenet-256-xl": "ilsvrc-imagenet-1k-256x256-sd-vae-ft-ema-8c8935317d",
        "cats-256-fast": "huggan-cats-256x256-sd-vae-ft-mse-d9229ba77c",
    }
    data = RECIPES["cats-256"].data
    assert encoding.folder(C.replace(C.Config(data=data), data={"latents": "channel"}).data).name != names["cats-256"]


def test_a_plan_of_the_newer_autoencoder_needs_no_network(monkeypatch, capsys):
    import socket

    def refuse(*_):
        raise AssertionError("a plan went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    plan.plan(plan.parse(["cats-256-vavae", "--gpus", "8"]))
    assert "cats-256-vavae" in capsys.readouterr().out
    bound = costs.bound(RECIPES["cats-256-vavae"], costs.Cluster(GPUS["a100-80gb"], 8, 1, 25.0))
    page = (Path(__file__).parent.parent / "docs" / "quality.md").read_text()
    assert f"bound at {bound.images / bound.step_s:,.0f} images a second on 8 A100-80GB. Nobody" in " ".join(page.split())


# --- the statistics ---


def manifest_of(config: Config, chunk: int) -> str:
    """As one rank: encode in small chunks. → the content of manifest.json."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    world = World(rank, size, rank, size, CPU) if torch.distributed.is_initialized() else ALONE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK", chunk)
        return (encoding.ensure(config, world, quiet) / "manifest.json").read_text()


def test_statistics_are_exact_over_all_images_and_their_posterior(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 7)
    monkeypatch.setattr(chunks, "BATCH", 3)
    path = encoding.ensure(config_of(tmp_path, autoencoder(tmp_path / "vae")), ALONE, quiet)
    m = packs.read_manifest(path)
    mean, logvar = rows_of(path)
    variance = mean.var(1, correction=0) + logvar.exp().mean(1)
    torch.testing.assert_close(torch.tensor(m.latents_mean, dtype=torch.float64), mean.mean(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.tensor(m.latents_std, dtype=torch.float64), variance.sqrt(), rtol=1e-12, atol=0)
    assert m.normaliser == {"kind": "mean_std", "x": {"offset": m.latents_mean, "scale": m.latents_std}}
    ours, unit = encode.statistics(m)
    assert ours.abs().max() < 1e-6
    assert (unit - 1).abs().max() < 1e-6
    assert encode.report(path)[-2] == "latents: each channel by a mean and deviation of its own, those of these images"


def test_one_two_and_three_ranks_write_the_same_manifest(tmp_path, pictures, run_ranks):
    config = config_of(tmp_path, autoencoder(tmp_path / "vae"))
    found = []
    for world in (1, 2, 3):
        own = C.replace(config, data={"packs": str(tmp_path / f"packs{world}")})
        found += run_ranks(world, manifest_of, own, 4)
    assert len(set(found)) == 1
    assert len(json.loads(found[0])["chunks"]) == 6


def test_what_an_autoencoders_config_says_goes_before(tmp_path, pictures):
    path = encoding.ensure(config_of(tmp_path, autoencoder(tmp_path / "vae", **OWN)), ALONE, quiet)
    m = packs.read_manifest(path)
    assert m.normaliser == {"kind": "mean_std", "x": {"offset": OWN["latents_mean"], "scale": OWN["latents_std"]}}
    mean, _ = rows_of(path)
    assert m.latents_mean == pytest.approx(mean.mean(1).tolist(), rel=1e-12)
    said, shown = encode.report(path)[-2:]
    assert said == "latents: each channel by a mean and deviation of its own, those of the autoencoder's config"
    expected = (mean.mean(1) - torch.tensor(OWN["latents_mean"])) / torch.tensor(OWN["latents_std"])
    assert f"mean {' '.join(f'{x:.3f}' for x in expected.tolist())};" in shown


@pytest.mark.parametrize("values", [[1.0], [1.0] * 5 + [0.0], ["x"] * 6], ids=["too few", "no deviation", "no numbers"])
def test_an_autoencoder_whose_statistics_are_none_is_one_line(tmp_path, values):
    config = json.loads((autoencoder(tmp_path / "vae", **OWN) / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {"latents_mean": values, "latents_std": values}))
    with pytest.raises(UserError, match=rf"\A--data\.vae {tmp_path}/vae: [^\n]*\Z"):
        vae.load(C.DataConfig(vae=str(tmp_path / "vae")), CPU)


def test_a_channel_that_never_changes_keeps_its_scale():
    found = vae.per_channel(torch.tensor([1.0, 2.0]).double(), torch.tensor([0.0, 3.0]).double())
    assert found.x == ((1.0, 2.0), (1.0, 3.0))


def test_a_pack_made_in_python_has_them_too(tmp_path):
    pixels = torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8)
    data = torch.utils.data.TensorDataset(pixels, torch.arange(9) % 3)
    for name, channels, normalised in (("new", 6, True), ("sd", 4, False)):
        folder = autoencoder(tmp_path / f"vae-{name}", channels)
        path = encoding.pack_dataset(data, tmp_path / name, image_size=(16, 16), vae=str(folder))
        m = packs.read_manifest(path)
        assert (len(m.latents_mean), m.normaliser is not None) == (channels, normalised)


# --- batches, and back ---


def test_batches_have_mean_0_and_deviation_1_and_decode_to_the_same_pixels(tmp_path, pictures):
    config = config_of(tmp_path, autoencoder(tmp_path / "vae"))
    config = C.replace(config, data={"hflip": True})  # as the statistics are, of both
    pack = encoding.open_pack(config, ALONE, quiet)
    x0 = pack.batch(0, 23 * 200).x0.double().transpose(0, 1).flatten(1)  # each image 200 times, with noise of its own
    assert x0.mean(1).abs().max() < 0.01
    assert (x0.std(1) - 1).abs().max() < 0.01
    loaded = vae.of(config, CPU, pack.manifest.vae_sha256, pack.normaliser)
    direct = AutoencoderKL.from_pretrained(tmp_path / "vae", low_cpu_mem_usage=False)
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        latents = direct.encode(images).latent_dist.mean
        wanted = direct.decode(latents).sample
    z = loaded.scaled(loaded.moments(images)[:, :6])
    m = pack.manifest
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (m.latents_mean, m.latents_std))
    torch.testing.assert_close(z, (latents - mean) / std, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loaded.decode(z), wanted, rtol=0, atol=1e-5)
    moments = torch.randn(2, 12, 8, 8)
    exact = (moments[:, :6].double() + (0.5 * moments[:, 6:].double()).exp() * 0.25 - mean.double()) / std.double()
    drawn = packs.posterior(moments, torch.full((2, 6, 8, 8), 0.25), *manifest.scaling(m, CPU))
    torch.testing.assert_close(drawn.double(), exact, rtol=0, atol=1e-5)


# --- a whole run, and wherever its weights go ---


def run(config: Config) -> None:
    command.run(train.train, lambda argv: config)


def drawn(source: Path | str, out: Path) -> torch.Tensor:
    """What sample.py writes: two pictures of seed 0, uint8 [2, 3, 16, 16]."""
    sample.sample(sample.Options(str(source), num_images=2, out=str(out), singles=True, precision="fp32"))
    files = sorted(out.rglob("0000*.png"))
    return torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])


def test_a_run_resumes_exports_and_decodes_alike_everywhere(tmp_path, pictures, run_ranks):
    config = config_of(tmp_path, autoencoder(tmp_path / "vae"))
    half = C.replace(config, train={"images": 32, "lr_decay": "constant"})
    whole = C.replace(config, train={"lr_decay": "constant"})
    for asked in (half, whole):
        [end] = run_ranks.outcomes(1, run, asked, init=False)
        assert end.code == 0, end.error + end.output
    folder = tmp_path / "runs" / "tiny"
    uninterrupted = C.replace(whole, run={"name": "at-once"})
    [end] = run_ranks.outcomes(1, run, uninterrupted, init=False)
    assert end.code == 0, end.error + end.output
    sums = [
        (tmp_path / "runs" / name / "checkpoints" / f"{64:012d}" / "SHA256SUMS").read_text() for name in ("tiny", "at-once")
    ]
    assert sums[0] == sums[1]

    kept = packs.read_manifest(encoding.folder(config.data)).normaliser
    assert load_config(folder / "config.json").data.latents == "channel"
    assert json.loads((folder / "normaliser.json").read_text()) == kept
    [truth] = run_ranks(1, drawn, folder, tmp_path / "a", init=False)
    exported = export.export(export.Options(str(folder)))
    pipeline = export.export(export.Options(str(folder), format="pipeline"))
    assert json.loads((exported / "normaliser.json").read_text()) == kept
    assert "each channel brought to mean 0 and deviation 1 by `normaliser.json`" in (exported / "README.md").read_text()
    with pytest.raises(UserError, match=r"DiTPipeline scales all channels of the latents alike"):
        export.export(export.Options(str(folder), format="diffusers", out=str(tmp_path / "theirs")))
    for source in (exported, folder / "checkpoints" / f"{64:012d}", folder / "checkpoints" / f"{64:012d}" / "ema.safetensors"):
        [found] = run_ranks(1, drawn, source, tmp_path / f"{source.name}-pictures", init=False)
        assert torch.equal(found, truth), source
        assert torch.equal(fastdit.sample(fastdit.load(source, "cpu", precision="fp32"), num=2), truth), source
    again = tmp_path / "again"
    model = fastdit.load(exported, "cpu", precision="fp32")
    save_pretrained(model, again, model.run)
    assert torch.equal(fastdit.sample(fastdit.load(again, "cpu", precision="fp32"), num=2), truth)

    from fastdit.weights.pipeline import FastDiTPipeline

    pipe = FastDiTPipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    noise = rng.normal((6, 8, 8), 0, "sample noise", 0, 2, CPU)
    images = pipe(class_labels=[0, 1], latents=noise, output_type="pt").images
    assert (images * 255 - truth).abs().max() <= 0.6  # a grey level's half, for rounding, and what the solvers round apart
    pipe._units = None  # by the one scale the pixels are others
    assert (pipe(class_labels=[0, 1], latents=noise, output_type="pt").images * 255 - truth).abs().max() > 20

    # Another autoencoder in the same place: a loaded model refuses it as sample.py does, where the run says whose it saw.
    swapped = fastdit.load(folder, "cpu", precision="fp32")
    shutil.rmtree(tmp_path / "vae")
    autoencoder(tmp_path / "vae", seed=1)
    with pytest.raises(UserError, match=r"is not the autoencoder that made the latents \(SHA-256 [0-9a-f]{16} then"):
        fastdit.sample(swapped, num=1)

    alone = shutil.copytree(exported, tmp_path / "alone")  # not below the run, which has one too
    (alone / "normaliser.json").unlink()
    with pytest.raises(UserError, match=r"holds no normaliser\.json, which says in which units the model's latents are"):
        locate(alone)
    Normaliser("mean_std", Normaliser.from_dict(kept).x._replace(offset=(0.0,), scale=(1.0,))).write(alone)
    with pytest.raises(UserError, match=r"its normaliser\.json is not of 6 channels and 0 conditions"):
        locate(alone)


def test_a_run_and_a_pack_from_before_go_on_to_the_bit(tmp_path, pictures, run_ranks):
    """Of an autoencoder that would be normalised per channel today: the same command goes on with one scale for all."""
    config = C.replace(config_of(tmp_path, autoencoder(tmp_path / "vae")), train={"lr_decay": "constant"})
    old = C.replace(config, data={"latents": "scalar"})
    for asked in (C.replace(old, train={"images": 32}), C.replace(old, run={"name": "at-once"})):
        [end] = run_ranks.outcomes(1, run, asked, init=False)
        assert end.code == 0, end.error + end.output
    file, pack = tmp_path / "runs" / "tiny" / "config.json", encoding.folder(old.data)
    about = json.loads(file.read_text())
    assert about["data"].pop("latents") == "scalar"
    file.write_text(json.dumps(about))
    fields = json.loads((pack / "manifest.json").read_text())
    (pack / "manifest.json").write_text(json.dumps({k: v for k, v in fields.items() if not k.startswith("latents_")}))
    assert "scaled latents" not in encode.report(pack)[-1]
    [end] = run_ranks.outcomes(1, run, config, init=False)
    assert end.code == 0, end.error + end.output
    sums = [
        (tmp_path / "runs" / name / "checkpoints" / f"{64:012d}" / "SHA256SUMS").read_text() for name in ("tiny", "at-once")
    ]
    assert sums[0] == sums[1]
    assert not (tmp_path / "runs" / "tiny" / "normaliser.json").exists()
    assert load_config(file).data.latents == "scalar"
    assert [path.name for path in (tmp_path / "packs").iterdir()] == [pack.name]
    # And where it has to be encoded anew, it is as it was.
    before = (pack / "data.bin").read_bytes()
    shutil.rmtree(pack)
    [end] = run_ranks.outcomes(1, run, C.replace(config, train={"images": 64}), init=False)
    assert end.code == 0, end.error + end.output
    assert (pack / "data.bin").read_bytes() == before
    assert packs.read_manifest(pack).normaliser is None
