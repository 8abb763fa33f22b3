"""Files of TFLite, written with LiteRT's own tables, and its interpreter."""

from collections.abc import Sequence
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from flatbuffers import flexbuffers

from mbv2_jax.models.mobilenet_v2 import blocks
from mbv2_jax.spec import Backbone
from mbv2_jax.tasks.detection.anchors import AnchorTable

_TYPES = {np.dtype(np.float32): 0, np.dtype(np.int32): 2, np.dtype(np.uint8): 3}
NONE, RELU, RELU6 = 0, 1, 3  # fused activations
SAME, VALID = 0, 1
_OF_ONE_VERSION = (
    schema.BuiltinOperator.RESHAPE,
    schema.BuiltinOperator.CUSTOM,
    schema.BuiltinOperator.LOGISTIC,
    schema.BuiltinOperator.CONCATENATION,
)


class File:
    """A graph to which operators are added; `content()` is the file."""

    def __init__(self) -> None:
        self._tensors: list[Any] = []
        self.operators: list[Any] = []
        self._kinds: list[int] = []
        self._custom = ""
        self._buffers = [schema.BufferT()]  # that of tensors without data
        self.inputs: list[int] = []

    def tensor(self, shape: Sequence[int], array: np.ndarray | None = None, dtype: int = 0) -> int:
        """Adds a tensor, or with an array a constant; returns its number."""
        tensor = schema.TensorT(shape=list(shape), type=dtype, name=f"t{len(self._tensors)}")
        if array is not None:
            tensor.type = _TYPES[array.dtype]
            tensor.buffer = len(self._buffers)
            data = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
            self._buffers.append(schema.BufferT(data=data))
        self._tensors.append(tensor)
        return len(self._tensors) - 1

    def constant(self, array: Any, dtype: Any = np.float32) -> int:
        array = np.asarray(array, dtype)
        return self.tensor(array.shape, array)

    def scale(self, tensor: int, scale: float, zero_point: int) -> None:
        """Says what the integers of a tensor stand for: scale * (integer - zero_point)."""
        self._tensors[tensor].quantization = schema.QuantizationParametersT(
            scale=[scale], zeroPoint=[zero_point]
        )

    def shape(self, tensor: int) -> list[int]:
        return self._tensors[tensor].shape

    def open_sides(self) -> None:
        """Leaves open the sides of all maps, as in a file for images of any size."""
        for tensor in self._tensors:
            if len(tensor.shape) == 4 and not tensor.buffer:
                channels = tensor.shape[3]
                tensor.shape, tensor.shapeSignature = [1, 1, 1, channels], [1, -1, -1, channels]

    def op(
        self, kind: str, inputs: Sequence[int], shape: Sequence[int], options: Any = None
    ) -> int:
        """Adds an operator; returns the number of its result."""
        code = getattr(schema.BuiltinOperator, kind)
        if code not in self._kinds:
            self._kinds.append(code)
        out = self.tensor(shape)
        operator = schema.OperatorT(
            opcodeIndex=self._kinds.index(code), inputs=list(inputs), outputs=[out]
        )
        if options is not None:
            name = type(options).__name__.removesuffix("T")
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, name)
            operator.builtinOptions = options
        self.operators.append(operator)
        return out

    def custom(
        self, name: str, inputs: Sequence[int], shapes: Sequence[Sequence[int]], options: bytes
    ) -> list[int]:
        """Adds the one operator that is not TFLite's own; returns the numbers of its results."""
        first = self.op("CUSTOM", inputs, shapes[0])
        operator = self.operators[-1]
        operator.outputs = [first, *(self.tensor(shape) for shape in shapes[1:])]
        operator.customOptions = np.frombuffer(options, np.uint8)
        self._custom = name
        return operator.outputs

    def content(self, *outputs: int) -> bytes:
        graph = schema.SubGraphT(
            tensors=self._tensors,
            inputs=self.inputs,
            outputs=list(outputs),
            operators=self.operators,
        )
        codes = [
            schema.OperatorCodeT(
                deprecatedBuiltinCode=min(kind, 127),
                # Dilation came with the second version; there is no second of these.
                version=1 if kind in _OF_ONE_VERSION else 2,
                builtinCode=kind,
                customCode=self._custom if kind == schema.BuiltinOperator.CUSTOM else None,
            )
            for kind in self._kinds
        ]
        signature = schema.SignatureDefT(
            inputs=[schema.TensorMapT("images", tensor) for tensor in self.inputs],
            outputs=[schema.TensorMapT(f"output{i}", tensor) for i, tensor in enumerate(outputs)],
            signatureKey="serving_default",
        )
        model = schema.ModelT(
            version=3,
            operatorCodes=codes,
            subgraphs=[graph],
            buffers=self._buffers,
            signatureDefs=[signature],
        )
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())


class Network(File):
    """A MobileNetV2 with random weights, whose parts a test may change.

    Args:
      backbone: decides strides, padding, width and dilation.
      size: of the images, in pixels.
      separate: whether activations are operators of their own.
      batches: whether dilation is written as batches of distant pixels.

    Attributes:
      maps: the tensors of the blocks, their expansions and the last layer, by our names.
    """

    def __init__(
        self, backbone: Backbone, size: int, separate: bool = False, batches: bool = False
    ) -> None:
        super().__init__()
        self.backbone, self.separate, self.batches = backbone, separate, batches
        self._random = np.random.default_rng(0)
        self.maps: dict[str, int] = {}  # by our names
        self.images = self.tensor([1, size, size, 3])
        self.inputs.append(self.images)

    def build(self, tensor: int | None = None) -> int:
        """Adds the backbone's operators; returns its result."""
        plan = blocks(self.backbone)
        stem = plan[0].inner
        tensor = self.conv(self.images if tensor is None else tensor, stem, 3, RELU6, 2)
        for block in plan:
            before = tensor
            if block.expansion != 1:
                tensor = self.conv(tensor, block.inner, 1, RELU6)
                self.maps[f"{block.name}/expand"] = tensor
            tensor = self.depthwise(tensor, block.stride, block.dilation)
            tensor = self.conv(tensor, block.channels, 1, NONE)
            if self.shape(before) == self.shape(tensor):
                tensor = self.op("ADD", [tensor, before], self.shape(tensor), schema.AddOptionsT())
            self.maps[block.name] = tensor
        self.maps["last"] = self.conv(tensor, 1280, 1, RELU6)
        return self.maps["last"]

    def conv(self, tensor: int, out: int, side: int, activation: int, stride: int = 1) -> int:
        kernel = self.draw((out, side, side, self.shape(tensor)[-1]))
        tensor, padding = self._padded(tensor, side, stride)
        options = schema.Conv2DOptionsT(padding, stride, stride, activation)
        return self._applied("CONV_2D", tensor, kernel, options, stride)

    def depthwise(self, tensor: int, stride: int, dilation: int) -> int:
        channels = self.shape(tensor)[-1]
        kernel = self.draw((1, 3, 3, channels), fan=9)
        if dilation > 1 and self.batches:
            return self._in_batches(tensor, kernel, dilation)
        tensor, padding = self._padded(tensor, 3, stride)
        options = schema.DepthwiseConv2DOptionsT(
            padding, stride, stride, 1, RELU6, dilation, dilation
        )
        return self._applied("DEPTHWISE_CONV_2D", tensor, kernel, options, stride)

    def head(self, tensor: int, *sizes: int, activation: str = "", dense: bool = True) -> int:
        """Adds pooling and layers of these sizes, with ReLU between them."""
        channels = self.shape(tensor)[-1]
        axes = self.constant([1, 2], np.int32)
        shape = [1, channels] if dense else [1, 1, 1, channels]
        tensor = self.op("MEAN", [tensor, axes], shape, schema.ReducerOptionsT(not dense))
        for place, out in enumerate(sizes):
            fused = RELU if place < len(sizes) - 1 else NONE
            if not dense:
                tensor = self.conv(tensor, out, 1, fused)
                continue
            kernel = self.draw((out, self.shape(tensor)[-1]))
            bias = self.constant(self._random.normal(0, 0.5, out))
            inputs = [tensor, self.constant(kernel), bias]
            options = schema.FullyConnectedOptionsT(fused)
            tensor = self.op("FULLY_CONNECTED", inputs, [1, out], options)
        if not dense:
            target = self.constant([1, sizes[-1]], np.int32)
            tensor = self.op("RESHAPE", [tensor, target], [1, sizes[-1]], schema.ReshapeOptionsT())
        if activation:
            options = schema.SoftmaxOptionsT(1.0) if activation == "SOFTMAX" else None
            tensor = self.op(activation, [tensor], self.shape(tensor), options)
        return tensor

    def detector(self, classes: int, table: AnchorTable, *taps: str, scores: str) -> list[int]:
        """Adds SSDLite's heads on these maps, and on extra ones; returns codes and scores.

        The codes are (1, A, 4), and the scores (1, A, classes + 1), the background first.
        """
        maps = [self.maps[tap] for tap in taps]
        while len(maps) < len(table.counts):
            tensor = self.depthwise(self.conv(maps[-1], 16, 1, RELU6), 2, 1)
            maps.append(self.conv(tensor, 32, 1, RELU6))
        results = []
        for width, activation in ((4, ""), (classes + 1, scores)):
            parts = []
            for tensor, count in zip(maps, table.counts, strict=True):
                head = self.conv(self.depthwise(tensor, 1, 1), count * width, 1, NONE)
                shape = [1, int(np.prod(self.shape(head))) // width, width]
                target = self.constant(shape, np.int32)
                parts.append(self.op("RESHAPE", [head, target], shape, schema.ReshapeOptionsT()))
            shape = [1, sum(self.shape(part)[1] for part in parts), width]
            tensor = self.op("CONCATENATION", parts, shape, schema.ConcatenationOptionsT(1))
            if activation:
                options = schema.SoftmaxOptionsT(1.0) if activation == "SOFTMAX" else None
                tensor = self.op(activation, [tensor], shape, options)
            results.append(tensor)
        return results

    def suppression(
        self, codes: int, scores: int, anchors: np.ndarray, **options: Any
    ) -> list[int]:
        """Adds TensorFlow's suppression; returns boxes, classes, scores and their number.

        Args:
          codes, scores: from `detector`.
          anchors: (A, 4), x0, y0, x1, y1 in shares of the image's sides.
          options: beside or instead of the usual ones.
        """
        x0, y0, x1, y1 = anchors.T
        centred = np.stack([(y0 + y1) / 2, (x0 + x1) / 2, y1 - y0, x1 - x0], 1)
        values = {
            "max_detections": 20,
            "max_classes_per_detection": 1,
            "detections_per_class": 20,
            "use_regular_nms": True,
            "nms_score_threshold": 0.3,
            "nms_iou_threshold": 0.5,
            "num_classes": self.shape(scores)[2] - 1,
            **dict.fromkeys(("y_scale", "x_scale"), 10.0),
            **dict.fromkeys(("h_scale", "w_scale"), 5.0),
        } | options
        room = values["max_detections"]
        return self.custom(
            "TFLite_Detection_PostProcess",
            [codes, scores, self.constant(centred)],
            [(1, room, 4), (1, room), (1, room), (1,)],
            flexbuffers.Dumps(values),
        )

    def draw(self, shape: Sequence[int], fan: int = 0) -> np.ndarray:
        """Draws weights with which the activations neither vanish nor grow."""
        scale = np.sqrt(2 / (fan or np.prod(shape[1:])))
        return self._random.normal(0, scale, shape).astype(np.float32)

    def _padded(self, tensor: int, side: int, stride: int) -> tuple[int, int]:
        """Adds a padding where the network pads as PyTorch does; returns its result, and SAME."""
        if stride == 1 or side == 1 or self.backbone.padding == "same":
            return tensor, SAME
        pads = self.constant([[0, 0], [1, 1], [1, 1], [0, 0]], np.int32)
        _, height, width, channels = self.shape(tensor)
        shape = [1, height + 2, width + 2, channels]
        return self.op("PAD", [tensor, pads], shape, schema.PadOptionsT()), VALID

    def _applied(
        self, kind: str, tensor: int, kernel: np.ndarray, options: Any, stride: int
    ) -> int:
        """Adds a convolution, with a bias, and its activation."""
        out = kernel.shape[3 if kind.startswith("D") else 0]
        bias = self._random.normal(0, 0.5, out)
        batch, height, width, _ = self.shape(tensor)
        if options.padding == VALID:
            height, width = height - 2, width - 2
        shape = [batch, -(-height // stride), -(-width // stride), out]
        activation = options.fusedActivationFunction
        if self.separate and activation == RELU6:
            options.fusedActivationFunction = NONE
        inputs = [tensor, self.constant(kernel), self.constant(bias)]
        tensor = self.op(kind, inputs, shape, options)
        if self.separate and activation == RELU6:
            tensor = self.op("RELU6", [tensor], shape)
        return tensor

    def _in_batches(self, tensor: int, kernel: np.ndarray, dilation: int) -> int:
        """Adds a dilated depthwise convolution as TensorFlow 1 writes it."""
        _, height, width, channels = self.shape(tensor)
        more = -height % dilation  # fills the map up to whole blocks
        pads = self.constant([[dilation, dilation + more]] * 2, np.int32)
        block = self.constant([dilation] * 2, np.int32)
        side = (height + 2 * dilation + more) // dilation
        shape = [dilation**2, side, side, channels]
        tensor = self.op(
            "SPACE_TO_BATCH_ND", [tensor, block, pads], shape, schema.SpaceToBatchNDOptionsT()
        )
        options = schema.DepthwiseConv2DOptionsT(VALID, 1, 1, 1, RELU6)
        tensor = self._applied("DEPTHWISE_CONV_2D", tensor, kernel, options, 1)
        crops = self.constant([[0, more]] * 2, np.int32)
        shape = [1, height, width, channels]
        options = schema.BatchToSpaceNDOptionsT()
        return self.op("BATCH_TO_SPACE_ND", [tensor, block, crops], shape, options)


def run(content: bytes, images: np.ndarray) -> np.ndarray:
    """Returns LiteRT's result for one image at a time, without its fast kernels."""
    (found,) = run_all(content, images)
    return found


def run_all(content: bytes, images: np.ndarray) -> list[np.ndarray]:
    """Returns each of LiteRT's results as `run` does the one."""
    results = _interpreter(content).get_output_details()
    return run_to(content, images, [result["name"] for result in results])


def run_to(content: bytes, images: np.ndarray, names: Sequence[str]) -> list[np.ndarray]:
    """Returns LiteRT's values of the tensors of these names, computed as in `run`."""
    interpreter = _interpreter(content)
    (given,) = interpreter.get_input_details()
    interpreter.resize_tensor_input(given["index"], (1, *images.shape[1:]))
    interpreter.allocate_tensors()
    numbers = {tensor["name"]: tensor["index"] for tensor in interpreter.get_tensor_details()}
    found: list[list[np.ndarray]] = [[] for _ in names]
    for image in images:
        interpreter.set_tensor(given["index"], image[None])
        interpreter.invoke()
        for values, name in zip(found, names, strict=True):
            values.append(interpreter.get_tensor(numbers[name])[0])
    return [np.stack(values) for values in found]


def _interpreter(content: bytes) -> Interpreter:
    interpreter = Interpreter(
        model_content=content,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        experimental_preserve_all_tensors=True,
    )
    interpreter.allocate_tensors()
    return interpreter
