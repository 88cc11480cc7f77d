"""Draws what `answer bench` and `answer evaluate` have measured, here or elsewhere.

    answer bench --kernels > kernels.txt && answer plot kernels.txt --out roofline.png
    answer plot 135m.txt 1b.txt 8b.txt --out depth.svg
    answer evaluate smollm2 --bits 3,4,5 --reference smollm2 --text book.txt --json > kl.txt
    answer plot kl.txt --out kl.png

A RUN is a file with their output: its lines of JSON are read, the others passed over. Runs of one
kind share a picture.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import EngineError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="answer plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output of a benchmark")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help=".png or .svg")
    a = parser.parse_args(arguments)
    try:
        draw([line for path in a.runs for line in read_lines(path)], a.out)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def draw(lines: Sequence[dict[str, Any]], out: Path) -> None:
    """Lines of JSON as a picture. EngineError: of different kinds, or not all there."""
    from engine.plot import check_picture, draw_evaluation  # matplotlib is optional
    from engine.plot_bench import draw_bench

    check_picture(out)
    judged = ["kl_mean" in line for line in lines]
    if any(judged) and not all(judged):
        raise EngineError(f"{out}: benchmarks and evaluations do not fit into one picture")
    try:
        (draw_evaluation if all(judged) else draw_bench)(out, lines)
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(
            f"{out}: the runs lack something ({type(error).__name__}: {error}), as those of "
            "another version may; measure again"
        ) from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects among the lines of a benchmark's output."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"{path}: cannot be read: {error}") from None
    found = []
    for line in text.splitlines():
        if line.startswith("{"):
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict) and ("rows" in value or "kl_mean" in value):
                found.append(value)
    if not found:
        raise EngineError(f"{path}: holds no line of JSON of `answer bench` or `answer evaluate`")
    return found


if __name__ == "__main__":
    sys.exit(main())
