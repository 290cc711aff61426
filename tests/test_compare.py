"""Each run's command is a valid one and differs in its objective alone; the page says what the runs say."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from fastdit import command, compare
from fastdit import config as C
from fastdit.compare import SUBJECTS, Options
from fastdit.config import UserError
from fastdit.quality import evaluation


@pytest.mark.parametrize("subject", SUBJECTS)
def test_runs_differ_in_the_subject_alone_and_the_page_has_their_figures(monkeypatch, tmp_path, subject):
    options = Options(
        subject=subject,
        images=640,
        num=32,
        runs=str(tmp_path / "runs"),
        packs=str(tmp_path / "packs"),
        out=str(tmp_path / "docs"),
    )
    configs = {}

    def train(arguments, processes):
        """What train.py would leave."""
        assert processes == 1
        config = command.parse(["cats", *arguments], "train.py", "")
        configs[config.run.name] = config
        folder = Path(config.run.folder) / config.run.name
        (folder / "samples").mkdir(parents=True)
        C.save(config, folder / "config.json")
        (folder / "samples" / "000000640.png").write_bytes(config.run.name.encode())
        (folder / "samples" / "000000064.png").write_bytes(b"an early one")
        rows = ({"images": 64 * i, "loss": 1 / i, "grad_norm": 2 / i, "skipped": 0} for i in range(1, 11))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        place = list(SUBJECTS[subject]).index(config.run.name)
        figures = {"kid": 1.5 + place, "kid_floor": -0.001, "swd": 0.25, "swd_floor": 0.05, "coverage": 0.75}
        figures |= {"coverage_floor": 0.97, "nearest": 12.34, "nearest_floor": 9.5}
        settings = {**evaluation.how(config, 640, "offline", 32, 0), "against": "32 images of 64 held-out embedded cats"}
        evaluation.record(folder, {**settings, **figures})

    monkeypatch.setattr(compare, "train", train)
    page = compare.compare(options).read_text()
    assert list(configs) == list(SUBJECTS[subject])
    base = next(iter(configs.values()))
    expected = {"objectives": ("diffusion.",), "stability": ("parallel.", "model.qk_norm")}[subject]
    for config in configs.values():
        changed = [d.partition(":")[0] for d in C.differences(config, base)]
        assert all(d.startswith(expected) or d == "run.name" for d in changed)
        assert (config.train.images, config.eval.every_images, config.eval.num) == (640, 640, 32)
    varied = [str((config.diffusion, config.parallel, config.model)) for config in configs.values()]
    assert len(set(varied)) == len(configs)
    if subject == "objectives":
        assert base.diffusion == dataclasses.replace(C.DiffusionConfig(), prediction="epsilon")
        assert configs["flow"].diffusion.flow_t == "logit_normal"
    else:
        assert "| bf16 (the recipe of cats) | 0.10000 | 0 |" in page
        assert (tmp_path / "docs" / subject / "curves.svg").read_text().count("<polyline") == 2 * len(configs)

    for place, (name, (title, _)) in enumerate(SUBJECTS[subject].items()):
        row = f"| {title} | {1.5 + place:.3f} | 0.250 | 0.750 | 12.3 | ![{title}]({subject}/{name}.png) |"
        assert row.replace("5.500", "5.5") in page
        assert (tmp_path / "docs" / subject / f"{name}.png").read_bytes() == name.encode()
    assert "| real images, held out | -0.001 | 0.050 | 0.970 | 9.5 | |" in page
    for said in (
        "640 images seen by each",
        "None of it is comparable with a published FID",
        "not photographs",
        "CC-BY-4.0",
        "20 steps",
    ):
        assert said in page, said


def test_a_run_that_fails_or_is_not_there_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(UserError, match=r"--train.images 640 .* ended with 1; the same command goes on"):
        compare.compare(Options(images=640, runs=str(tmp_path)))
    folder = tmp_path / "epsilon"
    folder.mkdir()
    C.save(C.RECIPES["cats"], folder / "config.json")
    with pytest.raises(UserError, match="holds no evaluation of 500 pictures"):
        compare.write(Options(runs=str(tmp_path), out=str(tmp_path / "docs")))
