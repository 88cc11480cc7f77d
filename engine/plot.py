"""A picture of models on one text: divergence against stored bits. Needs matplotlib, which the rest
of the engine does without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MultipleLocator, NullFormatter

from weights.container import replacing


@dataclass(frozen=True)
class Point:
    label: str
    bits: float  # stored per weight of the block matrices
    kl: float  # mean KL(reference || model) in nats
    error: float = 0.0  # standard error of kl


# llama.cpp executed on the default model; the text was English, but not the one that is judged on.
# 576 columns are no multiple of 256: most of its K-quants fall back to larger types here.
PUBLISHED = (
    Point("Q4_0", 4.50, 0.293),
    Point("IQ4_XS", 4.47, 0.191),
    Point("Q3_K_M", 4.63, 0.127),
    Point("Q4_K_M", 5.53, 0.050),
    Point("Q5_K_M", 6.04, 0.081),
    Point("Q6_K", 8.02, 0.0094),
    Point("Q8_0", 8.50, 0.0041),
)

_OURS, _OTHERS = "#c2410c", "#475569"


def draw(
    path: Path,
    title: str,
    curves: Sequence[Sequence[Point]],
    published: Sequence[Point] = (),
) -> None:
    """Write a PNG or SVG, whole or not at all; the points of each curve are joined.

    Points without a divergence have no place on a logarithmic axis and are left out.
    """
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for i, curve in enumerate(curves):
        points = sorted((point for point in curve if point.kl > 0), key=lambda point: point.bits)
        bits, kl, errors = [[getattr(p, k) for p in points] for k in ("bits", "kl", "error")]
        name = "answer, this run, with standard errors" if i == 0 else None
        axes.errorbar(bits, kl, errors, fmt="o-", color=_OURS, label=name, capsize=3, zorder=3)
        _label(axes, points, _OURS, (-6, -6), "right")
    if published:
        bits, kl = [p.bits for p in published], [p.kl for p in published]
        name = "llama.cpp, measured on another English text"
        axes.errorbar(bits, kl, fmt="D", color=_OTHERS, markersize=5, label=name)
        _label(axes, published, _OTHERS, (6, 4), "left")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MultipleLocator(0.5))
    axes.margins(x=0.08, y=0.08)
    axes.set_xlabel("stored bits per weight of the block matrices")
    axes.set_ylabel("mean KL(reference || model), nats per token")
    axes.set_title(title)
    axes.grid(which="major", color="#cbd5e1", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:])


def _label(
    axes: Axes, points: Sequence[Point], color: str, offset: tuple[int, int], side: str
) -> None:
    for point in points:
        axes.annotate(
            point.label,
            (point.bits, point.kl),
            xytext=offset,
            textcoords="offset points",
            horizontalalignment=side,
            verticalalignment="top" if offset[1] < 0 else "bottom",
            color=color,
            fontsize=9,
        )
