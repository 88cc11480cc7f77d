"""Where a token's time goes: each kind of launch of the token step by itself, and the whole.

Part of `python -m engine.bench` (--profile).
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from engine.bench_kernels import time_dispatches
from engine.errors import DeviceError
from engine.generate import Engine
from engine.kernel import Dispatch

_STEPS = 32  # of the whole, from position 0 on


@dataclass(frozen=True)
class ProfileRow:
    """Launches of one kernel in one grid. The last row, `step`, is all of them in their order."""

    kernel: str
    matrix: str  # whose weights it reads, the same of all layers: down_proj; or ""
    workgroups: tuple[int, int, int]
    launches: int  # a token
    microseconds: float  # each, barrier included: median
    microseconds_per_token: float


def profile(engine: Engine) -> list[ProfileRow]:
    """A row for each kernel, matrix and grid, in the order of the step, then the whole step.

    DeviceError without timestamps. What the cache held is lost.
    """
    if not engine.device.timestamps:
        raise DeviceError(f"{engine.adapter_name}: has no timestamps to measure kernels with")
    steps = min(_STEPS, engine.context - 1)
    dispatches = engine.step_dispatches()
    groups: dict[tuple[str, str, tuple[int, int, int]], list[Dispatch]] = {}
    for dispatch in dispatches:
        matrix = re.sub(r"^model\.(layers\.\d+\.\w+\.)?|\[.*", "", dispatch.matrix)
        key = (dispatch.kernel.name, matrix, dispatch.workgroups)
        groups.setdefault(key, []).append(dispatch)
    rows = []
    for (kernel, matrix, workgroups), group in groups.items():
        if kernel != "sample_token":  # which would move the position on and on
            each = 1e6 * time_dispatches(engine.device, group)[0]
            rows.append(ProfileRow(kernel, matrix, workgroups, len(group), each, each * len(group)))
    times = [engine.gpu_seconds(steps) or 0.0 for _ in range(5)]
    whole = 1e6 * statistics.median(times) / steps
    rows.append(ProfileRow("step", "", (0, 0, 0), len(dispatches), whole / len(dispatches), whole))
    return rows


def markdown(rows: Sequence[ProfileRow]) -> str:
    whole = rows[-1].microseconds_per_token
    lines = [
        "| kernel | matrix | workgroups | launches a token | µs each | µs a token | share |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        grid = " x ".join(map(str, row.workgroups)) if row is not rows[-1] else ""
        lines.append(
            f"| {row.kernel} | {row.matrix} | {grid} | {row.launches} | {row.microseconds:.1f} "
            f"| {row.microseconds_per_token:.0f} | {row.microseconds_per_token / whole:.0%} |"
        )
    return "\n".join(lines)
