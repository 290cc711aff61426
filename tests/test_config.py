"""The command line: every recipe resolves, and whatever is wrong is one line that names it."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest

from fastdit import command
from fastdit import config as C
from fastdit.command import parse
from fastdit.config import UserError
from fastdit.recipes import RECIPES
from fastdit.runtime.resuming import differences
from fastdit.runtime.run import load_config, save_config
from fastdit.runtime.validation import validate


def cli(*args: str) -> C.Config:
    return parse(args, "train.py", "Train a DiT.")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_resolves_and_survives_json(name, tmp_path):
    config = cli(name)
    assert config.run.name == name
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config


def test_no_arguments_is_the_cats_recipe():
    assert cli() == cli("cats")


def test_fields_are_set_by_their_dotted_names():
    config = cli("cats-256", "--lr", "3e-4", "--image_size", "64", "32", "--data.no_hflip", "--name=x")
    assert (config.train.lr, config.data.image_size, config.data.hflip, config.run.name) == (3e-4, (64, 32), False, "x")
    assert config.model.input_size == (8, 4)  # latents


BAD = [
    (["cat"], "unknown recipe 'cat'; did you mean cats?"),
    (["--train.lrr", "1"], "--train.lrr; did you mean --train.lr?"),
    (["--trainn.lr", "1"], "did you mean --train.lr?"),
    (["--learning_rate", "1"], "unknown option --learning_rate"),
    (["--every", "1"], "unknown option --every"),
    (["--train.lr", "fast"], "--train.lr"),
    (["--train.lr"], "--train.lr"),
    (["--train.lr", "nan"], "--train.lr is nan"),
    (["--train.lr", "0"], "--train.lr is 0"),
    (["--train.batch", "-1"], "--train.batch is -1"),
    (["--train.batch", "1.5"], "--train.batch"),
    (["--train.grad_accum", "0"], "--train.grad_accum is 0"),
    (["--train.images", "0"], "--train.images is 0"),
    (["--train.ema", "1"], "--train.ema is 1"),
    (["--train.lr_decay", "linear"], "--train.lr_decay"),
    (["--model.num_heads", "5"], "unknown option --model.num_heads"),
    (["--model.width", "250"], "multiple of 4"),
    (["--model.patch", "5"], "--model.patch 5 does not divide the network's input of 32×32"),
    (["--model.patch", "0"], "--model.patch is 0"),
    (["--model.input_size", "32"], "--model.input_size"),
    (["--model.input_size", "64", "64"], "unknown option --model.input_size"),
    (["--model.conv_kernel", "7"], "valid are 3, 4, 5, and 0"),
    (["--model.class_dropout", "1"], "--model.class_dropout is 1"),
    (["--data.label_column", "None", "--model.class_dropout", "0.1"], "--model.class_dropout needs classes"),
    (["--model.channels", "4"], "unknown option --model.channels"),
    (["--data.source", "hub"], "unknown option --data.source"),
    (["--data.image_size", "48", "48"], "32×32 or 64×64"),
    (["--data.max_bad", "2"], "unknown option --data.max_bad"),
    (["--sample.steps", "0"], "--sample.steps is 0"),
    (["--sample.steps", "2000"], "--sample.steps 2000 is more than"),
    (["--sample.guidance", "2"], "--sample.guidance 2 needs"),
    (["--diffusion.kind", "flow", "--model.learn_sigma"], "--model.learn_sigma"),
    (["--diffusion.kind", "flow", "--diffusion.prediction", "v"], "use velocity or x0"),
    (["--diffusion.kind", "ddpm", "--diffusion.prediction", "velocity"], "use epsilon, v or x0"),
    (["--data.crop", "left"], "--data.crop"),
    (["--run.name", "../x"], "--run.name '../x'"),
    (["--run.name", "a/b"], "--run.name"),
    (["--run.name", ".hidden"], "--run.name"),
    (["--parallel.timeout_minutes", "0"], "--parallel.timeout_minutes"),
    (["--kernels", "cuda"], "--kernels"),
    (["--log.sample_every", "0"], "--log.sample_every is 0"),
    (["--profile", "-1"], "--profile is -1"),
    (["stray", "--train.lr", "1"], "unknown recipe 'stray'"),
    (["cats", "stray"], "stray"),
    (["--train.lr", "inf"], "--train.lr is inf"),
    (["--train.weight_decay", "-0.1"], "--train.weight_decay is -0.1"),
    (["--eval.every_images", "0"], "--eval.every_images is 0"),
    (["--log.peak_tflops", "100"], "unknown option --log.peak_tflops"),
    (["--train.optimizer", "sgd"], "--train.optimizer"),
    (["--train.spike_sigma", "-6"], "--train.spike_sigma is -6"),
    (["--train.weight_decay", "nan"], "--train.weight_decay is nan"),
    (["--train.images", str(10**12)], "--train.images is 1e+12; it must be at most"),
    (["--train.batch", str(2**31)], "it must be at most 2147483647"),
    (["--model.width", str(10**30)], "--model.width is 1e+30"),
    (["--model.depth", "0"], "--model.depth is 0"),
    (["--model.depth", "six"], "--model.depth"),
    (["--train.warmup_images", "-1"], "--train.warmup_images is -1"),
    (["--data.num_images", "0"], "--data.num_images is 0"),
    (["--model.class_dropout", "-0.5"], "--model.class_dropout is -0.5"),
    (["--data.source", "web"], "--data.source"),
    (["--data.num_images", "-5"], "--data.num_images is -5"),
    (["--data.image_size", "0", "0"], "--data.image_size"),
    (["--diffusion.model_guidance", "0.3"], "needs a --model.class_dropout"),
    (["--diffusion.prediction", "noise"], "--diffusion.prediction"),
    (["--parallel.precision", "fp16"], "--parallel.precision"),
    (["--parallel.shard", "2"], "unknown option --parallel.shard"),
    (["--log.save_every", "-1"], "--log.save_every is -1"),
    (["--attention", "fast"], "--attention"),
    (["--run.name", "x" * 101], "--run.name"),
    (["--run.name", "x\ny"], "--run.name"),
]


@pytest.mark.parametrize(("args", "said"), BAD, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_bad_input_is_one_line_that_names_it_and_touches_nothing(args, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        command.exit_cleanly(lambda: cli(*args) and None)
    out, line = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert said in line
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert len(line) < 310
    assert list(tmp_path.iterdir()) == []


def test_there_are_many_ways_to_be_wrong():
    assert len(BAD) >= 60


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ({"model": {"num_heads": 5}}, "5 attention heads do not divide --model.width"),
        ({"model": {"input_size": (64, 64)}}, "is not --data.image_size 32×32"),
        ({"model": {"channels": 4}}, "the model has 4 channels"),
        ({"model": {"mlp_ratio": 0}}, "--model.mlp_ratio is 0"),
        ({"model": {"num_classes": -1}}, "--model.num_classes is -1"),
        ({"model": {"learn_sigma": True}, "diffusion": {"kind": "flow", "prediction": "x0"}}, "no variance to learn"),
        ({"data": {"max_bad": 2.0}}, "--data.max_bad is 2; it must be a share, 0 to 1"),
        ({"diffusion": {"flow_t_logit": (math.nan, 1.0)}}, "the mean must be finite"),
        ({"diffusion": {"flow_clamp": 0.0}}, "--diffusion.flow_clamp is 0; it must be positive"),
        ({"diffusion": {"timesteps": 0}}, "--diffusion.timesteps is 0"),
        ({"train": {"beta2": 1.0}}, "--train.beta2 is 1"),
        ({"train": {"max_skips": 0}}, "--train.max_skips is 0"),
        ({"train": {"grad_clip": math.nan}}, "--train.grad_clip is nan"),
        ({"log": {"keep": 0}}, "--log.keep is 0"),
        ({"diffusion": {"kind": "ddpm"}, "sample": {"sampler": "euler"}}, "--sampler euler does not sample"),
        ({"sample": {"sampler": "ddim"}}, "use euler"),
        ({"sample": {"guidance_interval": (0.5, 0.5)}}, "0 ≤ low < high ≤ 1"),
        ({"parallel": {"shard": -1}}, "--parallel.shard is -1"),
    ],
)
def test_bad_values_of_derived_settings_are_refused_by_name(groups, said):
    with pytest.raises(UserError, match=re.escape(said)):
        validate(C.replace(cli(), **groups))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("train", "lr"), "fast", "lr"),
        (("train", "extra"), 1, "unknown setting 'extra'"),
        (("data", "image_size"), [32], "expected 2 values"),
        (("model", "depth"), 6.5, "depth"),
        (("model", "depth"), True, "depth"),
        (("diffusion", "kind"), "magic", "valid are 'ddpm', 'flow'"),
        (("train",), 3, "expected a group of settings"),
        (("run", "name"), "../../etc", "--run.name"),
    ],
)
def test_a_tampered_config_file_is_refused_by_name(tmp_path, path, value, said):
    data = json.loads(json.dumps(dataclasses.asdict(cli())))
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(UserError) as error:
        load_config(tmp_path / "config.json")
    assert "config.json" in str(error.value)
    assert said in str(error.value)


@pytest.mark.parametrize(("kind", "predicts"), [("flow", "velocity"), ("ddpm", "x0")])
def test_a_run_from_before_flow_could_predict_x0_means_what_it_meant(tmp_path, kind, predicts):
    data = json.loads(json.dumps(dataclasses.asdict(cli())))
    data["diffusion"] |= {"kind": kind, "prediction": "x0", "min_snr": 0.0, "flow_t": "logit_normal"}
    del data["diffusion"]["flow_t_logit"], data["diffusion"]["flow_clamp"]
    (tmp_path / "config.json").write_text(json.dumps(data))
    found = load_config(tmp_path / "config.json").diffusion
    assert (found.kind, found.prediction, found.flow_t, found.flow_t_logit) == (kind, predicts, "logit_normal", (0.0, 1.0))


def test_help_is_one_screen_and_help_all_explains_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        cli("--help")
    assert stop.value.code == 0
    short = capsys.readouterr().out
    assert len(short.splitlines()) <= 24
    assert max(map(len, short.splitlines())) <= 128
    with pytest.raises(SystemExit) as stop:
        cli("--help", "all")
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "peak, AdamW" in shown
    assert f"recipes: {', '.join(RECIPES)}" in shown


def test_every_field_has_help_and_there_are_few():
    source = Path(C.__file__).read_text()
    groups = [f.default_factory for f in dataclasses.fields(C.Config) if f.default_factory is not dataclasses.MISSING]
    fields = [f.name for g in groups for f in dataclasses.fields(g)]
    assert len(command._option_names(C.Config)) <= 50
    for name in fields:
        lines = [line for line in source.splitlines() if line.strip().startswith(f"{name}: ")]
        assert any("  # " in line or "Derived[" in line for line in lines), name


def test_differences_name_both_values():
    a, b = cli(), cli("--train.lr", "0.5")
    assert differences(a, a) == []
    assert differences(a, b) == ["train.lr: 0.004 here, 0.5 there"]
