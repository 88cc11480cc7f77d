"""The engine. `from engine import Batch, Engine, Sampling` is all that a program needs."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.batch import Batch as Batch
    from engine.generate import Engine as Engine
    from engine.generate import Generation as Generation
    from engine.sampler import Sampling as Sampling

__all__ = ["Batch", "Engine", "Generation", "Sampling"]


def __getattr__(name: str) -> Any:
    # Late, so that `engine.errors` and `--help` cost no GPU library, and weights may import the
    # errors.
    if name in ("Engine", "Generation"):
        from engine import generate

        return getattr(generate, name)
    if name == "Batch":
        from engine.batch import Batch

        return Batch
    if name == "Sampling":
        from engine.sampler import Sampling

        return Sampling
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
