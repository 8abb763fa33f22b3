"""Pictures and their masks in folders of one's own: images/ and masks/ for each split.

    PATH/classes.txt                 a name a line: the first is class 0, and so on
    PATH/SPLIT/images/NAME.jpg       or .png, .webp, .bmp, .tif, ...
    PATH/SPLIT/masks/NAME.png        each pixel's class, in grey or as the index of a palette

or PATH/images/SPLIT/ and PATH/masks/SPLIT/; or PATH/images/ and PATH/masks/ without splits, of
which a fifth of the pictures is held out. Both may hold folders, the same on both sides.

255 in a mask marks pixels that do not count. A line of classes.txt that is exactly `ignored` is a
number whose pixels do not count either: they become 255, and the later classes move up.
"""

import os
import pathlib
from collections.abc import Sequence

from mbv2_jax.data.sample import IGNORED
from mbv2_jax.data.sources import file_splits
from mbv2_jax.data.sources.folder import EXTENSIONS
from mbv2_jax.data.sources.masked_files import MaskedFiles
from mbv2_jax.errors import UserError, listed, nearest

CLASSES = "classes.txt"
_IMAGES, _MASKS = "images", "masks"
MASK_ENDING = ".png"


class PairsSource(MaskedFiles):
    """A split of pictures and masks in the layout that this module describes.

    The split "validation" is the folder val if there is no folder validation, and the other way
    round. A part such as "train[:90%]" is a random one, and a folder without splits is split, as
    for folders of classes (file_splits.py, held_out.py).

    Args:
      path: the folder that holds classes.txt.
      split: a name, or an expression as `parts.read` takes it.

    Attributes:
      root: the folder of the images.
      class_names, parts, note, faults: as `MaskedFiles` has them; the faults are masks without an
        image, images without a mask, and images of the same name.

    Raises:
      UserError: there is no such folder or split, no pair of files, or classes.txt is wrong.
    """

    def __init__(self, path: str, split: str):
        if not path:
            raise UserError("pairs: needs a path, such as 'pairs:/data/streets'")
        if not os.path.isdir(path):
            raise UserError(f"no folder {path!r}; pairs: takes the folder that holds {CLASSES}")
        names = read_classes(os.path.join(path, CLASSES))
        name = file_splits.split_name(path, split)
        self.root, masks, is_split = _locate(path, name)
        file_names, found, faults = _match(self.root, masks)
        if not found:
            raise UserError(
                f"no picture in {self.root} has a mask in {masks}: {listed(faults) or 'no files'}"
            )
        if is_split:
            chosen = file_splits.choose(self.root, split, name, len(found))
        else:
            files = [(file_name, 0) for file_name in file_names]
            chosen = file_splits.choose_held_out(path, split, name, files, "pictures")
        numbers = range(len(found)) if chosen.numbers is None else chosen.numbers.tolist()
        super().__init__(
            [os.path.join(self.root, found[number][0]) for number in numbers],
            [os.path.join(masks, found[number][1]) for number in numbers],
            names,
            chosen.parts,
            note=" ".join(filter(None, [chosen.note, _ignored_note(path, names)])),
            faults=faults,
        )


def read_classes(path: str) -> list[str]:
    """Returns the lines of a classes.txt, the ignored ones among them.

    Raises:
      UserError: the file is missing or not text, has an empty line between others, names a class
        twice, names none, or too many.
    """
    try:
        text = pathlib.Path(path).read_text("utf-8-sig")
    except FileNotFoundError:
        raise UserError(
            f"no file {path}: it names the classes, one a line, the first of which is class 0"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as text: {error}") from None
    names = [line.strip() for line in text.rstrip().splitlines()]
    named = [name for name in names if name != MaskedFiles.IGNORED_NAME]
    if "" in names:
        raise UserError(
            f"{path}: line {names.index('') + 1} is empty; each line names a class, or is `ignored`"
        )
    if not named:
        raise UserError(f"{path} names no class")
    if twice := sorted({name for name in named if named.count(name) > 1}):
        raise UserError(f"{path} names {listed(map(repr, twice), separator=', ')} more than once")
    if len(names) > IGNORED:
        raise UserError(
            f"{path} has {len(names)} lines, and there can be {IGNORED} classes, 0 to "
            f"{IGNORED - 1}: {IGNORED} marks the pixels of a mask that do not count"
        )
    return names


def _ignored_note(path: str, names: Sequence[str]) -> str:
    """Returns a sentence about the numbers of masks that do not count; "" if all do."""
    numbers = [number for number, name in enumerate(names) if name == MaskedFiles.IGNORED_NAME]
    if not numbers:
        return ""
    listing = listed(map(str, numbers), separator=", ")
    moved = " (later classes move up)" if min(numbers) < len(names) - len(numbers) else ""
    return f"{path}: pixels of class {listing} do not count, as its {CLASSES} says{moved}"


def _locate(path: str, split: str) -> tuple[str, str, bool]:
    """Returns the folders of a split's images and masks, and whether they hold just that split."""
    images, masks = os.path.join(path, _IMAGES), os.path.join(path, _MASKS)
    for name in (split, file_splits.OTHER_NAME.get(split)):
        if name is None:
            continue
        for found in (
            (os.path.join(path, name, _IMAGES), os.path.join(path, name, _MASKS)),
            (os.path.join(images, name), os.path.join(masks, name)),
        ):
            if os.path.isdir(found[0]):
                return *_with_masks(*found), True
    if known := _splits(path):
        raise UserError(f"no split {split!r} in {path}; {nearest(split, known)}")
    if os.path.isdir(images):
        is_split = os.path.basename(os.path.abspath(path)).lower() in file_splits.NAMES
        return *_with_masks(images, masks), is_split
    raise UserError(
        f"no images in {path}: they belong in {os.path.join(path, split, _IMAGES)}, and their "
        f"masks in {os.path.join(path, split, _MASKS)}"
    )


def _splits(path: str) -> list[str]:
    """Returns the names of a folder's splits, sorted."""
    names = {name for name in os.listdir(path) if os.path.isdir(os.path.join(path, name, _IMAGES))}
    images = os.path.join(path, _IMAGES)
    if os.path.isdir(images):
        names |= {name for name in os.listdir(images) if name.lower() in file_splits.NAMES}
    return sorted(names)


def _with_masks(images: str, masks: str) -> tuple[str, str]:
    if not os.path.isdir(masks):
        raise UserError(f"no folder {masks}: it holds the masks of the pictures in {images}")
    return images, masks


def _match(images: str, masks: str) -> tuple[list[str], list[tuple[str, str]], list[str]]:
    """Returns the names that have both files, (image, mask) of each, and the faults."""
    pictures, faults = _by_name(images, EXTENSIONS)
    drawn, more = _by_name(masks, (MASK_ENDING,))
    faults += more
    for name in sorted(pictures.keys() - drawn.keys()):
        wanted = os.path.join(masks, name + MASK_ENDING)
        faults.append(f"{os.path.join(images, pictures[name])}: there is no mask {wanted}")
    for name in sorted(drawn.keys() - pictures.keys()):
        file = os.path.join(masks, drawn[name])
        faults.append(f"{file}: there is no picture of this name in {images}")
    both = sorted(pictures.keys() & drawn.keys())
    return both, [(pictures[name], drawn[name]) for name in both], faults


def _by_name(folder: str, endings: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """Returns the files below a folder by their names without ending, and the faults."""
    found: dict[str, str] = {}
    faults = []
    for file in _files(folder, endings):
        name = os.path.splitext(file)[0]
        if name in found:
            path = os.path.join(folder, file)
            faults.append(f"{path}: {found[name]} has the same name but for its ending")
        else:
            found[name] = file
    return found, faults


def _files(folder: str, endings: tuple[str, ...]) -> list[str]:
    """Returns the files with these endings below a folder, relative to it, sorted, none hidden."""
    found = []

    def fail(error: OSError) -> None:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    for place, inside, files in os.walk(folder, followlinks=True, onerror=fail):
        inside[:] = [name for name in inside if not name.startswith(".")]
        found += [
            os.path.relpath(os.path.join(place, file), folder)
            for file in files
            if file.lower().endswith(endings) and not file.startswith(".")
        ]
    return sorted(found)
