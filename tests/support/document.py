"""Runs a page of docs/ as its reader would: every block as it is written, one after the other.

Blocks of Python share one namespace, and blocks of `sh` run in the same folder. To be quick, every
stage of the network has one block, in the commands too, by a `sitecustomize` beside the page's
files; nothing else differs from the package.
"""

import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from mbv2_jax.models import mobilenet_v2
from mbv2_jax.spec import Backbone
from tests.support import REPOSITORY

_SHORT = """
from mbv2_jax.models import mobilenet_v2
mobilenet_v2.STAGES = tuple(stage._replace(blocks=1) for stage in mobilenet_v2.STAGES)
"""


def run(page: str, substitutes: Mapping[str, str]) -> dict[str, Any]:
    """Runs the blocks of docs/PAGE in the current folder.

    Args:
      page: the name of the file.
      substitutes: texts of the page and those to use instead.

    Returns:
      The namespace of the Python blocks, and "outputs": the standard output of each sh block.
    """
    text = (REPOSITORY / "docs" / page).read_text()
    for old, new in substitutes.items():
        assert old in text
        text = text.replace(old, new)
    pathlib.Path("customized").mkdir()
    pathlib.Path("customized", "sitecustomize.py").write_text(_SHORT)
    exec(_SHORT, {})
    assert len(mobilenet_v2.blocks(Backbone())) == 7
    namespace: dict[str, Any] = {"__name__": "page"}
    outputs = []
    for language, block in re.findall(r"```(python|sh)\n(.*?)```", text, re.DOTALL):
        if language == "sh":
            outputs.append(_shell(block))
        else:
            exec(compile(block, page, "exec"), namespace)
    return namespace | {"outputs": outputs}


def _shell(block: str) -> str:
    paths = {
        "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{pathlib.Path('customized').absolute()}:{REPOSITORY}",
    }
    done = subprocess.run(
        ["sh", "-e", "-c", block], env=os.environ | paths, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
