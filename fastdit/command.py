"""From arguments to a config, and from errors to an exit status: what the verbs' command lines share."""

import contextlib
import dataclasses
import inspect
import io
import json
import os
import re
import signal
import sys
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from fastdit.config import Config, RankError, UserError, nearest, plain, replace
from fastdit.recipes import RECIPES, derive
from fastdit.runtime import process
from fastdit.runtime.run import CONFIG, load_config
from fastdit.runtime.validation import validate

T = TypeVar("T")


COMMON: tuple[str, ...] = (
    "data.path",
    "data.image_size",
    "data.vae",
    "train.images",
    "train.batch",
    "train.lr",
    "model.width",
    "model.depth",
)
COMMON += ("run.name", "run.fresh", "sample.steps", "parallel.precision", "log.save_every")


def parse(argv: Sequence[str], prog: str, description: str) -> Config:
    """[RECIPE] [--group.field value …] → a validated Config. Raises UserError, one line, for anything else."""
    args = list(argv)
    recipe = args.pop(0) if args and not args[0].startswith("-") else "cats"
    if recipe not in RECIPES:
        raise UserError(f"unknown recipe {plain(recipe)!r}{nearest(recipe, RECIPES)}; recipes: {', '.join(RECIPES)}")
    return _settings(args, prog, description, RECIPES[recipe])


def parse_run(argv: Sequence[str], prog: str, description: str) -> tuple[Config, bool]:
    """As `parse`, or with a run's folder for the recipe: then the run's own config is what the options change, on purpose.

    Returns the config, and whether a run's folder was named. Raises UserError.
    """
    first = Path(argv[0]) if argv and not argv[0].startswith("-") else None
    if first is None or argv[0] in RECIPES or not first.is_dir():
        return parse(argv, prog, description), False
    if not (first / CONFIG).is_file():
        raise UserError(f"{plain(first)} holds no {CONFIG}: it is not the folder of a run")
    folder = first.absolute()
    saved = load_config(first / CONFIG)
    saved = replace(saved, run={"name": folder.name, "folder": os.path.relpath(folder.parent), "fresh": False})
    return _settings(list(argv[1:]), prog, description, saved), True


def parse_over(cls: type[T], argv: Sequence[str], prog: str, description: str) -> T:
    """[RECIPE] [--field VALUE …] → settings of a recipe and those that `cls`, a kind of Config, adds. Raises UserError."""
    args = list(argv)
    recipe = [args.pop(0)] if args and not args[0].startswith("-") else []
    base = parse(recipe, prog, "")
    default = cls(**{f.name: getattr(base, f.name) for f in dataclasses.fields(base)})
    usage = f"{description.strip()}\n\n{prog} [RECIPE] [--field VALUE …]    recipes: {', '.join(RECIPES)} (default cats)"
    return parse_args(cls, args, prog, usage, default=default)


def is_program(verb: str, name: str) -> bool:
    """Whether a verb's module, of this __name__, is what was started, as a script or as installed. Else argv is another's."""
    return name == "__main__" or sys.argv[0].endswith(f"fastdit-{verb}")


def at_once(parse: Callable[[Sequence[str]], object], start: str = "") -> None:
    """What a verb can say before the seconds that torch takes to import: help, an error in the options, or that it starts."""
    process.outlive_terminal()
    rank = int(os.environ.get("RANK", 0))
    with _exits(rank):
        parse(sys.argv[1:])
    if start and rank == 0:
        print(start, flush=True)


def _settings(args: list[str], prog: str, description: str, default: Config) -> Config:
    way = f"{prog} [RECIPE | RUN] [--group.field VALUE …]\nrecipes: {', '.join(RECIPES)}; by default cats"
    usage = f"{description}\n\n{way}"
    if args and args[0] in ("--help", "-h") and args[1:] != ["all"]:
        print(_short_help(description.partition("\n")[0] + "\n\n" + way, prog, default))
        raise SystemExit(0)
    if args[:1] == ["--help"]:
        args = ["--help"]
    config = derive(parse_args(Config, args, prog, usage, default=default), default)
    validate(config, encoded=False)
    return config


def _short_help(usage: str, prog: str, default: Config) -> str:
    """One screen: the settings that most people change, and three examples."""
    lines = []
    for name in COMMON:
        group, _, leaf = name.partition(".")
        settings = getattr(default, group)
        [said] = re.findall(rf"^    {leaf}: .*?  # (.*)$", inspect.getsource(type(settings)), re.MULTILINE)
        value = getattr(settings, leaf)
        shown = "" if value is None else " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        lines.append(f"  --{name:<20} {shown:<9} {said}")
    examples = (
        f"  {prog:<34} drawn cats, within minutes, on any machine",
        f"  {prog} --data.path ~/pictures    a folder of pictures; its sub-folders are the classes",
        f"  {prog} runs/cats --train.images 72000    go on with a run, for longer",
    )
    return "\n".join([usage, "", *lines, "", *examples, "", "--help all lists every setting. --lr finds --train.lr."])


def parse_args(cls: type[T], argv: Sequence[str], prog: str, description: str, default: T | None = None) -> T:
    """A dataclass from --field arguments, by tyro. Raises UserError, one line, naming the nearest valid field.

    A field may be named by its last part alone, --lr for --train.lr, where no other ends like it.
    tyro prints its errors, or with console_outputs=False drops them. It has no hook that hands them over, so what it printed is
    read here.
    """
    names = _option_names(cls)
    given = [_whole_name(arg, names) if arg.startswith("--") and arg != "--help" else arg for arg in argv]
    out = io.StringIO()
    options: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(out):
            return tyro.cli(cls, args=given, prog=prog, description=description, use_underscores=True, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        # tyro's message is a titled box, its rules dashes where the terminal has no others; the first of its parts says it all.
        parts = re.split("─{5,}|-{5,}", re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).partition("\n")[2])
        inside = next(part for part in parts if part.strip())
        raise UserError(" ".join(inside.replace("│", " ").split())) from None


def _whole_name(arg: str, names: Sequence[str]) -> str:
    """--lr=1 → --train.lr=1. Raises UserError for an option that there is not."""
    name, equals, value = arg[2:].partition("=")
    name = name.replace("-", "_")
    head, _, tail = name.rpartition(".")
    positive = f"{head}.{tail.removeprefix('no_')}" if head else tail.removeprefix("no_")
    if name in names or positive in names:
        return arg
    ending = [whole for whole in names if whole.rpartition(".")[2] == positive] if not head else []
    if len(ending) == 1:
        whole = ending[0].removesuffix(positive) + name
        return f"--{whole}{equals}{value}"
    if ending:
        raise UserError(f"--{plain(name)} may be {' or '.join('--' + whole for whole in ending)}")
    raise UserError(f"unknown option --{plain(name)}{nearest(name, names, '--')}")


def chosen(config: Config, options: Any, **groups: dict[str, Any]) -> Config:
    """A run's config with what a verb's options change of its sampling; those left at None change nothing.

    Raises UserError for what does not go together.
    """
    changes = {name: getattr(options, name) for name in ("sampler", "steps", "guidance", "guidance_interval")}
    config = replace(
        config,
        sample={name: value for name, value in changes.items() if value is not None},
        data={"vae": options.vae} if options.vae else {},
        parallel={"precision": options.precision},
        **groups,
    )
    validate(config)
    return config


def _option_names(cls: type, prefix: str = "") -> list[str]:
    """The names of the settings that a command line takes: those that are not `Derived`."""
    names = []
    hints = typing.get_type_hints(cls, include_extras=True)
    for f in dataclasses.fields(cls):
        if tyro.conf.Suppress in typing.get_args(hints[f.name]):
            continue
        if dataclasses.is_dataclass(hints[f.name]):
            names += _option_names(typing.cast(type, hints[f.name]), f"{prefix}{f.name}.")
        else:
            names.append(prefix + f.name)
    return names


def run(verb: Callable[[T], object], parse: Callable[[Sequence[str]], T], no_memory: Callable[[T], str] | None = None) -> None:
    """What the main() of each verb is: read the command line, do the work, exit by `exit_cleanly`.

    verb: the work; a number that it returns is the exit status. parse: makes of the arguments what `verb` takes.
    no_memory: the line to end with where memory runs out.
    """
    from fastdit.runtime import ranks  # here: it imports torch, and --help need not wait for that

    process.outlive_terminal()
    process.end_with_parent()

    def work() -> int | None:
        options = parse(sys.argv[1:])
        try:
            status = verb(options)
            return status if isinstance(status, int) else 0
        except (RuntimeError, MemoryError) as error:
            if no_memory is None or not ranks.out_of_memory(error):
                raise
        # Outside the except clause, so that what the traceback held is free again.
        raise RankError(no_memory(options))

    exit_cleanly(lambda: ranks.as_one(work), int(os.environ.get("RANK", 0)))


def exit_cleanly(main: Callable[[], int | None], rank: int = 0) -> None:
    """Exit with main()'s status, or 2 after a UserError (rank 0 prints it), 1 after a RankError (its own rank does).

    Ctrl-C exits with 130 where nothing was there to save. torchrun is given the error too, for its summary.
    """
    with _exits(rank):
        sys.exit(main())


@contextlib.contextmanager
def _exits(rank: int) -> Iterator[None]:
    """What is raised inside, as an exit status."""
    try:
        yield
    except RankError as error:
        _say(f"error: rank {rank}: {error}")
        sys.stdout.flush()
        os._exit(1)  # threads and groups that still wait for another rank would keep a proper exit waiting too
    except UserError as error:
        _say(f"error: {error}", rank == 0)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _say(line: str, aloud: bool = True) -> None:
    if aloud:
        print(plain(line, 4000), file=sys.stderr, flush=True)
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # as torch.distributed.elastic.multiprocessing.errors reads it
    if file:
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": line, "timestamp": int(time.time())}), encoding="utf-8")
