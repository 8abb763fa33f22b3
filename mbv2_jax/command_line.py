"""A command's flags and config, read without jax; a mistake in them becomes one clear line.

absl and ml_collections do the parsing. This module adds to it: a missing config file is noticed at
once, the message about an unknown key names the nearest one, no mistake prints a traceback, and
--help exits with 0.
"""

import importlib.util
import io
import pathlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from mbv2_jax.errors import UserError, nearest, report


def run(main: Callable[[], None]) -> NoReturn:
    """Runs a command; exits with 0, with 2 for a user's mistake, with 1 for a run that failed."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a file's name goes out as it came in
    try:
        main()
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(report(error))
    sys.exit(0)


def parse(values: flags.FlagValues, argv: Sequence[str], usage: str) -> ConfigDict:
    """Parses `argv` into `values`, and returns the config that it names.

    Args:
      values: the command's own flags; --config is added here.
      argv: the command line, program name first.
      usage: the text that --help prints before the list of flags.

    Returns:
      The locked config with every --config.KEY=VALUE applied.

    Raises:
      UserError: anything wrong on the command line or in the config file.
    """
    if wants_help(argv[1:]):
        print(f"{usage.rstrip()}\n\nFlags:\n{_flag_table(values)}\n\n{_config_help()}")
        sys.exit(0)
    spec, rest = _take_config(argv[1:])
    config = load_config(spec)
    _check_keys(config, rest)
    argv = [argv[0], *rest]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    words = _parse_flags(values, argv)
    if words:
        raise UserError(f"unexpected argument {words[0]!r}: flags are written --NAME=VALUE")
    return values.config


def parse_words(values: flags.FlagValues, argv: Sequence[str], usage: str) -> list[str]:
    """Parses `argv` into `values` for a command without a config.

    Args:
      values, argv, usage: see `parse`.

    Returns:
      The arguments that are not flags, such as files.

    Raises:
      UserError: a flag is unknown, or its value is impossible.
    """
    if wants_help(argv[1:]):
        print(f"{usage.rstrip()}\n\nFlags:\n{_flag_table(values)}")
        sys.exit(0)
    return _parse_flags(values, argv)


def wants_help(arguments: Sequence[str]) -> bool:
    """Returns whether one of the arguments asks for help."""
    return not {"--help", "-h", "-help", "--helpfull", "--helpshort"}.isdisjoint(arguments)


def _parse_flags(values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """Parses `argv` into `values`, and returns the arguments that are not flags."""
    try:
        return values(argv)[1:]
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(f"{_one_line(error)}; --help lists the flags") from None


def overrides(values: flags.FlagValues) -> dict[str, Any]:
    """Returns the --config.KEY=VALUE of a parsed command line, as {"model.width": 0.5, ...}."""
    return dict(config_flags.get_override_values(values["config"]))


def expectation(flag: str, text: str | None, names: Sequence[str]) -> dict[str, float] | None:
    """Reads the figures of a flag such as --expect=71.86,90.42 or --expect=mIoU=75.32.

    Args:
      flag: its name, for messages.
      text: its value: a number for each name in order, or some of them as NAME=NUMBER; None or
        "none" expects nothing.
      names: the names of the figures, in order.

    Returns:
      The figures by name; None if nothing is expected.

    Raises:
      UserError: the text is neither, or a number is not from 0 to 100.
    """
    if text in (None, "none"):
        return None
    words = [word.rpartition("=")[::2] for word in text.split(",")]
    given = [name for name, _ in words] if "=" in text else names
    try:
        pairs = zip(given, words, strict=True)
        figures = {name: float(number) for name, (_, number) in pairs}
    except ValueError:
        figures = {}
    possible = all(name in names and 0 <= value <= 100 for name, value in figures.items())
    if not figures or len(figures) < len(given) or not possible:
        form = ",".join(name.upper() for name in names)
        raise UserError(
            f"{flag}={text}: give {form} in percent, such as 71.86,90.42, or some of them by name, "
            f"such as {names[0]}=75.32, or none"
        )
    return figures


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {"model.width": 1.0, ...} of a nested config."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def load_config(spec: str) -> ConfigDict:
    """Returns the locked config of PATH.py[:ARG] or NAME[:ARG], as --config takes it.

    Raises:
      UserError: there is no such file or recipe, or the file does not return a config.
    """
    name, _, argument = spec.partition(":")
    path = _config_file(name)
    try:
        module_spec = importlib.util.spec_from_file_location("_config", path)
        assert module_spec is not None and module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        config = module.get_config(*([argument] if argument else []))
    except UserError:
        raise
    except Exception as error:  # the file is the user's: any error in it becomes one line
        if argument and isinstance(error, TypeError) and "argument" in str(error):
            raise UserError(f"{path} takes no ':{argument}' after its name") from None
        raise UserError(f"config {path}: {type(error).__name__}: {_one_line(error)}") from None
    if not isinstance(config, ConfigDict):
        raise UserError(f"config {path}: get_config() must return a ConfigDict")
    return config.lock()


def _config_file(name: str) -> pathlib.Path:
    """Finds a recipe given as a file, or by the name of one that is installed with the package."""
    if name.endswith(".py") and pathlib.Path(name).is_file():
        return pathlib.Path(name)
    package = importlib.util.find_spec("mbv2_jax.configs")
    folders = package.submodule_search_locations if package else None
    recipes = {
        file.stem: file
        for folder in folders or []
        for file in sorted(pathlib.Path(folder).glob("*.py"))
        if file.stem not in ("__init__", "default")
    }
    if name in recipes:
        return recipes[name]
    stem = pathlib.Path(name).stem
    fault = f"there is no config {name!r}" if name else "--config=NAME is missing"
    raise UserError(
        f"{fault}: give the path of a .py file, or a recipe's name: {nearest(stem, recipes)}"
    )


def _take_config(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Splits --config=SPEC (or --config SPEC) off the other arguments."""
    rest = list(arguments)
    for i, argument in enumerate(rest):
        match = re.fullmatch(r"--?config(?:=(.*))?", argument)
        if match and match.group(1) is not None:
            return match.group(1), rest[:i] + rest[i + 1 :]
        if match:
            return "".join(rest[i + 1 : i + 2]), rest[:i] + rest[i + 2 :]
    return "", rest


def _check_keys(config: ConfigDict, arguments: Sequence[str]) -> None:
    """Refuses an override of a field that does not exist, or of a whole section."""
    known = flatten(config.to_dict())
    for argument in arguments:
        match = re.match(r"--?(?:no)?config\.([^=]*)", argument)
        if not match or match.group(1) in known:
            continue
        key = match.group(1)
        inside = [name for name in known if name.startswith(f"{key}.")]
        if inside:
            raise UserError(f"--config.{key} is a section; its fields are {', '.join(inside)}")
        # 'width' is nearer to 'model.width' than a comparison of whole paths would find.
        leaf = key.rpartition(".")[2]
        same_leaf = [name for name in known if name.rpartition(".")[2] == leaf]
        hint = f"did you mean {same_leaf[0]!r}?" if same_leaf else nearest(key, known)
        raise UserError(f"the config has no field {key!r}: {hint}")


def _config_help() -> str:
    from mbv2_jax import tasks
    from mbv2_jax.training import settings

    parts = [
        "Config:\n  --config=FILE.py[:ARG] or --config=NAME[:ARG] of an installed recipe\n"
        "  --config.KEY=VALUE changes one field, e.g. --config.schedule.base_lr=0.1",
        f"Fields of a config:\n{settings.explain(tasks.DEFAULT)}",
    ]
    parts += [
        f"Other fields of a config whose task is {task!r}:\n{settings.explain(task, tasks.DEFAULT)}"
        for task in tasks.BUILT_IN
        if task != tasks.DEFAULT
    ]
    return "\n\n".join(parts)


def _flag_table(values: flags.FlagValues) -> str:
    rows = [f"  --{name}\n      {values[name].help}" for name in sorted(values)]
    return "\n".join(rows)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error.args[0] if error.args else error).split())
