"""The names of the classes of converted weights."""

import dataclasses
from collections.abc import Sequence

from mbv2_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ClassNames:
    """The names of the classes in the order of the outputs, and their origin for messages.

    Attributes:
      names: () where there are no classes.
      origin: such as "the file's".
      assumed: whether neither the file nor the user gave them.
    """

    names: tuple[str, ...]
    origin: str
    assumed: bool = False


def choose(
    given: Sequence[str], own: Sequence[str], count: int | None, usual: ClassNames | None
) -> ClassNames:
    """Returns the names of the classes: those given, else the file's, the usual ones, or numbers.

    Args:
      given: the user's; () for none.
      own: the file's; () where it has none.
      count: the number of classes; None where there is no head.
      usual: those that a head of so many classes has where nothing is known; None for none.

    Raises:
      UserError: a name is not printable, or the number of given names is not that of the classes.
    """
    unprintable = [name for name in given or own if not name.isprintable()]
    if unprintable:
        raise UserError(
            f"a class name is not printable: {unprintable[0]!a}; --class-names=FILE gives others"
        )
    if count is None:
        return ClassNames((), "none")
    if given and len(given) != count:
        raise UserError(f"{len(given)} class names were given, but there are {count} classes")
    if given:
        return ClassNames(tuple(given), "as given")
    if len(own) == count:
        return ClassNames(tuple(own), "the file's")
    if not own and usual is not None:
        return dataclasses.replace(usual, assumed=True)
    return ClassNames(tuple(map(str, range(count))), "numbers", assumed=True)


def warnings(chosen: ClassNames, own: Sequence[str], command: str) -> list[str]:
    """Returns a line about names that are assumed; [] about others.

    Args:
      chosen, own: from `choose`, and its argument.
      command: the beginning of a command that converts, such as "python -m convert".
    """
    if not chosen.assumed:
        return []
    found = f"names {len(own)} classes and has {len(chosen.names)}" if own else "names no classes"
    numbered = chosen.origin == "numbers"
    instead = "they are numbered" if numbered else f"{chosen.origin} names are used"
    return [f"the file {found}: {instead} ({command} --class-names=FILE gives others)"]
