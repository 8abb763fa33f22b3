"""Matching of a dataset's classes with a model's: by name, by WordNet id, or not at all."""

import dataclasses
import pickle

import pytest

from mbv2_jax.data import labels
from mbv2_jax.data.classes import IMAGENET_NAMES, IMAGENET_WNIDS
from mbv2_jax.errors import UserError
from tests.support.coded import CodedSource

# ImageNet's class numbers, with both cranes and the last class.
KNOWN = {"n01440764": 0, "n01484850": 2, "n02012849": 134, "n03126707": 517, "n15075141": 999}


def match(theirs, ours):
    return labels.match(theirs, ours, data="the data", model="the model")


def test_equal_lists_are_the_same_classes_without_a_note():
    assert match(["a", "b", "b"], ("a", "b", "b")) == ((0, 1, 2), "")


def test_classes_are_found_by_name_in_any_order_and_number():
    assert match(["c", "a"], ["a", "b", "c"]) == (
        (2, 0),
        "the data: 2 of the model's 3 classes, by name",
    )
    assert match(["c", "a", "b"], ["a", "b", "c"])[0] == (2, 0, 1)


def test_wordnet_ids_are_found_in_a_model_of_imagenet():
    found, how = match(list(KNOWN), IMAGENET_NAMES)
    assert found == tuple(KNOWN.values())
    assert how == "the data: 5 of ImageNet's 1000 classes, by WordNet id"
    found, how = match(IMAGENET_WNIDS, IMAGENET_NAMES)
    assert found == tuple(range(1000))
    assert how == "the data: 1000 of ImageNet's 1000 classes, by WordNet id"


def test_background_class_of_the_model_moves_the_others():
    found, _ = match(list(KNOWN), ("background", *IMAGENET_NAMES))
    assert found == tuple(index + 1 for index in KNOWN.values())
    with pytest.raises(UserError, match="the model has no class 'background'"):
        match(("background", *IMAGENET_NAMES), IMAGENET_WNIDS)


def test_wordnet_ids_mean_nothing_to_another_model_of_a_thousand_classes():
    numbers = [str(i) for i in range(1000)]
    with pytest.raises(UserError, match="the model has 1000 classes, the data 5: class 0 is '0'"):
        match(list(KNOWN), numbers)


@pytest.mark.parametrize("others", [["n01440764"], [], ["tench, Tinca tinca"]])
def test_wordnet_id_that_is_not_imagenets_is_refused_by_name(others):
    with pytest.raises(UserError, match="the model has no class 'n00000001'"):
        match([*others, "n00000001"], IMAGENET_NAMES)


def test_a_thousand_other_wordnet_ids_are_not_taken_for_imagenets():
    ids = [f"n{i:08}" for i in range(1000)]
    with pytest.raises(UserError, match=r"no class 'n00000000'.* nor 999 more"):
        match(ids, IMAGENET_NAMES)
    # Nor by their order if all but one are ImageNet's.
    with pytest.raises(UserError, match="no class 'n99999999'"):
        match([*IMAGENET_WNIDS[:-1], "n99999999"], IMAGENET_NAMES)


def test_class_that_the_model_lacks_is_refused_by_name():
    with pytest.raises(UserError, match=r"the model has no class 'daisies'.*did you mean 'daisy'"):
        match(["daisies", "tulip"], ["daisy", "tulip"])
    with pytest.raises(UserError, match=r"the model has no class 'd', .*, nor 1 more of them"):
        match(["a", "d", "e"], ["a", "b", "c"])


def test_name_of_two_classes_is_not_matched():
    for theirs, ours in (
        (["crane", "tench"], ["crane", "tench", "crane"]),
        (["crane"], ["crane", "tench", "crane"]),
        (["crane", "crane"], ["crane", "tench"]),
        (["crane", "hen"], ["crane", "crane"]),
    ):
        with pytest.raises(UserError, match="'crane' names more than one class"):
            match(theirs, ours)


def test_equally_many_other_names_are_matched_by_their_order():
    found, how = match(["n1", "n2"], ["cat", "dog"])
    assert found == (0, 1)
    assert how == (
        "class 0 is 'cat' in the model and 'n1' in the data; no name is shared: taken as the same "
        "classes in the same order"
    )
    with pytest.raises(UserError, match="the model has 2 classes, the data 3"):
        match(["n1", "n2", "n3"], ["cat", "dog"])


def test_numbers_are_the_models_indices():
    folders = sorted(map(str, range(1000)))
    assert folders[2] == "10"  # as folders are listed
    found, how = match(folders, IMAGENET_NAMES)
    assert [str(index) for index in found] == folders
    assert how == "the data: 1000 of the model's 1000 classes, by number"
    assert match(["001", "002", "010"], IMAGENET_NAMES)[0] == (1, 2, 10)
    assert match(["1", "0"], ["cat", "dog"])[0] == (1, 0)


def test_numbers_that_are_names_of_the_model_are_names():
    trained_on = sorted(map(str, range(12)))  # '0', '1', '10', '11', '2', ...
    assert match(trained_on, trained_on) == (tuple(range(12)), "")
    found, how = match(["2", "10"], trained_on)
    assert (found, how) == ((4, 2), "the data: 2 of the model's 12 classes, by name")
    with pytest.raises(UserError, match="the model has no class '12'"):
        match(["2", "12"], [*trained_on, "cat"])


def test_numbers_that_cannot_be_indices_are_refused():
    with pytest.raises(UserError, match="the model has the classes 0 to 1, and the data one named"):
        match(["1", "2"], ["cat", "dog"])
    with pytest.raises(UserError, match="and the data one named '1000'"):
        match([str(i) for i in range(1, 1001)], IMAGENET_NAMES)


def test_names_like_numbers_are_not_taken_for_numbers():
    for names in (["1", "01"], ["0", "-1"], ["0", "1.0"], ["0", "²"]):
        assert "no name is shared" in match(names, ["cat", "dog"])[1]


def test_the_same_classes_are_the_same_whatever_imagenets_are_called():
    assert labels.same(["cat", "dog"], ("cat", "dog"))
    assert not labels.same(["dog", "cat"], ["cat", "dog"])
    assert not labels.same(["cat"], ["cat", "dog"])
    assert labels.same(IMAGENET_WNIDS, IMAGENET_NAMES)
    assert not labels.same(IMAGENET_WNIDS, ["background", *IMAGENET_NAMES])
    assert not labels.same(IMAGENET_WNIDS[:10], IMAGENET_NAMES[:10])


def test_relabelled_split_changes_nothing_but_labels():
    source = CodedSource(20)
    ours = labels.Relabelled(source, tuple(10 * i for i in range(10)), tuple("abc"))
    ours = pickle.loads(pickle.dumps(ours))  # it is sent to worker processes
    assert len(ours) == 20
    assert ours.class_names == ("a", "b", "c")
    assert ours.parts == source.parts
    for i in (0, 13):
        sample = source[i]
        assert ours[i] == dataclasses.replace(
            sample, targets={"label": 10 * sample.targets["label"]}
        )
        assert ours.describe(i) == source.describe(i)


def test_missing_label_stays_missing():
    class Unlabelled(CodedSource):
        def __getitem__(self, index):
            return dataclasses.replace(super().__getitem__(index), targets={"label": -1})

    assert labels.Relabelled(Unlabelled(1), (5,), tuple("abcdef"))[0].targets["label"] == -1


def test_data_without_labels_is_left_to_the_task_to_refuse():
    class Masked(CodedSource):
        def __getitem__(self, index):
            return dataclasses.replace(super().__getitem__(index), targets={"mask": None})

    assert labels.Relabelled(Masked(1), (5,), tuple("abcdef"))[0].targets == {"mask": None}


def test_a_class_is_found_by_name_number_id_and_synonym():
    names = ("cat", "7", "dog, hound")
    found = [labels.find(name, names) for name in ("cat", "7", "2", "dog", "dog, hound")]
    assert found == [0, 1, 2, 2, 2]
    wnid = IMAGENET_WNIDS[0]
    assert labels.find(wnid, IMAGENET_NAMES) == labels.find("tench", IMAGENET_NAMES) == 0
    assert labels.find(wnid, ("background", *IMAGENET_NAMES)) == 1


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("crane", ["'crane' names 2 classes", "134 or 517"]),
        ("tensh", ["'tensh'", "did you mean 'tench'"]),
        ("1000", ["'1000'", "0 to 999"]),
    ],
)
def test_a_class_that_is_none_or_several_is_refused(name, parts):
    with pytest.raises(UserError) as error:
        labels.find(name, IMAGENET_NAMES)
    for part in parts:
        assert part in str(error.value)
