"""Pictures and boxes as mmdetection's datasets and pycocotools read the same files."""

import tarfile

import numpy as np
import pytest
from pycocotools.coco import COCO

from tests.support import peers
from tests.support.boxed import annotation, opened, voc_object, write_coco, write_voc


@pytest.fixture(scope="module")
def mmdet():
    peers.mmdet()
    import mmdet.datasets

    return mmdet.datasets


def unpacked(folder, name: str, tmp_path_factory):
    """Returns a folder with the files of an archive."""
    target = tmp_path_factory.mktemp(name)
    with tarfile.open(folder / "data" / f"{name}.tar") as archive:
        archive.extractall(target, filter="data")
    return target


def assert_same_objects(source, data_list: list[dict], flag: str) -> None:
    """Compares the objects that are trained on; `flag` is ours of those that mmdet ignores."""
    assert [source.describe(i) for i in range(len(source))] == [d["img_path"] for d in data_list]
    objects = 0
    for index, expected in enumerate(data_list):
        boxes, found = source[index].targets["boxes"], expected["instances"]
        corners = np.array([each["bbox"] for each in found], np.float32).reshape(-1, 4)
        np.testing.assert_array_equal(boxes.corners, corners)
        assert boxes.labels.tolist() == [each["bbox_label"] for each in found]
        assert getattr(boxes, flag).tolist() == [each["ignore_flag"] for each in found]
        assert source.image_id(index) == expected["img_id"]
        objects += len(found)
    assert objects


def coco_dataset(mmdet, file, images) -> list[dict]:
    prefix = {"img": f"{images}/"}
    dataset = mmdet.CocoDataset(ann_file=str(file), data_prefix=prefix, serialize_data=False)
    return dataset.data_list


def test_coco(mmdet, check_data, tmp_path_factory):
    folder = unpacked(check_data, "coco_mini", tmp_path_factory) / "coco_mini"
    for split in ("train2017", "val2017"):
        source = opened(f"coco:{folder}", split)
        assert source.class_names == mmdet.CocoDataset.METAINFO["classes"]
        file = folder / "annotations" / f"instances_{split}.json"
        assert_same_objects(source, coco_dataset(mmdet, file, folder / split), "crowd")
        peer = COCO(file)
        assert list(source.category_ids) == peer.getCatIds()
        for index in range(len(source)):
            expected = peer.loadAnns(peer.getAnnIds(imgIds=[source.image_id(index)]))
            boxes = source.boxes(index)
            assert boxes.area.tolist() == [each["area"] for each in expected]
            assert boxes.crowd.tolist() == [each["iscrowd"] for each in expected]


def test_bad_objects_of_coco(mmdet, tmp_path, monkeypatch):
    """Each of the reasons for which mmdetection leaves an object out."""
    rng = np.random.default_rng(0)
    found = [
        annotation(number, 1 + number % 3, 1, *rng.choice([-5, 0, 0.5, 3, 38, 40, 50], 4).tolist())
        for number in range(300)
    ]
    for each in found[::7]:
        each["ignore"] = 1
    for each in found[::5]:
        each["iscrowd"] = 1
    images = {number: f"{number}.jpg" for number in (2, 3, 1)}
    file = tmp_path / "annotations/instances_train.json"
    write_coco(file, tmp_path / "train", images, found, {1: "cat"})
    monkeypatch.setitem(mmdet.CocoDataset.METAINFO, "classes", ("cat",))
    expected = coco_dataset(mmdet, file, tmp_path / "train")
    assert_same_objects(opened(f"coco:{tmp_path}"), expected, "crowd")


def voc_dataset(mmdet, root, split: str, class_names) -> list[dict]:
    dataset = mmdet.XMLDataset(
        data_root=str(root),
        ann_file=f"ImageSets/Main/{split}.txt",
        data_prefix={"sub_data_root": f"{root}/"},
        metainfo={"classes": class_names},
        serialize_data=False,
    )
    for each in dataset.data_list:
        each["img_path"] = f"{root}/JPEGImages/{each['img_id']}.jpg"
    return dataset.data_list


def test_voc(mmdet, check_data, tmp_path_factory):
    """mmdetection trains on two boxes without area, too, of which the targets are not finite."""
    root = unpacked(check_data, "bccd", tmp_path_factory) / "BCCD" / "BCCD"
    for split, bad in (("train", 1), ("val", 1), ("test", 0)):
        source = opened(f"voc:{root}", split)
        expected = voc_dataset(mmdet, root, split, source.class_names)
        left_out = 0
        for each in expected:
            kept = [o for o in each["instances"] if o["bbox"][0] < o["bbox"][2]]
            left_out += len(each["instances"]) - len(kept)
            each["instances"] = kept
        assert left_out == bad
        assert_same_objects(source, expected, "difficult")


def test_coordinates_of_voc(mmdet, tmp_path):
    objects = [
        voc_object("dog", 1, 2, 11, 22, difficult=1),
        voc_object("dog", 1.9, "2.5", 11.2, 22.99),
        voc_object("dog", 0, -3, 45, 36, difficult=0),
    ]
    write_voc(tmp_path, "train", {"a": objects})
    source = opened(f"voc:{tmp_path}")
    expected = voc_dataset(mmdet, tmp_path, "train", source.class_names)
    assert_same_objects(source, expected, "difficult")
