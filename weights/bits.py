"""What `--bits` takes, wherever it is asked for. Nothing is imported here that takes its time."""

from __future__ import annotations

import argparse
import math
from typing import Literal

Bits = float | Literal["lossless"]  # stored per weight

# A bit for four weights is the least that the code can do; what is stored of rows comes on top.
MIN_BITS, MAX_BITS = 0.25, 8.0


def parse_bits(text: str) -> Bits:
    """An argparse type: a rate on offer, or the word for all of the weights' bits."""
    if text == "lossless":
        return "lossless"
    try:
        bits = float(text)
    except ValueError:
        bits = math.nan
    if not MIN_BITS <= bits <= MAX_BITS:
        raise argparse.ArgumentTypeError(
            f"expected {MIN_BITS:g} to {MAX_BITS:g}, or lossless, found {text}"
        )
    return bits
