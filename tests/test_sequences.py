"""Sequences, clips, conditions and padding: the model, its losses, and whole runs that stop, resume, sample and export."""

import dataclasses
import importlib
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from fastdit_kernels.attention import sdpa
from fastdit_kernels.cpu import CPU
from fastdit_kernels.reference import REFERENCE
from safetensors.torch import load_file, save_file

import fastdit
from fastdit import config as C
from fastdit import report, sample
from fastdit.command import parse_run
from fastdit.config import Config, DiffusionConfig, ModelConfig, UserError
from fastdit.data.cats import Cats
from fastdit.data.normaliser import Affine, Normaliser
from fastdit.diffusion import DDPM, Drawn, Flow, Labels, draw
from fastdit.embeddings import mean_within
from fastdit.export import Options as ExportOptions
from fastdit.export import export
from fastdit.given import Given, asked
from fastdit.model import DiT
from fastdit.planning.memory import num_parameters
from fastdit.recipes import RECIPES
from fastdit.runtime import saved, sharding
from fastdit.runtime.validation import fit
from fastdit.sampling import sample as draw_samples
from fastdit.weights.folder import save_pretrained
from fastdit.weights.layouts import named_shapes
from fastdit.weights.start import start_from

with pytest.MonkeyPatch.context() as patch:  # a file beside this one, which is no package
    patch.syspath_prepend(Path(__file__).parent)
    whole_runs = importlib.import_module("whole_runs")

SEQUENCE = ModelConfig(
    input_size=(12,), channels=3, num_classes=4, condition=5, patch=1, depth=2, width=32, num_heads=2, conv_kernel=4
)
CLIP = dataclasses.replace(SEQUENCE, input_size=(4, 4, 6), patch=2, num_classes=0)


def random_model(config: ModelConfig, ops=REFERENCE) -> DiT:
    model, rng = DiT(config, ops), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * 0.2)
    return model


def inputs(config: ModelConfig, B: int = 4) -> tuple[torch.Tensor, torch.Tensor, Given]:
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(B, config.channels, *config.input_size, generator=rng)
    t = torch.randint(0, 1000, (B,), generator=rng)
    y = torch.randint(0, config.num_classes, (B,), generator=rng) if config.num_classes else None
    condition = torch.randn(B, config.condition, generator=rng) if config.condition else None
    length = torch.randint(1, config.input_size[0], (B,), generator=rng)
    return x, t, Given(y, condition, length)


# --- conditions ---


@pytest.mark.parametrize("config", [SEQUENCE, CLIP, dataclasses.replace(SEQUENCE, class_dropout=0.1)], ids=["1d", "3d", "null"])
def test_a_condition_moves_its_own_sample_alone(config):
    model, (x, t, given) = random_model(config), inputs(config)
    condition = given.condition
    for b in range(len(x)):
        changed = condition.clone()
        changed[b, 1] += 1
        moved = (model(x, t, given.y, condition=condition) != model(x, t, given.y, condition=changed)).flatten(1).any(1)
        assert moved.tolist() == [i == b for i in range(len(x))]


def test_every_parameter_of_a_conditioned_model_is_trained_and_counted():
    config = dataclasses.replace(SEQUENCE, class_dropout=0.1)
    model, (x, t, given) = random_model(config), inputs(config)
    condition = given.condition.clone()
    condition[0] = torch.nan
    model(x, t, given.y, condition=condition).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()] == []
    assert num_parameters(config) == sum(shape.numel() for _, shape in named_shapes(config))


def test_the_null_condition_is_a_row_of_nan_whatever_else_is_in_it():
    config = dataclasses.replace(SEQUENCE, class_dropout=0.1)
    model, (x, t, given) = random_model(config), inputs(config)
    null = torch.full_like(given.condition, torch.nan)
    other = given.condition.clone()
    other[:, 2] = torch.nan
    found = model(x, t, given.y, condition=null)
    assert found.isfinite().all()
    assert torch.equal(found, model(x, t, given.y, condition=other))
    assert not torch.equal(found, model(x, t, given.y, condition=given.condition))


def test_dropout_drops_class_and_condition_together_whatever_the_batch():
    labels, y, condition = Labels(4, 0.3), torch.arange(200) % 4, torch.ones(200, 5)
    kept = labels.drop(Given(y, condition), 3, 0)
    null = kept.condition.isnan().all(1)
    assert torch.equal(null, kept.y == 4)
    assert 30 < null.sum() < 90
    part = labels.drop(Given(y[50:], condition[50:]), 3, 50)
    assert torch.equal(part.y, kept.y[50:])
    alone = labels.drop(Given(None, condition), 3, 0)
    assert torch.equal(alone.condition.isnan(), kept.condition.isnan())


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_samples_of_conditions_are_the_same_alone_and_in_a_batch(guidance):
    config = dataclasses.replace(SEQUENCE, class_dropout=0.1)
    model, (x, _, given) = random_model(config), inputs(config)
    flow = DiffusionConfig("flow", "velocity", clip_x0=False)

    def make(part: slice) -> torch.Tensor:
        y, condition, length = given.each(lambda whole: whole[part])
        shape = (len(y), *x.shape[1:])
        return draw_samples(
            model,
            flow,
            shape,
            y,
            condition=condition,
            length=length,
            steps=3,
            guidance=guidance,
            first=part.start,
            null_class=4,
        )

    whole = make(slice(0, 4))
    assert whole.isfinite().all()
    for n in range(4):
        torch.testing.assert_close(make(slice(n, n + 1))[0], whole[n], rtol=1e-4, atol=1e-4)


# --- padding ---

CASES = {
    "sequence": SEQUENCE,
    "patches": dataclasses.replace(SEQUENCE, patch=4, qk_norm=True),
    "clip": CLIP,
    "image": dataclasses.replace(SEQUENCE, input_size=(8, 6), patch=2, conv_kernel=3),
    "plain": dataclasses.replace(SEQUENCE, conv_kernel=0),
}


def within(x: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    found = torch.zeros_like(x, dtype=torch.bool)
    for b, n in enumerate(length.tolist()):
        found[b, :, :n] = True
    return found


@pytest.mark.parametrize("ops", [REFERENCE, CPU], ids=["reference", "cpu"])
@pytest.mark.parametrize("name", CASES)
def test_what_stands_in_the_padding_changes_no_bit(name, ops):
    """Outputs at valid positions, the loss and every gradient, with NaN, huge numbers or zeros in the padding."""
    config = CASES[name]
    x, t, given = inputs(config)
    inside, noise = within(x, given.length), torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    flow, found = Flow(DiffusionConfig("flow", "velocity")), []
    for poison in (0.0, torch.nan, 1e30):
        model, x0 = random_model(config, ops), torch.where(inside, x, poison)
        out = model(x0, t, given.y, condition=given.condition, length=given.length)
        losses = flow.losses_of(model, Drawn(x0, noise, t.float(), given))
        losses.sum().backward()
        found.append((torch.where(inside, out, 0), losses, *(p.grad for p in model.parameters())))
    assert all(part.isfinite().all() for part in found[0])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("ops", [REFERENCE, CPU], ids=["reference", "cpu"])
def test_a_padded_sequence_is_the_short_one(ops):
    """What a grid of 7 makes of a sequence, a grid of 12 makes of it with five positions of padding: attention, convolution."""
    for config in (SEQUENCE, dataclasses.replace(SEQUENCE, conv_kernel=7, qk_norm=True), CLIP):
        short, n = dataclasses.replace(config, input_size=(3, *config.input_size[1:])), 3
        long_model, short_model = random_model(config, ops), DiT(short, ops)
        state = long_model.state_dict()
        state["pos_embed"] = state["pos_embed"][: short.num_tokens]
        short_model.load_state_dict(state)
        x, t, given = inputs(config)
        length = torch.full((len(x),), n)
        out = long_model(x, t, given.y, condition=given.condition, length=length)[:, :, :n]
        truth = short_model(x[:, :, :n], t, given.y, condition=given.condition)
        assert (out - truth).abs().max() <= 1e-5 * truth.abs().max()
        assert not torch.allclose(long_model(x, t, given.y, condition=given.condition)[:, :, :n], truth, rtol=1e-3)


def test_the_loss_is_the_mean_over_positions_that_are_no_padding():
    values, length = torch.randn(3, 2, 5, 4), torch.tensor([1, 5, 3])
    found = mean_within(values, length)
    truth = torch.stack([v[:, :n].mean() for v, n in zip(values, length.tolist(), strict=True)])
    torch.testing.assert_close(found, truth)
    assert torch.equal(mean_within(values, None), values.flatten(1).mean(1))


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_ddpm_leaves_the_padding_out_too(learn_sigma):
    config = dataclasses.replace(SEQUENCE, learn_sigma=learn_sigma)
    x, _, given = inputs(config)
    inside = within(x, given.length)
    process = DDPM(DiffusionConfig(), learn_sigma=learn_sigma)
    losses = [
        process.losses_of(random_model(config), draw(process, torch.where(inside, x, poison), given, 0, 0))
        for poison in (0.0, torch.nan)
    ]
    assert losses[0].isfinite().all()
    assert torch.equal(*losses)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler's own, as it looks about
def test_compiled_blocks_leave_the_padding_out_too():
    x, t, given = inputs(SEQUENCE)
    model, compiled = random_model(SEQUENCE, CPU), random_model(SEQUENCE, CPU)
    torch._dynamo.reset()
    for block in compiled.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    found = [
        m(torch.where(within(x, given.length), x, torch.nan), t, given.y, condition=given.condition, length=given.length)
        for m in (model, compiled)
    ]
    torch._dynamo.reset()
    inside = within(found[0], given.length)
    torch.testing.assert_close(found[1][inside], found[0][inside], rtol=1e-5, atol=1e-5)


def test_padding_changes_no_bit_in_bf16_and_under_recomputation():
    x, t, given = inputs(SEQUENCE)
    inside, found = within(x, given.length), []
    for poison in (0.0, torch.nan):
        model = random_model(SEQUENCE, CPU).bfloat16()
        sharding.checkpoint(model, C.ParallelConfig(checkpoint_activations=True))
        out = model(torch.where(inside, x, poison), t, given.y, condition=given.condition, length=given.length)
        torch.where(inside, out, 0).square().sum().backward()
        found.append((torch.where(inside, out, 0), *(p.grad for p in model.parameters())))
    assert all(part.isfinite().all() for part in found[0])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["image", "sequence", "clip"])
def test_the_kernels_leave_the_padding_out_too(name, device):
    """GELU of what stands there is 0 in the Triton kernel too, forward and backward."""
    from fastdit_kernels.triton_ops import TRITON  # here: after the interpreter has been chosen, where there is no GPU

    config = CASES[name]
    x, t, given = (
        part.to(device) if isinstance(part, torch.Tensor) else part.each(lambda p: p.to(device)) for part in inputs(config, 2)
    )
    inside, found = within(x, given.length), []
    for ops, poison in ((REFERENCE, 0.0), (TRITON, 0.0), (TRITON, torch.nan)):
        model = random_model(config, ops._replace(attention=sdpa)).to(device)
        out = model(torch.where(inside, x, poison), t, given.y, condition=given.condition, length=given.length)
        torch.where(inside, out, 0).square().sum().backward()
        found.append((torch.where(inside, out, 0), *(p.grad for p in model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(found[1], found[2], strict=True))
    for a, b in zip(found[0], found[1], strict=True):
        assert (a - b).abs().max() <= 1e-3 * a.abs().max()


# --- bad input ---


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"condition": torch.zeros(3)}, "conditions of 2×3 numbers; the model takes 2×5 for 2 samples"),
        ({"condition": torch.zeros(3, 5)}, "conditions of 3×5 numbers"),
        ({"condition": [1.0, 2, 3, 4, float("nan")]}, "not finite"),
        ({}, "needs a condition of 5 numbers"),
        ({"condition": torch.zeros(5), "length": 13}, r"lengths of \[13, 13\]; expected 2, each from 1 to 12"),
        ({"condition": torch.zeros(5), "length": [3, 0]}, r"lengths of \[3, 0\]"),
        ({"condition": torch.zeros(5), "length": [1, 2, 3]}, r"lengths of \[1, 2, 3\]; expected 2"),
    ],
    ids=str,
)
def test_what_a_model_cannot_take_is_one_line(given, said):
    with pytest.raises(UserError, match=said) as error:
        asked(SEQUENCE, 2, torch.tensor([0, 1]), given.get("condition"), given.get("length"))
    assert "\n" not in str(error.value)


def test_settings_for_data_not_seen_yet_are_judged_once_they_are():
    """What divides a sequence need not divide the pictures that a path might have held."""
    given = ["--data.path", "somewhere", "--model.patch", "5", "--model.conv_kernel", "7", "--model.class_dropout", "0.1"]
    config, _ = parse_run(given, "train.py", "")
    fitted = fit(config, (3, 20), 0, 4, "mean_std")
    assert (fitted.model.grid, fitted.model.condition, fitted.data.kind) == ((4,), 4, "arrays")
    for shape, condition, said in (
        ((3, 12), 4, r"--model\.patch 5 does not divide the network's input of 12$"),
        ((3, 20), 0, r"--model\.class_dropout needs classes or conditions"),
        ((3, 20, 20), 4, r"--model\.conv_kernel is 7; valid are 3, 4, 5, and 0"),
    ):
        with pytest.raises(UserError, match=said):
            fit(config, shape, 0, condition, "mean_std")
    clip = C.replace(config, model={"conv_kernel": 3})
    with pytest.raises(UserError, match=r"--model\.patch 5 does not divide the network's input of 8×16×16 rows and columns"):
        fit(clip, (3, 8, 16, 16), 0, 4, "mean_std")
    assert fit(clip, (3, 8, 10, 15), 0, 4, "mean_std").model.grid == (8, 2, 3)
    with pytest.raises(UserError, match="it compares pictures, and the data are arrays"):
        fit(C.replace(clip, eval={"every_images": 100}), (3, 20), 0, 4, "mean_std")


def test_the_network_itself_names_a_condition_of_another_width():
    model, (x, t, given) = random_model(SEQUENCE), inputs(SEQUENCE)
    with pytest.raises(UserError, match=r"a condition of 4×4; this model takes 5 numbers a sample"):
        model(x, t, given.y, condition=given.condition[:, :4])
    with pytest.raises(UserError, match="no condition; this model takes 5 numbers"):
        model(x, t, given.y)


def test_a_start_from_other_conditions_says_what_is_new(tmp_path):
    def config(**model) -> Config:
        model = {**dataclasses.asdict(SEQUENCE), **model}
        return C.replace(Config(), model=model, data={"kind": "arrays", "path": "x"}, diffusion={"clip_x0": False})

    theirs = config()
    model = random_model(theirs.model)
    model.normaliser = Normaliser("mean_std", Affine((0.0,) * 3, (1.0,) * 3), Affine((0.0,) * 5, (1.0,) * 5))
    save_pretrained(model, tmp_path / "theirs", theirs)
    for change, said in (
        ({}, "34 of 34 tensors"),
        ({"condition": 7}, "the condition of 7 numbers, or its null, is initialised"),
        ({"condition": 0}, "its condition of 5 numbers is left out"),
        ({"input_size": (20,)}, "position embedding interpolated from 12 to 20 tokens"),
    ):
        ours = config(**change)
        ours_model = DiT(ours.model, REFERENCE)
        ours_model.init_weights(0)
        assert said in start_from(ours_model, str(tmp_path / "theirs"), ours), change
        assert torch.equal(ours_model.x_embedder.weight, model.x_embedder.weight)
    other = config(input_size=(4, 3))
    with pytest.raises(UserError, match="sequences, images and videos do not start from each other"):
        start_from(DiT(other.model, REFERENCE), str(tmp_path / "theirs"), other)


# --- whole runs ---

BATCH, STEPS = 8, 6


def mel(folder: Path) -> None:
    """Sequences like a spectrogram: 20 bands, unequal lengths, three classes, a condition of three numbers."""
    rng = torch.Generator().manual_seed(0)
    N, bands, L = 24, 20, 16
    condition = torch.randn(N, 3, generator=rng) * 5 + 100
    tones = torch.sin(torch.arange(L) * (1 + torch.arange(bands)[:, None] / 7)) * 40 - 20
    x = tones + condition[:, :1, None] + torch.randn(N, bands, L, generator=rng)
    length = torch.randint(3, L + 1, (N,), generator=rng)
    for row, n in zip(x, length.tolist(), strict=True):
        row[:, n:] = torch.nan
    save_file({"x": x, "condition": condition, "label": torch.arange(N) % 3, "length": length}, folder / "a.safetensors")


def clip(folder: Path) -> None:
    """Eight frames of cats that move to the right."""
    cats = torch.from_numpy(Cats(16, 32).images(0, 16)).permute(0, 3, 1, 2)[:, :, ::2, ::2] / 127.5 - 1
    frames = torch.stack([cats.roll(f, -1) for f in range(8)], 2)
    save_file({"x": frames.contiguous()}, folder / "cats.safetensors")


MADE = {"mel": mel, "clip": clip}


def settings(folder: Path, name: str, run: str, **groups: dict) -> Config:
    config = C.replace(
        RECIPES["cats"],
        run={"name": run, "folder": str(folder / "runs")},
        data={
            "path": str(folder / name),
            "packs": str(folder / "packs"),
            "normaliser": "min_max" if name == "clip" else "mean_std",
        },
        model={"patch": 1 if name == "mel" else 4, "depth": 2, "width": 32, "num_heads": 2},
        sample={"num": 4, "steps": 2},
        train={"images": STEPS * BATCH, "batch": BATCH, "warmup_images": 8},
        log={"print_every": BATCH, "sample_every": 3 * BATCH, "save_every": 6 * BATCH},
        parallel={"threads": 1, "precision": "fp32"},
    )
    return C.replace(config, **groups)


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = saved.newest(run / "checkpoints")
    assert newest is not None
    return load_file(newest / saved.WEIGHTS)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", params=MADE)
def finished(request, run_ranks, tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp(request.param)
    (folder / request.param).mkdir()
    MADE[request.param](folder / request.param)
    assert run_ranks(1, whole_runs.run, settings(folder, request.param, "whole"), init=False) == [0]
    return folder, request.param


def test_a_run_stopped_and_resumed_ends_at_the_same_bits(finished, run_ranks):
    folder, name = finished
    config = settings(folder, name, "stopped")
    assert run_ranks(1, whole_runs.run_signalled, config, 3, signal.SIGTERM, init=False) == [128 + signal.SIGTERM]
    assert run_ranks(1, whole_runs.run, config, init=False) == [0]
    ours, truth = weights(folder / "runs" / "stopped"), weights(folder / "runs" / "whole")
    assert ours.keys() == truth.keys()
    assert all(torch.equal(ours[n], truth[n]) for n in truth)
    lines = [losses(folder / "runs" / r) for r in ("whole", "stopped")]
    assert lines[0] == lines[1]
    last = f"{STEPS * BATCH:09d}.safetensors"
    ours, truth = (load_file(folder / "runs" / r / "samples" / last)["x"] for r in ("stopped", "whole"))
    assert torch.equal(ours, truth)


def test_a_finished_run_samples_exports_and_loads_in_physical_units(finished, tmp_path):
    folder, name = finished
    run = folder / "runs" / "whole"
    out = export(ExportOptions(str(run), out=str(tmp_path / "export")))
    assert "Arrays of" in (out / "README.md").read_text()
    given = {"condition": torch.tensor([100.0, 95, 103]), "length": [16, 5, 9]} if name == "mel" else {}
    made = [fastdit.sample(fastdit.load(source, "cpu", precision="fp32"), num=3, **given) for source in (run, out)]
    assert torch.equal(*made)
    x = load_file(folder / name / ("a.safetensors" if name == "mel" else "cats.safetensors"))["x"]
    assert made[0].shape == (3, *x.shape[1:])
    assert made[0].isfinite().all()
    if name == "mel":
        assert not made[0][1, :, 5:].any()  # beyond its length
        assert made[0][0].mean() > 20  # the data's mean is 80, the network's own numbers are about 0
    else:
        assert made[0].abs().max() <= 1.001

    if name == "mel":
        np.save(tmp_path / "c.npy", given["condition"][None].numpy())
    options = sample.Options(
        str(run),
        3,
        precision="fp32",
        out=str(tmp_path / "s"),
        **({"condition": str(tmp_path / "c.npy")} if name == "mel" else {}),
    )
    sample.sample(options)
    [file] = (tmp_path / "s").glob("*.safetensors")
    whole = {"condition": given["condition"]} if name == "mel" else {}
    again = fastdit.sample(fastdit.load(run, "cpu", precision="fp32"), num=3, **whole)
    assert torch.equal(load_file(file)["x"], again)
    assert file.with_suffix(".png").is_file()

    assert "arrays of" in report.report(report.Options(str(run), out=str(tmp_path / "report.html"))).read_text()
    for format in ("diffusers", "pipeline"):
        with pytest.raises(UserError, match="this model makes arrays"):
            export(ExportOptions(str(run), format=format, out=str(tmp_path / format)))
    (out / "normaliser.json").unlink()
    with pytest.raises(UserError, match=r"holds no normaliser\.json"):
        fastdit.load(out)


def test_a_sampler_makes_the_same_samples_and_names_a_condition_of_another_width(finished):
    folder, name = finished
    run = folder / "runs" / "whole"
    given = {"condition": [100.0, 95, 103]} if name == "mel" else {}
    policy = sample.Sampler.load(run, steps=2, precision="fp32")
    found = policy(0 if name == "mel" else None, **given)
    truth = fastdit.sample(
        fastdit.load(run, "cpu", precision="fp32"), num=1, label=0 if name == "mel" else None, steps=2, **given
    )
    torch.testing.assert_close(found, truth[0], rtol=1e-4, atol=1e-3)
    if name == "mel":
        with pytest.raises(UserError, match="the model takes 1×3"):
            policy(0, condition=[1.0, 2.0])
    assert Normaliser.read(run) is not None


def test_two_ranks_train_the_same(finished, run_ranks):
    folder, name = finished
    if name == "clip":
        pytest.skip("one kind of data shows it")
    config = settings(folder, name, "two", train={"batch": BATCH // 2}, model={"class_dropout": 0.2})
    one = C.replace(config, run={"name": "one"}, train={"batch": BATCH})
    assert run_ranks(2, whole_runs.run, config, init=False) == [0, 0]
    assert run_ranks(1, whole_runs.run, one, init=False) == [0]
    lines = [losses(folder / "runs" / r) for r in ("two", "one")]
    assert lines[0] == pytest.approx(lines[1], rel=1e-4)
