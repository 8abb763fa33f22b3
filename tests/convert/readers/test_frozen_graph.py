"""TensorFlow's frozen graphs are read without TensorFlow."""

import gzip
import io
import pathlib
import subprocess
import tarfile
import time
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pytest

from mbv2_jax.convert import importer, readers
from mbv2_jax.errors import UserError
from tests.support import REPOSITORY, feature_maps
from tests.support.graph_def import GraphDef
from tests.support.weight_files import flipped, refusal


def computed_by_tensorflow(
    path: pathlib.Path, photos: np.ndarray, nodes: Sequence[str], folder: pathlib.Path
) -> list[np.ndarray]:
    """Returns the results of nodes, for which TensorFlow runs in its own environment."""
    python = REPOSITORY / ".venv-tensorflow" / "bin" / "python"
    if not python.exists():
        pytest.fail("no .venv-tensorflow here; make test-tensorflow makes it and runs this test")
    images, results = folder / "photos.npy", folder / "results.npz"
    np.save(images, photos)
    script = REPOSITORY / "tests" / "support" / "run_frozen_graph.py"
    command = [*map(str, (python, script, path, images, results)), *nodes]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return list(np.load(results).values())


@pytest.mark.tensorflow
def test_every_block_of_a_trained_detection_graph(check_data, tmp_path):
    """Its normalised photos and the maps of all its layers are TensorFlow's."""
    folder = check_data / "golden" / "ssdlite_tf"
    path, golden = folder / "frozen_inference_graph.pb", np.load(folder / "golden.npz")
    photos = np.stack([golden[f"image_{picture}_u8"] for picture in range(3)])
    assert photos.shape[1:3] == (300, 300)  # at which the graph's resizing changes nothing
    saved = importer.load(path, features_only=True).saved
    nodes = {
        "stem": "Conv/Relu6",
        **{name: f"{block}/output" for name, block in feature_maps.slim_blocks(saved).items()},
        "layer6_0/expand": "expanded_conv_13/expand/Relu6",
        "last": "Conv_1/Relu6",
    }
    names = [f"FeatureExtractor/MobilenetV2/{node}" for node in nodes.values()]
    normalized, *theirs = computed_by_tensorflow(
        path, photos, ["Preprocessor/sub", *names], tmp_path
    )
    # The graph multiplies by 2 / 255, rounded, where we divide by 127.5: float32 rounds twice.
    ours = saved.spec.preprocessing.normalize(photos)
    np.testing.assert_allclose(ours, normalized, rtol=0, atol=3e-7)
    maps = feature_maps.of_converted(saved, tuple(nodes), normalized)
    assert len(maps) == len(theirs) == 20
    for name, ours, expected in zip(nodes, maps, theirs, strict=True):
        assert expected.std() > 0.1, name
        # Up to 35; float32 rounds at 6e-8 of that, and 53 layers enlarge it: 5e-5 was measured.
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-3, err_msg=name)


def graph(**others: np.ndarray) -> GraphDef:
    """Returns a graph of a convolution and its BatchNorm, with further constants."""
    found = GraphDef()
    found.placeholder("input", -1, 160, 160, 3)
    draw = np.random.default_rng(0).standard_normal
    arrays = {
        "net/Conv/weights": draw((3, 3, 3, 4)).astype(np.float32),
        "net/Conv/BatchNorm/moving_variance": np.ones(4, np.float32),
        **{name.replace(".", "/"): array for name, array in others.items()},
    }
    for name, array in arrays.items():
        found.constant(name, array)
    return found


def test_constants_that_are_weights_are_read(tmp_path):
    many = np.arange(6, dtype=np.float32).reshape(2, 3) / 7
    alike = np.broadcast_to(np.float32(0.25), (4, 5))
    half = (many + 1).astype(np.float16)
    found = graph(**{"net.biases": np.ones(3, np.float32)})
    found.constant("net/a/gamma", many, "float_val")
    found.constant("net/b/beta", alike, "float_val")
    found.constant("net/c/gamma", half, "half_val")
    found.constant("net/d/gamma", half)
    found.constant("net/Shape/weights", np.array([1, 2], np.int32))
    found.constant("net/Conv/anchors", many)
    (tmp_path / "net.bin").write_bytes(found.content())  # the content decides, not the name
    file = readers.read(tmp_path / "net.bin")
    assert file.container == "frozen graph"
    assert file.contents.stated == {"data.image_size": 160}
    tensors = file.tensors
    assert len(tensors) == 7
    np.testing.assert_array_equal(tensors["net/a/gamma"], many, strict=True)
    np.testing.assert_array_equal(tensors["net/b/beta"], alike, strict=True)
    for name in ("net/c/gamma", "net/d/gamma"):
        np.testing.assert_array_equal(tensors[name], half.astype(np.float32), strict=True)


def tar(members: Mapping[str, bytes], mode: Literal["w", "w:gz"] = "w:gz") -> bytes:
    """Returns a tar archive."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as archive:
        for name, member in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(member)
            archive.addfile(info, io.BytesIO(member))
    return content.getvalue()


def test_the_frozen_graph_in_an_archive(tmp_path):
    """TF-slim's archives hold checkpoints and the graph of evaluation, too."""
    path = tmp_path / "mobilenet_v2_1.0_224.tgz"
    members = {
        "./mobilenet_v2_1.0_224.ckpt.index": bytes(99),
        "./mobilenet_v2_1.0_224_eval.pbtxt": b"node {",
        "./mobilenet_v2_1.0_224_frozen.pb": graph().content(),
        "./saved_model/saved_model.pb": b"\x08\x01",
    }
    for mode in ("w:gz", "w"):
        path.write_bytes(tar(members, mode))
        file = readers.read(path)
        assert file.contents.selection == "./mobilenet_v2_1.0_224_frozen.pb"
        assert "net/Conv/weights" in file.tensors
    path.write_bytes(tar({**members, "other/frozen.pb": graph().content()}))
    assert "2 frozen graphs (./mobilenet_v2_1.0_224_frozen.pb, other/frozen.pb)" in refusal(path)
    path.write_bytes(tar({"weights.pth": bytes(99)}))
    assert "no frozen graphs" in refusal(path)
    assert "unpack it, and give the file of weights in it" in refusal(path)


def test_an_archive_made_to_fill_the_memory(tmp_path):
    path = tmp_path / "net.tgz"
    path.write_bytes(tar({"zeros.ckpt": bytes(100 << 20), "frozen.pb": graph().content()}))
    assert path.stat().st_size < 200_000
    assert "it unpacks to more than 2 times its size" in refusal(path)


@pytest.mark.parametrize(
    ("name", "headers", "says"),
    [
        ("a/" * 4_000 + "frozen.pb", {}, "one of its headers has 8,0"),
        ("frozen.pb", {"comment": "1" * 100_000}, "one of its headers has 100,0"),
        # A sparse file takes 8 GiB once it is read, and 16 bytes of the archive.
        ("frozen.pb", {"GNU.sparse.map": "0,16", "GNU.sparse.size": str(8 << 30)}, "no frozen"),
    ],
    ids=["name", "digits", "sparse"],
)
def test_members_made_to_hang_or_to_fill_the_memory(name, headers, says, tmp_path):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo(name)
        member.size, member.pax_headers = 16, headers
        archive.addfile(member, io.BytesIO(bytes(16)))
    (tmp_path / "net.tgz").write_bytes(content.getvalue())
    assert says in refusal(tmp_path / "net.tgz")


def test_a_constant_made_to_fill_the_memory(tmp_path):
    found = graph()
    found.constant("net/a/gamma", np.broadcast_to(np.float32(1), (1 << 20, 1 << 12)), "float_val")
    (tmp_path / "net.pb").write_bytes(found.content())
    assert "its arrays 4,294,967,408 numbers" in refusal(tmp_path / "net.pb")


def test_a_graph_made_of_nothing_but_fields(tmp_path):
    """Each takes two bytes, and would take a microsecond every time that it is passed."""
    path = tmp_path / "net.pb"
    path.write_bytes(graph().content() + bytes([9 << 3, 0]) * 2_000_000)
    start = time.perf_counter()
    assert "it has more than 1,000,000 fields" in refusal(path)
    assert time.perf_counter() - start < 10


def test_half_floats_that_are_written_as_integers(tmp_path):
    """TensorFlow 1 wrote all of them so: up to three bytes for each."""
    found = graph()
    bits = np.arange(1 << 20) % 0x7C00  # those of infinity
    numbers = bits.astype(np.uint16).view(np.float16)
    found.constant("net/a/gamma", numbers, "half_val")
    (tmp_path / "net.pb").write_bytes(found.content())
    half = readers.read(tmp_path / "net.pb").tensors["net/a/gamma"]
    np.testing.assert_array_equal(half, numbers)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda g: g.node("a", "FakeQuantWithMinMaxVars"), "simulates 8-bit numbers"),
        (lambda g: g.node("a", "QuantizeV2"), "simulates 8-bit numbers"),
        (
            lambda g: [g.node(f"n{i}", "NoOp") for i in range(100_001)],
            "more than 100,000 nodes",
        ),
    ],
)
def test_graphs_that_are_refused(change, says, tmp_path):
    found = graph()
    change(found)
    (tmp_path / "net.pb").write_bytes(found.content())
    assert says in refusal(tmp_path / "net.pb")
    assert "one set of weights" in refusal(tmp_path / "net.pb", ema=True)


def test_graphs_without_the_weights(tmp_path):
    found = GraphDef()
    found.node("MobilenetV2/Conv/weights", "VariableV2")
    (tmp_path / "net.pb").write_bytes(found.content())
    assert "whose weights are in a checkpoint" in refusal(tmp_path / "net.pb")
    folded = GraphDef()
    folded.constant("net/depthwise/depthwise_weights", np.ones((3, 3, 4, 1), np.float32))
    (tmp_path / "net.pb").write_bytes(folded.content())
    assert "BatchNorm folded" in refusal(tmp_path / "net.pb")


def with_strides(steps: list[tuple[int, int]], native: bool) -> GraphDef:
    """Returns a graph with strides and dilations of TF-slim's depthwise convolutions."""
    found = graph()
    found.node("MobilenetV2/Conv/Conv2D", "Conv2D", strides=[1, 2, 2, 1], padding=b"SAME")
    for index, (stride, dilation) in enumerate(steps):
        scope = f"MobilenetV2/expanded_conv{f'_{index}' if index else ''}/depthwise"
        found.constant(f"{scope}/block_shape", np.full(2, dilation, np.int32))
        found.node(f"{scope}/SpaceToBatchND", "SpaceToBatchND", "x", f"{scope}/block_shape")
        before = "x" if native or dilation == 1 else f"{scope}/SpaceToBatchND:0"
        attributes: dict[str, list[int] | bytes] = {"strides": [1, stride, stride, 1]}
        attributes["padding"] = b"SAME" if before == "x" else b"VALID"
        if native:
            attributes["dilations"] = [1, dilation, dilation, 1]
        found.node(f"{scope}/depthwise", "DepthwiseConv2dNative", before, **attributes)
    return found


@pytest.mark.parametrize("native", [False, True])
def test_the_output_stride_is_the_graphs(native, tmp_path):
    """Stride and dilation of the 17 blocks at output stride 8, as in TensorFlow's DeepLab."""
    path = tmp_path / "net.pb"
    strides = [1, 2, 1, 2, *[1] * 13]
    dilations = [*[1] * 7, *[2] * 7, *[4] * 3]
    steps = list(zip(strides, dilations, strict=True))
    path.write_bytes(with_strides(steps, native).content())
    assert readers.read(path).contents.stated["model.output_stride"] == 8
    path.write_bytes(with_strides([(2, 1), *steps[1:]], native).content())
    assert "strides and dilations that no network here has: 2 and 1" in refusal(path)


PAPERS = [(2 if index in (1, 3, 6, 13) else 1, 1) for index in range(17)]  # Table 2's strides


def with_padding(pads: list[int]) -> GraphDef:
    """Returns TF-slim's graph with `use_explicit_padding`: a Pad before each 3x3."""
    found = graph()
    found.constant("MobilenetV2/pads", np.reshape(pads, (4, 2)).astype(np.int32))
    found.node("MobilenetV2/Pad", "Pad", "x", "MobilenetV2/pads")
    scopes = [f"expanded_conv{f'_{index}' if index else ''}/depthwise" for index in range(17)]
    for scope, (stride, _) in zip(["Conv", *scopes], [(2, 1), *PAPERS], strict=True):
        op = "Conv2D" if scope == "Conv" else "DepthwiseConv2dNative"
        attributes = {"strides": [1, stride, stride, 1]}
        name = f"MobilenetV2/{scope}/{op}"
        found.node(name, op, "MobilenetV2/Pad", **attributes, padding=b"VALID")
    return found


def test_padding_and_epsilon_are_the_graphs(tmp_path):
    path = tmp_path / "net.pb"
    found = with_strides(PAPERS, native=True)
    path.write_bytes(found.content())
    assert readers.read(path).contents.stated["model.padding"] == "same"
    for name in ("Conv/BatchNorm/FusedBatchNorm", "expanded_conv_3/project/FusedBatchNormV3"):
        found.node(f"MobilenetV2/{name}", name.rpartition("/")[2], epsilon=1e-5)
    path.write_bytes(found.content())
    assert readers.read(path).contents.stated["model.bn_epsilon"] == 1e-5
    found.node("MobilenetV2/Conv_1/FusedBatchNorm", "FusedBatchNorm", epsilon=1e-3)
    path.write_bytes(found.content())
    assert r"several epsilons: [1e-05, 0.001]" in refusal(path)
    path.write_bytes(with_padding([0, 0, 1, 1, 1, 1, 0, 0]).content())
    assert readers.read(path).contents.stated["model.padding"] == "torch"
    path.write_bytes(with_padding([0, 0, 0, 1, 0, 1, 0, 0]).content())
    assert "pads as no network here does: by [0, 0, 0, 1, 0, 1, 0, 0]" in refusal(path)


def test_another_activation(tmp_path):
    found = with_strides(PAPERS, native=True)
    found.node("MobilenetV2/expanded_conv_1/expand/Relu", "Relu")
    (tmp_path / "net.pb").write_bytes(found.content())
    says = "the activation Relu at MobilenetV2/expanded_conv_1/expand/Relu, not Relu6"
    assert says in refusal(tmp_path / "net.pb")


def test_damaged_graphs(tmp_path):
    """Flipped bits may change a number; everything else is an error of one line."""
    path = tmp_path / "net.pb"
    whole = graph(**{"net.Conv.BatchNorm.gamma": np.ones(4, np.float32)}).content()
    for content in (*flipped(whole, 300), *(whole[:n] for n in range(1, len(whole), 7))):
        path.write_bytes(content)
        try:
            readers.read(path)
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017 # there may be none


def test_damaged_archives(tmp_path):
    """gzip has a checksum: no flipped bit of its content goes unnoticed."""
    path = tmp_path / "net.tgz"
    packed = gzip.compress(tar({"frozen.pb": graph().content()}, "w"))
    header = 10  # bytes, of which some say when and where the file was written
    for content in flipped(packed[header:], 100):
        path.write_bytes(packed[:header] + content)
        assert "damaged" in refusal(path) or "compressed (gzip)" in refusal(path)
    for length in range(header, len(packed), 40):
        path.write_bytes(packed[:length])
        assert "damaged" in refusal(path) or "compressed (gzip)" in refusal(path)
