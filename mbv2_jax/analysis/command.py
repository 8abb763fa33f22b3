"""The table of a program's commands, and the parsing of their command lines.

`data_commands.py` and `model_commands.py` hold the tables; everything that takes seconds to import,
such as jax, is imported by a command when it runs.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from mbv2_jax import command_line
from mbv2_jax.errors import UserError, nearest

# Each takes the flag's name, its default and its help; an enum its values before the help.
text = functools.partial(functools.partial, flags.DEFINE_string)
whole = functools.partial(functools.partial, flags.DEFINE_integer)
number = functools.partial(functools.partial, flags.DEFINE_float)
choice = functools.partial(functools.partial, flags.DEFINE_enum)

_CONFIG = (
    "\nConfig:\n  --config=FILE.py[:ARG] or --config=NAME[:ARG] of an installed recipe\n"
    "  --config.KEY=VALUE changes one field, e.g. --config.data.data_dir=/data/tfds"
)


@dataclasses.dataclass(frozen=True)
class Given:
    """The command line of a command, parsed.

    Attributes:
      flags: the values of its flags by name.
      config: the config of --config; None for a command that takes none.
      overrides: the --config.KEY=VALUE, as {"model.width": 0.5, ...}.
      words: the arguments that are not flags; () for a command that takes a config.
    """

    flags: Mapping[str, Any]
    config: ConfigDict | None = None
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    words: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Command:
    """One command of a program.

    Attributes:
      run: the command itself.
      flags: made by `text`, `whole`, `number` and `choice`.
      takes_config: whether it takes --config; otherwise it takes words, such as files.
    """

    run: Callable[[Given], None]
    flags: Sequence[Callable[..., Any]]
    takes_config: bool = True

    def parse(self, argv: Sequence[str], usage: str) -> Given:
        """Parses a command line, program name first; --help prints `usage` and the flags."""
        values = flags.FlagValues()
        for define in self.flags:
            define(flag_values=values)
        names = list(values)
        if not self.takes_config:
            words = command_line.parse_words(values, argv, usage)
            return Given({name: values[name].value for name in names}, words=words)
        config = command_line.parse(values, argv, usage + _CONFIG)
        given = {name: values[name].value for name in names}
        return Given(given, config, command_line.overrides(values))


def main(usage: str, commands: Mapping[str, Command]) -> None:
    """Parses the command line of a program, and runs one of its commands.

    Args:
      usage: the text that --help prints.
      commands: by name.

    Raises:
      UserError: the command is missing or unknown, or one of its flags is wrong.
    """
    if not sys.argv[1:]:
        print(usage, file=sys.stderr)
        *others, last = commands
        raise UserError(f"a command is missing: {', '.join(others)} or {last}")
    name, *arguments = sys.argv[1:]
    if command_line.wants_help([name]):
        print(usage.rstrip())
        return
    if name not in commands:
        raise UserError(f"unknown command {name!r}: {nearest(name, commands)}")
    command = commands[name]
    command.run(command.parse([sys.argv[0], *arguments], usage))
