"""Writes a frozen graph of deeplab: python write_deeplab_graph.py GRAPH IMAGES.npy RESULTS.npz ...

The tests start it with the Python of .venv-tensorflow, where this project is not installed. The
arguments after RESULTS.npz are the side of the images, the output stride, the width and the
dilations at that output stride, as text: 513 16 1.0 "" or 129 8 0.5 "12 24 36".

The graph is built as research/deeplab/export_model.py and research/slim build theirs: an input of
uint8 pixels of any size, which are padded to the side with the mean pixel and scaled to -1 to 1;
MobileNetV2 with dilations behind SpaceToBatchND; image pooling over a window of a fixed size; names
as there. Weights and statistics are random. RESULTS has the logits of the images, "logits", and
their classes, "classes".
"""

import pathlib
import sys

import numpy as np
import tensorflow as tf

v1 = tf.compat.v1
# Expansion, channels, blocks, stride of each row of the paper's Table 2.
ROWS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
DRAW = np.random.default_rng(0)


def variable(name: str, shape: tuple[int, ...], fan_in: int = 0) -> tf.Tensor:
    """Returns a variable with random values such as a trained network has."""
    if fan_in:
        values = DRAW.normal(0, np.sqrt(2 / fan_in), shape)
    elif name in ("gamma", "moving_variance"):
        values = DRAW.uniform(0.5, 1.5, shape)
    else:
        values = DRAW.uniform(-0.5, 0.5, shape)
    initial = v1.constant_initializer(values.astype(np.float32))
    return v1.get_variable(name, shape, tf.float32, initial, use_resource=False)


def normalized(x: tf.Tensor, epsilon: float) -> tf.Tensor:
    """Returns x after slim.batch_norm with the running statistics."""
    channels = x.shape[-1]
    with v1.variable_scope("BatchNorm"):
        names = ("gamma", "beta", "moving_mean", "moving_variance")
        arrays = [variable(name, (channels,)) for name in names]
        return v1.nn.fused_batch_norm(x, *arrays, epsilon=epsilon, is_training=False)[0]


def conv(x: tf.Tensor, channels: int, side: int = 1, stride: int = 1, rate: int = 1) -> tf.Tensor:
    """Returns slim.conv2d without its normalisation."""
    inputs = x.shape[-1]
    weights = variable("weights", (side, side, inputs, channels), side * side * inputs)
    if rate == 1:
        return v1.nn.conv2d(x, weights, stride, "SAME", name="Conv2D")
    return batches(x, rate, lambda y: v1.nn.conv2d(y, weights, 1, "VALID", name="convolution"))


def batches(x: tf.Tensor, rate: int, convolve) -> tf.Tensor:
    """Returns a 3x3 convolution with dilation as TensorFlow 1 wrote it: on distant pixels."""
    height, width = x.shape[1:3]
    fill = [-(side + 2 * rate) % rate for side in (height, width)]
    pads = [[rate, rate + fill[0]], [rate, rate + fill[1]]]
    y = v1.space_to_batch_nd(x, [rate, rate], pads, name="SpaceToBatchND")
    crops = [[0, fill[0]], [0, fill[1]]]
    return v1.batch_to_space_nd(convolve(y), [rate, rate], crops, name="BatchToSpaceND")


def layer(x: tf.Tensor, scope: str, channels: int, **window: int) -> tf.Tensor:
    """Returns a layer of the head: a convolution, a normalisation and ReLU."""
    with v1.variable_scope(scope):
        return v1.nn.relu(normalized(conv(x, channels, **window), 1e-5), name="Relu")


def inner(x: tf.Tensor, scope: str, channels: int, relu6: bool = True, **window: int) -> tf.Tensor:
    """Returns a layer of the backbone: a convolution and a normalisation, with ReLU6 or without."""
    with v1.variable_scope(scope):
        y = normalized(conv(x, channels, **window), 1e-3)
        return v1.nn.relu6(y, name="Relu6") if relu6 else y


def depthwise(x: tf.Tensor, stride: int, rate: int) -> tf.Tensor:
    """Returns the depthwise layer of a block."""
    channels = x.shape[-1]
    with v1.variable_scope("depthwise"):
        weights = variable("depthwise_weights", (3, 3, channels, 1), 9)

        def convolve(y: tf.Tensor, padding: str) -> tf.Tensor:
            strides = (1, stride, stride, 1)
            return v1.nn.depthwise_conv2d_native(y, weights, strides, padding, name="depthwise")

        y = convolve(x, "SAME") if rate == 1 else batches(x, rate, lambda z: convolve(z, "VALID"))
        return v1.nn.relu6(normalized(y, 1e-3), name="Relu6")


def backbone(x: tf.Tensor, output_stride: int, width: float) -> tf.Tensor:
    """Returns layer_18, with the rates of research/slim/nets/mobilenet/mobilenet.py."""
    with v1.variable_scope("MobilenetV2"):
        y = inner(x, "Conv", int(32 * width), side=3, stride=2)
        current, rate, index = 2, 1, 0
        for expansion, channels, blocks, stride in ROWS:
            for number in range(blocks):
                step = stride if number == 0 else 1
                layer_rate, lost = rate, 1
                if current == output_stride:
                    step, lost = 1, step
                before = y
                with v1.variable_scope("expanded_conv" + (f"_{index}" if index else "")):
                    if expansion > 1:
                        y = inner(y, "expand", expansion * int(y.shape[-1]))
                    y = depthwise(y, step, layer_rate)
                    y = inner(y, "project", int(channels * width), relu6=False)
                    if step == 1 and before.shape[-1] == y.shape[-1]:
                        y = v1.add(y, before, name="add")
                current, rate, index = current * step, rate * lost, index + 1
    return y


def build(side: int, output_stride: int, width: float, rates: list[int]) -> None:
    """Adds the whole network to the default graph."""
    pixels = v1.placeholder(tf.uint8, (1, None, None, 3), name="ImageTensor")
    image = v1.cast(pixels, tf.float32)
    shape = v1.shape(image)
    # Padded with the mean pixel, as in core/preprocess_utils.py.
    pads = [[0, 0], [0, side - shape[1]], [0, side - shape[2]], [0, 0]]
    image = v1.pad(image - 127.5, pads) + 127.5
    image.set_shape((1, side, side, 3))
    features = backbone((2.0 / 255.0) * image - 1.0, output_stride, width)
    size = (side - 1) // output_stride + 1
    pooled = v1.nn.avg_pool(features, size, 1, "VALID", name="AvgPool2D/AvgPool")
    pooled = layer(pooled, "image_pooling", 256)
    branches = [v1.image.resize_bilinear(pooled, (size, size), align_corners=True)]
    branches.append(layer(features, "aspp0", 256))
    for number, rate in enumerate(rates, start=1):
        branches.append(layer(features, f"aspp{number}", 256, side=3, rate=rate))
    y = layer(v1.concat(branches, 3), "concat_projection", 256)
    with v1.variable_scope("logits"), v1.variable_scope("semantic"):
        logits = v1.nn.bias_add(conv(y, 21), variable("biases", (21,)), name="BiasAdd")
    whole = v1.image.resize_bilinear(logits, v1.shape(image)[1:3], align_corners=True)
    classes = v1.argmax(whole, 3)
    v1.slice(classes, [0, 0, 0], [1, shape[1], shape[2]], name="SemanticPredictions")


def main(path: str, images: str, results: str, side: str, stride: str, width: str, rates: str):
    with tf.Graph().as_default() as graph, v1.Session() as session:
        build(int(side), int(stride), float(width), [int(rate) for rate in rates.split()])
        session.run(v1.global_variables_initializer())
        frozen = v1.graph_util.convert_variables_to_constants(
            session, graph.as_graph_def(), ["SemanticPredictions"]
        )
        pathlib.Path(path).write_bytes(frozen.SerializeToString())
        nodes = ("logits/semantic/BiasAdd:0", "SemanticPredictions:0")
        found = [session.run(nodes, {"ImageTensor:0": image[None]}) for image in np.load(images)]
    logits, classes = (np.concatenate(part) for part in zip(*found, strict=True))
    np.savez(results, logits=logits, classes=classes)


if __name__ == "__main__":
    main(*sys.argv[1:])
