"""Pascal VOC's pictures and masks in the layout of its VOCdevkit; voc_boxes.py has its boxes.

    VOC2012/ImageSets/Segmentation/SPLIT.txt     the names of a split, a line each
    VOC2012/JPEGImages/NAME.jpg
    VOC2012/SegmentationClass/NAME.png           VOC's own mask, if it is there, else
    VOC2012/SegmentationClassAug/NAME.png

VOC's own masks come first, so that `val` is scored as others score it. SegmentationClassAug holds
the masks of SBD (Hariharan et al. 2011) in VOC's numbers, as grey or palette PNGs; with them the
split train_aug has 10,582 pictures instead of 1,464. Its list is part of neither and comes with the
masks.
"""

import os
import pathlib

from mbv2_jax.data.classes import VOC_NAMES
from mbv2_jax.data.sources import file_splits
from mbv2_jax.data.sources.folder import EXTENSIONS
from mbv2_jax.data.sources.masked_files import MaskedFiles
from mbv2_jax.data.sources.parts import Part
from mbv2_jax.errors import UserError, nearest

_LISTS = os.path.join("ImageSets", "Segmentation")
IMAGES = "JPEGImages"
_MASKS = ("SegmentationClass", "SegmentationClassAug")  # the first that has a mask is taken


class VocSource(MaskedFiles):
    """A split of VOC's pictures and masks; 255 in a mask marks pixels that do not count.

    The split "validation" is val.txt if there is no validation.txt, and the other way round. A part
    such as "train[:90%]" is a random one (file_splits.py).

    Args:
      path: VOC2012, VOCdevkit, or the folder that holds either.
      split: the name of a list, or an expression as `parts.read` takes it.

    Attributes:
      root: the folder of the year.
      class_names: VOC's 21, background first.
      parts: of each picture, so that train and trainval are known to overlap.
      note, faults: as `MaskedFiles` has them; the faults are pictures and masks that are missing.

    Raises:
      UserError: there is no such folder or split, or nothing in it can be used.
    """

    def __init__(self, path: str, split: str):
        if not path:
            raise UserError("voc: needs a path, such as 'voc:/data/VOCdevkit'")
        self.root = find_root(path, _LISTS)
        name = file_splits.split_name(os.path.join(self.root, _LISTS), split)
        names = read_list(self.root, _LISTS, name)
        folders = _mask_folders(self.root)
        # Of a mask that is in both, the folder of the first counts.
        masks = {file: folder for folder in reversed(folders) for file in os.listdir(folder)}
        chosen = file_splits.choose(self.root, split, name, len(names))
        if chosen.numbers is not None:
            names = [names[number] for number in chosen.numbers.tolist()]
        faults, images = [], []
        for each in names:
            image = os.path.join(self.root, IMAGES, f"{each}.jpg")
            mask = os.path.join(masks.get(f"{each}.png", folders[-1]), f"{each}.png")
            missing = [file for file in (image, mask) if not os.path.isfile(file)]
            faults += [f"{file} is missing" for file in missing]
            if not missing:
                images.append((image, mask))
        if not images:
            raise UserError(f"no picture of split {split!r} has its files; {faults[0]}")
        location = os.path.realpath(self.root)
        super().__init__(
            [image for image, _ in images],
            [mask for _, mask in images],
            VOC_NAMES,
            [Part(os.path.join(location, each), 0, 1) for each in names],
            faults=faults,
        )


def find_root(path: str, lists: str) -> str:
    """Returns the folder of a year that a path stands for; 2012 if there are several.

    Args:
      path: VOC2012, VOCdevkit, or the folder that holds either.
      lists: the folder of the splits' lists below that of a year.

    Raises:
      UserError: there is none, or several and none of 2012.
    """
    if not os.path.isdir(path):
        raise UserError(f"no folder {path!r}; voc: takes VOCdevkit or a year's folder, VOC2012")
    tried = [path]
    for folder in (path, os.path.join(path, "VOCdevkit")):
        if os.path.isdir(folder):
            years = sorted(name for name in os.listdir(folder) if name.startswith("VOC2"))
            tried += [os.path.join(folder, year) for year in years]
    found = [folder for folder in tried if os.path.isdir(os.path.join(folder, lists))]
    if not found:
        raise UserError(f"no {lists} in {path}, nor in a VOC2012 below it: voc: takes VOCdevkit")
    if len(found) == 1:
        return found[0]
    latest = [folder for folder in found if os.path.basename(folder) == "VOC2012"]
    if not latest:
        raise UserError(f"several years in {path}: give one of {', '.join(map(repr, found))}")
    return latest[0]


def read_list(root: str, lists: str, name: str) -> list[str]:
    """Returns the names of a split's pictures: of ROOT/LISTS/NAME.txt.

    A line may also be two paths, of the picture and the mask, as in the list of train_aug that
    circulates with SBD's masks.

    Raises:
      UserError: there is no such list, it is empty or no text, or names a picture twice.
    """
    folder = pathlib.Path(root, lists)
    known = sorted(file.stem for file in folder.glob("*.txt"))
    chosen = next((each for each in file_splits.spellings(name) if each in known), None)
    if chosen is None:
        raise UserError(f"no split {name!r} in {folder}; {nearest(name, known)}")
    file = folder / f"{chosen}.txt"
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file} as text: {error}") from None
    names = [_name(line.split()[0]) for line in lines if line.strip()]
    if not names:
        raise UserError(f"{file} names no picture")
    if len(set(names)) < len(names):
        twice = next(each for number, each in enumerate(names) if each in names[:number])
        raise UserError(f"{file} names {twice!r} more than once")
    return names


def _name(path: str) -> str:
    """Returns the name of a picture, which may hold dots, of its path with or without an ending."""
    file = pathlib.PurePosixPath(path)
    return file.stem if file.suffix.lower() in EXTENSIONS else file.name


def _mask_folders(root: str) -> list[str]:
    """Returns those of the folders of masks that there are, in the order in which they count."""
    present = [os.path.join(root, name) for name in _MASKS]
    present = [folder for folder in present if os.path.isdir(folder)]
    if not present:
        raise UserError(f"no {' and no '.join(_MASKS)} in {root}: they hold the masks")
    return present
