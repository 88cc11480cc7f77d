"""The flags of `answer chat`. Loads nothing heavy: --help needs no GPU library."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from engine.flags import add_cache
from weights.bits import parse_bits


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="answer chat",
        description="Chat with a language model whose weights stay entropy-coded in GPU memory.",
        epilog='example: answer -p "Why is the sky blue?" -n 200',
    )
    add = parser.add_argument
    count = _within(int, 1)
    model = "weights file or name of a model (smollm2)"
    add("model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL", help=model)
    add("--model", default="smollm2", metavar="MODEL", help="the same")
    add("--bits", type=parse_bits, help="stored bits per weight, or lossless, when it is converted")
    add("--context", type=count, metavar="N", help="tokens of prompt and answer together")
    overflow = (
        "full context: end the answer (stop), or read its latest half again and go on (slide)"
    )
    add("--overflow", choices=("stop", "slide"), default="stop", help=overflow)
    add_cache(parser)
    add("--adapter", metavar="NAME", help="GPU to run on: its number or part of its name")
    add("--draft", metavar="MODEL", help="a smaller model of the same family that guesses for it")
    add("--exact", action="store_true", help="float32 activations: slower, true to the weights")
    add("-p", "--prompt", help="answer this and leave; - reads stdin, as a pipe without -p does")
    add("-s", "--system", metavar="TEXT", help="system prompt")
    add("-n", "--max-tokens", type=count, default=1024, metavar="N", help="longest answer (1024)")
    add("--no-stats", action="store_true", help="print no figures of the model and the answers")

    draw = parser.add_argument_group("how tokens are drawn").add_argument
    share = _within(float, 0, 1)
    heat = _within(float, 0, 100)
    warm = "0: always the likeliest (%(default)s)"
    draw("-t", "--temperature", type=heat, default=0.5, metavar="T", help=warm)
    draw("--top-k", type=_within(int, 0), default=0, metavar="K", help="among the K likeliest")
    draw("--top-p", type=share, default=1.0, metavar="P", help="among the likeliest that sum to P")
    least = "none below P times the likeliest (%(default)s)"
    draw("--min-p", type=share, default=0.1, metavar="P", help=least)
    draw("--seed", type=_within(int, 0), metavar="N", help="same seed, same answers")
    return parser


def _within(kind: type[float], low: float, high: float = 2**32 - 1) -> Callable[[str], float]:
    """An argparse type: low <= value <= high."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {what} from {low} to {high}, found {text}")
        return value

    return parse
