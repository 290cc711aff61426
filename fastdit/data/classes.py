"""classes.json of a run folder: what the classes are called, so that a picture can be asked for by name."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastdit.config import UserError, nearest, plain
from fastdit.runtime.files import read_file, write_text

FILE = "classes.json"
LIMIT = 1 << 26  # bytes; the names of ImageNet's classes have 30,000


def write(folder: Path, names: Sequence[str]) -> None:
    """Keep the names of classes 0, 1, … in a folder; nothing is written where there are none. Raises OSError."""
    if names:
        write_text(folder / FILE, json.dumps(list(names), indent=0) + "\n")


def read(folder: Path) -> list[str]:
    """The names kept in a folder; empty where there are none. Raises UserError for a file that is no list of names."""
    return read_names(folder / FILE)


def read_names(path: Path) -> list[str]:
    """The same of the file itself, whatever it is called."""
    try:
        names = json.loads(read_file(path, LIMIT))
        if not isinstance(names, list) or not all(type(name) is str for name in names):
            raise ValueError("not a list of names")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{plain(path)}: not the names of classes ({plain(error, 200)})") from None
    return names


def captions(names: Sequence[str], classes: Iterable[int] | None) -> list[str]:
    """What to write below pictures of these classes; nothing where there are no classes or no names of them."""
    return [names[number] for number in classes] if names and classes is not None else []


def number(label: str, names: Sequence[str], num_classes: int) -> int:
    """The class that a label names: a class by its name, or by its number. Raises UserError for what is neither.

    A name comes first: of folders "1", "10" and "2", label 2 is the folder "2".
    """
    if label in names[:num_classes]:
        return names.index(label)
    if label.isascii() and label.isdecimal() and len(label) < 10 and int(label) < num_classes:
        return int(label)
    if not num_classes:
        raise UserError(f"--label {plain(label)}: the model has no classes")
    close = plain(nearest(label, names))
    listed = f" ({plain(', '.join(names[:20]))}{', …' if len(names) > 20 else ''})" if names else ""
    raise UserError(f"--label {plain(label)}: the model has classes 0 … {num_classes - 1}{listed}{close}")
