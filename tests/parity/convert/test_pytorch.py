"""Files of torch, timm and mmcls are read as they are, and nothing in them is executed."""

import argparse
import collections
import hashlib
import os
import pathlib
import pickle
import sys
import tracemalloc
import types
import zipfile
from typing import Any

import pytest
import torch

from mbv2_jax.convert import readers
from mbv2_jax.convert.readers.contents import Dense
from mbv2_jax.errors import UserError
from tests.support import peers
from tests.support.weight_files import assert_is, flipped, forbidden, refusal

ZIP = pytest.param({}, id="zip")
LEGACY = pytest.param({"_use_new_zipfile_serialization": False}, id="legacy")


def other(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns weights of the same names and other values."""
    return {name: tensor + 1 for name, tensor in net.state_dict().items()}


# Plain weights


@pytest.mark.parametrize("how", [ZIP, LEGACY])
def test_files_of_torch_save(how, net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "net.bin", **how)
    file = readers.read(tmp_path / "net.bin")
    assert_is(file.tensors, net.state_dict())
    assert (file.container, file.contents.selection, file.contents.class_names) == ("torch", "", ())
    assert file.sha256 == hashlib.sha256((tmp_path / "net.bin").read_bytes()).hexdigest()


@pytest.mark.parametrize("how", [ZIP, LEGACY])
def test_types_and_views(how, tmp_path):
    values = torch.arange(24.0).reshape(2, 3, 4) / 7
    weights = {
        "double": values.double(),
        "half": values.half(),
        "bfloat16": values.bfloat16(),
        "int": torch.tensor(3),
        "transposed": values.transpose(0, 2),
        "slice": values[1, ::2],
        "expanded": torch.tensor([1.5]).expand(5),
        "parameter": torch.nn.Parameter(values),
    }
    torch.save(weights, tmp_path / "net.pth", **how)
    expected = weights | {"half": weights["half"].float(), "bfloat16": weights["bfloat16"].float()}
    assert_is(readers.read(tmp_path / "net.pth").tensors, expected)


def test_mmpretrains_file(check_data):
    path = check_data / "weights" / "mm_mobilenet_v2.pth"
    file = readers.read(path)
    saved = torch.load(path, weights_only=True)
    assert len(file.tensors) == 314
    assert_is(file.tensors, saved["state_dict"])
    assert file.contents.class_names == tuple(saved["meta"]["CLASSES"])
    assert len(file.contents.class_names) == 1000


@pytest.mark.parametrize(
    "meta",
    [
        pytest.param({"CLASSES": ["cat", "dog"], "mmcls_version": "0.6.0"}, id="mmcls 0.x"),
        pytest.param({"dataset_meta": {"classes": ("cat", "dog")}, "epoch": 3}, id="mmpretrain"),
    ],
)
def test_class_names(meta, net, tmp_path):
    torch.save({"meta": meta, "state_dict": net.state_dict()}, tmp_path / "net.pth")
    assert readers.read(tmp_path / "net.pth").contents.class_names == ("cat", "dog")


@pytest.mark.parametrize("meta", [{"CLASSES": None}, {"dataset_meta": {"classes": [1, 2]}}, None])
def test_no_class_names(meta, net, tmp_path):
    torch.save({"meta": meta, "state_dict": net.state_dict()}, tmp_path / "net.pth")
    assert readers.read(tmp_path / "net.pth").contents.class_names == ()


# Wrappers


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "net", "generator"])
def test_wrapped(key, net, tmp_path):
    torch.save({"epoch": 3, key: net.state_dict(), "optimizer": {"state": {}}}, tmp_path / "a.pth")
    file = readers.read(tmp_path / "a.pth")
    assert_is(file.tensors, net.state_dict())
    assert file.contents.selection == key


@pytest.mark.parametrize(
    "wrap",
    [
        torch.nn.DataParallel,
        torch.compile,
        lambda net: torch.nn.DataParallel(torch.compile(net)),
        lambda net: torch.compile(torch.nn.DataParallel(torch.nn.DataParallel(net))),
    ],
    ids=["DataParallel", "compile", "DataParallel of compile", "compile of DataParallel, twice"],
)
def test_prefixes_of_wrapping_modules(wrap, net, tmp_path):
    wrapped = wrap(net).state_dict()
    assert list(wrapped) != list(net.state_dict())
    torch.save(wrapped, tmp_path / "net.pth")
    assert_is(readers.read(tmp_path / "net.pth").tensors, net.state_dict())


def test_a_name_with_and_without_prefix(net, tmp_path):
    weights = net.state_dict()
    torch.save({**weights, "module.1.bias": weights["1.bias"]}, tmp_path / "net.pth")
    assert "1.bias" in refusal(tmp_path / "net.pth")


def test_torchvisions_training_checkpoint(net, tmp_path):
    # references/classification/train.py writes this; its ExponentialMovingAverage is this class.
    averaged = torch.optim.swa_utils.AveragedModel(net)
    averaged.module.load_state_dict(other(net))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    checkpoint = {
        "model": net.state_dict(),
        "model_ema": averaged.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3]).state_dict(),
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1, device=torch.device("cpu")),
    }
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    for ema, weights, expected in (
        (None, "model_ema (averaged: EMA)", other(net)),
        (True, "model_ema (averaged: EMA)", other(net)),
        (False, "model (not the averaged ones)", net.state_dict()),
    ):
        file = readers.read(tmp_path / "checkpoint.pth", ema=ema)
        assert file.contents.selection == weights
        assert_is(file.tensors, expected)


def test_timms_training_checkpoint(net, tmp_path):
    peers.torchvision()  # timm imports it
    from timm.models import load_state_dict
    from timm.utils import CheckpointSaver, ModelEmaV3

    averaged = ModelEmaV3(net)
    averaged.module.load_state_dict(other(net))
    saver = CheckpointSaver(
        net,
        torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
        args=argparse.Namespace(model="mobilenetv2_100", lr=0.1),
        model_ema=averaged,
        checkpoint_dir=str(tmp_path),
    )
    saver.save_checkpoint(0, metric=12.5)
    path = tmp_path / "last.pth.tar"
    assert_is(readers.read(path).tensors, load_state_dict(str(path)))
    assert_is(readers.read(path).tensors, other(net))
    assert_is(readers.read(path, ema=True).tensors, load_state_dict(str(path), use_ema=True))
    assert_is(readers.read(path, ema=False).tensors, load_state_dict(str(path), use_ema=False))


def test_weights_that_are_not_there(net, tmp_path):
    weights = net.state_dict()
    path = tmp_path / "a.pth"
    torch.save(weights, path)
    assert "one set of weights" in refusal(path, ema=True)
    assert_is(readers.read(path, ema=False).tensors, weights)
    torch.save({"model": weights}, path)
    assert "only 'model'" in refusal(path, ema=True)
    torch.save({"model_ema": weights}, path)
    assert "only 'model_ema'" in refusal(path, ema=False)
    torch.save({"model": {"width": 1.0}, "weights": weights}, path)
    assert_is(readers.read(path).tensors, weights)
    torch.save({"model": weights, "net": weights}, path)
    assert "several sets of weights: 'model', 'net'" in refusal(path)
    torch.save({"epoch": 3, "generator": weights, "critic": weights}, path)
    assert "several sets of weights: 'generator', 'critic'" in refusal(path)
    torch.save({"epoch": 3, "generator": {"lr": 0.1}}, path)
    assert "it holds 'epoch', 'generator'" in refusal(path)
    torch.save({"state_dict": {}}, path)
    assert "holds no weights" in refusal(path)
    torch.save(list(weights.values()), path)
    assert "a list" in refusal(path)


# Code


class Call:
    """An object that pickles as a call of a function: unpickling it runs the call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call

    def __call__(self):
        """Makes the result of the call look like a function to pickle."""


def side_effects(file: pathlib.Path) -> dict[str, object]:
    """Returns objects that create `file` when unpickled, by the name that a refusal has to give."""
    code = f"open({str(file)!r}, 'w')"
    from mmengine.logging import HistoryBuffer

    # This has the form of mmengine's files, which name HistoryBuffer and `getattr` its methods.
    method = Call(getattr, HistoryBuffer, "mean")
    names = Call(getattr, method, "__globals__")
    get = Call(getattr, names, "__getitem__")
    builtin = Call(get, "__builtins__")
    run = Call(Call(getattr, builtin, "__getitem__"), "exec")
    return {
        "posix.system": Call(os.system, f"touch {file}"),
        "builtins.eval": Call(eval, code),
        "builtins.exec": Call(exec, code),
        "builtins.getattr": Call(run, code),
    }


@pytest.mark.parametrize("how", [ZIP, LEGACY])
@pytest.mark.parametrize(
    "name", ["posix.system", "builtins.eval", "builtins.exec", "builtins.getattr"]
)
def test_code_is_not_run(name, how, net, tmp_path):
    made = tmp_path / "made"
    path = tmp_path / "net.pth"
    torch.save({"state_dict": net.state_dict(), "hub": side_effects(made)[name]}, path, **how)
    torch.load(path, weights_only=False)
    assert made.exists()  # armed
    made.unlink()
    assert name in refusal(path)
    assert not made.exists()


def test_code_that_pickle_itself_would_run_is_not_run(tmp_path):
    """The first bytes of a legacy file are a pickle of their own."""
    made = tmp_path / "made"
    for protocol in (2, 4):
        path = tmp_path / f"{protocol}.pth"
        path.write_bytes(pickle.dumps(Call(os.system, f"touch {made}"), protocol))
        assert "not one of torch.save" in refusal(path)
        assert not made.exists()


@pytest.mark.parametrize("how", [ZIP, LEGACY])
def test_objects_of_unknown_libraries_are_passed_over(how, net, tmp_path):
    """Training programs write their own options and logs beside the weights."""
    options = type("Options", (dict,), {"__module__": "a_library"})
    library: Any = types.ModuleType("a_library")
    library.Options, library.make = options, lambda: 3
    library.make.__module__, library.make.__qualname__ = "a_library", "make"
    extra = {"options": options(lr=0.1), "made": Call(library.make), "path": pathlib.Path("a")}
    sys.modules["a_library"] = library
    try:
        torch.save({"state_dict": net.state_dict(), **extra}, tmp_path / "net.pth", **how)
    finally:
        del sys.modules["a_library"]
    assert_is(readers.read(tmp_path / "net.pth").tensors, net.state_dict())
    assert "a_library" not in sys.modules


# Whole models


@pytest.mark.parametrize("how", [ZIP, LEGACY])
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"epoch": 3, "model": m}], ids=["", "in"])
def test_whole_models(wrap, how, tmp_path):
    model = peers.torchvision().models.mobilenet_v2(width_mult=0.1)
    peers.randomize(model, seed=1)
    model.register_buffer("transient", torch.ones(2), persistent=False)
    torch.save(wrap(model), tmp_path / "net.pth", **how)
    with forbidden("torch", "torchvision"):
        contents = readers.read(tmp_path / "net.pth").contents
    assert_is(contents.tensors, model.state_dict())
    assert contents.head == (Dense("classifier.1", "linear"),)
    assert contents.obstacles == ()


def test_two_whole_models_of_which_one_is_averaged(tmp_path):
    """YOLO's training programs write such files."""
    models = [peers.torchvision().models.mobilenet_v2(width_mult=0.1) for _ in range(2)]
    torch.save({"model": models[0], "ema": models[1], "updates": 3}, tmp_path / "last.pt")
    for ema, selection, model in (
        (None, "ema (averaged: EMA)", models[1]),
        (False, "model (not the averaged ones)", models[0]),
    ):
        contents = readers.read(tmp_path / "last.pt", ema=ema).contents
        assert contents.selection == selection
        assert_is(contents.tensors, model.state_dict())


def test_a_whole_model_shows_its_activations(tmp_path):
    model = peers.torchvision().models.mobilenet_v2(width_mult=0.1)
    model.classifier = torch.nn.Sequential(
        torch.nn.Linear(1280, 8), torch.nn.ReLU(), torch.nn.Dropout(), torch.nn.Linear(8, 3)
    )
    torch.save(model, tmp_path / "relu.pth")
    contents = readers.read(tmp_path / "relu.pth").contents
    assert contents.head == (Dense("classifier.0", "relu"), Dense("classifier.3", "linear"))
    model.classifier[1] = torch.nn.Tanh()
    model.features[3].conv[0][2] = torch.nn.Hardswish()
    torch.save(model, tmp_path / "tanh.pth")
    obstacles = readers.read(tmp_path / "tanh.pth").contents.obstacles
    assert obstacles == (
        "Hardswish (features.3.conv.0.2)",
        "Tanh (classifier.1)",
    )


def test_modules_inside_one_another_without_end_are_refused(tmp_path):
    net = torch.nn.Module()
    net._modules["again"] = net
    torch.save(net, tmp_path / "net.pth")
    assert "without end" in refusal(tmp_path / "net.pth")


@pytest.mark.parametrize("levels", [10, 40])
def test_modules_that_share_theirs_do_not_multiply(levels, tmp_path):
    """Each level holds the one below twice: 2**levels modules in a file of a few kilobytes."""
    net = torch.nn.Linear(2, 2)
    for _ in range(levels):
        net = torch.nn.Sequential(net, net)
    torch.save(net, tmp_path / "net.pth")
    if levels == 10:
        assert_is(readers.read(tmp_path / "net.pth").tensors, net.state_dict())
    else:
        assert "more than" in refusal(tmp_path / "net.pth")


def test_long_names_do_not_multiply(tmp_path):
    """A name of 1 MB in a module that stands in 5,000 places would take 5 GB."""
    shared = torch.nn.Module()
    shared.register_buffer("a" * 1_000_000, torch.zeros(1))
    torch.save(torch.nn.ModuleList([shared] * 5_000), tmp_path / "net.pth")
    tracemalloc.start()
    refusal(tmp_path / "net.pth")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 100 << 20


def test_half_precision_that_tensors_share_does_not_multiply(tmp_path):
    """Each becomes float32: here 1 GB, from a file of 32 MB."""
    numbers = torch.zeros(16 << 20, dtype=torch.half)
    torch.save({str(i): numbers[i:] for i in range(16)}, tmp_path / "net.pth")
    assert "its arrays 268,435,336 numbers" in refusal(tmp_path / "net.pth")


def test_the_advice_on_torchscript_works(net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.jit.trace(net.eval(), torch.zeros(1, 3, 8, 8)).save("net.pt")
    line = refusal(pathlib.Path("net.pt"))
    advice = line[line.index("torch.save(") : line.index(", and convert")]
    exec(advice)
    assert_is(readers.read("weights.pth").tensors, net.state_dict())


# Values that are not weights


@pytest.mark.filterwarnings("ignore:.*deprecated:UserWarning:")  # torch's, at quantizing
def test_every_value_that_is_not_a_weight_is_named(net, tmp_path):
    weights = dict(net.state_dict())
    weights |= {
        "lr": 0.1,
        "blocks": {"a": torch.ones(2)},
        "sparse": torch.eye(3).to_sparse(),
        "int8": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "phase": torch.ones(2, dtype=torch.complex64),
    }
    torch.save(weights, tmp_path / "net.pth")
    line = refusal(tmp_path / "net.pth")
    for fault in (
        "lr is a float, not a tensor",
        "blocks is a dict, not a tensor",
        "sparse is a sparse tensor",
        "int8 is a quantized tensor",
        "phase is a tensor of complex numbers",
    ):
        assert fault in line


FLOAT = torch.FloatStorage
STORAGE = ("storage", FLOAT, "0", "cpu", 10)
HANGING = {
    "size": lambda shared: call(STORAGE, (shared, shared), (1, 1)),
    "stride": lambda shared: call(STORAGE, (1,), (shared,)),
    "key": lambda shared: call(("storage", FLOAT, shared, "cpu", 10), (1,), (1,)),
    "count": lambda shared: call(("storage", FLOAT, "0", "cpu", shared), (0,), (1,)),
}


def call(storage: Any, size: Any, stride: Any) -> Any:
    return Call(torch._utils._rebuild_tensor_v2, Persistent(storage), 0, size, stride, False, {})


class Persistent:
    """An object whose persistent id is anything."""

    def __init__(self, identity: Any):
        self.identity = identity


class Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.identity if isinstance(obj, Persistent) else None


@pytest.mark.parametrize("fault", HANGING)
def test_values_that_contain_one_another_do_not_hang(fault, tmp_path):
    """Refuses a tuple of a few bytes that takes 2**60 steps as text or as a key of a dict."""
    shared: Any = ()
    for _ in range(60):
        shared = (shared, shared)
    hostile = HANGING[fault](shared)
    with zipfile.ZipFile(tmp_path / "net.pth", "w") as archive:
        with archive.open("net/data.pkl", "w") as file:
            Pickler(file, 2).dump({"a": hostile})
        archive.writestr("net/data/0", bytes(40))
    assert "damaged" in refusal(tmp_path / "net.pth")


def test_a_name_that_is_no_text_does_not_hang(tmp_path):
    shared = b"N" + b"q\1h\1\x86" * 60
    with zipfile.ZipFile(tmp_path / "net.pth", "w") as archive:
        archive.writestr("net/data.pkl", b"\x80\4" + shared + shared + b"\x93.")
    assert "a name that is no text" in refusal(tmp_path / "net.pth")


def test_the_product_of_large_sizes_is_not_taken(tmp_path):
    """Python multiplies integers of any length, however long that takes."""
    storage = b"((X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0X\3\0\0\0cpuK\ntQK\0"
    large = b"\x8b" + (1_000_000).to_bytes(4, "little") + b"\x7f" * 1_000_000 + b"q\1"
    size = b"(" + large + b"h\1" * 30 + b"t(" + b"K\1" * 31 + b"t"
    body = b"ctorch._utils\n_rebuild_tensor_v2\n" + storage + size + b"\x89}tR"
    with zipfile.ZipFile(tmp_path / "net.pth", "w") as archive:
        archive.writestr("net/data.pkl", b"\x80\2" + body + b".")
    assert "impossible" in refusal(tmp_path / "net.pth")


def test_a_set_that_is_made_often_takes_no_memory(tmp_path):
    pickled = b"\x80\2(" + b"N" * 200_000 + b"lq\1cbuiltins\nset\nq\2" + b"h\2h\1\x85R" * 100_000
    with zipfile.ZipFile(tmp_path / "net.pth", "w") as archive:
        archive.writestr("net/data.pkl", pickled + b".")
    tracemalloc.start()
    refusal(tmp_path / "net.pth")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 100 << 20  # copies would take 160 GB


def test_python_2_wrote_the_items_of_a_dict_into_the_call(net, tmp_path):
    items = [[name, tensor] for name, tensor in net.state_dict().items()]
    torch.save(Call(collections.OrderedDict, items), tmp_path / "net.pth")
    loaded = torch.load(tmp_path / "net.pth", weights_only=False)
    assert_is(readers.read(tmp_path / "net.pth").tensors, loaded)


def test_a_model_of_the_users_own_program_is_read(tmp_path, monkeypatch):
    """Its class is in `__main__`, where a script defines it."""
    model = type("Net", (torch.nn.Linear,), {"__module__": "__main__"})(2, 3)
    monkeypatch.setattr(sys.modules["__main__"], "Net", type(model), raising=False)
    torch.save(model, tmp_path / "net.pth")
    assert_is(readers.read(tmp_path / "net.pth").tensors, model.state_dict())


def test_tensors_without_data(tmp_path):
    torch.save({"a": torch.ones(2, device="meta")}, tmp_path / "net.pth")
    assert "a is a tensor without data" in refusal(tmp_path / "net.pth")


# Damage


@pytest.mark.parametrize("how", [ZIP, LEGACY])
def test_cut_off(how, net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "net.pth", **how)
    whole = (tmp_path / "net.pth").read_bytes()
    for length in [0, 1, 10, *range(40, len(whole), len(whole) // 40), len(whole) - 1]:
        (tmp_path / "cut.pth").write_bytes(whole[:length])
        refusal(tmp_path / "cut.pth")


def test_a_flipped_bit_in_a_zip_is_noticed(net, tmp_path):
    """This includes the numbers, where torch.load itself does not notice."""
    torch.save(net.state_dict(), tmp_path / "net.pth")
    path = tmp_path / "flipped.pth"
    refused = 0
    for content in flipped((tmp_path / "net.pth").read_bytes(), tries=300):
        path.write_bytes(content)
        try:
            assert_is(readers.read(path).tensors, net.state_dict())  # in the padding, or a date
        except UserError:
            refused += 1
    assert refused > 50


def test_numbers_that_torch_would_leave_out_are_noticed(net, tmp_path):
    """torch treats a member with this bit as a folder, and leaves the memory uninitialised."""
    torch.save(net.state_dict(), tmp_path / "net.pth")
    content = bytearray((tmp_path / "net.pth").read_bytes())
    entry = content.rindex(b"net/data/0") - 46  # in the central directory
    assert content[entry : entry + 4] == b"PK\1\2"
    content[entry + 38] |= 0x10  # external attributes: the folder bit of MS-DOS
    (tmp_path / "net.pth").write_bytes(content)
    assert "net/data/0" in refusal(tmp_path / "net.pth")


def test_a_zip_without_checksums_is_read(net, tmp_path):
    """Users of torch can switch the checksums off."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(net.state_dict(), tmp_path / "net.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert zipfile.ZipFile(tmp_path / "net.pth").infolist()[0].CRC == 0
    assert_is(readers.read(tmp_path / "net.pth").tensors, net.state_dict())
