"""The command line: every recipe resolves, and whatever is wrong is one line that names it."""

import dataclasses
import json
from pathlib import Path

import pytest

from fastdit import config as C
from fastdit.config import RECIPES, UserError, parse


def cli(*args: str) -> C.Config:
    return parse(args, "train.py", "Train a DiT.")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_resolves_and_survives_json(name, tmp_path):
    config = cli(name)
    assert config.run.name == name
    C.save(config, tmp_path / "config.json")
    assert C.load(tmp_path / "config.json") == config


def test_no_arguments_is_the_cats_recipe():
    assert cli() == cli("cats")


def test_fields_are_set_by_their_dotted_names():
    config = cli("cats-256", "--train.lr", "3e-4", "--model.input_size", "64", "32", "--data.no_hflip", "--run.name=x")
    assert (config.train.lr, config.model.input_size, config.data.hflip, config.run.name) == (3e-4, (64, 32), False, "x")


BAD = [
    (["cat"], "unknown recipe 'cat'; did you mean cats?"),
    (["--train.lrr", "1"], "--train.lrr; did you mean --train.lr?"),
    (["--trainn.lr", "1"], "did you mean --train.lr?"),
    (["--lr", "1"], "unknown option --lr"),
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
    (["--model.num_heads", "5"], "--model.num_heads 5 does not divide --model.width"),
    (["--model.width", "250", "--model.num_heads", "1"], "multiple of 4"),
    (["--model.patch", "5"], "--model.patch 5 does not divide --model.input_size 32×32"),
    (["--model.patch", "0"], "--model.patch is 0"),
    (["--model.input_size", "32"], "--model.input_size"),
    (["--model.input_size", "64", "64"], "differs from --data.image_size"),
    (["--model.conv_kernel", "7"], "valid are 3, 4, 5, and 0"),
    (["--model.class_dropout", "1"], "--model.class_dropout is 1"),
    (["--model.num_classes", "0", "--model.class_dropout", "0.1"], "--model.class_dropout needs classes"),
    (["--model.channels", "4"], "--model.channels is 4"),
    (["--data.source", "hub"], "--data.source hub needs --data.path"),
    (["--data.image_size", "48", "48"], "32×32 or 64×64"),
    (["--data.max_bad", "2"], "--data.max_bad is 2"),
    (["--sample.steps", "0"], "--sample.steps is 0"),
    (["--sample.steps", "2000"], "--sample.steps 2000 is more than"),
    (["--sample.guidance", "2"], "--sample.guidance 2 needs"),
    (["--sample.sampler", "euler"], "--sample.sampler euler does not sample"),
    (["--diffusion.kind", "flow", "--sample.sampler", "ddim"], "use euler"),
    (["--diffusion.kind", "flow", "--model.learn_sigma"], "--model.learn_sigma"),
    (["--diffusion.kind", "flow", "--diffusion.min_snr", "5"], "--diffusion.min_snr"),
    (["--run.name", "../x"], "--run.name '../x'"),
    (["--run.name", "a/b"], "--run.name"),
    (["--run.name", ".hidden"], "--run.name"),
    (["--parallel.timeout_minutes", "0"], "--parallel.timeout_minutes"),
    (["--kernels", "cuda"], "--kernels"),
    (["--log.keep", "0"], "--log.keep is 0"),
    (["stray", "--train.lr", "1"], "unknown recipe 'stray'"),
    (["cats", "stray"], "stray"),
]


@pytest.mark.parametrize(("args", "said"), BAD, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_bad_input_is_one_line_that_names_it(args, said):
    with pytest.raises(UserError) as error:
        cli(*args)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("train", "lr"), "fast", "lr"),
        (("train", "extra"), 1, "unknown setting 'extra'"),
        (("model", "input_size"), [32], "expected 2 values"),
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
        C.load(tmp_path / "config.json")
    assert "config.json" in str(error.value)
    assert said in str(error.value)


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        cli("--help")
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "peak, AdamW" in shown
    assert "recipes: cats, cats-256, imagenet-256-xl" in shown


def test_every_field_has_help_and_there_are_few():
    source = Path(C.__file__).read_text().split("RECIPES = ")[0]
    groups = [f.default_factory for f in dataclasses.fields(C.Config) if f.default_factory is not dataclasses.MISSING]
    fields = [f.name for g in groups for f in dataclasses.fields(g)]
    assert len(fields) < 80
    for name in fields:
        assert any(line.strip().startswith(f"{name}: ") and "  # " in line for line in source.splitlines()), name


def test_differences_name_both_values():
    a, b = cli(), cli("--train.lr", "0.5")
    assert C.differences(a, a) == []
    assert C.differences(a, b) == ["train.lr: 0.001 here, 0.5 there"]
