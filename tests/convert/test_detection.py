"""Detection networks in files, those that do not fit, and weights of other networks and classes."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mbv2_jax
from mbv2_jax import model_dir, tasks
from mbv2_jax.convert import arrays, importer, mmdet_config
from mbv2_jax.data import classes, labels
from mbv2_jax.errors import UserError
from mbv2_jax.model_dir import SavedModel
from mbv2_jax.model_json import Description
from mbv2_jax.spec import Backbone, ModelSpec, Preprocessing, TrainingMode
from mbv2_jax.tasks.detection.settings import Head
from tests.support import detection_graph, tiny_model
from tests.support.convert_command import make_run, refused
from tests.support.graph_def import GraphDef

CLASSES = ("ant", "bee")
# The heads of mmdet, on the network of two blocks and two maps more.
HEAD = Head(
    num_classes=2,
    taps=("layer1", "last"),
    extra_channels=(16, 8),
    anchor_sizes=(0.1, 0.3, 0.5, 0.7, 0.9),
)
SPEC = ModelSpec(
    "detection",
    Backbone(width=0.5, bn_epsilon=1e-3),
    HEAD,
    Preprocessing(64, "resize(size)"),
    TrainingMode(bn_momentum=0.97),
)
# TensorFlow's, on the same network.
TENSORFLOW = dataclasses.replace(
    SPEC,
    backbone=Backbone(width=0.5, padding="same", bn_epsilon=1e-3),
    head=dataclasses.replace(HEAD, anchors="tensorflow", taps=("layer7_0/expand", "last")),
)
TAPS = (
    "FeatureExtractor/MobilenetV2/expanded_conv_1/expansion_output",
    "FeatureExtractor/MobilenetV2/Conv_1/Relu6",
)


@pytest.fixture(autouse=True)
def short_network(few_layers):
    """The network has two blocks, also where the shapes of its arrays are remembered."""
    arrays.shapes.cache_clear()
    yield
    arrays.shapes.cache_clear()


@pytest.fixture
def run(monkeypatch, capsys):
    return make_run(monkeypatch, capsys)


def variables_of(spec: ModelSpec) -> dict[str, Any]:
    network = tasks.find(spec.task).for_model(spec.head, CLASSES).network(spec.backbone, spec.mode)
    return tiny_model.filled(model_dir.shapes_of(network))


def write(path: pathlib.Path, spec: ModelSpec = SPEC) -> pathlib.Path:
    """Writes a detection model with random arrays."""
    variables = variables_of(spec)
    names = CLASSES if spec.head.num_classes == 2 else tuple(map(str, range(spec.head.num_classes)))
    description = Description(spec, names, {"kind": "made by a test"})
    model_dir.write(path, variables["params"], variables["batch_stats"], description)
    return path


def with_head(**changes: Any) -> ModelSpec:
    return dataclasses.replace(SPEC, head=dataclasses.replace(HEAD, **changes))


def sha256(path: pathlib.Path) -> str:
    return model_dir.arrays_sha256(model_dir.read(path).variables())


def test_a_safetensors_file_keeps_everything(run, tmp_path):
    """Taps, anchors, thresholds and classes too, and every array to the bit."""
    spec = dataclasses.replace(
        TENSORFLOW,
        head=dataclasses.replace(TENSORFLOW.head, score_threshold=0.3, max_boxes=7),
    )
    ours, file = write(tmp_path / "m", spec), tmp_path / "m.safetensors"
    code, out, err = run(ours, "--to=safetensors", f"--output={file}")
    assert code == 0, err
    assert "SSDLite on layer7_0/expand and last, 4 maps, 2 classes of boxes" in out
    code, out, err = run(file, f"--output={tmp_path / 'again'}")
    assert (code, err) == (0, "")
    again = model_dir.read(tmp_path / "again")
    assert (again.spec, again.classes) == (spec, CLASSES)
    assert sha256(tmp_path / "again") == sha256(ours)


def test_a_network_without_the_last_convolution(run, tmp_path):
    """No head reads it, so that the model does not have it."""
    ours, file = (
        write(tmp_path / "m", with_head(taps=("layer1", "layer7"))),
        tmp_path / "m.safetensors",
    )
    assert "last" not in model_dir.read(ours).params
    code, _, err = run(ours, "--to=safetensors", f"--output={file}")
    assert code == 0, err
    code, _, err = run(file, f"--output={tmp_path / 'again'}")
    assert code == 0, err
    assert sha256(tmp_path / "again") == sha256(ours)
    shorter = write(
        tmp_path / "shorter", with_head(taps=("layer1",), anchor_sizes=(0.1, 0.2, 0.3, 1.0))
    )
    error = refused(run(shorter, "--to=safetensors", f"--output={tmp_path / 's.safetensors'}"))
    assert "has no layer7_0, which its heads do not read" in error


def test_mmdets_layout_and_back(run, tmp_path):
    """Every array to the bit, the names of the classes, and mmdet's conventions."""
    head = Head(num_classes=2, taps=HEAD.taps, extra_channels=(16, 8, 8, 8))
    images = Preprocessing(320, "resize(size)")
    spec = dataclasses.replace(SPEC, head=head, preprocessing=images)
    ours, file = write(tmp_path / "m", spec), tmp_path / "m.pth"
    code, out, err = run(ours, "--to=mmdet", f"--output={file}")
    assert code == 0, err
    assert "mmdet.apis.init_detector('configs/ssd/ssdlite_mobilenetv2-scratch_8xb24" in out
    assert "class names" not in out  # since they are in the file
    code, out, err = run(file, f"--output={tmp_path / 'again'}")
    assert code == 0, err
    again = model_dir.read(tmp_path / "again")
    assert (again.spec, again.classes) == (spec, CLASSES)
    assert sha256(tmp_path / "again") == sha256(ours)


def graph(**changes: Any) -> GraphDef:
    """Returns the frozen graph of TENSORFLOW's network; `changes` are of its head."""
    head = dataclasses.replace(TENSORFLOW.head, **changes)
    spec = dataclasses.replace(TENSORFLOW, head=head)
    return detection_graph.write(variables_of(spec), spec.backbone, head)


def test_a_frozen_graph(run, tmp_path):
    """Its background comes first, and its codes are y, x, height, width; its operators tell fields.

    Values in the graph are of no default.
    """
    found, sizes = graph(), HEAD.anchor_sizes
    detection_graph.add_operators(found, TAPS)
    detection_graph.add_anchors(found, sizes)
    (tmp_path / "g.pb").write_bytes(found.content())
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    names = f"--class-names={tmp_path / 'names.txt'}"
    code, _, err = run(tmp_path / "g.pb", names, f"--output={tmp_path / 'm'}")
    assert code == 0, err
    saved = model_dir.read(tmp_path / "m")
    assert saved.classes == CLASSES
    expected = dataclasses.replace(
        TENSORFLOW.head,
        scores="softmax",
        score_threshold=0.125,
        nms_iou=0.5,
        clip_first=False,
        max_detections=60,
    )
    assert saved.spec.head == expected
    assert saved.spec.preprocessing == Preprocessing(192, "resize(size)", (128.0,) * 3, (64.0,) * 3)
    assert (saved.spec.backbone, saved.spec.mode.bn_momentum) == (TENSORFLOW.backbone, 0.9997)
    ours = model_dir.arrays_sha256(variables_of(TENSORFLOW))
    assert sha256(tmp_path / "m") == ours


def test_the_weights_of_a_graph_alone(tmp_path):
    """The fields that no operator tells are those of the published network."""
    found = graph(extra_channels=(16, 8, 8, 8), anchor_sizes=(0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0))
    (tmp_path / "g.pb").write_bytes(found.content())
    with pytest.raises(UserError, match="map 0 has 48 channels, as 0 of the backbone's"):
        importer.load(tmp_path / "g.pb")  # that the heads are on layer7_0/expand
    detection_graph.add_operators(found, TAPS)
    (tmp_path / "g.pb").write_bytes(found.content())
    saved = importer.load(tmp_path / "g.pb").saved
    assert saved.spec.head.anchor_sizes == (0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0)
    assert saved.classes == ("0", "1")


def lite(found: GraphDef, **attributes: Any) -> None:
    layer = "BoxPredictor_1/ClassPredictor_depthwise"
    usual = {"strides": [1, 1, 1, 1], "padding": b"SAME"}
    found.node(f"{layer}/depthwise", "DepthwiseConv2dNative", TAPS[1], **usual | attributes)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda g: lite(g, strides=[1, 2, 2, 1]), r"stride 2 and padding 'SAME' at BoxPredictor_1"),
        (lambda g: lite(g, padding=b"VALID"), r"stride 1 and padding 'VALID' .* not 1 and 'SAME'"),
        (
            lambda g: g.node("BoxPredictor_0/ClassPredictor_depthwise/Relu", "Relu", "x"),
            r"has the activation Relu at BoxPredictor_0/ClassPredictor_depthwise/Relu, not Relu6",
        ),
        (
            lambda g: g.node(
                "BoxPredictor_0/ClassPredictor_depthwise/BatchNorm/FusedBatchNorm",
                "FusedBatchNorm",
                epsilon=0.01,
            ),
            r"heads whose BatchNorm has epsilon \[0.01\], not None",
        ),
        (
            lambda g: detection_graph.add_operators(g, ("FeatureExtractor/Mixed_5b/concat",)),
            r"a head on FeatureExtractor/Mixed_5b/concat, which is no map",
        ),
        (
            lambda g: g.constant("Postprocessor/Decode/truediv_2/y", np.array([10], np.float32)),
            r"has 10.0 at Postprocessor/Decode/truediv_2/y, and all networks here 5",
        ),
        (
            lambda g: g.node("Postprocessor/convert_scores", "Identity", "x"),
            r"has Identity at Postprocessor/convert_scores, not Sigmoid or Softmax",
        ),
        (
            lambda g: detection_graph.add_anchors(g, HEAD.anchor_sizes, ratio=0.25),
            r"has anchors of ratios \[.*0\.25, 1\.0\] .* on map 1, which no table here has",
        ),
    ],
)
def test_graphs_of_other_networks(change, says, tmp_path):
    found = graph()
    change(found)
    (tmp_path / "g.pb").write_bytes(found.content())
    with pytest.raises(UserError, match=says) as caught:
        importer.load(tmp_path / "g.pb")
    assert str(tmp_path / "g.pb") in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "shape"])
def test_damaged_graphs(damage, tmp_path):
    """One line names the fault."""
    content = graph().content()
    if damage == "cut":
        content = content[: len(content) // 2]
    else:
        content = content.replace(b"BoxPredictor_2/ClassPredictor/biases", b"BoxPredictor_2/x" * 2)
    (tmp_path / "g.pb").write_bytes(content)
    with pytest.raises(UserError) as caught:
        importer.load(tmp_path / "g.pb")
    assert "\n" not in str(caught.value) and str(tmp_path / "g.pb") in str(caught.value)


def test_a_file_that_lost_its_description(tmp_path, run):
    """The arrays tell the maps, the anchors' number and the classes; the sizes are assumed."""
    head = Head(num_classes=3, taps=("layer1", "last"))
    file = tmp_path / "m.safetensors"
    run(
        write(tmp_path / "m", dataclasses.replace(SPEC, head=head)),
        "--to=safetensors",
        f"--output={file}",
    )
    save_file(load_file(file), file)
    imported = importer.load(file)
    assert imported.saved.spec.head == head
    (assumed,) = (line for line in imported.warnings if "it is assumed" in line)
    assert "model.padding=torch" in assumed and "model.anchor_sizes=(0.15," in assumed


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("box_depthwise3/norm/bias"), r"missing: box_depthwise3/norm/bias"),
        (lambda t: t.pop("extra1_reduce/conv/kernel"), r"missing: extra1_reduce/conv/kernel"),
        (
            lambda t: t.update({"centerness/kernel": t["box_codes0/kernel"]}),
            r"not of this network: centerness/kernel",
        ),
        (
            lambda t: t.update({"class_logits1/kernel": t["class_logits1/kernel"][:, :, :9]}),
            r"unfit: class_logits1/kernel is float32 \(1, 1, 9, 18\), not \(1, 1, 1280, 18\)",
        ),
        (
            lambda t: t.update({"extra0_depthwise/norm/var": -t["extra0_depthwise/norm/var"]}),
            r"extra0_depthwise/norm/var, a variance, is negative",
        ),
        (
            lambda t: t.update({f"x/{n}": a for n, a in t.items() if "class" in n or "box" in n}),
            r"there are several, behind the prefixes '', 'x/'",
        ),
    ],
)
def test_heads_that_do_not_fit(change, says, run, tmp_path):
    """They are refused with every fault, and --features-only converts the backbone."""
    file = tmp_path / "m.safetensors"
    run(write(tmp_path / "m"), "--to=safetensors", f"--output={file}")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"model.json": mbv2_json(tmp_path / "m")})
    with pytest.raises(UserError, match=says) as caught:
        importer.load(file)
    assert "its head is not that of SSDLite" in str(caught.value)
    assert "--features-only converts the backbone alone" in str(caught.value)
    assert importer.load(file, features_only=True).saved.features_only


def mbv2_json(folder: pathlib.Path) -> str:
    return (folder / "model.json").read_text()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"extra_channels": (16,)}, "it has 3 maps, and its anchors are known for 6"),
        ({"taps": ("layer7", "last")}, ""),
    ],
)
def test_what_the_arrays_of_mmdet_tell(change, says, run, tmp_path):
    """The taps by their channels; other numbers of maps have anchors that nobody knows."""
    usual = {"num_classes": 5, "taps": HEAD.taps, "extra_channels": (16, 8, 8, 8)}
    head = Head(**{**usual, **change})
    maps = len(head.taps) + len(head.extra_channels)
    head = dataclasses.replace(head, anchor_sizes=Head.anchor_sizes[: maps + 1])
    run(
        write(tmp_path / "m", dataclasses.replace(SPEC, head=head)),
        "--to=mmdet",
        f"--output={tmp_path / 'm.pth'}",
    )
    if says:
        with pytest.raises(UserError, match=says):
            importer.load(tmp_path / "m.pth")
        return
    assert importer.load(tmp_path / "m.pth").saved.spec.head == head


def test_what_other_frameworks_lack(run, tmp_path):
    """The network, the table of anchors, or the scores."""
    error = refused(run(write(tmp_path / "m"), "--to=timm", f"--output={tmp_path / 'm.pth'}"))
    assert "a model for detection, which --to=timm does not write" in error
    assert "it has --to=safetensors and --to=mmdet" in error
    model = write(tmp_path / "tf", TENSORFLOW)
    error = refused(run(model, "--to=mmdet", f"--output={tmp_path / 'm.pth'}"))
    for fault in ("model.padding is same", "model.anchors is tensorflow", "model.taps is ("):
        assert fault in error
    tiny_model.write(tmp_path / "classifier")
    outcome = run(tmp_path / "classifier", "--to=mmdet", f"--output={tmp_path / 'm.pth'}")
    assert "a model for classification, which --to=mmdet does not write" in refused(outcome)


def test_mmdets_config_of_another_network():
    """The values are those that mmdet's own config would have, worked out by hand."""
    spec = dataclasses.replace(
        with_head(score_threshold=0.1, max_detections=50),
        preprocessing=Preprocessing(200, "resize(size)"),
    )
    saved = SavedModel({}, {}, Description(spec, CLASSES), pathlib.Path("m"))
    assert mmdet_config.options(saved) == {
        "model.backbone.widen_factor": 0.5,
        "model.backbone.out_indices": [0, 7],
        "model.neck.in_channels": [8, 1280],
        "model.neck.out_channels": [8, 1280, 16, 8],
        "model.neck.level_strides": [2, 2],
        "model.neck.level_paddings": [1, 1],
        "model.bbox_head.in_channels": [8, 1280, 16, 8],
        "model.bbox_head.num_classes": 2,
        # The two blocks halve the image once, in layer1's stem; maps of 100, 100, 50 and 25.
        "model.bbox_head.anchor_generator.strides": [2, 2, 4, 8],
        "model.bbox_head.anchor_generator.ratios": [[2, 3]] * 4,
        "model.bbox_head.anchor_generator.min_sizes": [20, 60, 100, 140],
        "model.bbox_head.anchor_generator.max_sizes": [60, 100, 140, 180],
        "model.test_cfg.score_thr": 0.1,
        "model.test_cfg.max_per_img": 50,
    }


def test_the_names_of_tensorflows_ids():
    """COCO's 80 classes are found among its 90 ids, each at its id less one."""
    names, _ = labels.match(classes.COCO_NAMES, classes.COCO_ID_NAMES, data="coco", model="m")
    assert len(set(names)) == len(names) == 80
    assert (names[0], names[11], names[79]) == (0, 12, 89)  # person 1, stop sign 13, toothbrush 90
    assert [name for name in classes.COCO_ID_NAMES if name.startswith("unused")] == [
        f"unused {i}" for i in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
    ]


@pytest.mark.parametrize(("count", "first", "last"), [(80, 0, 79), (90, 0, 89)])
def test_the_usual_names(count, first, last, run, tmp_path):
    """A file without names has COCO's, for so many classes."""
    head = Head(num_classes=count, taps=("layer1", "last"))
    file = tmp_path / "m.safetensors"
    run(
        write(tmp_path / "m", dataclasses.replace(SPEC, head=head)),
        "--to=mmdet",
        f"--output={file}",
    )
    save_file(load_file(file), file)
    imported = importer.load(file)
    assert (imported.saved.classes[first], imported.saved.classes[last]) == ("person", "toothbrush")
    assert any("COCO's names are used" in line for line in imported.warnings)


def test_a_detector_begins_with_a_classifiers_backbone(tmp_path):
    """All layers of it, by their names."""
    source = tiny_model.write(tmp_path / "m")
    _, variables = mbv2_jax.load(
        source,
        num_classes=3,
        task="detection",
        taps=("layer1", "last"),
        extra_channels=(16, 8, 8, 8),
    )
    theirs = model_dir.read(source).variables()
    for collection in ("params", "batch_stats"):
        for layer in ("stem", "layer1_0", "layer7_0", "last"):
            ours, expected = variables[collection][layer], theirs[collection][layer]
            assert model_dir.arrays_sha256(ours) == model_dir.arrays_sha256(expected)
    assert variables["params"]["class_logits0"]["kernel"].shape == (1, 1, 8, 6 * 4)


def test_a_detector_of_other_classes(tmp_path):
    """Only the layers of the classes' logits are new."""
    source = write(tmp_path / "m")
    _, variables = mbv2_jax.load(source, num_classes=3)
    theirs = model_dir.read(source).params
    new = {
        name
        for name, layer in variables["params"].items()
        if model_dir.arrays_sha256(layer) != model_dir.arrays_sha256(theirs[name])
    }
    assert new == {f"class_logits{i}" for i in range(4)}


@pytest.mark.parametrize(
    ("changes", "new", "says"),
    [
        ({"anchors": "tensorflow"}, ("class_logits", "box_codes"), "its table of anchors"),
        ({"anchor_sizes": (0.1, 0.2, 0.3, 0.4, 0.5)}, ("class_logits", "box_codes"), "its sizes"),
        ({"scores": "sigmoid"}, ("class_logits", "box_codes"), "its scores are others"),
        ({"nms_iou": 0.6}, (), "heads included"),
    ],
)
def test_a_detector_of_other_anchors(changes, new, says, tmp_path):
    """The heads are kept only if they were made for the same anchors and scores."""
    saved = model_dir.read(write(tmp_path / "m"))
    task = tasks.find("detection")(dataclasses.replace(HEAD, **changes), CLASSES)
    network = task.network(SPEC.backbone, SPEC.mode)
    image = jnp.zeros((1, 64, 64, 3))
    fresh = tiny_model.filled(jax.eval_shape(network.init, jax.random.key(0), image), seed=1)
    found = task.transfer(saved, fresh)
    assert says in found.note
    params = found.variables["params"]
    assert {name for name in params if params[name] is fresh["params"][name]} == {
        name for name in fresh["params"] if new and name.startswith(new)
    }
