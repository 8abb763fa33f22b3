"""LiteRT files (.tflite): for phones, boards and microcontrollers.

flatbuffer.py    the conversion of a program, and the operators of a file
layers.py        which operator computes which layer
precision.py     16-bit floats and 8-bit integers
trained.py       the ranges of activations that training with 8 bits leaves
runner.py        a file in LiteRT's interpreter

A zip archive with the metadata and the class names stands behind the flatbuffer, as TensorFlow
Lite's tools write it; `unzip` reads it.
"""

import dataclasses
import json
import pathlib
import zipfile
from collections.abc import Mapping, Sequence

from mbv2_jax.errors import UserError
from mbv2_jax.export import metadata
from mbv2_jax.export import program as programs
from mbv2_jax.export.formats import FLOAT16, INT8, Options
from mbv2_jax.export.litert import flatbuffer, layers, precision, trained
from mbv2_jax.export.litert.flatbuffer import Operator
from mbv2_jax.export.litert.runner import File
from mbv2_jax.export.program import Program

__all__ = ["open_file", "write"]


def write(program: Program, path: pathlib.Path, options: Options) -> None:
    """Writes a program as a .tflite file.

    Raises:
      UserError: an 8-bit file is to take any number of images, a layer of `keep_float` is not
        there, or activations have no ranges.
      RunFailed: the converter or the quantizer cannot convert the program.
    """
    if options.precision == INT8:
        content = _to_int8(program, options)
    else:
        content = flatbuffer.convert(program)
    if options.precision == FLOAT16:
        chosen = layers.in_16_bits(flatbuffer.operators(content), program)
        content = precision.to_float16(content, chosen)
    path.write_bytes(content)
    with zipfile.ZipFile(path, "a") as archive:
        facts = metadata.of(program, options.precision, integer_io=options.integer_io)
        archive.writestr(metadata.FILE, json.dumps(facts))
        archive.writestr(metadata.LABELS, "".join(f"{name}\n" for name in facts["classes"]))


def open_file(path: pathlib.Path, threads: int | None = None) -> File:
    """Opens a file that `write` wrote.

    Args:
      path: the file.
      threads: of the interpreter; None leaves them to it, which takes one.

    Raises:
      UserError: it cannot be read, or it is no such file.
    """
    return File(path, threads)


def _to_int8(program: Program, options: Options) -> bytes:
    if program.batch is None:
        raise UserError(
            f"--precision={INT8} needs a number of images: give --batch=1, or another number"
        )
    kept = layers.starting_with(options.keep_float, program)
    images = options.calibration
    pixels = program.input == programs.UINT8  # they become int8 at once, without floats
    if pixels:
        floats = dataclasses.replace(program, input=programs.FLOAT32)
        program = floats.with_params(program.params)
    program = precision.for_8_bits(program)
    integers = precision.Integers(pixels or options.integer_io, options.integer_io)
    content = flatbuffer.convert(program)
    operators = flatbuffer.operators(content)
    chosen = layers.in_8_bits(operators, program, kept, integers.inputs)
    ranges: dict[str, precision.Range] = {}
    if images is not None:
        images = images.astype(program.dtype)
        ranges |= precision.calibrate(content, chosen, program, images, integers)
    if program.trained_in_8_bits:
        ranges |= trained.ranges(operators, program)
        last = [operator for operator in operators if integers.outputs and operator.last]
        _check_ranges([*chosen, *last], ranges, program)
    if integers.inputs:  # the same numbers for every calibration: of pixels, pixel - 128
        ranges[flatbuffer.INPUT_TENSOR] = precision.input_range(program)
    content = precision.to_int8(content, chosen, ranges, integers)
    return flatbuffer.taking_uint8(content) if pixels else content


def _check_ranges(
    operators: Sequence[Operator], ranges: Mapping[str, precision.Range], program: Program
) -> None:
    """Refuses a program for which training left too few ranges.

    Args:
      operators: those whose results are 8-bit numbers.
      ranges: of training.
      program: that was trained.
    """
    if any(operator.name not in ranges for operator in operators):
        raise UserError(
            f"{program.saved.path} did not round all of these activations in training, or has seen "
            "no batch: give --calibrate=PHOTOS"
        )
