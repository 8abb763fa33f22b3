"""The common parts of the benchmarks' command lines: lists, and the exit status."""

from collections.abc import Callable, Iterable

from mbv2_jax.errors import UserError, nearest, report


def chosen(flag: str, text: str | None, known: Iterable[str]) -> list[str]:
    """Returns the names in `text`, in the order of `known`; all of `known` where it is None.

    Raises:
      UserError: a name is not one of `known`.
    """
    known = list(known)
    names = known if text is None else text.split(",")
    for name in names:
        if name not in known:
            raise UserError(f"{flag}: unknown {name!r}; {nearest(name, known)}")
    return [name for name in known if name in names]


def counts(flag: str, text: str | None) -> list[int]:
    """Returns the numbers in `text`, such as "1,32"; no numbers where it is None.

    Raises:
      UserError: a part is not a number, or is 0.
    """
    numbers = [int(part) if part.isdigit() else 0 for part in text.split(",")] if text else []
    if 0 in numbers:
        raise UserError(f"{flag}={text}: give numbers from 1 on, such as 1,32")
    return numbers


def status(main: Callable[[], None]) -> int:
    """Runs a benchmark and returns its exit status; reports a user's mistake, which gives 2."""
    try:
        main()
    except (UserError, KeyboardInterrupt) as error:
        return report(error)
    return 0
