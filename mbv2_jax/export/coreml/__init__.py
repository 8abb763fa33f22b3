"""Core ML packages (.mlpackage), for iPhones, iPads and Macs.

operations.py    ONNX's operations as Core ML's

A package is made from the graph of `export.onnx`, whose operations have their counterparts in MIL,
Core ML's own language. It is an ML program for iOS 15, macOS 12 and newer. Pixels are an image, as
Vision and Xcode hand it over; a classifier has class labels; a segmenter has names and colours of
its classes, with which Xcode shows a preview.

coremltools writes packages on Linux, too, but only macOS runs them.
"""

import json
import pathlib
import platform
from collections import Counter
from collections.abc import Mapping
from typing import Any

import coremltools as ct
import numpy as np
import onnx
from coremltools.converters.mil import Builder
from PIL import Image

from mbv2_jax.errors import RunFailed, UserError, first_line
from mbv2_jax.export import metadata
from mbv2_jax.export.coreml.operations import OPERATIONS
from mbv2_jax.export.formats import FLOAT16, Options
from mbv2_jax.export.onnx import walk
from mbv2_jax.export.program import UINT8, Program
from mbv2_jax.export.quiet import quiet

SUFFIX = ".mlpackage"
_LABEL = "classLabel"  # of a classifier: the name of the most probable class
_PROBABILITIES = "probabilities"  # which coremltools makes a dictionary, classLabel_probs
_PREVIEW = "com.apple.coreml.model.preview"


def write(program: Program, path: pathlib.Path, options: Options) -> None:
    """Writes a program: "images" in, the arrays of `Program` out.

    Images are (N, 3, H, W) or, of pixels, an image. A classifier of one image has two more outputs:
    "classLabel" and "classLabel_probs", the probabilities by name.

    Raises:
      UserError: the name does not end in .mlpackage, or the number of images is open.
      RunFailed: coremltools cannot convert the program.
    """
    if path.suffix != SUFFIX:
        raise UserError(f"{path.name}: the name of a Core ML package ends in {SUFFIX}")
    if program.batch is None:
        raise UserError("--to=coreml needs a number of images: give --batch=1, or another number")
    if program.input == UINT8 and program.batch != 1:
        raise UserError("--to=coreml takes one image of pixels at a time: give --input=float32 too")
    graph = walk.graph_of(program, nchw=True).proto()
    precision = ct.precision.FLOAT16 if options.precision == FLOAT16 else ct.precision.FLOAT32
    try:
        with quiet():
            converted = ct.convert(
                _mil(program, graph),
                inputs=[_input(program)],
                classifier_config=_classes(program),
                compute_precision=precision,
                minimum_deployment_target=ct.target.iOS15,
            )
    except Exception as error:  # of coremltools: of several kinds, none of them documented
        raise RunFailed(
            f"coremltools cannot convert {program.saved.path}: {first_line(error)}"
        ) from error
    _describe(converted, program, options.precision)
    with quiet():
        converted.save(str(path))


def _mil(program: Program, graph: onnx.GraphProto) -> Any:
    """Returns a program's graph in MIL."""
    height, width = program.size
    shape = (program.batch, 3, height, width)

    @Builder.program(input_specs=[Builder.TensorSpec(shape)], opset_version=ct.target.iOS15)
    def run(images: Any) -> Any:
        values: dict[str, Any] = {
            array.name: onnx.numpy_helper.to_array(array) for array in graph.initializer
        }
        values |= {walk.IMAGES: images, "": None}
        for node in graph.node:
            attributes = {
                attribute.name: onnx.helper.get_attribute_value(attribute)
                for attribute in node.attribute
            }
            inputs = [values[name] for name in node.input]
            results = OPERATIONS[node.op_type](*inputs, **_texts(attributes))
            results = results if isinstance(results, (list, tuple)) else [results]
            values.update(zip(node.output, results, strict=True))
        outputs = [Builder.identity(x=values[out.name], name=out.name) for out in graph.output]
        if _has_labels(program):
            outputs.append(Builder.softmax(x=outputs[0], axis=-1, name=_PROBABILITIES))
        return tuple(outputs)

    return run


def _texts(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.decode() if isinstance(value, bytes) else value
        for name, value in attributes.items()
    }


def _input(program: Program) -> Any:
    shape = (program.batch, 3, *program.size)
    if program.input != UINT8:
        return ct.TensorType(name=walk.IMAGES, shape=shape)
    return ct.ImageType(name=walk.IMAGES, shape=shape, color_layout=ct.colorlayout.RGB)


def _has_labels(program: Program) -> bool:
    """Returns whether the package names the class, which Core ML does for one image at a time."""
    return program.task.classifies and program.batch == 1


def _classes(program: Program) -> Any:
    """Returns the class labels of a classifier; None for other models."""
    if not _has_labels(program):
        return None
    return ct.ClassifierConfig(
        list(program.task.classes),
        predicted_feature_name=_LABEL,
        predicted_probabilities_output=_PROBABILITIES,
    )


def _describe(converted: Any, program: Program, precision: str) -> None:
    """Adds the metadata, and what Xcode shows of a segmenter."""
    facts = metadata.of(program, precision)
    converted.author, converted.version = facts["exporter"], str(facts["format_version"])
    converted.user_defined_metadata[metadata.KEY] = json.dumps(facts)
    palette = program.task.decoding().get("palette")
    if palette:
        colours = ["#" + bytes(colour).hex() for colour in palette]
        preview = {"labels": facts["classes"], "colors": colours}
        converted.user_defined_metadata[f"{_PREVIEW}.type"] = "imageSegmenter"
        converted.user_defined_metadata[f"{_PREVIEW}.params"] = json.dumps(preview)


class Package:
    """A Core ML package as a function of a batch of images, on macOS.

    Attributes:
      metadata: see `export.metadata`.
      operators: the number of operators of each kind.
      not_run: why it cannot be run here; "" where it can.
    """

    metadata: Mapping[str, Any]
    operators: Mapping[str, int]
    not_run: str

    def __init__(self, path: pathlib.Path):
        self.not_run = ""
        if platform.system() != "Darwin":
            self.not_run = "only macOS runs Core ML packages"
        try:
            with quiet():
                self._model = ct.models.MLModel(str(path), skip_model_load=bool(self.not_run))
            self.metadata = json.loads(self._model.user_defined_metadata[metadata.KEY])
            main = self._model.get_spec().mlProgram.functions["main"]
            (block,) = main.block_specializations.values()
        except Exception as error:  # of coremltools, protobuf or json: it depends on the damage
            raise UserError(
                f"{path} is no file of `python -m mbv2_jax.export --to=coreml`, or it is damaged: "
                f"{first_line(error)}"
            ) from None
        kinds = Counter(operation.type for operation in block.operations)
        self.operators = {kind: count for kind, count in kinds.items() if kind != "const"}

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the file's outputs by name for images, (N, H, W, 3).

        Raises:
          RunFailed: this is not macOS.
        """
        if self.not_run:
            raise RunFailed(self.not_run)
        if self.metadata["input"] == UINT8:
            given: Any = Image.fromarray(images[0])
        else:
            given = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        found = self._model.predict({walk.IMAGES: given})
        return {name: found[name] for name in self.metadata["outputs"]}


def open_file(path: pathlib.Path, threads: int | None = None) -> Package:
    """Opens a package that `write` wrote; Core ML chooses its processors.

    Raises:
      UserError: it cannot be read, or it is no such package.
    """
    del threads
    return Package(path)
