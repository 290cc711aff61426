"""Post-hoc averages: their integrals, another length against one that was tracked, and a run that keeps them."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import fastdit
from fastdit import config as C
from fastdit import evaluate, export, sample, train
from fastdit.config import Config, UserError
from fastdit.ema import PostHoc
from fastdit.planning import costs, memory
from fastdit.planning.gpus import GPUS
from fastdit.posthoc import LENGTHS, Profile, averaged_images, exponent, inner, mix
from fastdit.quality import evaluation
from fastdit.recipes import RECIPES
from fastdit.runtime import saved
from fastdit.runtime.run import load_config
from fastdit.runtime.tensors import load_weights
from fastdit.weights.averages import at_length, snapshots, total
from fastdit.weights.folder import locate

BATCH = 4


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.15, 0.25, 0.28])
def test_the_exponent_gives_the_length(length):
    gamma = exponent(length)
    assert math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2) == pytest.approx(length, rel=1e-12)
    tau = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    density = (gamma + 1) * tau**gamma
    mean = torch.trapezoid(density * tau, tau)
    assert float(torch.trapezoid(density * (tau - mean).square(), tau).sqrt()) == pytest.approx(length, rel=1e-6)


def test_the_two_lengths_of_the_paper():
    assert exponent(0.05) == pytest.approx(16.97, abs=5e-3)
    assert exponent(0.10) == pytest.approx(6.94, abs=5e-3)


def test_inner_products_are_the_integrals():
    tau = torch.linspace(0, 3, 300_001, dtype=torch.float64)
    for a, b in ((Profile(2.0, 1.5), Profile(3.0, 7.0)), (Profile(3.0, 17.0), Profile(3.0, 7.0)), (Profile(1.0, 3.0),) * 2):
        p, q = ((x.exponent + 1) * tau**x.exponent / x.end ** (x.exponent + 1) * (tau <= x.end) for x in (a, b))
        assert inner(a, b) == pytest.approx(float(torch.trapezoid(p * q, tau)), rel=1e-4)
        assert inner(a, b) == pytest.approx(inner(b, a), rel=1e-12)


def test_a_kept_length_is_found_as_it_is_and_more_snapshots_come_nearer():
    errors = []
    for count in (5, 10, 20):
        kept = [Profile(n / count, exponent(sigma)) for n in range(1, count + 1) for sigma in LENGTHS.values()]
        weights, error = mix(kept, Profile(1.0, exponent(LENGTHS["narrow"])))
        assert error < 1e-6
        assert weights[-1] == pytest.approx(1, abs=1e-6)
        assert weights[:-1].abs().max() < 1e-6
        weights, error = mix(kept, Profile(1.0, exponent(0.07)))
        assert float(weights.sum()) == pytest.approx(1, abs=0.01)
        errors.append(error)
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[1] < 0.01


# --- the averages of a training ---


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 1)


def path_of(net: Net, step: int) -> dict[str, torch.Tensor]:
    """The weights after a step of a made-up training, fp32: a drift, a slow wave and noise."""
    found = {}
    for name, p in Net().named_parameters():
        rng = torch.Generator().manual_seed(1000 * step + len(name))
        noise = torch.randn(p.shape, generator=rng, dtype=torch.float64)
        found[name] = (p.detach().double() + math.log1p(step / 50) + math.sin(step / 60) + 0.1 * noise).float()
    return found


def follow(sharded: bool, steps: int, every: int) -> list[tuple[int, dict[str, torch.Tensor]]]:
    """(images averaged, both averages whole) at a snapshot every so many steps."""
    net = Net()
    if sharded:
        fully_shard(net, reshard_after_forward=False)
    averages, found = PostHoc(net), []
    for step in range(1, steps + 1):
        for name, value in path_of(net, step).items():
            p = net.get_parameter(name).detach()
            if sharded:
                value = torch.distributed.tensor.distribute_tensor(value, p.device_mesh, p.placements).to_local()
                p = p.to_local()
            p.copy_(value)
        averages.follow(step * BATCH, BATCH)
        if step % every == 0:
            whole = {n: (e.full_tensor() if sharded else e).clone() for n, e in averages.saved().items()}
            found.append((averaged_images(step * BATCH, BATCH), whole))
    return found


def tracked(steps: int, length: float) -> dict[str, torch.Tensor]:
    """The average of a length over every step, as the paper's update has it, in fp64."""
    net, gamma = Net(), exponent(length)
    average = {n: p.detach().double() for n, p in net.named_parameters()}
    for step in range(1, steps + 1):
        beta = (1 - 1 / step) ** (gamma + 1)
        average = {n: beta * average[n] + (1 - beta) * w.double() for n, w in path_of(net, step).items()}
    return average


STEPS = 400


def spread(steps: int) -> float:
    """How far the weights went in the last tenth of the training: what an error is measured by."""
    last = [path_of(Net(), s)["first.weight"].double() for s in range(steps - steps // 10, steps)]
    return float(torch.stack(last).std(0).mean())


@pytest.mark.parametrize("length", [0.05, 0.07, 0.1, 0.15])
def test_a_length_chosen_afterwards_is_the_one_that_was_tracked(length):
    """Ten snapshots. Within an eighth of how far the weights swing in a tenth of the run, of which noise is a half."""
    found = follow(False, STEPS, STEPS // 10)
    kept = [Profile(images, exponent(sigma)) for images, _ in found for sigma in LENGTHS.values()]
    weights, _ = mix(kept, Profile(found[-1][0], exponent(length)))
    wanted = tracked(STEPS, length)
    for name, truth in wanted.items():
        held = [whole[f"{kind}.{name}"].double() for _, whole in found for kind in LENGTHS]
        made = sum(w * t for w, t in zip(weights.tolist(), held, strict=True))
        error = float((made - truth).square().mean().sqrt())
        assert error < spread(STEPS) / 8, name
        # and no other length is as near
        for other in (0.6 * length, 1.6 * length):
            far = tracked(STEPS, other)[name]
            assert float((made - far).square().mean()) > float((made - truth).square().mean())


@pytest.mark.parametrize("world", [1, 2, 3])
def test_sharded_averages_are_those_of_one_process_to_the_bit(run_ranks, world):
    expected = follow(False, 40, 20)
    for found in run_ranks(world, follow, True, 40, 20):
        for (images, whole), (same, single) in zip(found, expected, strict=True):
            assert images == same
            assert all(torch.equal(whole[n], single[n]) for n in single)


def test_the_averages_move_at_each_of_the_first_steps_then_at_one_in_eight():
    found = follow(False, 1050, 1)
    moved = [n for n in range(2, 1051) if not torch.equal(*(found[m - 1][1]["ema.first.weight"] for m in (n - 1, n)))]
    assert moved == [*range(2, 257), *range(258, 513, 2), *range(516, 1025, 4), 1032, 1040, 1048]
    assert [images // BATCH for images, _ in found] == [max(m for m in (1, *moved) if m <= n) for n in range(1, 1051)]
    assert torch.equal(found[0][1]["ema.first.weight"], path_of(Net(), 1)["first.weight"])


# --- a run that keeps them ---


def tiny(folder: Path, **groups) -> Config:
    config = C.replace(
        RECIPES["cats"],
        run={"name": "tiny", "folder": str(folder / "runs")},
        data={"num_images": 64, "packs": str(folder / "packs")},
        model={"patch": 8, "depth": 1, "width": 16, "num_heads": 1},
        train={"images": 96, "batch": BATCH, "ema": "posthoc", "warmup_images": 8, "lr": 2e-3, "beta2": 0.999},
        sample={"num": 2, "steps": 1},
        log={"save_every": 12, "sample_every": 96},
        parallel={"precision": "fp32", "threads": 1},
    )
    return C.replace(config, **groups)


def run(config: Config, per_rank: int) -> int:
    return train.train(C.replace(config, train={"batch": per_rank}))


def stopped(config: Config, at: int) -> int:
    """Train until so many images have been seen, and end as a killed process does: after a snapshot, before its checkpoint."""
    save = train.save

    def die(run, images_seen):
        if images_seen == at:
            raise SystemExit(0)
        save(run, images_seen)

    train.save = die
    return train.train(config)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    found = locate(folder / "runs" / "tiny")
    kept = snapshots(found)
    return {f"{n}.{i}": t for n in range(len(kept)) for i, t in total(kept[: n + 1], torch.ones(n + 1, 2)).items()}


@pytest.fixture(scope="module")
def whole(run_ranks, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert run_ranks(1, run, tiny(folder), BATCH, init=False) == [0]
    return folder


def test_snapshots_are_kept_where_checkpoints_are_removed(whole):
    place = whole / "runs" / "tiny" / "checkpoints"
    assert saved.complete(place) == [f"{n:012d}" for n in (72, 84, 96)]
    assert saved.complete(place / "averages") == [f"{n:012d}" for n in range(12, 97, 12)]
    assert [s.images for s in snapshots(locate(whole / "runs" / "tiny"))] == [*range(12, 97, 12)]
    assert load_config(whole / "runs" / "tiny" / "config.json").train.ema == "posthoc"
    # What sample.py takes without --ema is the average of 0.10, which --ema 0.1 gives too.
    found = locate(whole / "runs" / "tiny")
    plain, made = load_weights(found.weights)[0], load_weights(at_length(found, 0.1).weights)[0]
    for name, t in plain.items():
        torch.testing.assert_close(made[name], t, rtol=1e-5, atol=1e-6)
    other = load_weights(at_length(found, 0.06).weights)[0]
    assert any(not torch.equal(other[name], t) for name, t in plain.items())


@pytest.mark.parametrize("world", [1, 2])
def test_a_killed_run_goes_on_to_the_same_averages_on_any_ranks(run_ranks, whole, tmp_path, world):
    config = tiny(tmp_path)
    assert [o.code for o in run_ranks.outcomes(1, stopped, config, 48, init=False)] == [0]
    place = tmp_path / "runs" / "tiny" / "checkpoints"
    assert saved.complete(place)[-1] == f"{36:012d}"
    assert saved.complete(place / "averages")[-1] == f"{48:012d}"
    later = place / "averages" / f"{60:012d}"  # of a course that nothing goes on with
    later.mkdir()
    assert run_ranks(world, run, config, BATCH // world, init=False) == [0] * world
    assert saved.complete(place / "averages") == [f"{n:012d}" for n in range(12, 97, 12)]
    for (name, t), (same, expected) in zip(weights_of(tmp_path).items(), weights_of(whole).items(), strict=True):
        assert name == same
        if world == 1:
            assert torch.equal(t, expected), name
        else:
            torch.testing.assert_close(t, expected, rtol=1e-4, atol=1e-5)


def verbs(folder: Path, out: Path) -> list[str]:
    few = {"num_images": 16, "metric": "none", "steps": 1, "out": str(out / "made")}
    for length in (None, 0.07, 0.2):
        sample.sample(sample.Options(str(folder), num_images=2, steps=1, out=str(out / "pictures"), ema=length))
        evaluate.evaluate(evaluate.Options(str(folder), ema=length, **few))
    return sorted(path.name for path in (out / "pictures").iterdir())


@pytest.mark.parametrize("world", [1, 2])
def test_the_verbs_take_a_length(run_ranks, whole, tmp_path, world):
    for names in run_ranks(world, verbs, whole / "runs" / "tiny", tmp_path, init=False)[:1]:
        assert [name.partition("steps")[2] for name in names] == ["-0to1.png", "-ema0.07-0to1.png", "-ema0.2-0to1.png"]
    assert len(list((tmp_path / "made").iterdir())) == 3


def test_an_export_and_a_loaded_model_take_a_length(whole, tmp_path):
    folder, out = whole / "runs" / "tiny", tmp_path / "exported"
    wanted = load_weights(at_length(locate(folder), 0.07).weights)[0]
    export.export(export.Options(str(folder), ema=0.07, out=str(out)))
    for model in (fastdit.load(folder, "cpu", precision="fp32", ema=0.07), fastdit.load(out, "cpu", precision="fp32")):
        assert all(torch.equal(parameter, wanted[name]) for name, parameter in model.named_parameters() if name in wanted)
    plain = fastdit.load(folder, "cpu", precision="fp32")
    assert not all(torch.equal(parameter, wanted[name]) for name, parameter in plain.named_parameters() if name in wanted)
    assert "| weights | averaged (post-hoc EMA of length 0.07) |" in (out / "README.md").read_text()
    with pytest.raises(UserError, match="leave out --weights live"):
        export.export(export.Options(str(folder), ema=0.07, weights="live"))
    for verb in (fastdit.load, lambda source, ema: export.export(export.Options(str(source), ema=ema))):
        with pytest.raises(UserError, match="--ema needs a run that was trained with"):
            verb(out, ema=0.07)


def test_what_cannot_be_had_is_one_line(whole, tmp_path):
    found = locate(whole / "runs" / "tiny")
    for length, said in (
        (0.0, "--ema is 0; a length is a share of the run, above 0 and at most 0.28"),
        (0.5, "--ema is 0.5"),
        (math.nan, "--ema is nan"),
        (0.01, "--ema 0.01 does not follow from the run's 8 snapshots; lengths from 0.0"),
    ):
        with pytest.raises(UserError) as error:
            at_length(found, length)
        assert said in str(error.value)
    with pytest.raises(UserError, match="--ema needs a run that was trained with"):
        at_length(found._replace(config=C.replace(found.config, train={"ema": 0.9})), 0.1)
    with pytest.raises(UserError, match="holds no snapshot up to 5 images"):
        at_length(found._replace(images_seen=5), 0.1)
    copy = tmp_path / "copy"
    shard = Path("checkpoints", "averages", f"{48:012d}", "shards", "00000-of-00001.safetensors")
    for path in (whole / "runs" / "tiny").rglob("*"):
        if path.is_file():
            (copy / path.relative_to(whole / "runs" / "tiny")).parent.mkdir(parents=True, exist_ok=True)
            data = path.read_bytes()
            (copy / path.relative_to(whole / "runs" / "tiny")).write_bytes(data)
    data = bytearray((copy / shard).read_bytes())
    data[-1] ^= 1
    (copy / shard).write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        at_length(locate(copy), 0.1)


def test_a_line_of_another_length_stands_beside_the_run_s_own(tmp_path):
    figures = {"kid": 1.0, "swd": 1.0, "coverage": 0.5, "nearest": 2.0}
    entry = {"images": 96, "metric": "offline", "num": 16, "seed": 0, "against": "cats", **figures}
    for line in (entry, entry | {"ema": 0.07}, entry | {"ema": 0.07, "kid": 0.5}):
        evaluation.record(tmp_path, line)
    lines = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [(line.get("ema"), line["kid"]) for line in lines] == [(None, 1.0), (0.07, 0.5)]
    assert [row[0] for row in evaluation.table(lines)[1:]] == ["96", "96 (ema 0.07)"]
    assert all(len(line.points) == 1 for chart in evaluation.curves(lines) for line in chart.lines)


def test_the_plan_counts_them():
    plain = RECIPES["cats-256"]
    posthoc = C.replace(plain, train={"ema": "posthoc"})
    before, after = (memory.state_bytes(config, 1) for config in (plain, posthoc))
    assert after["EMA"] == 2 * before["EMA"]
    cluster = costs.Cluster(next(iter(GPUS.values())), 8, 1, 25.0)
    moved = [costs.optimizer_bytes(config, cluster) for config in (plain, posthoc)]
    assert [m / memory.sizes(plain.model, 8).trained for m in moved] == [4 + 36, 4 + 32 + 3]


def test_the_page_s_errors_are_those_of_the_fit():
    page = (Path(__file__).parent.parent / "docs" / "quality.md").read_text()
    table = page[page.index("| snapshots |") :].partition("\n\n")[0]
    [header, _, *rows] = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()]
    assert [int(row[0].split(",")[0]) for row in rows] == [10, 20, 40]
    for row in rows:
        count = int(row[0].split(",")[0])
        kept = [Profile(n / count, exponent(sigma)) for n in range(1, count + 1) for sigma in LENGTHS.values()]
        for length, said in zip(header[1:], row[1:], strict=True):
            error = mix(kept, Profile(1.0, exponent(float(length))))[1]
            assert 100 * error == pytest.approx(float(said.removesuffix(" %")), abs=0.051 if error < 0.1 else 0.51)
