"""What a workgroup that decodes weights has room for beside the decode table."""

from __future__ import annotations

from dataclasses import dataclass

MAX_LANES = 512  # so that tables, one a workgroup, leave a multiprocessor all its lanes
_MAX_TABLE = 4096  # states of one table

_OTHER_BYTES = 1024  # that it needs besides
_SUMS_AT_ONCE = 8  # most tokens whose sums it keeps
_SHARED_OUTLIERS = 256, 1024, 4096  # of a tile, as each number is a kernel
_MOST_SHARED = 16  # of a lane

# Memory that a multiprocessor has for all of its workgroups, of which each costs some more, and
# lanes that must have room there: an H100's, as its driver has it.
_RESIDENT_BYTES, _GROUP_BYTES, _RESIDENT_LANES = 48 << 10, 1024, 1024


def table_fits(memory_bytes: int) -> bool:
    """Whether a workgroup has room for a table with either number of states, and a sum a lane: all
    of a model's matrices are to agree.
    """
    return 4 * _MAX_TABLE + 4 * MAX_LANES <= memory_bytes


@dataclass(frozen=True)
class Workgroup:
    """One of so many lanes with a table of so many states."""

    memory_bytes: int  # that the adapter gives to one
    n_states: int
    lanes: int

    def table_variants(self, other_bytes: int = 0) -> list[str]:
        """Of shaders/shared/table.wgsl, for workgroups that need so much other memory: twice
        unless that leaves room for too few of them, and once for more.
        """
        rest = other_bytes + _OTHER_BYTES

        def resident_lanes(entry_bytes: int) -> int:
            group_bytes = entry_bytes * self.n_states + rest + _GROUP_BYTES
            return _RESIDENT_BYTES // group_bytes * self.lanes

        fits = 8 * self.n_states + rest <= self.memory_bytes
        wanted = min(resident_lanes(4), _RESIDENT_LANES)
        return ["twice"] if fits and resident_lanes(8) >= wanted else []

    def sums_at_once(self, tokens: int) -> int:
        """Tokens whose sums are added up together (shaders/shared/segments.wgsl)."""
        room = self.memory_bytes - 4 * self.n_states - _OTHER_BYTES
        # Of all tokens at once compilers make slow loops (H100: 152 instead of 92 us for 8).
        return max(1, min(_SUMS_AT_ONCE, tokens // 2, room // (4 * self.lanes)))

    def fits_input(self, input_bytes: int) -> bool:
        """Whether it may make its input (shaders/shared/input_made.wgsl), with any table: beside
        that there are four arrays of a word a lane.
        """
        room = self.memory_bytes - 4 * _MAX_TABLE - 16 * self.lanes - _OTHER_BYTES
        return input_bytes <= room

    def shared_outliers(self, heaviest: int, input_bytes: int) -> int:
        """Outliers of a tile that its lanes share (shaders/shared/outliers_shared.wgsl), of one
        token: no fewer than the `heaviest` tile has, if there is room for these.
        """
        used = 4 * self.n_states + 16 * self.lanes + input_bytes + _OTHER_BYTES
        room = min(_MOST_SHARED * self.lanes, (self.memory_bytes - used) // 4)
        sizes = [size for size in _SHARED_OUTLIERS if size <= room]
        return next((size for size in sizes if size >= heaviest), max(sizes, default=0))
