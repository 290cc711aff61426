"""Evaluation, in training and after it: pictures by number on any ranks, nothing made twice, figures kept beside the run."""

import json
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from fastdit import config as C
from fastdit import evaluate, pictures, sampling, train
from fastdit.config import Config, UserError
from fastdit.data.images import open_images
from fastdit.evaluate import Chunks, Options
from fastdit.quality import evaluation, features, fid, references, scores
from fastdit.recipes import RECIPES
from fastdit.runtime import ranks
from fastdit.weights.folder import load_model, locate

CPU = torch.device("cpu")
BATCH, IMAGES, NUM = 16, 96, 40


def tiny(folder: Path, **groups) -> Config:
    config = C.replace(
        RECIPES["cats"],
        run={"name": "tiny", "folder": str(folder / "runs")},
        data={"num_images": 120, "packs": str(folder / "packs")},
        model={"patch": 8, "depth": 2, "width": 32, "num_heads": 2},
        sample={"num": 4, "steps": 2},
        eval={"every_images": 48, "num": 16},
        train={"images": IMAGES, "batch": BATCH, "warmup_images": 32},
        log={"save_every": 32},
        parallel={"precision": "fp32", "threads": 1},
    )
    return C.replace(config, **groups)


def pixels(images: torch.Tensor) -> torch.Tensor:
    """Stands in for the network of the metric: fast, and a function of the picture alone."""
    return images.float().flatten(1)[:, ::41] / 255


def run(config: Config) -> int:
    features.load_network = lambda device: pixels
    features.require = lambda: None
    return train.train(config)


def run_killed(config: Config, after: int) -> int:
    """A run that ends at once when it has made its evaluation number `after`."""
    record, calls = evaluation.record, [0]

    def killed(*args):
        record(*args)
        calls[0] += 1
        if calls[0] == after:
            os._exit(9)

    evaluation.record = killed
    return run(config)


def evaluated(options: Options, chunk: int = 16) -> int:
    """Evaluate, and count the pictures made on this rank."""
    features.load_network = lambda device: pixels
    features.require = lambda: None
    evaluate.CHUNK = chunk
    make, made = sampling.make, [0]

    def counted(*args, **options):
        made[0] += options["count"]
        return make(*args, **options)

    sampling.make = counted
    evaluate.evaluate(options)
    return made[0]


@pytest.fixture(scope="module")
def folder(run_ranks, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert run_ranks(1, run, tiny(folder), init=False) == [0]
    return folder / "runs" / "tiny"


def lines(folder: Path) -> list[dict]:
    return [{k: v for k, v in e.items() if k != "time"} for e in evaluation.evaluations(folder)]


def test_training_keeps_a_line_and_a_curve_for_each_evaluation(folder):
    found = lines(folder)
    assert [e["images"] for e in found] == [48, 96]
    for e in found:
        assert (e["metric"], e["num"], e["against"]) == ("offline", 16, "16 images of 32 held-out embedded cats")
        assert e["kid"] > e["kid_floor"]
        assert 0 <= e["coverage"] <= e["coverage_floor"] <= 1
        assert e["nearest_floor"] > 0
    curve = (folder / evaluation.CURVE).read_text()
    assert "KID, EfficientNet-Lite0 features" in curve
    assert "real images" in curve


def test_a_line_is_the_metric_of_the_pictures_it_says(folder):
    """The last line once more, from the checkpoint, step by step."""
    weights, config, *_ = locate(folder)
    world = ranks.World(0, 1, 0, 1, CPU)
    model = load_model(weights, config, world)
    images = sampling.make(model, config, None, world, first=0, count=16, seed=config.run.seed)
    real = list(open_images(C.replace(config, data={"num_images": 32}).data, held_out=True).read(0, 32))
    real = torch.stack([torch.from_numpy(e.image).permute(2, 0, 1) for e in real])
    order = torch.tensor(references.rng.order(0, 3, 32).tolist())
    ours, others = real[order[:16]], real[order[16:]]
    last = lines(folder)[-1]
    assert last["kid"] == pytest.approx(scores.kid(pixels(images), pixels(ours)), rel=1e-6)
    assert last["kid_floor"] == pytest.approx(scores.kid(pixels(others), pixels(ours)), rel=1e-6)
    assert last["coverage"] == scores.coverage(pixels(images), pixels(ours))
    training = torch.stack([torch.from_numpy(e.image).permute(2, 0, 1) for e in open_images(config.data).read(0, 120)])
    assert last["nearest"] == pytest.approx(scores.nearest(images, training).median().item(), rel=1e-6)


@pytest.mark.parametrize("after", [1, 2])
def test_a_killed_run_resumes_to_the_same_lines(folder, run_ranks, tmp_path, after):
    [end] = run_ranks.outcomes(1, run_killed, tiny(tmp_path), after, init=False)
    assert end.code == 9
    assert run_ranks(1, run, tiny(tmp_path), init=False) == [0]
    assert lines(tmp_path / "runs" / "tiny") == lines(folder)


def test_ranks_make_the_pictures_one_rank_makes(folder, run_ranks, tmp_path):
    config = tiny(tmp_path, train={"batch": BATCH // 2}, eval={"every_images": 48, "num": 18})  # not a multiple of the ranks
    one = tiny(tmp_path, run={"name": "one", "folder": str(tmp_path / "runs")}, eval={"every_images": 48, "num": 18})
    assert run_ranks(1, run, one, init=False) == [0]
    assert run_ranks(2, run, config, init=False) == [0, 0]
    for ours, theirs in zip(lines(tmp_path / "runs" / "tiny"), lines(tmp_path / "runs" / "one"), strict=True):
        assert ours["num"] == 16 + 2
        assert ours["swd"] == pytest.approx(theirs["swd"], rel=1e-3)  # a picture's rounding may fall the other way


def stored(out: Path) -> dict[str, bytes]:
    [folder] = out.iterdir()
    return {p.name: p.read_bytes() for p in folder.glob("*.npy")}


def test_pictures_are_the_same_on_any_ranks_and_none_is_made_twice(folder, run_ranks, tmp_path):
    def options(out):
        return Options(str(folder), num_images=NUM, metric="none", batch=8, precision="fp32", out=str(tmp_path / out))

    assert run_ranks(1, evaluated, options("one"), init=False) == [NUM]
    one = stored(tmp_path / "one")
    assert sorted(one) == ["00000000-16.npy", "00000016-16.npy", "00000032-8.npy"]
    assert sorted(run_ranks(2, evaluated, options("two"), init=False)) == [16, 24]
    assert stored(tmp_path / "two") == one
    assert run_ranks(2, evaluated, options("two"), init=False) == [0, 0]

    [home] = (tmp_path / "two").iterdir()
    (home / "00000016-16.npy").unlink()
    (home / "00000032-8.npy").write_bytes(one["00000032-8.npy"][:500])  # as a full disk leaves it
    assert sum(run_ranks(2, evaluated, options("two"), init=False)) == 24
    assert stored(tmp_path / "two") == one

    whole = np.concatenate([np.load(home / n) for n in sorted(one)])
    weights, config, *_ = locate(folder)
    config = C.replace(config, run={"seed": 0})
    model = load_model(weights, config, ranks.World(0, 1, 0, 1, CPU))
    want = sampling.make(model, config, None, ranks.World(0, 1, 0, 1, CPU), first=24, count=8, seed=0)
    assert np.array_equal(whole[24:32], want.numpy())


def test_other_settings_and_weights_have_folders_of_their_own(folder, tmp_path):
    found = locate(folder)
    weights, config = found.weights, found.config

    def home(**changed):
        options = Options(str(folder), out=str(tmp_path), **{"precision": "bf16", **changed})
        return evaluate.prepare(options, evaluate.chosen(config, options), found, torch.device("cpu")).name

    names = {home(), home(seed=1), home(steps=3), home(sampler="euler"), home(precision="fp32")}
    assert len(names) == 5
    assert all(name.startswith("000000000096-") for name in names)
    assert home() in names
    assert home(num_images=100, batch=3, metric="offline") in names  # these change no picture
    other = tmp_path / "other.safetensors"
    other.write_bytes(weights.read_bytes() + b" ")
    assert evaluate.digest(other) != evaluate.digest(weights)


def test_the_metric_is_recorded_once_and_printed_with_its_floor(folder, run_ranks, tmp_path):
    options = Options(str(folder), num_images=NUM, metric="offline", precision="fp32", npz=True, out=str(tmp_path / "out"))
    before = lines(folder)
    [outcome] = run_ranks.outcomes(1, evaluated, options, init=False)
    assert outcome.code == 0, outcome.error
    assert "KID" in outcome.output
    assert outcome.output.count("(real images ") == 4
    assert "not comparable with published FID" in outcome.output
    [new] = [e for e in lines(folder) if e not in before]
    assert (new["images"], new["num"], new["against"]) == (96, NUM, f"{NUM} images of {2 * NUM} held-out embedded cats")
    run_ranks(1, evaluated, options, init=False)
    assert sorted(map(str, lines(folder))) == sorted(map(str, [*before, new]))

    [path] = (tmp_path / "out").glob("*/pictures-40x32x32x3.npz")
    with np.load(path, allow_pickle=False) as archive:
        assert archive.files == ["arr_0"]
        arr = archive["arr_0"]
    assert arr.dtype == np.uint8
    chunks = [np.load(p) for p in sorted(path.parent.glob("*.npy"))]
    assert np.array_equal(arr, np.concatenate(chunks).transpose(0, 2, 3, 1))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_a_folder_of_ones_own_is_compared_with_or_the_training_images(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "load_network", lambda device: pixels)
    monkeypatch.setattr(features, "require", lambda: None)
    cats = torch.stack([torch.from_numpy(e.image) for e in open_images(tiny(tmp_path).data).read(0, 60)])
    for i, image in enumerate(cats):
        place = tmp_path / "mine" / ("a" if i < 30 else "b") / f"{i:03d}.png"
        pictures.save_png(image.permute(2, 0, 1), place)
    (tmp_path / "mine" / "a" / "bad.png").write_bytes(b"no image")

    held = references.open_judge(tiny(tmp_path), 500, CPU, str(tmp_path / "mine"))
    assert held.against == f"30 images of {tmp_path / 'mine'}"
    assert held.floor.nearest == 0  # these are training images after all, and the floor tells
    own = tiny(tmp_path, data={"path": str(tmp_path / "mine"), "num_images": 0})
    judge = references.open_judge(own, 500, CPU)
    assert judge.against == f"30 training images of {tmp_path / 'mine'}"
    assert judge.floor.nearest is None
    assert judge.training.shape == (60, 3, 32, 32)
    line = evaluation.line(own, 10, judge, cats.permute(0, 3, 1, 2)[:25])
    assert line["nearest_floor"] is None
    assert "nearest 0.0  on 25" in evaluation.say(line)
    flipped = references.open_judge(C.replace(own, data={"hflip": True}), 500, CPU)
    assert flipped.training.shape == (120, 3, 32, 32)
    few = C.replace(own, data={"num_images": 5})
    with pytest.raises(UserError, match="5 images; a comparison needs at least 12"):
        references.open_judge(few, 500, CPU)


# --- torch-fidelity ---


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """arXiv 1706.08500, equation 6, the trace of the root by eigenvalues."""
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.maximum(np.linalg.eigvals(first @ second).real, 0)).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * roots


def test_fidelity_is_asked_for_the_published_figures(folder, run_ranks, tmp_path, monkeypatch):
    """Through torch-fidelity itself, its Inception stood in for by pixels: it would be downloaded."""
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    class Pixels(FeatureExtractorBase):
        def __init__(self, name, features_list, **options):
            super().__init__(name, features_list)
            assert features_list == ["2048"]

        @staticmethod
        def get_provided_features_list():
            return ("2048",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "2048"

        @staticmethod
        def can_be_compiled():
            return False

        @staticmethod
        def get_dummy_input_for_compile():
            return None

        def forward(self, x):
            assert x.dtype == torch.uint8
            return (x.double().flatten(1)[:, ::401] / 255,)

    monkeypatch.setitem(FEATURE_EXTRACTORS_REGISTRY, "inception-v3-compat", Pixels)
    out = tmp_path / "out"
    run_ranks(1, evaluated, Options(str(folder), num_images=NUM, metric="none", out=str(out)), 256, init=False)
    made = Chunks(sorted(out.glob("*/*.npy")))
    config = locate(folder).config
    source, numbers = references.references(config, 50)
    assert len(numbers) == 50 == len(set(numbers)) < source.length
    real = fid.Real(source, numbers)
    found = fid.fidelity(made, real, CPU, batch=13)
    a, b = (
        torch.stack([images[i] for i in range(len(images))]).double().flatten(1)[:, ::401].numpy() / 255
        for images in (made, real)
    )
    assert found["fid"] == pytest.approx(frechet(a, b), rel=1e-6, abs=1e-6)
    assert found.keys() == {"fid", "inception_kid", "precision", "recall"}
    assert 0 <= found["precision"] <= 1
    same = fid.fidelity(real, real, CPU, batch=13)
    assert same["fid"] == pytest.approx(0, abs=1e-6)
    assert same["precision"] == same["recall"] == 1

    options = Options(str(folder), num_images=NUM, metric="fidelity", out=str(out), reference_num=50)
    located, alone, quiet = locate(folder), ranks.World(0, 1, 0, 1, CPU), Console(quiet=True)
    evaluate.measure(options, evaluate.chosen(config, options), located, made, "fidelity", out, alone, quiet)
    [line] = [e for e in lines(folder) if e["metric"] == "fidelity"]
    assert (line["fid"], line["against"]) == (pytest.approx(found["fid"]), "50 images of 120 embedded cats")
    assert "FID" in (folder / evaluation.CURVE).read_text()

    def no_network(*args, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr("torch_fidelity.calculate_metrics", no_network)
    with pytest.raises(UserError, match="torch-fidelity: Name or service not known; --metric offline needs no download"):
        fid.fidelity(made, real, CPU, batch=8)


def test_an_image_that_cannot_be_decoded_is_stood_in_for(tmp_path):
    for i in range(4):
        pictures.save_png(torch.full((3, 32, 32), i, dtype=torch.uint8), tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"")
    source = open_images(C.DataConfig(path=str(tmp_path)))
    real = fid.Real(source, range(4))
    assert [image[0, 0, 0].item() for image in real.__getitems__([0, 1, 2, 3])] == [0, 2, 2, 3]
    with pytest.raises(IndexError):
        real[4]


def test_what_is_missing_or_wrong_is_said_before_anything_is_made(folder, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match=r"pip install 'fastdit\[eval\]'"):
        evaluate.evaluate(Options(str(folder)))
    monkeypatch.setattr(fid.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"torch-fidelity: pip install 'fastdit\[eval\]', or --metric offline"):
        evaluate.evaluate(Options(str(folder), metric="fidelity"))
    for options, message in (
        (Options(str(folder), num_images=3), "--num_images is 3; a metric needs at least 16"),
        (Options(str(folder), batch=0), "--batch is 0"),
        (Options(str(folder), steps=-1), "--sample.steps is -1"),
        (Options(str(folder), guidance=2.0), "--model.class_dropout"),
        (Options(str(tmp_path / "none")), "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.evaluate(options)


def test_lines_that_are_none_are_skipped(tmp_path):
    good = {"metric": "offline", "images": 5, "kid": 1.0}
    rows = ["[]", "{", '{"metric": 3, "images": 1}', '{"metric": "offline", "images": "x"}', json.dumps(good), "[" * 10_000]
    (tmp_path / evaluation.LINES).write_text("\n".join(rows))
    assert evaluation.evaluations(tmp_path) == [good]
    evaluation.record(tmp_path, {"metric": "offline", "images": 3, "kid": 2.0})
    assert [e["kid"] for e in evaluation.evaluations(tmp_path)] == [2.0, 1.0]
    assert evaluation.evaluations(tmp_path / "none") == []
