"""ONNX files, for ONNX Runtime, OpenVINO, TensorRT and browsers.

graph.py         an ONNX graph in the making, its tensors and their layouts
operations.py    JAX's operations as ONNX's
walk.py          a program's jaxpr as a graph
suppression.py   NonMaxSuppression behind a detector
runtime.py       the files in ONNX Runtime

A file is made from the program's jaxpr, not from the modules: the jaxpr is what JAX computes, heads
and normalisation included, of any width, depth, padding and output stride, and it holds some twenty
operations only. Whatever does not depend on the images, such as anchors, is computed here.
"""

import json
import pathlib

import onnx

from mbv2_jax.export import metadata
from mbv2_jax.export.formats import Options
from mbv2_jax.export.onnx import suppression, walk
from mbv2_jax.export.onnx.runtime import LAYOUT
from mbv2_jax.export.onnx.runtime import open_file as open_file
from mbv2_jax.export.program import Program

_OPSET = 17  # the oldest with all of the operations' forms that are used
_IR_VERSION = 8  # of the file, the oldest that holds the opset


def write(program: Program, path: pathlib.Path, options: Options) -> None:
    """Writes a program: "images" in, the arrays of `Program` out.

    With `options.suppress` there is one more output, see `suppression.add`.

    Raises:
      UserError: the program has an operation that has no counterpart here.
    """
    graph = walk.graph_of(program, options.nchw)
    facts = metadata.of(program, options.precision)
    facts |= {LAYOUT: "nchw" if options.nchw else "nhwc"}
    if options.suppress:
        suppression.add(graph, program)
        facts["outputs"] |= {suppression.SELECTED: [[3], "int64"]}
    model = onnx.helper.make_model(
        graph.proto(),
        opset_imports=[onnx.helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
        producer_name="mbv2_jax",
    )
    onnx.helper.set_model_props(model, {metadata.KEY: json.dumps(facts)})
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())
