"""The notebooks of docs/ run as they are, in a kernel as their readers use."""

import json
import pathlib
import re
import sys

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from nbclient import NotebookClient

from tests.support import REPOSITORY


class ThisPython(KernelSpecManager):
    """Finds one kernel: that of the Python that runs the tests, whatever the machine has."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        del kernel_name
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="Python 3", language="python")


def run(name: str, folder: pathlib.Path, **parameters: object) -> str:
    """Runs a notebook in a folder, and returns everything that it printed.

    Args:
      name: of the file in docs/notebooks.
      folder: the working directory.
      parameters: values for the first cell of code, which is the one tagged "parameters".
    """
    notebook = nbformat.read(REPOSITORY / "docs" / "notebooks" / name, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code[0].metadata.tags == ["parameters"]
    assert not any(cell.outputs for cell in code), "clear the outputs before committing"
    lines = [f"{name} = {value!r}" for name, value in parameters.items()]
    assert all(re.search(rf"^{name} = ", code[0].source, re.M) for name in parameters)
    code[0].source = "\n".join([code[0].source, *lines])
    client = NotebookClient(
        notebook,
        timeout=600,
        resources={"metadata": {"path": str(folder)}},
    )
    client.create_kernel_manager().kernel_spec_manager = ThisPython()
    client.execute()
    outputs = [output for cell in code for output in cell.outputs]
    texts = [
        output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs
    ]
    return "\n".join(texts)


@pytest.fixture
def weights(check_data) -> str:
    return str(check_data / "weights" / "mm_mobilenet_v2.pth")


def test_quick_start(weights, tmp_path):
    printed = run("quick_start.ipynb", tmp_path, WEIGHTS=weights)
    # The photos show a pavilion on a hill, and a dahlia: the nearest of ImageNet's classes.
    assert re.search(r"\d\d\.\d%  \d+  (palace|monastery|stupa)", printed), printed
    assert "(2, 1000)" in printed
    assert "[(2, 56, 56, 24), (2, 28, 28, 32), (2, 14, 14, 96), (2, 7, 7, 1280)]" in printed
    assert (tmp_path / "runs" / "torchvision.pth").is_file()


def test_finetune_and_look(weights, tmp_path):
    printed = run("finetune_and_look.ipynb", tmp_path, WEIGHTS=weights)
    results = [json.loads(line) for line in printed.splitlines() if line.startswith('{"top1"')]
    probe, tuned, report = (result["top1"] for result in results)
    # 80 of 400 digits are held out; a standard error is 3 points, and chance is 10.
    assert probe > 80
    assert tuned >= probe - 6
    assert report == tuned
    for name in ("confusion", "mistakes", "calibration"):
        assert (tmp_path / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "cam").iterdir())) == 3
