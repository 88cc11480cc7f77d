"""The command `answer serve`: its flags, what it says, how it ends."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.errors import EngineError
from engine.flags import add_cache
from weights.bits import parse_bits

_KEY = "ANSWER_API_KEY"
_EXAMPLES = f"""\
examples:
  answer serve                                   # the default model, for this machine
  answer serve HuggingFaceTB/SmolLM2-1.7B-Instruct --bits 4 --port 8000
  {_KEY}=secret answer serve --host 0.0.0.0
  curl localhost:8080/v1/chat/completions -H 'content-type: application/json' \\
    -d '{{"messages": [{{"role": "user", "content": "Why is the sky blue?"}}]}}'
"""


def _from(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `least` on."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit()) or not least <= int(text) < 1 << 32:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least}, found {text}")
        return int(text)

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="answer serve",
        description="Serve a model over HTTP, as the OpenAI API has it, with a page to chat at /.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", nargs="?", default="smollm2", metavar="MODEL", help="weights file or name")
    add("--host", default="127.0.0.1", help="address to listen at (this machine's alone)")
    add("--port", type=int, default=8080, metavar="N", help="0: any that is free (8080)")
    key = f"whoever asks must have it; needed with another --host; or {_KEY}"
    add("--api-key", default=os.environ.get(_KEY), metavar="KEY", help=key)
    running = "answers that are worked on at once, up to 64 (16)"
    add("--max-sequences", type=_from(1), default=16, metavar="N", help=running)
    add("--queue", type=_from(0), default=64, metavar="N", help="answers that may wait (64)")
    grace = "for answers to end by themselves at Ctrl-C (10)"
    add("--grace", type=_from(0), default=10, metavar="SECONDS", help=grace)
    add("--bits", type=parse_bits, help="stored bits per weight, or lossless, when it is converted")
    add("--context", type=_from(1), metavar="N", help="tokens of a prompt and its answer together")
    positions = "tokens that the cache holds of all answers together (the context)"
    add("--cache-positions", type=_from(1), metavar="N", help=positions)
    add_cache(parser)
    add("--adapter", metavar="NAME", help="GPU to run on: its number or part of its name")
    add("--exact", action="store_true", help="float32 activations: slower, true to the weights")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    if not 0 <= args.port < 1 << 16:
        parser.error(f"argument --port: expected 0 to 65535, found {args.port}")
    try:
        _serve(args)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before there was a server to stop
        return 130
    return 0


def _serve(args: argparse.Namespace) -> None:
    try:
        from engine.server.run import Server, listen
    except ImportError as error:
        raise EngineError(f"serving needs {error.name}: pip install 'answer-llm[server]'") from None
    from engine import Engine
    from weights.cache import resolve

    listener = listen(args.host, args.port, args.api_key)  # first: it is what fails most often
    path = resolve(args.model, args.bits)

    def open_engine() -> Engine:
        return Engine.open(
            path,
            exact=args.exact,
            context=args.context,
            cache=args.cache,
            cache_positions=args.cache_positions,
            adapter=args.adapter,
        )

    name = Path(args.model).stem if Path(args.model).exists() else args.model
    server = Server(
        listener,
        open_engine,
        name,
        api_key=args.api_key,
        max_sequences=args.max_sequences,
        max_waiting=args.queue,
        grace_seconds=args.grace,
    )
    server.serve_until_stopped()
