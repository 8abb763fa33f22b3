"""TFLite's files, read without TensorFlow, beside LiteRT's interpreter of the same files."""

import pathlib
import zipfile

import jax
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_quantizer import qtyping, quantizer, recipe_manager
from ai_edge_quantizer import recipe as quantizer_recipe
from flax.traverse_util import flatten_dict

from mbv2_jax.convert import importer, readers
from mbv2_jax.errors import UserError
from mbv2_jax.spec import Backbone
from tests.support import feature_maps, tflite_files
from tests.support.tflite_files import Network
from tests.support.weight_files import flipped, refusal

SIZE = 64
SAME = Backbone(width=0.35, padding="same")


def images(size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((2, size, size, 3)).astype(np.float32)


def logits(saved, x: np.ndarray) -> np.ndarray:
    network = saved.task().network(saved.spec.backbone, saved.spec.mode)
    return np.asarray(jax.jit(network.apply)(saved.variables(), x))


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert theirs.std() > 0.01
    # Both round at 1e-7; 53 layers enlarge that.
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * abs(theirs).max())


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        (SAME, {}),
        (Backbone(width=0.35, padding="torch"), {}),
        (SAME, {"separate": True}),
        (Backbone(width=0.35, padding="same", output_stride=16), {}),
        (Backbone(width=0.35, padding="same", output_stride=8), {"batches": True}),
        (Backbone(width=1.0, padding="same", strides=(2, 1, 1, 2, 1, 1, 2, 1)), {}),
    ],
)
def test_networks(backbone, options, tmp_path):
    network = Network(backbone, SIZE, **options)
    content = network.content(network.head(network.build(), 5))
    (tmp_path / "net.tflite").write_bytes(content)
    imported = importer.load(tmp_path / "net.tflite")
    spec = imported.saved.spec
    for field in ("width", "padding", "output_stride", "strides"):
        assert getattr(spec.backbone, field) == getattr(backbone, field)
    assert spec.preprocessing.image_size == SIZE
    assert_same(logits(imported.saved, images()), tflite_files.run(content, images()))


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((7, 5), {}),
        ((5,), {"activation": "SOFTMAX"}),
        ((5,), {"activation": "SOFTMAX", "dense": False}),
        ((1,), {"activation": "LOGISTIC"}),
    ],
)
def test_heads(sizes, options, tmp_path):
    """The scores are the file's: of a softmax, or of the sigmoid of the one logit."""
    network = Network(SAME, SIZE)
    content = network.content(network.head(network.build(), *sizes, **options))
    (tmp_path / "net.tflite").write_bytes(content)
    saved = importer.load(tmp_path / "net.tflite").saved
    assert saved.spec.head.hidden == sizes[:-1]
    ours, theirs = logits(saved, images()), tflite_files.run(content, images())
    if options:
        ours = np.asarray(jax.nn.softmax(ours))
    assert_same(ours[:, -sizes[-1] :], theirs)


def test_a_backbone_alone(tmp_path):
    network = Network(SAME, SIZE)
    content = network.content(network.build())
    (tmp_path / "net.tflite").write_bytes(content)
    saved = importer.load(tmp_path / "net.tflite").saved
    assert saved.features_only
    (ours,) = logits(saved, images())
    assert_same(ours, tflite_files.run(content, images()))


def test_a_normalization_in_the_graph(tmp_path):
    """It is the model's own, and the converted network takes what comes after it."""
    network = Network(SAME, SIZE)
    shape = network.shape(network.images)
    mean = network.constant([123.675, 116.28, 103.53])
    factor = network.constant(np.divide(1, [58.395, 57.12, 57.375]))
    centred = network.op("SUB", [network.images, mean], shape, schema.SubOptionsT())
    scaled = network.op("MUL", [centred, factor], shape, schema.MulOptionsT())
    content = network.content(network.head(network.build(scaled), 5))
    (tmp_path / "net.tflite").write_bytes(content)
    imported = importer.load(tmp_path / "net.tflite")
    preprocessing = imported.saved.spec.preprocessing
    assert preprocessing.mean == (123.675, 116.28, 103.53)
    assert preprocessing.std == (58.395, 57.12, 57.375)
    pixels = np.random.default_rng(2).integers(0, 256, (2, SIZE, SIZE, 3)).astype(np.float32)
    seen = (pixels - np.float32(preprocessing.mean)) / np.float32(preprocessing.std)
    assert_same(logits(imported.saved, seen), tflite_files.run(content, pixels))


def test_a_normalization_of_pixels_from_0_to_1(tmp_path):
    network = Network(SAME, SIZE)
    shape = network.shape(network.images)
    doubled = network.op(
        "MUL", [network.images, network.constant(2.0)], shape, schema.MulOptionsT()
    )
    scaled = network.op("SUB", [doubled, network.constant(1.0)], shape, schema.SubOptionsT())
    content = network.content(network.head(network.build(scaled), 5))
    (tmp_path / "net.tflite").write_bytes(content)
    imported = importer.load(tmp_path / "net.tflite")
    preprocessing = imported.saved.spec.preprocessing
    assert (preprocessing.mean, preprocessing.std) == ((127.5,) * 3, (127.5,) * 3)
    assert any("pixels from 0 to 1" in line for line in imported.warnings)


def test_labels(tmp_path):
    """Class names are in a zip archive behind the graph, as TensorFlow's metadata has them."""
    network = Network(SAME, SIZE)
    path = tmp_path / "net.tflite"
    path.write_bytes(network.content(network.head(network.build(), 3)))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("labels.txt", "apple\npear\nplum\n")
    assert importer.load(path).saved.classes == ("apple", "pear", "plum")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> pathlib.Path:
    """A float32 file."""
    path = tmp_path_factory.mktemp("tflite") / "float32.tflite"
    network = Network(SAME, SIZE)
    path.write_bytes(network.content(network.head(network.build(), 7, 5)))
    return path


def quantized(plain: pathlib.Path, recipe) -> pathlib.Path:
    """Returns the file that AI Edge's quantizer makes of a float32 one."""
    found = quantizer.Quantizer(str(plain), recipe)
    statistics = None
    if found.need_calibration:
        samples = [{"images": image[None]} for image in images()]
        statistics = found.calibrate({"serving_default": samples})
    path = plain.with_name("quantized.tflite")
    path.write_bytes(found.quantize(statistics).quantized_model)
    assert path.stat().st_size < 0.6 * plain.stat().st_size
    return path


def half_floats():
    """Returns the recipe for weights of 16 bits, which the file converts back."""
    manager = recipe_manager.RecipeManager()
    weights = qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT)
    manager.add_quantization_config(
        regex=".*",
        operation_name=qtyping.TFLOperationName.ALL_SUPPORTED,
        op_config=qtyping.OpQuantizationConfig(
            weight_tensor_config=weights,
            compute_precision=qtyping.ComputePrecision.FLOAT,
            explicit_dequantize=True,
        ),
        algorithm_key="float_casting",
    )
    return manager.get_quantization_recipe()


@pytest.mark.parametrize("recipe", [half_floats, quantizer_recipe.weight_only_wi8_afp32])
def test_small_weights(recipe, plain):
    """LiteRT computes with the same float32 numbers."""
    path = quantized(plain, recipe())
    saved = importer.load(path).saved
    theirs = tflite_files.run(path.read_bytes(), images())
    assert_same(logits(saved, images()), theirs)
    assert abs(theirs - tflite_files.run(plain.read_bytes(), images())).max() > 1e-4


@pytest.mark.parametrize(
    "recipe", [quantizer_recipe.dynamic_wi8_afp32, quantizer_recipe.static_wi8_ai8]
)
def test_networks_of_8_bits(recipe, plain):
    """They compute in 8 bits; their weights are at most half a step from the float ones."""
    saved = importer.load(quantized(plain, recipe())).saved
    ours, theirs = (flatten_dict(s.params) for s in (saved, importer.load(plain).saved))
    for name, array in theirs.items():
        # A step of a bias is the product of those of the weights and of the activations.
        steps = 254 if name[-1] == "kernel" else 1000
        largest = (
            abs(array).max() if array.ndim == 1 else abs(array).max(tuple(range(array.ndim - 1)))
        )
        assert (abs(ours[name] - array) <= largest / steps * 1.01).all(), name
        assert name[-1] != "kernel" or (ours[name] != array).any()


def test_unsigned_weights_of_one_scale(tmp_path):
    """Older files have a zero point, and one scale for all channels."""

    class Older(Network):
        def constant(self, array, dtype=np.float32):
            array = np.asarray(array, dtype)
            if array.ndim != 4:
                return super().constant(array, dtype)
            scale = np.ptp(array) / 255
            zero_point = round(-array.min() / scale)
            codes = np.clip(np.round(array / scale) + zero_point, 0, 255).astype(np.uint8)
            number = self.tensor(codes.shape, codes)
            self.scale(number, float(scale), zero_point)
            return self.op("DEQUANTIZE", [number], codes.shape, schema.DequantizeOptionsT())

    network = Older(SAME, SIZE)
    content = network.content(network.head(network.build(), 5))
    (tmp_path / "net.tflite").write_bytes(content)
    saved = importer.load(tmp_path / "net.tflite").saved
    assert_same(logits(saved, images()), tflite_files.run(content, images()))


def test_heads_that_are_no_classifier(tmp_path):
    """The backbone converts without them, and gives what the same file's backbone gives."""
    network = Network(SAME, SIZE)
    backbone = network.build()
    maps = network.content(backbone)
    upsampled = network.op(
        "RESIZE_BILINEAR",
        [network.conv(backbone, 3, 1, tflite_files.NONE), network.constant([8, 8], np.int32)],
        [1, 8, 8, 3],
        schema.ResizeBilinearOptionsT(),
    )
    path = tmp_path / "net.tflite"
    path.write_bytes(network.content(upsampled))
    with pytest.raises(UserError, match=r"operators CONV_2D, RESIZE_BILINEAR.*--features-only"):
        importer.load(path)
    saved = importer.load(path, features_only=True).saved
    (ours,) = logits(saved, images())
    assert_same(ours, tflite_files.run(maps, images()))


def relu_of_logits(network: Network) -> int:
    logits = network.head(network.build(), 5)
    network.operators[-1].builtinOptions.fusedActivationFunction = tflite_files.RELU
    return network.op("SOFTMAX", [logits], [1, 5], schema.SoftmaxOptionsT(1.0))


def two_softmaxes(network: Network) -> int:
    scores = network.head(network.build(), 5, activation="SOFTMAX")
    return network.op("SOFTMAX", [scores], [1, 5], schema.SoftmaxOptionsT(1.0))


def pooling(network: Network, side: int) -> int:
    """Averages a window of this side at the corner of the map, which is 2x2."""
    options = schema.Pool2DOptionsT(tflite_files.VALID, 2, 2, side, side)
    return network.op("AVERAGE_POOL_2D", [network.build()], [1, 1, 1, 1280], options)


def softmax_of_features(network: Network) -> int:
    return network.op(
        "SOFTMAX", [pooling(network, 2)], [1, 1, 1, 1280], schema.SoftmaxOptionsT(1.0)
    )


@pytest.mark.parametrize(
    ("head", "kinds"),
    [
        (relu_of_logits, "MEAN, FULLY_CONNECTED, SOFTMAX"),
        (two_softmaxes, "MEAN, FULLY_CONNECTED, SOFTMAX"),
        (softmax_of_features, "AVERAGE_POOL_2D, SOFTMAX"),
        (lambda network: pooling(network, 1), "AVERAGE_POOL_2D"),
    ],
)
def test_heads_that_compute_something_else(head, kinds, tmp_path):
    network = Network(SAME, SIZE)
    (tmp_path / "net.tflite").write_bytes(network.content(head(network)))
    with pytest.raises(UserError, match=f"a head of the operators {kinds}"):
        importer.load(tmp_path / "net.tflite")


def test_a_head_that_begins_with_a_narrow_convolution(tmp_path):
    """It is not the network's last one, which has 1280 channels."""

    class Narrow(Network):
        def conv(self, tensor, out, side, activation, stride=1):
            out = 256 if out == 1280 else out
            return super().conv(tensor, out, side, activation, stride)

    network = Narrow(SAME, SIZE)
    (tmp_path / "net.tflite").write_bytes(network.content(network.build()))
    saved = importer.load(tmp_path / "net.tflite", features_only=True).saved
    assert not saved.spec.backbone.last_convolution
    with pytest.raises(UserError, match="a head of the operators CONV_2D"):
        importer.load(tmp_path / "net.tflite")


def test_the_padding_of_a_file_for_images_of_any_size(tmp_path):
    """Its maps have sides of 1, which stand for any."""
    network = Network(Backbone(width=0.35, padding="torch"), SIZE)
    whole = network.head(network.build(), 5)
    network.open_sides()
    content = network.content(whole)
    (tmp_path / "net.tflite").write_bytes(content)
    saved = importer.load(tmp_path / "net.tflite").saved
    assert saved.spec.backbone.padding == "torch"
    assert_same(logits(saved, images()), tflite_files.run(content, images()))


@pytest.mark.parametrize("kind", ["MUL", "DIV"])
def test_a_normalization_that_is_none(kind, tmp_path):
    network = Network(SAME, SIZE)
    options = schema.MulOptionsT() if kind == "MUL" else schema.DivOptionsT()
    shape = network.shape(network.images)
    images = network.op(kind, [network.images, network.constant(0.0)], shape, options)
    (tmp_path / "net.tflite").write_bytes(network.content(network.head(network.build(images), 5)))
    with pytest.raises(UserError, match=f"{kind} .* is not a normalisation of the images"):
        importer.load(tmp_path / "net.tflite")


def test_every_block_of_a_trained_deeplab(check_data):
    """The stem and the 17 blocks give LiteRT's maps of photos, at width 0.5 and output stride 8."""
    folder = check_data / "golden" / "deeplab_tf"
    path, golden = folder / "deeplabv3_257_mv_gpu.tflite", np.load(folder / "golden.npz")
    photos = np.stack([golden[f"image_{picture}_u8"] for picture in range(3)])
    x = photos.astype(np.float32) / 127.5 - 1
    saved = importer.load(path, features_only=True).saved
    tensors = {"stem": "MobilenetV2/Conv/Relu6"}
    for name, block in feature_maps.slim_blocks(saved).items():
        # A block adds its input, unless it is the first of its stage.
        end = "project/BatchNorm/FusedBatchNorm" if name.endswith("_0") else "add"
        tensors[name] = f"MobilenetV2/{block}/{end}"
    maps = feature_maps.of_converted(saved, tuple(tensors), x)
    theirs = tflite_files.run_to(path.read_bytes(), x, tuple(tensors.values()))
    assert len(maps) == 18
    for name, ours, expected in zip(tensors, maps, theirs, strict=True):
        assert expected.std() > 1, name
        # Up to 66; float32 rounds at 6e-8 of that, and 52 layers enlarge it: 1.8e-4 was measured.
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-3, err_msg=name)


class _Relu(Network):
    def depthwise(self, tensor, stride, dilation):
        tensor = super().depthwise(tensor, stride, dilation)
        self.operators[-1].builtinOptions.fusedActivationFunction = tflite_files.RELU
        return tensor


class _Wide(Network):
    def conv(self, tensor, out, side, activation, stride=1):
        return super().conv(tensor, out, 3, activation, stride)


class _Strided(Network):
    def depthwise(self, tensor, stride, dilation):
        return super().depthwise(tensor, 2 if self.shape(tensor)[1] == 4 else stride, dilation)


class _Plain(Network):
    def op(self, kind, inputs, shape, options=None):
        return inputs[0] if kind == "ADD" else super().op(kind, inputs, shape, options)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (_Relu, "the activation after layer1_0/depthwise is relu, not relu6"),
        (_Wide, r"layer1_0/project should be a 1x1 convolution of 16 channels, and .* 3, 3, 16\)"),
        (_Strided, "no network here has its strides and dilations"),
        (_Plain, "the input of layer2_1 is not added to its output"),
    ],
)
def test_other_networks(kind, says, tmp_path):
    network = kind(SAME, SIZE)
    (tmp_path / "net.tflite").write_bytes(network.content(network.build()))
    with pytest.raises(UserError, match=says):
        importer.load(tmp_path / "net.tflite")


def unknown_sizes(network: Network, output: int) -> None:
    """Adds constants of all the numbers of one buffer, whose shapes do not count them."""
    large = network.constant(np.ones(500_000))
    for _ in range(200):
        open_ones = [network.tensor([-1]) for _ in range(20)]
        for number in open_ones:
            network._tensors[number].buffer = network._tensors[large].buffer
        network.op("CONCATENATION", [output, *open_ones], [1])


def two_writers(network: Network, output: int) -> None:
    """Adds operators of which each of one half leads to each of the other."""
    tensors = [network.tensor([1]) for _ in range(90)]
    for number in range(4_000):
        network.op("CONCATENATION", [output, *(tensors if number % 2 else [])], [1])
        if not number % 2:
            network.operators[-1].outputs = tensors


@pytest.mark.parametrize(
    ("change", "says"),
    [(unknown_sizes, "more numbers than the file can hold"), (two_writers, "write one tensor")],
)
def test_graphs_made_to_hang_or_to_fill_the_memory(change, says, tmp_path):
    network = Network(SAME, SIZE)
    output = network.head(network.build(), 3)
    change(network, output)
    (tmp_path / "net.tflite").write_bytes(network.content(output))
    assert says in refusal(tmp_path / "net.tflite")


def test_labels_made_to_fill_the_memory(plain):
    path = plain.with_name("labels.tflite")
    path.write_bytes(plain.read_bytes())
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("labels.txt", b"a\n" * (30 << 20))
    assert "its 'labels.txt' has 62,914,560 bytes" in refusal(path)


def test_damaged_files(plain):
    """Flipped bits in the tables may name another tensor; nothing is worse than an error line."""
    whole = plain.read_bytes()
    path = plain.with_name("damaged.tflite")
    tables = whole[-60_000:]  # the weights are before them
    for content in (
        *(whole[:-60_000] + damaged for damaged in flipped(tables, 60)),
        *(whole[: len(whole) * n // 20] for n in range(1, 20)),
    ):
        path.write_bytes(content)
        try:
            readers.read(path)
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017 # there may be none
