"""Headers of JPEG files, and the shortening of a file to its first rows.

A decoder has to read a file's entropy-coded data from the beginning, but not to its end: if the
header has a smaller height, it stops there. (ITU-T T.81, Annex B: markers; A.2: the data's order.)
"""

import dataclasses

_APP1 = 0xE1  # EXIF, XMP
_SOS = 0xDA  # start of a scan: entropy-coded data follow
_BASELINE = (0xC0, 0xC1)  # start of a sequential, Huffman-coded frame
_OTHER_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC0, 0xC1, 0xC4, 0xC8, 0xCC}
_STANDALONE = frozenset([0x00, 0x01, *range(0xD0, 0xDA)])  # no length follows; not in headers
_END = b"\xff\xd9"


@dataclasses.dataclass(frozen=True)
class Frame:
    """The frame header of a sequential JPEG file.

    Attributes:
      width, height: as stored, in pixels.
      components: 1 for grey, 3 for colour, 4 for CMYK.
      block_rows: the height of a coded unit in pixels, 8 to 32.
      height_at: the offset of the height in the file.
      has_metadata: whether the file may have an orientation (EXIF or XMP).
    """

    width: int
    height: int
    components: int
    block_rows: int
    height_at: int
    has_metadata: bool


def read_frame(encoded: bytes) -> Frame | None:
    """Reads the header of a JPEG file.

    Args:
      encoded: the bytes of a file of any kind.

    Returns:
      The frame; None unless this is a complete JPEG file of 8 bits with a single sequential scan.
    """
    # A file without an end marker is cut short.
    if encoded[:2] != b"\xff\xd8" or not encoded.endswith(_END):
        return None
    position, has_metadata, frame = 2, False, None
    while position + 4 <= len(encoded) and encoded[position] == 0xFF:
        marker = encoded[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker in _STANDALONE:
            return None
        length = int.from_bytes(encoded[position + 2 : position + 4], "big")
        segment = encoded[position + 4 : position + 2 + length]
        if marker == _SOS:
            if frame is None or segment[:1] != bytes([frame.components]):  # several scans
                return None
            return dataclasses.replace(frame, has_metadata=has_metadata)
        if marker in _OTHER_FRAMES:
            return None
        if marker in _BASELINE:
            frame = _frame(segment, position + 4)
            if frame is None:
                return None
        has_metadata = has_metadata or marker == _APP1
        position += 2 + length
    return None


def _frame(segment: bytes, at: int) -> Frame | None:
    """Reads a frame's segment (B.2.2), which begins at offset `at` of the file."""
    if len(segment) < 9 or len(segment) < 6 + 3 * segment[5]:
        return None
    bits, components = segment[0], segment[5]
    height, width = int.from_bytes(segment[1:3], "big"), int.from_bytes(segment[3:5], "big")
    sampling = max(segment[7 + 3 * component] & 15 for component in range(max(1, components)))
    if bits != 8 or not width or not height or not components or not 1 <= sampling <= 4:
        return None
    return Frame(width, height, components, 8 * sampling, at + 1, has_metadata=False)


def first_rows(encoded: bytes, frame: Frame, rows: int) -> bytes:
    """Returns a file whose first `rows` rows decode to the pixels that they have in `encoded`.

    It is the same file with a smaller height in its header, rounded up to whole blocks. One more
    row of blocks is kept, since colours are interpolated across its edge.

    Args:
      encoded: the bytes of a JPEG file.
      frame: the file's frame from `read_frame`.
      rows: the number of rows wanted, 1 to `frame.height`.
    """
    height = (-(-rows // frame.block_rows) + 1) * frame.block_rows
    if height >= frame.height:
        return encoded
    at = frame.height_at
    return b"".join((encoded[:at], height.to_bytes(2, "big"), encoded[at + 2 :]))
