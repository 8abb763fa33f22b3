"""HDF5 files as Keras writes them: plain arrays in a tree of groups, read within bounds.

HDF5 can do more: link to other places and files, compress, and declare arrays of any size that
take no room in the file. Keras uses none of that, and a file that does is refused.
"""

import math
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from mbv2_jax.errors import UserError

# Bytes that the arrays of a file may have together: these, and these times the file's size.
_PLAIN = 64 << 20
_RATIO = 8

_MOST_GROUPS = 10_000  # a MobileNetV2 has about 400
_LONGEST_TEXT = 4 << 20  # bytes of a model's config, which has about 200 kB


class Hdf5:
    """An open HDF5 file, in which groups and datasets are reached by their names.

    Attributes:
      root: the outermost group.
    """

    def __init__(self, path: pathlib.Path, file: Any, size: int):
        self._path = path
        self._left = _PLAIN + _RATIO * size
        self._visited: set[int] = set()
        self._groups = 0
        self.root = file

    def get(self, group: Any, name: str) -> Any:
        """Returns the group or dataset with a name, which may contain slashes; None without one.

        Raises:
          UserError: it lies in another place or another file.
        """
        import h5py

        for part in name.split("/"):
            if not isinstance(group, h5py.Group) or not group.id.links.exists(part.encode()):
                return None
            if group.id.links.get_info(part.encode()).type != h5py.h5l.TYPE_HARD:
                raise UserError(
                    f"{self._path} was refused: {group.name}/{part} is a link, perhaps to another "
                    "file, which Keras never writes"
                )
            group = group[part]
        return group

    def members(self, group: Any) -> dict[str, Any]:
        """Returns the groups and datasets in a group.

        Raises:
          UserError: it is no group or is met for the second time, or there are too many.
        """
        import h5py

        if not isinstance(group, h5py.Group):
            raise UserError(f"{self._path} is damaged: {group.name} in it is not a group")
        address = h5py.h5o.get_info(group.id).addr
        if address in self._visited:
            raise UserError(f"{self._path} was refused: its group {group.name} has two names")
        self._visited.add(address)
        self._groups += len(group)
        if self._groups > _MOST_GROUPS:
            raise UserError(f"{self._path} was refused: it has more than {_MOST_GROUPS:,} groups")
        # h5py gives a name that is not UTF-8 as bytes.
        return {name: self.get(group, name) for name in group if isinstance(name, str)}

    def array(self, dataset: Any) -> np.ndarray:
        """Reads a dataset; bfloat16, which HDF5 lacks, becomes float32.

        Raises:
          UserError: it is not a plain array of numbers, or is too large for the file.
        """
        import h5py

        if not isinstance(dataset, h5py.Dataset):
            raise UserError(f"{self._path} is damaged: it lacks an array, or has a group in place")
        if dataset.external or dataset.is_virtual:
            raise UserError(f"{self._path} was refused: its {dataset.name} lies in another file")
        if dataset.id.get_create_plist().get_nfilters():
            raise UserError(
                f"{self._path} was refused: its {dataset.name} is compressed, as Keras does not do;"
                " `h5repack -f NONE` writes it plainly"
            )
        chunk = math.prod(dataset.chunks or ()) * dataset.dtype.itemsize
        self._left -= max(dataset.nbytes, chunk)
        if self._left < 0:
            raise UserError(
                f"{self._path} was refused: with its {dataset.name}, of shape {dataset.shape}, its"
                " arrays are far larger than the file"
            )
        bfloat16 = dataset.dtype == np.dtype("V2")
        if dataset.dtype.kind not in "fiub" and not bfloat16:
            raise UserError(f"{self._path}: its {dataset.name} does not hold numbers")
        array = np.asarray(dataset[()])
        marked = dataset.dtype.itemsize == 2 and self.text(dataset, "dtype") == "bfloat16"
        if bfloat16 or marked:
            array = array.view(ml_dtypes.bfloat16).astype(np.float32)
        return array

    def text(self, group: Any, name: str) -> str:
        """Returns an attribute that holds text; "" without one."""
        found = group.attrs.get(name, "")
        if not isinstance(found, str | bytes):
            return ""
        if len(found) > _LONGEST_TEXT:
            raise UserError(f"{self._path} was refused: its {name} is longer than any model's")
        return found.decode() if isinstance(found, bytes) else found

    def listed(self, group: Any, name: str) -> list[str]:
        """Returns the texts in an attribute; Keras splits a long list into name0, name1, ...

        Raises:
          UserError: a text is listed twice, so that its array would be read again and again.
        """
        names = [name] if name in group.attrs else []
        while f"{name}{len(names)}" in group.attrs:
            names.append(f"{name}{len(names)}")
        entries = [entry for part in names for entry in group.attrs[part]]
        texts = [entry.decode() if isinstance(entry, bytes) else str(entry) for entry in entries]
        if len(set(texts)) < len(texts):
            raise UserError(f"{self._path} was refused: {name} of {group.name} repeats a name")
        return texts
