"""setup.cfg ships every package, and the names that users import resolve."""

import configparser
import subprocess
import sys

from tests.support import REPOSITORY

BESIDE = ("configs", "convert")  # these folders install inside the package


def test_every_package_is_shipped():
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    files = [path for root in ("mbv2_jax", *BESIDE) for path in (REPOSITORY / root).rglob("*.py")]
    found = {".".join(path.parent.relative_to(REPOSITORY).parts) for path in files}
    inside = {name if name.startswith("mbv2_jax") else f"mbv2_jax.{name}" for name in found}
    assert listed == inside


def test_every_file_of_the_page_is_shipped():
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    folder = REPOSITORY / "mbv2_jax" / "export" / "web"
    patterns = setup["options.package_data"]["mbv2_jax.export.web"].split()
    shipped = {path for pattern in patterns for path in folder.glob(pattern)}
    files = {path for path in folder.rglob("*") if path.is_file()}
    assert shipped == {path for path in files if path.suffix not in (".py", ".pyc")}


def test_core_needs_neither_tensorflow_nor_torch():
    script = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name.partition('.')[0] in ('tensorflow', 'torch'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import mbv2_jax\n"
        "mbv2_jax.MobileNetV2, mbv2_jax.init_model, mbv2_jax.inference_model\n"
        "import mbv2_jax.training.loop, mbv2_jax.data.digits, mbv2_jax.configs.digits\n"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
