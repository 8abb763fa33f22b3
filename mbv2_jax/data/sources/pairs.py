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
from collections.abc import Sequence

from mbv2_jax.data.sample import IGNORED
from mbv2_jax.data.sources import class_list, file_splits, two_folders
from mbv2_jax.data.sources.folder import EXTENSIONS
from mbv2_jax.data.sources.masked_files import MaskedFiles
from mbv2_jax.errors import UserError, listed

_MASKS = "masks"
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
            raise UserError(
                f"no folder {path!r}; pairs: takes the folder that holds {class_list.NAME}"
            )
        names = read_classes(os.path.join(path, class_list.NAME))
        name = file_splits.split_name(path, split)
        self.root, masks, is_split = two_folders.locate(path, name, _MASKS)
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
            note="\n".join(filter(None, [chosen.note, _ignored_note(path, names)])),
            faults=faults,
        )


def read_classes(path: str) -> list[str]:
    """Returns the lines of a classes.txt, the ignored ones among them.

    Raises:
      UserError: as `class_list.read` does; or all classes are ignored, or there are too many.
    """
    names = class_list.read(path, repeatable=(MaskedFiles.IGNORED_NAME,))
    if set(names) == {MaskedFiles.IGNORED_NAME}:
        raise UserError(f"{path} names no class")
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
    return f"{path}: pixels of class {listing} do not count, as its {class_list.NAME} says{moved}"


def _match(images: str, masks: str) -> tuple[list[str], list[tuple[str, str]], list[str]]:
    """Returns the names that have both files, (image, mask) of each, and the faults."""
    pictures, faults = two_folders.by_name(images, EXTENSIONS)
    drawn, more = two_folders.by_name(masks, (MASK_ENDING,))
    faults += more
    for name in sorted(pictures.keys() - drawn.keys()):
        wanted = os.path.join(masks, name + MASK_ENDING)
        faults.append(f"{os.path.join(images, pictures[name])}: there is no mask {wanted}")
    for name in sorted(drawn.keys() - pictures.keys()):
        file = os.path.join(masks, drawn[name])
        faults.append(f"{file}: there is no picture of this name in {images}")
    both = sorted(pictures.keys() & drawn.keys())
    return both, [(pictures[name], drawn[name]) for name in both], faults
