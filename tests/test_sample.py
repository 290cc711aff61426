"""sample.py beyond pictures by number: classes by name, captions, one picture at a time, what is refused unbuilt."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

from fastdit import config as C
from fastdit import sample, sampling
from fastdit.config import UserError
from fastdit.data.cats import COLOURS
from fastdit.model import DiT
from fastdit.modulations import FEW
from fastdit.planning.memory import num_parameters
from fastdit.recipes import RECIPES
from fastdit.runtime import latency as runtime_latency
from fastdit.runtime.run import load_config, save_config
from fastdit.sample import Options, Sampler
from fastdit.weights.folder import REFERENCE, save_folder

SIDE = 32


def folder_of(path, **groups):
    """A folder of weights, every one of them random."""
    config = C.replace(
        RECIPES["cats"],
        model={"patch": 8, "depth": 2, "width": 32, "num_heads": 2},
        parallel={"precision": "fp32"},
        sample={"steps": 3},
    )
    config = C.replace(config, **groups)
    model, rng = DiT(config.model, REFERENCE), torch.Generator().manual_seed(0)
    save_folder(path, {name: torch.randn(p.shape, generator=rng) * 0.1 for name, p in model.named_parameters()}, config)
    return path


def sampled(options: Options) -> None:
    sample.sample(options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("weights"))


def test_a_class_by_name_is_the_class_by_number_and_a_grid_names_its_classes(folder, run_ranks, tmp_path):
    for label in ("mauve", "3"):
        options = Options(str(folder), num_images=2, label=label, singles=True, out=str(tmp_path / label), precision="fp32")
        run_ranks(1, sampled, options, init=False)
    assert COLOURS[3] == "mauve"
    by_name, by_number = ({p.name: p.read_bytes() for p in (tmp_path / x).rglob("*.png")} for x in ("mauve", "3"))
    assert by_name == by_number
    assert len(by_name) == 3
    run_ranks(
        1, sampled, Options(str(folder), num_images=4, singles=True, out=str(tmp_path / "all"), precision="fp32"), init=False
    )
    [grid] = (tmp_path / "all").glob("*.png")
    with Image.open(grid) as image:
        assert image.size == (2 * (3 * SIDE + 2) + 2, 2 * (3 * SIDE + 14 + 2) + 2)
        for n in range(4):
            row, column = divmod(n, 2)
            left, top = 2 + column * (3 * SIDE + 2), 2 + row * (3 * SIDE + 14 + 2)
            with Image.open(next((tmp_path / "all").rglob(f"{n:06d}.png"))) as single:
                enlarged = single.resize((3 * SIDE, 3 * SIDE), Image.Resampling.NEAREST)
                assert image.crop((left, top, left + 3 * SIDE, top + 3 * SIDE)).tobytes() == enlarged.tobytes()
            caption = image.crop((left, top + 3 * SIDE, left + 3 * SIDE, top + 3 * SIDE + 14)).convert("L")
            darkest, lightest = caption.getextrema()
            assert darkest < 64  # text, its edges smoothed
            assert lightest == 255


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("mauv", "did you mean mauve?"),
        ("15", "the model has classes 0 … 14"),
        ("-1", "classes 0 … 14"),
        ("³", "classes 0 … 14"),
    ],
)
def test_what_is_no_class_is_one_line(folder, label, said):
    with pytest.raises(UserError, match=re.escape(said)) as error:
        sample.sample(Options(str(folder), label=label))
    assert "\n" not in str(error.value)
    assert "maroon, green" in str(error.value)


@pytest.mark.parametrize(
    "groups",
    [
        {"model": {"depth": 2**31 - 1}},
        {"model": {"width": 2**31 - 4}},
        {
            "model": {"input_size": (2**31 - 8, 2**31 - 8)},
            "data": {"image_size": (2**31 - 8, 2**31 - 8), "path": "x"},
        },
        {"model": {"num_classes": 2**31 - 1}},
    ],
    ids=["depth", "width", "size", "classes"],
)
def test_an_absurd_config_is_refused_before_anything_is_built(folder, tmp_path, groups):
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    save_config(C.replace(load_config(folder / "config.json"), **groups), tmp_path / "config.json")
    with pytest.raises(UserError, match=r"by plan one picture of this model takes [\d,.]+ GB at least"):
        sample.sample(Options(str(tmp_path)))


@pytest.mark.parametrize("fields", [{"timesteps": 2**31 - 1}, {"timesteps": 10**6 + 1}])
def test_an_absurd_schedule_is_refused(folder, tmp_path, fields):
    save_config(C.replace(load_config(folder / "config.json"), diffusion=fields), tmp_path / "config.json")
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"config.json: --diffusion.timesteps is \d+; it must be at most 1000000"):
        sample.sample(Options(str(tmp_path)))


@pytest.mark.parametrize("fields", [{}, {"qk_norm": True, "class_dropout": 0.1, "conv_kernel": 4}, {"conv_kernel": 0}])
def test_the_count_of_parameters_is_the_models(fields):
    for recipe in RECIPES.values():
        config = C.replace(recipe, model={"depth": 3, **fields}).model
        with torch.device("meta"):
            assert num_parameters(config) == sum(p.numel() for p in DiT(config, REFERENCE).parameters())


def test_a_sampler_makes_what_sample_makes_and_makes_modulation_once_a_class(folder):
    policy = Sampler.load(folder, steps=2, precision="fp32")
    config = policy.config
    assert config.sample.steps == 2
    calls = []
    policy.model.adaLN_modulation.register_forward_hook(lambda *_: calls.append(1))
    wanted = sampling.make(policy.model, config, None, policy.world, first=5, count=1, seed=3, label=7)[0]
    calls.clear()
    for _ in range(3):
        got = policy(7, seed=3, number=5)
        assert torch.equal(sampling.to_uint8(got), wanted)
    assert len(calls) == 1
    assert got.shape == (3, SIDE, SIDE)
    assert not torch.equal(policy(7, seed=3, number=6), got)
    for label in range(15):
        policy(label)
    policy(0)
    assert len(policy.modulations) <= sample.CLASSES_KEPT


def test_latency_is_one_line_of_the_calls_made(folder, capsys, monkeypatch):
    monkeypatch.setattr(sample, "LATENCY_CALLS", 200)
    sample.sample(Options(str(folder), steps=1, latency=True, precision="fp32"))
    said = capsys.readouterr().out
    found = re.fullmatch(
        r"200 calls at batch 1, 1 step each: median ([\d.]+) ms, 99th percentile ([\d.]+) ms, "
        r"([\d,.]+) evaluations per second\n",
        said,
    )
    assert found, said
    median, last, rate = (float(x.replace(",", "")) for x in found.groups())
    assert 0 < median <= last
    assert rate <= 2000 / median  # at least half of the calls take the median or longer
    assert not (folder / "pictures").exists()


def test_figures_of_latency_are_those_of_the_times(folder, monkeypatch):
    policy = Sampler.load(folder, steps=2, precision="fp32")
    times = iter(float(x) for i in range(10) for x in (10 * i, 10 * i + 0.001 * (i + 1)))
    monkeypatch.setattr(runtime_latency, "perf_counter", lambda: next(times))
    said = sample.latency(policy, 0, calls=10)
    assert said.startswith("10 calls at batch 1, 2 steps each: median 5.50 ms, ")
    assert said.endswith(f"{20 / 0.055:,.1f} evaluations per second")


@pytest.mark.parametrize("diffusion", [{}, {"kind": "ddpm", "prediction": "epsilon", "flow_t": "uniform"}])
def test_a_sampler_a_thread_makes_what_one_alone_makes(folder, tmp_path, diffusion):
    """No state is global: four threads, each with an object of its own, call at once."""
    path = folder_of(tmp_path / "weights", diffusion=diffusion) if diffusion else folder
    alone = Sampler.load(path, steps=2, precision="fp32")
    wanted = [[alone(label, seed=label, number=n) for n in range(6)] for label in range(4)]
    policies = [Sampler.load(path, steps=2, precision="fp32") for _ in range(4)]

    def calls(label: int) -> list[torch.Tensor]:
        return [policies[label](label, seed=label, number=n) for n in range(6)]

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(calls, range(4)))
    for ours, theirs in zip(found, wanted, strict=True):
        for got, want in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 4, 20])
def test_a_taught_model_jumps_in_a_sampler_as_in_sample(tmp_path, steps):
    policy = Sampler.load(folder_of(tmp_path, model={"patch": 8, "jumps": True}), steps=steps, precision="fp32")
    made = sampling.make(policy.model, policy.config, None, policy.world, first=5, count=1, seed=3, label=7)[0]
    assert torch.equal(sampling.to_uint8(policy(7, seed=3, number=5)), made)
    before = policy(7)
    with torch.no_grad():
        policy.model.jump_embedder[2].bias += 1
    policy.modulations.clear()
    assert torch.equal(policy(7), before) == (steps > FEW)  # a longer schedule follows plain flow
