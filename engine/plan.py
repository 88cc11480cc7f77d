"""Recorded dispatches and their replay: one compute pass, no look-ups, no allocation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
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

    @cached_property
    def _launches(self) -> list[tuple[Any, ...]]:
        """Of each its pipeline, None if it is the one before's, its bind group, its workgroups.

        Made for the first replay, until when its kernels, and other plans', may be compiled.
        """
        launches: list[tuple[Any, ...]] = []
        previous = None
        for d in self.dispatches:
            pipeline = d.kernel.pipeline
            handle = None if pipeline is previous else pipeline._internal
            launches.append((handle, d.bind_group._internal, *d.workgroups))
            previous = pipeline
        return launches

    def replay(self, compute_pass: Any) -> None:
        handle, null, lib = compute_pass._internal, _api.ffi.NULL, _api.lib
        set_pipeline = lib.wgpuComputePassEncoderSetPipeline
        set_bind_group = lib.wgpuComputePassEncoderSetBindGroup
        dispatch = lib.wgpuComputePassEncoderDispatchWorkgroups
        for pipeline, bind_group, x, y, z in self._launches:
            if pipeline is not None:
                set_pipeline(handle, pipeline)
            set_bind_group(handle, 0, bind_group, 0, null)
            dispatch(handle, x, y, z)


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
