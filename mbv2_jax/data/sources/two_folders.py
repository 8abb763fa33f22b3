"""Pictures in one folder and the files that belong to them in another, such as images/ and masks/.

Both are PATH/SPLIT/images and PATH/SPLIT/masks; or PATH/images/SPLIT and PATH/masks/SPLIT; or,
without splits, PATH/images and PATH/masks. Both may hold folders, the same on both sides.
"""

import os

from mbv2_jax.data.sources import file_splits
from mbv2_jax.errors import UserError, nearest

_IMAGES = "images"


def locate(path: str, split: str, other: str) -> tuple[str, str, bool]:
    """Finds the folders of a split.

    Args:
      path: the folder of the data.
      split: the split's name; "validation", "val" and "valid" find one another.
      other: the name of the folder beside images, such as "masks".

    Returns:
      The folder of the images, the one of the other files, and whether both hold just that split;
      if not, the data has no splits.

    Raises:
      UserError: there is no such split, or no such folder.
    """
    images, others = os.path.join(path, _IMAGES), os.path.join(path, other)
    for name in file_splits.spellings(split):
        for found in (
            (os.path.join(path, name, _IMAGES), os.path.join(path, name, other)),
            (os.path.join(images, name), os.path.join(others, name)),
        ):
            if os.path.isdir(found[0]):
                return *_both(*found, other), True
    if known := _splits(path):
        raise UserError(f"no split {split!r} in {path}; {nearest(split, known)}")
    if os.path.isdir(images):
        is_split = os.path.basename(os.path.abspath(path)).lower() in file_splits.NAMES
        return *_both(images, others, other), is_split
    raise UserError(
        f"no images in {path}: they belong in {os.path.join(path, split, _IMAGES)}, and their "
        f"{other} in {os.path.join(path, split, other)}"
    )


def _splits(path: str) -> list[str]:
    """Returns the names of a folder's splits, sorted."""
    names = {name for name in os.listdir(path) if os.path.isdir(os.path.join(path, name, _IMAGES))}
    images = os.path.join(path, _IMAGES)
    if os.path.isdir(images):
        names |= {name for name in os.listdir(images) if name.lower() in file_splits.NAMES}
    return sorted(names)


def _both(images: str, others: str, other: str) -> tuple[str, str]:
    if not os.path.isdir(others):
        raise UserError(f"no folder {others}: it holds the {other} of the pictures in {images}")
    return images, others


def by_name(folder: str, endings: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """Finds the files below a folder with one of these endings, none hidden.

    Returns:
      The files, relative to the folder, by their names without ending, sorted; and a line for each
      that differs from another in its ending only.
    """
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
