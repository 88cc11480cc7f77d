"""Flags that several commands have. Nothing is imported here that takes its time."""

from __future__ import annotations

import argparse

CACHES = "f16", "int8", "int4"


def add_cache(parser: argparse.ArgumentParser) -> None:
    kept = "what is kept of each position: 16 bits, 8, or 8 of keys and 4 of values (f16)"
    parser.add_argument("--cache", choices=CACHES, default="f16", help=kept)
