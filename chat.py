"""The terminal chat: opens a model, then answers one prompt or talks. Its parts: engine/chat."""

from __future__ import annotations

import io
import os
import secrets
import sys
from collections.abc import Sequence

from engine.chat.arguments import parser
from engine.chat.commands import loop
from engine.chat.talk import Chat, describe
from engine.chat.terminal import complain, line_reader, say
from engine.errors import EngineError


def main(argv: Sequence[str] | None = None) -> int:
    """The command `answer`. Returns its exit code."""
    flags = parser()
    args = flags.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without the character gets "?"
    try:
        prompt = args.prompt
        if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
            prompt = sys.stdin.buffer.read().decode(errors="replace").rstrip("\r\n")
        if prompt is not None and not prompt.strip():
            flags.error("the prompt is empty")
        # Only now: this loads the GPU library, for which --help and a mistyped flag need not wait.
        from engine import Engine, Sampling

        def open_model(name: str) -> Engine:
            """The flags about bits and drafts are about the first model; /model may name others."""
            own = name == args.model
            return Engine.open(
                name,
                exact=args.exact,
                context=args.context,
                cache=args.cache,
                adapter=args.adapter,
                bits=args.bits if own else None,
                draft=args.draft if own else None,
                announce=None
                if args.no_stats
                else lambda engine, memory: say(describe(name, engine, memory, about=True)),
            )

        seed = secrets.randbits(32) if args.seed is None else args.seed
        sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, seed)
        chat = Chat(
            open_model,
            args.model,
            sampling,
            args.max_tokens,
            args.system,
            show_stats=not args.no_stats,
            slide=args.overflow == "slide",
        )
        chat.greet()
        return loop(chat, line_reader(chat.count)) if prompt is None else chat.answer(prompt)
    except EngineError as error:
        complain(error)
        return 1
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT, as a shell counts
    except BrokenPipeError:  # whoever read the answers has left
        null = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):  # Python flushes them once more on its way out
            os.dup2(null, stream.fileno())
        return 141  # 128 + SIGPIPE


if __name__ == "__main__":
    sys.exit(main())
