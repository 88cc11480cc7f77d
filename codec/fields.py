"""Bit fields of one width, row by row: what is not worth an entropy code.

A row's fields follow each other without gaps, the most significant bit of a word first, and fill
whole words.
"""

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]

_GROUP = 32  # so many fields of any width take whole words, `width` of them


def row_words(cols: int, width: int) -> int:
    """Words that a row of `cols` fields takes."""
    return -(-cols * width // 32)


def pack(fields: Words, width: int) -> Words:
    """Fields (rows, cols) of 1 to 32 bits, nothing set above them -> (rows, row_words)."""
    rows, cols = fields.shape
    padded = np.zeros((rows, -(-cols // _GROUP), _GROUP), np.uint32)
    padded.reshape(rows, -1)[:, :cols] = fields
    words = np.zeros((rows, padded.shape[1], width), np.uint32)
    for i in range(_GROUP):
        word, missing = _place(i, width)
        field = padded[:, :, i]
        if missing > 0:
            words[:, :, word] |= field >> np.uint32(missing)
            words[:, :, word + 1] |= field << np.uint32(32 - missing)
        else:
            words[:, :, word] |= field << np.uint32(-missing)
    return words.reshape(rows, -1)[:, : row_words(cols, width)]


def unpack(words: Words, width: int, cols: int) -> Words:
    """The inverse of `pack`: (rows, row_words) -> (rows, cols)."""
    rows, size = words.shape
    padded = np.zeros((rows, -(-cols // _GROUP), width), np.uint32)
    padded.reshape(rows, -1)[:, :size] = words
    fields = np.empty((rows, padded.shape[1], _GROUP), np.uint32)
    for i in range(_GROUP):
        word, missing = _place(i, width)
        if missing > 0:
            fields[:, :, i] = padded[:, :, word] << np.uint32(missing)
            fields[:, :, i] |= padded[:, :, word + 1] >> np.uint32(32 - missing)
        else:
            fields[:, :, i] = padded[:, :, word] >> np.uint32(-missing)
    fields &= np.uint32((1 << width) - 1)
    return fields.reshape(rows, -1)[:, :cols]


def _place(i: int, width: int) -> tuple[int, int]:
    """Word in which field i of a group starts, and how many of its bits that word has no room for.

    A negative number is how many bits of the word follow the field.
    """
    word, position = divmod(i * width, 32)
    return word, position + width - 32
