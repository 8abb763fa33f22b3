"""VOC's colours of classes, in which masks are saved and drawn."""

import numpy as np


def colours(count: int = 256) -> np.ndarray:
    """Returns the first colours of VOC's palette, uint8 (count, 3) RGB.

    Each bit of a class's number goes to the high bits of R, G and B in turn (VOCdevkit's
    VOClabelcolormap.m): 0 is black, 15 (person) is (192, 128, 128), 255 is (224, 224, 192).
    """
    numbers = np.arange(count)
    palette = np.zeros((count, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            if 3 * bit + channel < 8:
                value = (numbers >> (3 * bit + channel)) & 1
                palette[:, channel] |= (value << (7 - bit)).astype(np.uint8)
    return palette
