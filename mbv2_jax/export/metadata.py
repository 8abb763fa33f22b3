"""The facts that every exported file carries about itself, as JSON."""

from typing import Any

import mbv2_jax
from mbv2_jax.export.program import Program

KEY = "mbv2_jax"  # of the JSON, where a format holds properties by name
FILE = "mbv2_jax.json"  # its name, where a format holds files
LABELS = "labels.txt"


def of(program: Program, precision: str, *, integer_io: bool = False) -> dict[str, Any]:
    """Returns the facts that a caller of the file needs.

    Args:
      program: as it was exported.
      precision: of the file, such as "float16".
      integer_io: whether its inputs and outputs are 8-bit numbers, whose scales are in the file.

    Returns:
      {"format_version", "task", "classes", "input", "image_size", "mean", "std", "eval_transforms",
      "outputs", "precision", "integer_io", "exporter"}.
    """
    preprocessing = program.saved.spec.preprocessing
    return {
        "format_version": 1,
        "task": program.saved.spec.task,
        "classes": list(program.task.classes),
        "input": program.input,
        "image_size": list(program.size),  # height, width
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "eval_transforms": preprocessing.eval_transforms,
        "outputs": {
            name: [list(array.shape[1:]), "int8" if integer_io else array.dtype.name]
            for name, array in program.outputs().items()
        },
        "precision": precision,
        "integer_io": integer_io,
        "exporter": f"mbv2_jax {mbv2_jax.__version__}",
    }
