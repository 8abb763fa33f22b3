"""Smaller numbers in a .tflite file: 16-bit floats, and 8-bit integers, by ai-edge-quantizer."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from ai_edge_quantizer import calibrator, qtyping, quantizer, recipe_manager
from ai_edge_quantizer.algorithm_manager import AlgorithmName
from ai_edge_quantizer.utils import qsv_utils
from flax.traverse_util import flatten_dict, unflatten_dict

from mbv2_jax.errors import RunFailed, first_line
from mbv2_jax.export.litert.flatbuffer import INPUT, SIGNATURE, Operator
from mbv2_jax.export.program import NORMALISED, Program
from mbv2_jax.export.quiet import quiet
from mbv2_jax.model_dir import SavedModel

# The least weight of a channel, as a share of its bias, see `for_8_bits`.
_LEAST = 3e-4


def to_float16(content: bytes, chosen: Iterable[Operator]) -> bytes:
    """Returns a flatbuffer with weights of 16-bit floats, which are computed with in 32 bits.

    Args:
      content: in 32-bit floats.
      chosen: the convolutions and dense layers whose weights become 16-bit floats.
    """
    config = qtyping.OpQuantizationConfig(
        weight_tensor_config=qtyping.TensorQuantizationConfig(
            num_bits=16, dtype=qtyping.TensorDataType.FLOAT
        ),
        compute_precision=qtyping.ComputePrecision.FLOAT,
    )
    recipe = recipe_manager.RecipeManager()
    for operator in chosen:
        recipe.add_quantization_config(
            _exactly(operator), _kind(operator), config, AlgorithmName.FLOAT_CASTING
        )
    return _quantized(content, recipe, {})


# The least and the largest value of a tensor, as {"min": array, "max": array} of one number each.
Range: TypeAlias = dict[str, np.ndarray]


def make_range(low: float, high: float) -> Range:
    """Returns a range from its ends."""
    return {"min": np.array([low], np.float32), "max": np.array([high], np.float32)}


def input_range(program: Program) -> Range:
    """Returns the range of a program's images, which no photo is needed for."""
    ends = np.array([0, 255], np.float32)
    if program.input == NORMALISED:
        pixels = np.broadcast_to(ends[:, None], (2, 3))
        ends = np.asarray(program.saved.spec.preprocessing.normalize(pixels))
    return make_range(ends.min(), ends.max())


class Integers(NamedTuple):
    """The ends of a file that are 8-bit numbers.

    Attributes:
      inputs, outputs: whether they are.
    """

    inputs: bool
    outputs: bool


def for_8_bits(program: Program) -> Program:
    """Returns a program that computes the same, and that loses less in 8 bits.

    The standard deviations of pixels are divided out of the first layer's weights, so that pixels
    are rounded once, and not after each of two operators. Of a network that was trained in 8 bits,
    these weights are rounded in other places than in training.

    No channel of a layer has a bias and no weights. Trained networks have such channels. The step
    of a bias is that of its channel's weights, times that of the inputs: without weights it is next
    to 0, and 2^31 steps do not reach the bias. The first weight becomes 3e-4 of the bias. With
    inputs up to 6, it adds less than half of an 8-bit step to the result, and inputs up to 0.05
    already leave room for the bias.
    """
    params = flatten_dict(program.params)
    if program.input != NORMALISED:
        stem = ("stem", "conv", "kernel")  # HWIO
        std = np.asarray(program.saved.spec.preprocessing.std, np.float32)
        params[stem] = np.asarray(params[stem]) / std[:, None]
        program = dataclasses.replace(program, saved=_with_unit_std(program.saved))
    for path, bias in list(params.items()):
        if path[-1] != "bias":
            continue
        kernel = np.array(params[*path[:-1], "kernel"])
        rows = kernel.reshape(-1, bias.size)  # a view, (weights, channels)
        least = _LEAST * abs(np.asarray(bias))
        weak = abs(rows).max(0) < least
        rows[0, weak] = least[weak]
        params[*path[:-1], "kernel"] = kernel
    return program.with_params(unflatten_dict(params))


def _with_unit_std(saved: SavedModel) -> SavedModel:
    """Returns a model that normalises pixels by subtracting their mean alone."""
    preprocessing = dataclasses.replace(saved.spec.preprocessing, std=(1.0, 1.0, 1.0))
    return saved.with_spec(dataclasses.replace(saved.spec, preprocessing=preprocessing))


def calibrate(
    content: bytes,
    chosen: Sequence[Operator],
    program: Program,
    images: np.ndarray,
    integers: Integers,
) -> dict[str, Range]:
    """Returns the ranges of tensors by name: those of their values for all images.

    Args:
      content: in 32-bit floats.
      chosen: the operators that become 8-bit ones.
      program: that the flatbuffer computes.
      images: (M, H, W, 3) that the program takes.
      integers: which of the file's inputs and outputs become 8-bit numbers, too.
    """
    rows = program.batch or 1
    missing = -len(images) % rows
    whole = np.concatenate([images, images[:1].repeat(missing, 0)])
    batches = [{INPUT: batch} for batch in whole.reshape(-1, rows, *images.shape[1:])]
    with quiet():
        calibration = calibrator.Calibrator(content, qsv_update_func=qsv_utils.min_max_update)
        calibration.calibrate({SIGNATURE: batches}, _recipe(chosen, integers))
    return calibration.get_model_qsvs()


def to_int8(
    content: bytes,
    chosen: Sequence[Operator],
    ranges: Mapping[str, Range],
    integers: Integers,
) -> bytes:
    """Returns a flatbuffer of 8-bit numbers, with a scale for each channel of weights.

    Args:
      content: in 32-bit floats.
      chosen: the operators that become 8-bit ones.
      ranges: of activations, by the names of tensors.
      integers: which of the file's inputs and outputs become 8-bit numbers, too.

    Raises:
      RunFailed: ai-edge-quantizer refuses them; of an activation without a range it names the
        tensor.
    """
    try:
        return _quantized(content, _recipe(chosen, integers), ranges)
    except ValueError as error:
        raise RunFailed(f"ai-edge-quantizer: {first_line(error)}") from error


def _recipe(chosen: Sequence[Operator], integers: Integers) -> recipe_manager.RecipeManager:
    recipe = recipe_manager.RecipeManager()
    for operator in chosen:
        recipe.add_static_config(_exactly(operator), _kind(operator), 8, 8)
    for kind, is_integer in integers._asdict().items():  # "inputs", "outputs"
        if is_integer:
            name = qtyping.TFLOperationName(kind.upper().removesuffix("S"))
            recipe.add_static_config(".*", name, 8, 8)
    return recipe


def _exactly(operator: Operator) -> str:
    """Returns the regular expression by which a recipe names one operator."""
    return f"^{re.escape(operator.name)};$"


def _kind(operator: Operator) -> qtyping.TFLOperationName:
    return qtyping.TFLOperationName(operator.kind)


def _quantized(content: bytes, recipe: recipe_manager.RecipeManager, ranges: Any) -> bytes:
    made = quantizer.Quantizer(content)
    made.load_quantization_recipe(recipe.get_quantization_recipe())
    with quiet():
        result = made.quantize(ranges, enable_progress_bar=False, enable_progress_report=False)
    return bytes(result.quantized_model)
