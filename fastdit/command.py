"""From arguments to a config, and from errors to an exit status: what the verbs' command lines share."""

import contextlib
import dataclasses
import io
import os
import re
import signal
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

from fastdit.config import RECIPES, Config, RankError, UserError, nearest, replace, validate

T = TypeVar("T")


def parse(argv: Sequence[str], prog: str, description: str) -> Config:
    """[RECIPE] [--group.field value …] → a validated Config. Raises UserError, one line, for anything else."""
    args = list(argv)
    recipe = args.pop(0) if args and not args[0].startswith("-") else "cats"
    if recipe not in RECIPES:
        raise UserError(f"unknown recipe {recipe!r}{nearest(recipe, RECIPES)}; recipes: {', '.join(RECIPES)}")
    usage = f"{description}\n\n{prog} [RECIPE] [--group.field VALUE …]    recipes: {', '.join(RECIPES)} (default cats)"
    config = parse_args(Config, args, prog, usage, default=RECIPES[recipe])
    if not config.run.name:
        config = replace(config, run={"name": recipe})
    validate(config)
    return config


def parse_args(cls: type[T], argv: Sequence[str], prog: str, description: str, default: T | None = None) -> T:
    """A dataclass from --field arguments, by tyro. Raises UserError, one line, naming the nearest valid field."""
    names = set(_option_names(cls))
    for arg in argv:
        if arg.startswith("--") and arg != "--help":
            name = arg[2:].partition("=")[0].replace("-", "_")
            head, _, tail = name.rpartition(".")
            plain = f"{head}.{tail.removeprefix('no_')}" if head else tail.removeprefix("no_")
            if name not in names and plain not in names:
                raise UserError(f"unknown option --{name}{nearest(name, names, '--')}")
    out = io.StringIO()
    options: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(out):
            return tyro.cli(cls, args=list(argv), prog=prog, description=description, use_underscores=True, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        # tyro's message is a titled box, its rules dashes where the terminal has no others; the first of its parts says it all.
        parts = re.split("─{5,}|-{5,}", re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).partition("\n")[2])
        inside = next(part for part in parts if part.strip())
        raise UserError(" ".join(inside.replace("│", " ").split())) from None


def chosen(config: Config, options: Any, **groups: dict[str, Any]) -> Config:
    """A run's config with what a verb's options change of its sampling; those left at None change nothing.

    Raises UserError for what does not go together.
    """
    changes = {name: getattr(options, name) for name in ("sampler", "steps", "guidance")}
    changes["guidance_low"], changes["guidance_high"] = options.guidance_interval or (None, None)
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
    names = []
    for f in dataclasses.fields(cls):
        nested = typing.get_type_hints(cls)[f.name]
        if dataclasses.is_dataclass(nested):
            names += _option_names(typing.cast(type, nested), f"{prefix}{f.name}.")
        else:
            names.append(prefix + f.name)
    return names


def exit_cleanly(main: Callable[[], int | None], rank: int = 0) -> None:
    """Run a verb and exit with its status; a UserError becomes one line on stderr (rank 0's) and status 2, on every rank.

    A RankError becomes its own rank's line and status 1, and Ctrl-C status 130.
    """
    try:
        sys.exit(main())
    except RankError as error:
        print(f"error: rank {rank}: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # threads and groups that still wait for another rank would keep a proper exit waiting too
    except UserError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
