"""Archives for hostile files, and the types of their makers."""

import io
import pathlib
import zipfile

Files = list[bytes]
Originals = list[pathlib.Path]  # real files of a container


def zip_file(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Returns a zip archive of members by name."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression, compresslevel=1) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()
