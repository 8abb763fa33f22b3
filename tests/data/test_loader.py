"""Order, epochs, shards and padding of batches that are made in this process."""

import contextlib
import dataclasses
import itertools
import re

import numpy as np
import pytest

from mbv2_jax.data.loader import eval_batches, steps_per_epoch, train_batches
from mbv2_jax.data.sample import ArraySpec, Boxes
from mbv2_jax.data.transforms.pipeline import make_transform
from mbv2_jax.errors import UnreadableImage, UserError
from tests.support.coded import CodedSource, LabelCollator, indices

COLLATOR = LabelCollator()
PLAIN = make_transform("resize(size)", 8)
# Two epochs of 16 examples with seed 7, from the first release.
ORDER = [
    6,
    2,
    7,
    1,
    9,
    11,
    13,
    4,
    14,
    15,
    3,
    8,
    5,
    12,
    10,
    0,
    6,
    3,
    7,
    9,
    10,
    11,
    5,
    14,
    8,
    1,
    15,
    12,
    0,
    4,
    13,
    2,
]

RANDOM = make_transform("random_crop(size, padding=4)|random_flip(0.5)", 8)


def train(source, start, stop, *, transform=PLAIN, seed=7, batch_size=8, **options):
    with contextlib.closing(
        train_batches(
            source,
            transform,
            COLLATOR,
            batch_size=batch_size,
            seed=seed,
            start=start,
            stop=stop,
            workers=0,
            **options,
        )
    ) as batches:
        return list(batches)


def evaluate(source, batch_size, **options):
    with contextlib.closing(
        eval_batches(source, PLAIN, COLLATOR, batch_size=batch_size, workers=0, **options)
    ) as batches:
        return list(batches)


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def epoch_of(batches):
    return list(itertools.chain.from_iterable(indices(batch) for batch in batches))


def test_steps_of_an_epoch():
    # ImageNet's training split in batches of 8 x 32: the page's log counts 5,005.
    assert steps_per_epoch(1_281_167, 256, "fill") == 5005
    assert steps_per_epoch(1_281_167, 256, "drop") == 5004
    assert steps_per_epoch(512, 256, "fill") == steps_per_epoch(512, 256, "drop") == 2
    assert steps_per_epoch(100, 256, "fill") == 1


def test_batches_have_the_promised_types():
    (batch,) = train(CodedSource(20), 0, 1)
    assert batch.keys() == {"image", "label"}
    assert (batch["image"].shape, batch["image"].dtype) == ((8, 8, 8, 3), np.uint8)
    assert (batch["label"].shape, batch["label"].dtype) == ((8,), np.int32)
    np.testing.assert_array_equal(batch["label"], [i % 10 for i in indices(batch)])


class BoxCollator:
    """Collates the centres of at most 2 boxes, and no labels."""

    def batch_spec(self, size):
        height, width = size
        return {
            "image": ArraySpec((height, width, 3), np.uint8),
            "centres": ArraySpec((2, 2), np.float32),
            "count": ArraySpec((), np.int64),
        }

    def collate(self, samples):
        centres = np.zeros((len(samples), 2, 2), np.float32)
        for row, sample in enumerate(samples):
            corners = sample.targets["boxes"].corners
            centres[row, : len(corners)] = (corners[:, :2] + corners[:, 2:]) / 2
        counts = [len(sample.targets["boxes"]) for sample in samples]
        images = np.stack([sample.image for sample in samples])
        return {"image": images, "centres": centres, "count": np.array(counts)}


class BoxSource(CodedSource):
    """Example i has i % 3 boxes."""

    def __getitem__(self, index):
        corners = np.array([[0, 0, 4, 2], [2, 2, 8, 8]], np.float32)[: index % 3]
        none = np.zeros(len(corners))
        boxes = Boxes(corners, none.astype(np.int32), none > 0, none > 0, none.astype(np.float32))
        return dataclasses.replace(super().__getitem__(index), targets={"boxes": boxes})


def test_the_collator_decides_the_arrays_of_a_batch():
    transform = make_transform("resize((16, 4))", 1)  # twice as high, half as wide
    with contextlib.closing(
        eval_batches(BoxSource(5), transform, BoxCollator(), batch_size=4, workers=0)
    ) as batches:
        first, last = batches
    assert first.keys() == last.keys() == {"image", "centres", "count", "index", "mask"}
    assert first["image"].shape == (4, 16, 4, 3)
    assert (first["centres"].dtype, first["count"].dtype) == (np.dtype("f4"), np.dtype("i8"))
    np.testing.assert_array_equal(first["count"], [0, 1, 2, 0])
    np.testing.assert_array_equal(first["centres"][2], [[1, 2], [2.5, 10]])
    np.testing.assert_array_equal(last["mask"], [True, False, False, False])
    np.testing.assert_array_equal(last["index"], [4, 0, 0, 0])
    np.testing.assert_array_equal(last["count"], [1, 0, 0, 0])
    assert not last["centres"][1:].any() and not last["image"][1:].any()


def test_an_operation_that_would_not_move_boxes_names_the_image():
    transform = make_transform("resize(size)|rand_augment()", 8)
    batches = train_batches(
        BoxSource(8), transform, BoxCollator(), batch_size=8, seed=0, start=0, stop=1, workers=0
    )
    with contextlib.closing(batches), pytest.raises(UserError) as error:
        next(batches)
    assert re.match(
        r"coded/\d.png: rand_augment .* its boxes would no longer fit", str(error.value)
    )


def test_every_epoch_holds_every_example_once_in_an_order_of_its_own():
    batches = train(CodedSource(400), 0, 150)  # three epochs of 50 batches
    epochs = [epoch_of(batches[e * 50 : (e + 1) * 50]) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(400))
    for first, second in itertools.combinations([*epochs, list(range(400))], 2):
        # Two random orders of 400 agree in one place on average, and hardly ever in ten.
        assert sum(a == b for a, b in zip(first, second, strict=True)) < 10


def test_the_order_never_changes():
    """A run that is resumed with another release, or another NumPy, continues its epoch."""
    batches = train(CodedSource(16), 0, 4)
    assert epoch_of(batches) == ORDER


# 3 processes share batches of 6, 2 and 1 of 8; 45 examples divide by none of them.
@pytest.mark.parametrize(("process_count", "batch_size"), [(1, 8), (2, 8), (3, 6)])
@pytest.mark.parametrize("last_batch", ["fill", "drop"])
@pytest.mark.parametrize("length", [45, 48])
def test_all_processes_together_see_each_example_once_an_epoch(
    process_count, batch_size, last_batch, length
):
    steps = steps_per_epoch(length, batch_size, last_batch)
    seen = []
    for process in range(process_count):
        batches = train(
            CodedSource(length),
            steps,  # the second epoch
            2 * steps,
            batch_size=batch_size,
            last_batch=last_batch,
            process_index=process,
            process_count=process_count,
        )
        assert len(batches) == steps
        assert all(len(batch["label"]) == batch_size // process_count for batch in batches)
        seen += epoch_of(batches)
    times = np.bincount(seen, minlength=length)
    if last_batch == "drop":
        assert times.max() == 1
        assert (times == 0).sum() == length % batch_size
    else:
        assert times.min() == 1
        assert times.max() <= 2
        assert (times == 2).sum() == -length % batch_size


def test_another_seed_gives_another_order():
    orders = {tuple(epoch_of(train(CodedSource(80), 0, 10, seed=seed))) for seed in range(5)}
    assert len(orders) == 5


def test_fill_repeats_the_first_examples_of_the_epoch():
    batches = train(CodedSource(20), 0, 6, last_batch="fill")  # epochs of 3 batches
    for epoch in (epoch_of(batches[:3]), epoch_of(batches[3:])):
        assert sorted(epoch[:20]) == list(range(20))
        assert epoch[20:] == epoch[:4]


def test_fill_repeats_a_split_smaller_than_half_a_batch():
    (batch,) = train(CodedSource(3), 0, 1, last_batch="fill")
    order = indices(batch)
    assert sorted(order[:3]) == [0, 1, 2]
    assert order == (order[:3] * 3)[:8]


def test_drop_leaves_the_rest_of_the_epoch_out():
    batches = train(CodedSource(20), 0, 4, last_batch="drop")  # epochs of 2 batches
    for epoch in (epoch_of(batches[:2]), epoch_of(batches[2:])):
        assert len(set(epoch)) == 16


def test_a_batch_depends_on_its_number_alone():
    source = CodedSource(60)
    unbroken = train(source, 0, 24, transform=RANDOM)  # three epochs of 8 batches
    for start in (1, 7, 8, 13, 23):
        assert_same(train(source, start, 24, transform=RANDOM), unbroken[start:])
    assert_same(train(source, 5, 6, transform=RANDOM), unbroken[5:6])
    assert train(source, 24, 24) == []


def test_an_example_is_augmented_anew_in_every_epoch():
    crops = {
        batch["image"].tobytes()
        for batch in train(CodedSource(1), 0, 30, transform=RANDOM, batch_size=1)
    }
    # 81 places of the crop (the flip does not show in one colour): about 25 differ in 30 draws.
    assert len(crops) > 15


def test_augmentation_does_not_depend_on_who_shares_the_batch():
    """The same epoch in batches of another size has the same images."""
    source = CodedSource(48)
    small = train(source, 0, 12, transform=RANDOM, batch_size=4)
    large = train(source, 0, 2, transform=RANDOM, batch_size=24)
    np.testing.assert_array_equal(
        np.concatenate([b["image"] for b in small]), np.concatenate([b["image"] for b in large])
    )


@pytest.mark.parametrize("last_batch", ["fill", "drop"])
def test_processes_share_the_batch_that_one_would_get(last_batch):
    source = CodedSource(45)
    whole = train(source, 3, 14, transform=RANDOM, last_batch=last_batch)
    parts = [
        train(
            source, 3, 14, transform=RANDOM, last_batch=last_batch, process_index=p, process_count=4
        )
        for p in range(4)
    ]
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 30])
@pytest.mark.parametrize(("process_count", "batch_size"), [(1, 8), (2, 8), (3, 6), (4, 8)])
def test_evaluation_scores_each_example_once(length, process_count, batch_size):
    parts = [
        evaluate(CodedSource(length), batch_size, process_index=p, process_count=process_count)
        for p in range(process_count)
    ]
    # The same number of batches everywhere: a collective waits for every process.
    assert {len(part) for part in parts} == {-(-length // batch_size)}
    seen = []
    for batch in itertools.chain.from_iterable(parts):
        assert batch["image"].shape == (batch_size // process_count, 8, 8, 3)
        assert (batch["mask"].dtype, batch["label"].dtype) == (np.dtype(bool), np.dtype(np.int32))
        scored = np.array(indices(batch))[batch["mask"]]
        np.testing.assert_array_equal(batch["label"][batch["mask"]], scored % 10)
        np.testing.assert_array_equal(batch["index"][batch["mask"]], scored)
        assert not batch["image"][~batch["mask"]].any()
        assert not batch["label"][~batch["mask"]].any()
        seen += scored.tolist()
    assert sorted(seen) == list(range(length))


def test_evaluation_keeps_the_order_of_the_source():
    batches = evaluate(CodedSource(20), 8)
    assert epoch_of(batches)[:20] == list(range(20))


def test_a_broken_image_stops_both_and_is_named():
    source = CodedSource(30, broken=17)
    for run in (lambda: train(source, 0, 4), lambda: evaluate(source, 8)):
        with pytest.raises(UserError) as error:
            run()
        assert str(error.value) == (
            "coded/17.png: cannot decode the image (8 bytes): not the bytes of an image file"
        )


@pytest.mark.parametrize("last_batch", ["fill", "drop"])
def test_repeats_bring_an_example_several_times_each_augmented_anew(last_batch):
    """An epoch stays as long and holds fewer examples, as with torchvision's RASampler."""
    source = CodedSource(40)
    plain = epoch_of(train(source, 0, 5, last_batch=last_batch))
    repeated = train(source, 0, 5, repeats=4, last_batch=last_batch)
    # A batch of eight holds two examples, and neighbours, which mixup would mix, are different.
    assert [indices(batch) for batch in repeated] == [
        plain[2 * i : 2 * i + 2] * 4 for i in range(5)
    ]
    crops = train(source, 0, 5, transform=RANDOM, repeats=4)
    different = [
        len({image.tobytes() for image in batch["image"][example::2]})
        for batch in crops
        for example in (0, 1)
    ]
    assert np.mean(different) > 3.5  # two of four crops out of 81 rarely agree
    once = np.concatenate([batch["image"] for batch in train(source, 0, 5, transform=RANDOM)])
    first = np.concatenate([batch["image"][:2] for batch in crops])
    np.testing.assert_array_equal(first, once[:10])  # the first repeat is the one without repeats


def test_repeats_that_do_not_divide_the_batch_go_on_in_the_next():
    source = CodedSource(30)
    plain = epoch_of(train(source, 0, 3))
    batches = train(source, 0, 3, repeats=3)
    expected = [index for index in plain for _ in range(3)]
    for number, batch in enumerate(batches):
        assert sorted(indices(batch)) == sorted(expected[8 * number : 8 * number + 8])
        assert all(a != b for a, b in itertools.pairwise(indices(batch)))


class PartlyBroken(CodedSource):
    """Some examples cannot be decoded, and some cannot be read."""

    def __init__(self, length, undecodable=(), unreadable=()):
        super().__init__(length)
        self._undecodable, self._unreadable = undecodable, unreadable

    def __getitem__(self, index):
        if index in self._unreadable:
            raise UnreadableImage("cannot read the record: checksums differ")
        sample = super().__getitem__(index)
        if index in self._undecodable:
            return dataclasses.replace(sample, image=b"no image")
        return sample


def test_skip_takes_the_next_readable_example_and_says_so():
    whole = epoch_of(train(CodedSource(32), 0, 4))
    # Two in a row, and the last of the epoch, which is followed by its first.
    broken = [whole[5], whole[6], whole[31]]
    source = PartlyBroken(32, undecodable=broken[:1], unreadable=broken[1:])
    batches = train(source, 0, 4, corrupt="skip")
    expected = list(whole)
    expected[5] = expected[6] = whole[7]
    expected[31] = whole[0]
    assert epoch_of(batches) == expected
    skipped = np.concatenate([batch["skipped"] for batch in batches])
    assert skipped.dtype == np.int32
    assert {i: s for i, s in enumerate(skipped.tolist()) if s >= 0} == {
        5: whole[5],
        6: whole[6],
        31: whole[31],
    }
    labels = np.concatenate([batch["label"] for batch in batches])
    np.testing.assert_array_equal(labels, [index % 10 for index in expected])


def test_a_replacement_is_augmented_unlike_its_own_row():
    """Otherwise a batch would hold the same pixels twice."""
    crops = []
    for seed in range(5):
        order = epoch_of(train(CodedSource(8), 0, 1, seed=seed))
        source = PartlyBroken(8, undecodable=[order[2]])
        (batch,) = train(source, 0, 1, seed=seed, transform=RANDOM, corrupt="skip")
        crops.append((batch["image"][2] == batch["image"][3]).all())
    assert sum(crops) < 3  # one in 81 by chance


@pytest.mark.parametrize("options", [{}, {"repeats": 2}, {"last_batch": "drop"}])
def test_skipping_depends_on_the_batch_alone(options):
    source = PartlyBroken(45, undecodable=range(0, 45, 7), unreadable=range(3, 45, 11))
    whole = train(source, 0, 14, transform=RANDOM, corrupt="skip", **options)
    assert_same(train(source, 5, 9, transform=RANDOM, corrupt="skip", **options), whole[5:9])


def test_skipping_gives_up_where_nothing_can_be_read():
    with pytest.raises(UserError, match=r"^100 examples in a row cannot be read, the last: coded/"):
        train(PartlyBroken(8, undecodable=range(8)), 0, 1, corrupt="skip")


def test_skipping_does_not_hide_images_that_are_too_small():
    transform = make_transform("center_crop(size)", 16)
    with pytest.raises(UserError, match=r"^coded/\d+.png: center_crop\(16\) needs a larger image"):
        train(CodedSource(8), 0, 1, transform=transform, corrupt="skip")


def test_without_skip_a_record_that_cannot_be_read_stops_training():
    with pytest.raises(UserError, match=r"^coded/3.png: cannot read the record: checksums differ"):
        train(PartlyBroken(8, unreadable=[3]), 0, 1)


def test_examples_without_a_label_are_refused():
    """TFDS gives -1 for the examples of ImageNet's test split."""

    class Unlabelled(CodedSource):
        def __getitem__(self, index):
            return dataclasses.replace(super().__getitem__(index), targets={"label": -1})

    with pytest.raises(UserError, match=r"coded/\d.png: has no label"):
        evaluate(Unlabelled(8), 8)


def test_a_crop_that_does_not_fit_names_the_image():
    with pytest.raises(UserError, match=r"^coded/\d+.png: center_crop\(16\) needs a larger image"):
        train(CodedSource(8), 0, 1, transform=make_transform("center_crop(size)", 16))


def test_closing_ends_the_iterator():
    batches = train_batches(
        CodedSource(8), PLAIN, COLLATOR, batch_size=8, seed=0, start=0, stop=9, workers=0
    )
    next(batches)
    batches.close()
    batches.close()
    with pytest.raises(ValueError, match="closed"):
        next(batches)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"last_batch": "fil"}, "unknown last_batch 'fil'; did you mean 'fill'?"),
        ({"batch_size": 0}, "batch_size=0 must be a positive multiple"),
        ({"batch_size": -8}, "batch_size=-8 must be a positive multiple"),
        ({"process_count": 3}, "batch_size=8 must be a positive multiple of the 3 processes"),
        ({"last_batch": "drop", "batch_size": 32}, "a batch of 32 is larger than the split (20"),
        ({"seed": -1}, "seed=-1 must be 0 or more"),
        ({"repeats": 0}, "repeats=0 must be 1 or more"),
        ({"corrupt": "skipp"}, "unknown corrupt 'skipp'; did you mean 'skip'?"),
        ({"decode_as": "quick"}, "unknown decode_as 'quick'"),
        ({"workers": -1}, "workers=-1 must be 0 or more"),
    ],
)
def test_impossible_arguments_are_explained(options, says):
    arguments = {"batch_size": 8, "seed": 0, "start": 0, "stop": 1, "workers": 0} | options
    with pytest.raises(UserError) as error:
        train_batches(CodedSource(20), PLAIN, COLLATOR, **arguments)
    assert says in str(error.value)


def test_an_empty_split_is_refused():
    with pytest.raises(UserError, match="an epoch of 0 examples"):
        steps_per_epoch(0, 8)


def test_evaluation_refuses_a_random_transform():
    with pytest.raises(UserError, match="must not be random"):
        eval_batches(CodedSource(8), RANDOM, COLLATOR, batch_size=8, workers=0)
