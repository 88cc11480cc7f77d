"""Pictures: how all of them look, and divergence against stored bits of models on one text.

Needs matplotlib, which the rest of the engine does without; to import this raises an EngineError
where it is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import EngineError
from weights.cache import DEFAULT_MODEL
from weights.container import check_place, replacing

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MultipleLocator, NullFormatter
except ImportError as error:
    raise EngineError(
        f"pictures need matplotlib ({error}); install it with: pip install 'answer-llm[plot]'"
    ) from None

_SUFFIXES = (".png", ".svg")
OURS, OTHERS, GRID = "#c2410c", "#475569", "#cbd5e1"
_COLUMNS = 2  # of panels: more of them are too small to read where a page shows the picture


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


def check_picture(path: Path) -> None:
    """Now rather than after hours of work; EngineError says why nothing could be drawn there."""
    if path.suffix not in _SUFFIXES:
        raise EngineError(f"{path}: expected a name that ends in {' or '.join(_SUFFIXES)}")
    check_place(path)


def figure_of(n_panels: int) -> tuple[Figure, list[Axes]]:
    """Panels, two in a row, each with margins of its own."""
    columns = min(n_panels, _COLUMNS)
    rows = -(-n_panels // columns)
    figure = Figure(figsize=(8 if columns == 1 else 5.5 * columns, 4.6 * rows), dpi=150)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    panels = figure.subfigures(rows, columns, squeeze=False).flat
    return figure, [panel.subplots() for panel in list(panels)[:n_panels]]


def finish(axes: Axes, title: str, x: str, y: str) -> None:
    """A panel's words and grid; x and y say what is on the axes, in which unit."""
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(which="major", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(edgecolor="none", framealpha=0.9, fontsize=9)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG or SVG, whole or not at all."""
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:])


def draw_evaluation(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Models judged in one run, of which `lines` are the lines of JSON: KL against bits."""
    curves: dict[str, list[Point]] = {}
    for line in lines:
        bits = line["bits"]
        name = Path(line["model"]).stem if bits is None else str(bits)
        if isinstance(bits, float):
            name = f"{bits:g} bit"
        error = line["kl_standard_error"] or 0
        point = Point(name, line["bits_per_weight_blocks"], line["kl_mean"], error)
        curves.setdefault(line["model"], []).append(point)
    first = lines[0]
    sources = sorted({line["source"] for line in lines})
    title = (
        f"{', '.join(sources)} on {Path(first['text']).name}, "
        f"{first['tokens']} tokens in windows of {first['window']}, "
        f"{first['activations']} activations"
    )
    # Others measured the same model against its unquantized self.
    comparable = sources == [first["reference"]] == [DEFAULT_MODEL]
    draw(path, title, list(curves.values()), PUBLISHED if comparable else ())


def draw(
    path: Path,
    title: str,
    curves: Sequence[Sequence[Point]],
    published: Sequence[Point] = (),
) -> None:
    """KL against bits; the points of each curve are joined.

    Points without a divergence have no place on a logarithmic axis and are left out.
    """
    figure, (axes,) = figure_of(1)
    for i, curve in enumerate(curves):
        points = sorted((point for point in curve if point.kl > 0), key=lambda point: point.bits)
        bits, kl, errors = [[getattr(p, k) for p in points] for k in ("bits", "kl", "error")]
        name = "answer, this run, with standard errors" if i == 0 else None
        axes.errorbar(bits, kl, errors, fmt="o-", color=OURS, label=name, capsize=3, zorder=3)
        _label(axes, points, OURS, (-6, -6), "right")
    if published:
        bits, kl = [p.bits for p in published], [p.kl for p in published]
        name = "llama.cpp, measured on another English text"
        axes.errorbar(bits, kl, fmt="D", color=OTHERS, markersize=5, label=name)
        _label(axes, published, OTHERS, (6, 4), "left")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MultipleLocator(0.5))
    axes.margins(x=0.12, y=0.08)  # room for labels
    bits_label = "stored bits per weight of the block matrices"
    finish(axes, title, bits_label, "mean KL(reference || model), nats per token")
    save(figure, path)


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
