"""Lists of classes as text files, a name a line: classes.txt."""

import pathlib
from collections.abc import Sequence

from mbv2_jax.errors import UserError, listed

NAME = "classes.txt"


def read(path: str, repeatable: Sequence[str] = ()) -> list[str]:
    """Returns the names in a file, the first of which is class 0.

    Args:
      path: of the file.
      repeatable: names that may stand there more than once.

    Raises:
      UserError: the file is missing or not text, has an empty line between others, names a class
        twice, or names none.
    """
    try:
        text = pathlib.Path(path).read_text("utf-8-sig")
    except FileNotFoundError:
        raise UserError(
            f"no file {path}: it names the classes, one a line, the first of which is class 0"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as text: {error}") from None
    names = [line.strip() for line in text.rstrip().splitlines()]
    if "" in names:
        raise UserError(f"{path}: line {names.index('') + 1} is empty; each line names a class")
    if not names:
        raise UserError(f"{path} names no class")
    twice = sorted({name for name in names if names.count(name) > 1} - set(repeatable))
    if twice:
        raise UserError(f"{path} names {listed(map(repr, twice), separator=', ')} more than once")
    return names
