"""Pictures of benchmarks, from their lines of JSON: rates, the time of kernels, the roofline."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from engine.errors import EngineError
from engine.plot import GRID, OTHERS, OURS, figure_of, finish, save

Run = Mapping[str, Any]  # a line of JSON of `answer bench`

# Told apart by colour-blind eyes as well (after Okabe and Ito), and by their markers.
_COLORS = (OURS, "#0072b2", "#009e73", "#cc79a7", "#e69f00", OTHERS)
_KERNELS = {"matvec": OURS, "f16": "#0f172a", "int8": "#64748b", "int4": "#a3b1c6"}
_MARKERS = "osD^vP*Xh<>p"


def draw_bench(path: Path, runs: Sequence[Run]) -> None:
    """All that the runs measured, a panel for each kind of figure; EngineError: nothing to draw."""
    kernels = [run for run in runs if _is_of_kernels(run)]
    models = [run for run in runs if not _is_of_kernels(run)]
    panels: list[Callable[[Axes], None]] = []
    for kind, title, x in (
        ("pp", "reading a prompt", "tokens of the prompt"),
        ("tg", "generating", "tokens in the context before"),
        ("batch", "generating, all sequences together", "sequences at once"),
    ):
        curves = {_name(run): rates(run, kind) for run in models}
        if any(len(curve) > 1 for curve in curves.values()):
            panels.append(partial(_draw_rates, curves=curves, title=title, x=x))
    panels += [partial(_draw_profile, run=run) for run in models if run["profile"]]
    for run in kernels:
        panels += [partial(_draw_roofline, run=run), partial(_draw_memory, run=run)]
    if not panels and any(run["rows"] for run in models):
        panels.append(partial(_draw_tests, runs=models))
    if not panels:
        raise EngineError(f"{path}: nothing was measured that could be drawn")
    figure, all_axes = figure_of(len(panels))
    for draw, axes in zip(panels, all_axes, strict=True):
        draw(axes)
    for run in kernels or models[:1]:
        figure.suptitle(f"{run['adapter']}, {run['date']}", fontsize=10, color=OTHERS)
    save(figure, path)


def rates(run: Run, kind: str) -> list[tuple[int, float, float, float]]:
    """Of tests of a kind, by what they are about: that number, tokens/s, the least, the most.

    pp: tokens of the prompt. tg: tokens before; of several rows of a depth the last one. batch:
    sequences.
    """
    rows = {}
    if kind == "batch":
        rows = {row["sequences"]: row for row in run.get("batch", [])}
    for row in run["rows"]:
        if match := re.fullmatch(r"(pp|tg)(\d+)(?:@d(\d+))?", row["test"]):
            name, number, depth = match.groups()
            if name == kind:
                rows[int(depth or 0) if name == "tg" else int(number)] = row
    names = ("tokens_per_second", "slowest", "fastest")
    return [(at, *(row[name] for name in names)) for at, row in sorted(rows.items())]


def _is_of_kernels(run: Run) -> bool:
    return any("kernel" in row for row in run["rows"])


def _name(run: Run) -> str:
    return f"{run['model']}, {run['bits_per_weight_file']:.2f} bit, {run['activations']}"


def _draw_rates(
    axes: Axes, curves: Mapping[str, list[tuple[int, float, float, float]]], title: str, x: str
) -> None:
    places = sorted({point[0] for curve in curves.values() for point in curve})
    for color, marker, (name, curve) in zip(_COLORS, _MARKERS, curves.items(), strict=False):
        if curve:
            at, middle, least, most = (list(values) for values in zip(*curve, strict=True))
            spread = [
                [m - low for m, low in zip(middle, least, strict=True)],
                [high - m for m, high in zip(middle, most, strict=True)],
            ]
            form = f"{marker}-"
            axes.errorbar(at, middle, spread, fmt=form, color=color, label=name, capsize=3)
    if places[0]:  # numbers that double have the same distance
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [str(place) for place in places])
        axes.set_xticks([], minor=True)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    highest = max(point[3] for curve in curves.values() for point in curve)
    axes.set_ylim(0, highest * (1.1 + 0.07 * len(curves)))  # room for the legend
    finish(axes, title, x, "tokens per second: median, slowest, fastest")


def _draw_tests(axes: Axes, runs: Sequence[Run]) -> None:
    """Single figures, with nothing to put them in an order."""
    rows = [(f"{run['model']}\n{row['test']}", row) for run in runs for row in run["rows"]]
    axes.barh([name for name, _ in rows], [row["tokens_per_second"] for _, row in rows], color=OURS)
    axes.invert_yaxis()
    finish(axes, "median of the runs", "tokens per second", "test")


def _draw_profile(axes: Axes, run: Run) -> None:
    *rows, step = run["profile"]
    whole = step["microseconds_per_token"]
    names = [_launches(row) for row in rows]
    times = [row["microseconds_per_token"] for row in rows]
    kinds = ["decode weights" if "matvec" in row["kernel"] else "others" for row in rows]
    for kind, color in (("decode weights", OURS), ("others", OTHERS)):
        places = [place for place, other in enumerate(kinds) if other == kind]
        bars = axes.barh(places, [times[i] for i in places], color=color, label=kind)
        shares = [f"{times[i]:.0f}, {100 * times[i] / whole:.0f} %" for i in places]
        axes.bar_label(bars, shares, padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), names, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    title = f"{_name(run)}:\n{whole:.0f} µs a token on the GPU"
    finish(axes, title, "µs a token, each kind of launch alone", "")
    axes.grid(axis="y", visible=False)


def _launches(row: Mapping[str, Any]) -> str:
    """Of a profile: what is launched, and how often for a token."""
    name = row["kernel"] + (f", {row['matrix']}" if row["matrix"] else "")
    return name if row["launches"] == 1 else f"{row['launches']} x {name}"


def _series(run: Run) -> dict[str, list[Mapping[str, Any]]]:
    """Rows by what the picture calls their kernel."""
    series: dict[str, list[Mapping[str, Any]]] = {}
    for row in run["rows"]:
        name = "coded" if row["kernel"] == "matvec" else row["kernel"]
        if row["tokens"] > 1:
            name += f", {row['tokens']} tokens"
        series.setdefault(name, []).append(row)
    return series


def _best_memory(run: Run) -> float:
    """GB/s: no adapter tells what its memory could do, so the best that any kernel here did."""
    return max(row["gb_per_second"] for row in run["rows"])


def _shapes(run: Run) -> list[tuple[int, int]]:
    """Largest first."""
    shapes = {(row["rows"], row["cols"]) for row in run["rows"]}
    return sorted(shapes, key=lambda shape: (-shape[0] * shape[1], shape))


def _draw_roofline(axes: Axes, run: Run) -> None:
    """Weights multiplied a second against weights in a byte: as far right as the code is short."""
    roof, shapes = _best_memory(run), _shapes(run)
    for name, rows in _series(run).items():
        color = _KERNELS[rows[0]["kernel"]]
        for row in rows:
            axes.plot(
                8 / row["bits_per_weight"],
                row["gweights_per_second"],
                _MARKERS[shapes.index((row["rows"], row["cols"])) % len(_MARKERS)],
                color=color,
                markerfacecolor=color if row["tokens"] == 1 else "none",
                label=name if row is rows[0] else None,
            )
    ends = [8 / max(row["bits_per_weight"] for row in run["rows"]) / 1.2]
    ends.append(8 / min(row["bits_per_weight"] for row in run["rows"]) * 1.2)
    axes.plot(ends, [roof * end for end in ends], "--", color=OTHERS, zorder=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(top=2.5 * roof * ends[1])  # room for the legend
    ticks = [tick for tick in (0.5, 1, 2, 3, 4, 6) if tick <= ends[1]]
    axes.set_xticks(ticks, [f"{tick:g}\n({8 / tick:.3g} bit)" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")
    title = f"matvecs, by shape; dashed: memory's roof,\n{roof:,.0f} GB/s, the best of this run"
    finish(axes, title, "weights per byte read", "Gweight/s, each counted once a pass")


def _draw_memory(axes: Axes, run: Run) -> None:
    """For each shape, how much of the memory's rate its kernels reach."""
    series, shapes = _series(run), _shapes(run)
    height = 0.8 / len(series)
    for i, (name, rows) in enumerate(series.items()):
        kernel = rows[0]["kernel"]
        places = [shapes.index((row["rows"], row["cols"])) + i * height for row in rows]
        axes.barh(
            places,
            [row["gb_per_second"] for row in rows],
            height,
            label=name,
            color=_KERNELS[kernel],
            hatch="//" if rows[0]["tokens"] > 1 else None,
            edgecolor="white",
        )
    axes.axvline(_best_memory(run), linestyle="--", color=OTHERS)
    centre = 0.4 - height / 2
    names = [f"{rows} x {cols}" for rows, cols in shapes]
    axes.set_yticks([i + centre for i in range(len(shapes))], names, fontsize=9)
    axes.tick_params("y", length=0, pad=16)
    for i in range(len(shapes)):  # the roofline's markers
        axes.plot(
            -0.025,
            i + centre,
            _MARKERS[i % len(_MARKERS)],
            color=OTHERS,
            markersize=5,
            transform=axes.get_yaxis_transform(),
            clip_on=False,
        )
    axes.invert_yaxis()
    finish(
        axes, "bytes read of each shape;\ndashed: the best of this run", "GB/s", "rows x columns"
    )
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
