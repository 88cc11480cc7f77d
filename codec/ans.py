"""tANS over many streams at once: groups to bits and back. Knows nothing of matrices or files.

A step of a stream is one group of two or four weights; four weights, two steps or one, are a quad.
A quad is, most significant bit first: 4 * raw_bits raw bits, the state bits of its first group,
those of its second. The encoder goes from a stream's last step to its first, and the decoder starts
in the state where the encoder ended. What state follows the last step means nothing, so the last
group's state bits, which would say, are left out: the encoder starts in a state of that group. A
decoder may read whatever follows in their place.

Arrays over streams are (steps, streams): one numpy operation advances every stream by a step.
Look-ups use mode="clip" because the default has numpy check and buffer every result.
"""

import numpy as np
import numpy.typing as npt

from codec.groups import QUAD
from codec.table import Table, entry_nbits

WORD_BITS = 32


def encode(
    table: Table,
    groups: npt.NDArray[np.int64],
    raw: npt.NDArray[np.uint16],
    raw_bits: npt.NDArray[np.uint8],
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Encode groups (steps, streams), which must have states, and raw bits (quads, streams).

    The groups of a stream are of one class, which has so many raw bits a weight (streams,).

    Returns the decoder's first states (streams,), and the streams as quads of at most 40 bits with
    their lengths, both (streams, quads): what `BitWriter.append` takes.
    """
    steps, streams = groups.shape
    steps_per_quad = QUAD // table.group
    quads = np.zeros((steps // steps_per_quad, streams), np.int64)
    quad_raw_bits = 4 * raw_bits.astype(np.int64)
    lengths = np.zeros_like(quads)
    # The last group's lowest state: the lower a state is, the fewer bits does its predecessor take.
    last = groups[-1]
    x = table.next_x[table.frequencies[last] + table.delta_state[last]]
    n, rest, scratch = np.empty_like(x), np.empty_like(x), np.empty_like(x)
    for t in range(steps - 2, -1, -1):
        quad, length = quads[t // steps_per_quad], lengths[t // steps_per_quad]
        table.delta_bits.take(groups[t], out=n, mode="clip")
        n += x
        n >>= 16
        np.right_shift(x, n, out=rest)
        np.left_shift(rest, n, out=scratch)
        x -= scratch  # which leaves the low n bits
        x <<= length
        quad |= x
        length += n
        if t % steps_per_quad == 0 and quad_raw_bits.any():
            scratch[:] = raw[t // steps_per_quad]
            scratch <<= length
            quad |= scratch
            length += quad_raw_bits
        table.delta_state.take(groups[t], out=scratch, mode="clip")
        rest += scratch
        table.next_x.take(rest, out=x, mode="clip")
    first_states = (x - (1 << table.log2_states)).astype(np.uint16)
    return first_states, quads.T.astype(np.uint64), lengths.T.astype(np.uint64)


class BitWriter:
    """Fields of varying length, appended to one contiguous string of bits."""

    def __init__(self) -> None:
        self.n_bits = 0
        self._full: list[npt.NDArray[np.uint64]] = []  # the first n_bits // 64 words of 64 bits
        self._partial = np.uint64(0)  # the n_bits % 64 bits after them, left-aligned

    def append(
        self, fields: npt.NDArray[np.uint64], lengths: npt.NDArray[np.uint64]
    ) -> npt.NDArray[np.int64]:
        """Append fields of 0 to 63 bits (rows, fields), row by row -> end of each row (rows,)."""
        offset = self.n_bits % 64
        length = lengths.ravel()
        end = np.cumsum(length) + np.uint64(offset)
        start = end - length
        aligned = fields.ravel() << (np.uint64(64) - length)
        shift = start & np.uint64(63)
        word = start >> np.uint64(6)

        # A field is shorter than a word, so some field starts in every word, and only the last of
        # them can reach into the next word. (A shift by 64 gives 0 in numpy.)
        first = np.append(0, np.flatnonzero(word[1:] != word[:-1]) + 1)
        last = np.append(first[1:], word.size) - 1
        words = np.zeros(first.size + 1, np.uint64)
        words[:-1] = np.bitwise_or.reduceat(aligned >> shift, first)
        words[1:] |= aligned[last] << (np.uint64(64) - shift[last])
        words[0] |= self._partial

        ends = end.reshape(fields.shape)[:, -1].astype(np.int64) + (self.n_bits - offset)
        n_full = ends[-1] // 64 - self.n_bits // 64
        self._full.append(words[:n_full])
        self._partial = words[n_full]
        self.n_bits = int(ends[-1])
        return ends

    def words(self) -> npt.NDArray[np.uint32]:
        """The bits in as few words as hold them: bit p is bit 31 - p % 32 of word p // 32."""
        big_endian = np.append(np.concatenate(self._full), self._partial).astype(">u8")
        return big_endian.view(">u4")[: -(-self.n_bits // WORD_BITS)].astype(np.uint32)


class Decoder:
    """Streams, each of a class, read in step; it can stop after any quad and go on.

    It stays within `words` whatever they hold: past the end it sees zeros.
    """

    def __init__(
        self,
        tables: npt.NDArray[np.uint32],
        group: int,
        raw_bits: npt.NDArray[np.uint8],
        words: npt.NDArray[np.uint32],
        starts: npt.NDArray[np.int64],
        states: npt.NDArray[np.uint16],
        classes: npt.NDArray[np.uint8],
    ) -> None:
        """Decode tables (n_classes, 2^P); of each stream (streams,) the first bit in `words`, the
        first state and the class, and of each class how many bits of a weight are raw (n_classes,).
        """
        n_classes, self._n_states = tables.shape
        first_states = np.arange(n_classes) * self._n_states
        self._nbits = entry_nbits(tables).ravel()
        base_unit = self._n_states >> 11  # 1 for P = 11, 2 for P = 12
        base = (tables >> 21).astype(np.int64) * base_unit
        self._base = (base + first_states[:, None]).ravel()
        self._steps_per_quad = QUAD // group
        self._raw_bits = 4 * raw_bits[classes].astype(np.int64)  # of a quad (streams,)
        # Window i is words i and i + 1: shifted left by up to 31, it still begins with 32 bits.
        self._windows = np.append(words, np.uint32(0)).astype(np.uint64) << np.uint64(WORD_BITS)
        self._windows[:-1] |= np.append(words[1:], np.uint32(0))
        self._starts = starts
        self._positions = starts.astype(np.int64)
        self._states = first_states[classes] + states  # of all tables' states, one after another

    @property
    def states(self) -> npt.NDArray[np.int64]:
        """Each stream's state (streams,), 0 .. 2^P - 1."""
        states: npt.NDArray[np.int64] = self._states & self._n_states - 1
        return states

    @property
    def consumed(self) -> npt.NDArray[np.int64]:
        """How many bits each stream has read so far (streams,)."""
        return self._positions - self._starts

    def run(self, steps: int) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16]]:
        """Decode so many steps, in whole quads.

        Returns the place in `tables`, raveled, of the entry of each step (steps, streams), and the
        raw bits (quads, streams).
        """
        position, state = self._positions, self._states
        visited = np.empty((steps, state.size), np.uint16)
        raw = np.zeros((steps // self._steps_per_quad, state.size), np.uint16)
        n = np.empty_like(state)
        raw_bits, has_raw = self._raw_bits.view(np.uint64), self._raw_bits.any()
        window = np.empty(state.size, np.uint64)
        # numpy does not mix the two kinds of 64-bit integers, so each also has the other's name.
        n_unsigned, window_signed = n.view(np.uint64), window.view(np.int64)
        for t in range(steps):
            visited[t] = state
            np.right_shift(position, 5, out=n)
            self._windows.take(n, out=window, mode="clip")
            np.bitwise_and(position, WORD_BITS - 1, out=n)
            window <<= n_unsigned
            if has_raw and t % self._steps_per_quad == 0:
                # By 64 where there are none, which gives 0 in numpy.
                raw[t // self._steps_per_quad] = window >> (np.uint64(64) - raw_bits)
                window <<= raw_bits
                position += self._raw_bits
            self._nbits.take(state, out=n, mode="clip")
            position += n
            np.subtract(64, n, out=n)
            window >>= n_unsigned
            self._base.take(state, out=n, mode="clip")
            np.add(n, window_signed, out=state)
        return visited, raw
