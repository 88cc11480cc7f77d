"""Recorded dispatches and their replay: one compute pass, no look-ups, no allocation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import wgpu
from wgpu.backends.wgpu_native import _api

from engine.device import Device
from engine.interrupt import uninterrupted
from engine.kernel import Dispatch


class Plan:
    """A list of dispatches that is recorded once and replayed for every token.

    Replay calls the backend library directly with handles taken beforehand: 2 us a dispatch instead
    of the 7 to 10 of the Python objects, which at ten dispatches a layer would be most of a token's
    time on a fast GPU.
    """

    def __init__(self, dispatches: Iterable[Dispatch]) -> None:
        self.dispatches = list(dispatches)  # keeps pipelines and bind groups alive
        lib, null = _api.lib, _api.ffi.NULL
        self._calls: list[tuple[Any, tuple[Any, ...]]] = []
        previous = None
        for d in self.dispatches:
            pipeline = d.kernel.pipeline
            if pipeline is not previous:
                self._calls.append((lib.wgpuComputePassEncoderSetPipeline, (pipeline._internal,)))
                previous = pipeline
            group = (0, d.bind_group._internal, 0, null)
            self._calls.append((lib.wgpuComputePassEncoderSetBindGroup, group))
            self._calls.append((lib.wgpuComputePassEncoderDispatchWorkgroups, d.workgroups))

    def replay(self, compute_pass: Any) -> None:
        handle = compute_pass._internal
        for function, arguments in self._calls:
            function(handle, *arguments)


def encode(encoder: Any, plans: Sequence[Plan], timestamps: Any = None) -> None:
    """The plans, in order, as one compute pass, which writes `timestamps` if they are asked for."""
    if plans:
        compute_pass = encoder.begin_compute_pass(timestamp_writes=timestamps)
        for plan in plans:
            plan.replay(compute_pass)
        compute_pass.end()


@uninterrupted()
def run(device: Device, *plans: Plan) -> None:
    """Submit the plans, in order, as one compute pass; does not wait."""
    encoder = device.wgpu.create_command_encoder()
    encode(encoder, plans)
    device.submit(encoder.finish())


@uninterrupted()
def gpu_seconds(device: Device, *plans: Plan) -> float | None:
    """GPU time of the plans as one compute pass; None on an adapter without timestamps."""
    if not device.timestamps:
        return None
    queries = device.wgpu.create_query_set(type="timestamp", count=2)
    usage = wgpu.BufferUsage.QUERY_RESOLVE | wgpu.BufferUsage.COPY_SRC
    resolved = device.wgpu.create_buffer(size=16, usage=usage)
    encoder = device.wgpu.create_command_encoder()
    ends = dict(query_set=queries, beginning_of_pass_write_index=0, end_of_pass_write_index=1)
    encode(encoder, plans, ends)
    encoder.resolve_query_set(queries, 0, 2, resolved, 0)
    device.submit(encoder.finish())
    begin, end = device.read(resolved, np.uint64, (2,))
    return float(end - begin) * 1e-9  # wgpu's timestamps are in nanoseconds
