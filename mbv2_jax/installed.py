"""Checks for packages that not every install has.

`pip install .` installs everything that training needs, an extra adds more, and
requirements/light.txt installs less (docs/installation.md). The code that needs such a package
calls `require` and then imports it, in the function that uses it.
"""

import importlib.util

from mbv2_jax.errors import UserError


def require(purpose: str, *modules: str, extra: str = "") -> None:
    """Raises UserError with the command that installs what is missing.

    Args:
      purpose: the use of the modules, which starts the message, such as "reading net.pth".
      modules: names to import.
      extra: the extra of setup.cfg that installs them; "" for `install_requires`.
    """
    missing = [name for name in modules if not _is_installed(name)]
    if missing:
        verb = "are" if len(missing) > 1 else "is"
        what = f"'.[{extra}]'" if extra else "."
        raise UserError(
            f"{purpose} needs {', '.join(missing)}, which {verb} not installed: run pip install"
            f" {what} in the clone of mbv2_jax"
        )


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a package above it
        return False
