"""Figures for Prometheus. Each server has its own registry."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from engine.memory import Memory

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)


class Metrics:
    """What is counted; gauges are read when they are asked for."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "answer_requests", "Requests answered.", ("path", "status"), registry=registry
        )
        self.prompt_tokens = Counter(
            "answer_prompt_tokens", "Tokens of prompts.", registry=registry
        )
        self.reused_tokens = Counter(
            "answer_reused_tokens", "Of those, what was in the cache.", registry=registry
        )
        self.tokens = Counter("answer_generated_tokens", "Tokens generated.", registry=registry)
        self.restarts = Counter(
            "answer_engine_restarts", "Times the device was opened anew.", registry=registry
        )
        self.first_token = Histogram(
            "answer_first_token_seconds",
            "From a request to its answer's first token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.duration = Histogram(
            "answer_duration_seconds",
            "From a request to its answer's end.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._sequences = Gauge(
            "answer_sequences", "Answers, by state.", ("state",), registry=registry
        )
        self._memory = Gauge(
            "answer_memory_bytes", "Memory on the device.", ("part",), registry=registry
        )

    def watch_sequences(self, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        self._sequences.labels("running").set_function(running)
        self._sequences.labels("waiting").set_function(waiting)

    def set_memory(self, memory: Memory) -> None:
        self._memory.labels("weights").set(memory.weights_bytes)
        self._memory.labels("cache").set(memory.cache_bytes)
        self._memory.labels("scratch").set(memory.scratch_bytes)

    def text(self) -> bytes:
        return generate_latest(self.registry)
