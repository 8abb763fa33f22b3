"""The conversion of a program to a flatbuffer, by litert-converter, and the operators in one."""

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flatbuffers
import jax
import jax.export
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from litert_converter import converter_api_ext
from litert_converter.mlir import ir, passmanager

from mbv2_jax.errors import RunFailed, first_line
from mbv2_jax.export.program import NORMALISED, Program
from mbv2_jax.export.quiet import quiet
from mbv2_jax.ops import lowering

INPUT, SIGNATURE = "images", "serving_default"
INPUT_TENSOR = f"{SIGNATURE}_{INPUT}"  # as the converter names it
CONVOLUTIONS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")

_KINDS = {number: kind for kind, number in vars(schema.BuiltinOperator).items() if kind[0] != "_"}


class Operator(NamedTuple):
    """An operator of a file's graph.

    Attributes:
      kind: such as "CONV_2D".
      name: the name of its result, which lists the JAX operations that it computes.
      inputs: the numbers of the tensors that it reads, without constants.
      outputs: the numbers of its results.
      last: whether its result is one of the file's.
    """

    kind: str
    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    last: bool


def convert(program: Program) -> bytes:
    """Returns a program in 32-bit floats as a flatbuffer.

    Raises:
      RunFailed: the converter cannot convert it.
    """
    example, known = program.example(), program.batch is not None
    if not known:
        (count,) = jax.export.symbolic_shape("b")
        example = jax.ShapeDtypeStruct((count, *example.shape[1:]), example.dtype)
    with lowering.plain_lowering(composites=known):
        exported = jax.export.export(jax.jit(_by_rows(program)), platforms=["tpu"])(example)
    names = sorted(program.outputs())  # the order in which jax flattens a dict
    try:
        with quiet():
            return _converted(exported.mlir_module(), names, known)
    except Exception as error:  # of MLIR: of several kinds, none of them documented
        raise RunFailed(
            f"litert-converter cannot convert {program.saved.path}: {first_line(error)}"
        ) from error


def _by_rows(program: Program) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """Returns a program that normalises whole rows of pixels at a time.

    Where LiteRT subtracts three means from each pixel, it does so for three numbers at a time,
    which takes as long as a seventh of an 8-bit network.
    """
    if program.input == NORMALISED:
        return program
    preprocessing = program.saved.spec.preprocessing
    mean, std = (
        np.tile(np.asarray(values, np.float32), program.size[1])  # (3 W,)
        for values in (preprocessing.mean, preprocessing.std)
    )

    def run(images: jax.Array) -> dict[str, jax.Array]:
        rows = images.astype(np.float32).reshape(*images.shape[:2], -1)  # (N, H, 3 W)
        rows = rows - mean if (std == 1).all() else (rows - mean) * (1 / std)
        return program.of_normalised(rows.reshape(images.shape))

    return run


def _converted(module: str, outputs: Sequence[str], known_batch: bool) -> bytes:
    """Returns a StableHLO module as a flatbuffer."""
    context = ir.Context()
    converter_api_ext.prepare_mlir_context(context)
    config = converter_api_ext.ConvertToTFLConfig()
    # Without it, operators for broadcasting take 30 times as long as the network.
    config.unsafe_fuse_dynamic_shaped_broadcast = not known_batch
    with context:
        parsed = ir.Module.parse(module)
        converter_api_ext.set_signature(
            parsed.operation,
            signature_name=SIGNATURE,
            input_names=[INPUT],
            output_names=list(outputs),
        )
        converter_api_ext.run_convert_to_tfl_passes(parsed, passmanager.PassManager(), config)
        return bytes(converter_api_ext.export_flatbuffer_to_bytes(parsed.operation))


def taking_uint8(content: bytes) -> bytes:
    """Returns a flatbuffer of int8 pixels - 128 that takes uint8 pixels instead."""
    model = schema.ModelT.InitFromPackedBuf(content)
    graph = model.subgraphs[0]
    inner = graph.inputs[0]
    outer = copy.deepcopy(graph.tensors[inner])
    outer.type, outer.quantization.zeroPoint = schema.TensorType.UINT8, [0]
    graph.tensors[inner].name += b"_int8"
    model.signatureDefs[0].inputs[0].tensorIndex = len(graph.tensors)
    graph.inputs = [len(graph.tensors)]
    graph.tensors.append(outer)

    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.QUANTIZE
    code.version = 2
    operator = schema.OperatorT()
    operator.opcodeIndex = len(model.operatorCodes)
    operator.inputs, operator.outputs = graph.inputs, [inner]
    operator.builtinOptionsType = schema.BuiltinOptions.QuantizeOptions
    operator.builtinOptions = schema.QuantizeOptionsT()
    model.operatorCodes.append(code)
    graph.operators.insert(0, operator)

    for buffer in model.buffers:
        if buffer.offset > 1:  # behind the flatbuffer, where the quantizer writes large arrays
            buffer.data = np.frombuffer(content, np.uint8, buffer.size, buffer.offset)
            buffer.offset = buffer.size = 0
    builder = flatbuffers.Builder()
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def operators(content: bytes) -> list[Operator]:
    """Returns the operators of a flatbuffer in the order of their execution."""
    model = schema.Model.GetRootAs(content)
    graph = model.Subgraphs(0)
    results = set(graph.OutputsAsNumpy().tolist())
    found = []
    for place in range(graph.OperatorsLength()):
        operator = graph.Operators(place)
        code = model.OperatorCodes(operator.OpcodeIndex())
        # Numbers up to 127 are in the older field, or in both.
        kind = _KINDS[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]
        inputs = [number for number in operator.InputsAsNumpy().tolist() if number >= 0]
        outputs = tuple(operator.OutputsAsNumpy().tolist())
        found.append(
            Operator(
                kind,
                graph.Tensors(outputs[0]).Name().decode(),
                tuple(number for number in inputs if not _is_constant(model, graph, number)),
                outputs,
                not results.isdisjoint(outputs),
            )
        )
    return found


def _is_constant(model: schema.Model, graph: schema.SubGraph, tensor: int) -> bool:
    return bool(model.Buffers(graph.Tensors(tensor).Buffer()).DataLength())
