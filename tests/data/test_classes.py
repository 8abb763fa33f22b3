"""ImageNet's class names are read at their first use."""

import subprocess
import sys

import pytest

from mbv2_jax.data import classes


def test_importing_the_module_reads_no_file():
    script = (
        "import importlib.resources\n"
        "importlib.resources.files = None\n"
        "from mbv2_jax.data import classes\n"
        "classes.imagenet_offset(['cat', 'dog'])\n"
        "try:\n"
        "    classes.IMAGENET_NAMES\n"
        "except TypeError:\n"
        "    print('read now')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "read now\n", done.stderr


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="IMAGENET_LABELS"):
        classes.IMAGENET_LABELS  # noqa: B018
