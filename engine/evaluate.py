"""How much of a model's quality weights files keep, measured on a text against a reference.

    answer evaluate smollm2 --bits 3,4,5 --reference smollm2 --text book.txt
    answer evaluate a.safetensors b.safetensors --reference smollm2 --text book.txt

The reference is another weights file, run by the engine in exact mode, or a model before its
conversion, run in float32 by the numpy oracle. The text is cut into windows that do not see each
other; all models read a window before any reads the next. KL is the mean over tokens of
KL(reference || model), in nats; its standard error takes neighbouring tokens for dependent.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from engine.compare import Logits, Model, compare
from engine.errors import EngineError
from engine.flags import add_cache
from engine.generate import Engine
from engine.report import Row, as_json, as_markdown
from engine.tokenizer import Tokenizer
from model.reference import Reference
from weights.bits import Bits, parse_bits
from weights.cache import is_weights_file, resolve, resolve_each
from weights.sources import open_source


def main(arguments: Sequence[str] | None = None) -> int:
    a = _parse(arguments)
    try:
        if a.plot is not None:
            from engine.plot import check_picture, draw_evaluation  # matplotlib is optional

            check_picture(a.plot)
        text = _read_text(a.text)
        _check_models(a.models, a.bits)
        rows = _evaluate(a, text)
        print("\n".join(map(as_json, rows)) if a.json else as_markdown(rows))
        if a.plot is not None:
            draw_evaluation(a.plot, [json.loads(as_json(row)) for row in rows])
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="answer evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="weights file or name of a model")
    add("--reference", required=True, metavar="MODEL", help="weights file or unconverted model")
    add("--text", required=True, metavar="FILE", help="a text in UTF-8")
    add("--tokens", type=int, default=8192, metavar="N", help="how much of it (%(default)s)")
    add("--window", type=int, default=1024, metavar="N", help="tokens at once (%(default)s)")
    add(
        "--bits",
        type=_rates,
        default=[],
        metavar="B,B,...",
        help="stored bits per weight: the model is converted to each of them",
    )
    add("--adapter", metavar="NAME", help="GPU to run on: its number or part of its name")
    add("--exact", action="store_true", help="float32 activations instead of int8 ones")
    add_cache(parser)
    add(
        "--activations",
        action="store_true",
        help="also KL(exact || int8) of each file: what its int8 activations alone cost",
    )
    add("--json", action="store_true", help="one line of JSON per model instead of a table")
    add("--plot", type=Path, metavar="FILE", help="draw KL against bits into a .png or .svg")
    a = parser.parse_args(arguments)
    if min(a.tokens, a.window) < 2:
        parser.error("--tokens and --window take 2 or more")
    return a


def _rates(text: str) -> list[Bits]:
    """`2,2.5,3`"""
    return [parse_bits(rate) for rate in text.split(",")]


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except OSError as error:
        raise EngineError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise EngineError(f"{path}: expected a text in UTF-8: {error}") from None


def _check_models(models: Sequence[str], bits: Sequence[Bits]) -> None:
    """Before the first is converted: every one is there, and none has bits that it cannot have."""
    for model in models:
        if not is_weights_file(model):
            open_source(model)
        elif bits:
            resolve(model, bits[0])  # says that they are fixed


def _evaluate(a: argparse.Namespace, text: str) -> list[Row]:
    reference, tokenizer = _reference(a.reference, a.window, a.adapter)
    token_ids = tokenizer.encode(text)[: a.tokens]
    if len(token_ids) < 2:
        raise EngineError(f"{a.text}: makes {len(token_ids)} tokens, expected 2 or more")
    if len(token_ids) < a.tokens:
        short = f"{a.text}: makes {len(token_ids)} tokens, not {a.tokens}: all of them are used"
        print(short, file=sys.stderr)

    asked = [(model, bits) for model in a.models for bits in a.bits or [None]]
    options: dict[str, Any] = {"context": a.window, "adapter": a.adapter}
    files = [path for model in a.models for path in resolve_each(model, a.bits or [None])]
    engines = [Engine.open(path, exact=a.exact, cache=a.cache, **options) for path in files]
    for (model, _), engine in zip(asked, engines, strict=True):
        if complaint := _difference(engine, reference.config.vocab_size, text, token_ids):
            raise EngineError(
                f"{a.reference}: {complaint} the model {model}; give a reference of the same model"
            )
    twins = [
        Engine.open(path, exact=not a.exact, **options) for path in (files if a.activations else [])
    ]

    shown = _Shown(1 + len(engines) + len(twins), len(token_ids), a.window)
    models = [
        Model(
            shown.counted(model, engine.logits),
            a.exact,
            shown.counted(model, twins[i].logits) if twins else None,
        )
        for i, ((model, _), engine) in enumerate(zip(asked, engines, strict=True))
    ]
    theirs = shown.counted(a.reference, reference.logits)
    with shown.bar:
        verdicts = compare(models, theirs, token_ids, a.window, shown.report)
    return [
        Row(
            model=model,
            bits=bits,
            source=engine.weights.source,
            reference=a.reference,
            text=a.text,
            window=a.window,
            activations="exact" if a.exact else "int8",
            bits_per_weight_blocks=engine.weights.bits_per_weight(block_only=True),
            bits_per_weight_file=engine.weights.bits_per_weight(block_only=False),
            file_bytes=engine.weights.size_bytes,
            against_reference=verdict.against_reference,
            int8_against_exact=verdict.int8_against_exact,
        )
        for (model, bits), engine, verdict in zip(asked, engines, verdicts, strict=True)
    ]


class _Shown:
    """Progress on stderr: a line after each window, on a terminal also a bar."""

    def __init__(self, n_models: int, n_tokens: int, window: int) -> None:
        self._n_tokens, self._window = n_tokens, window
        self._windows_done = 0
        self.bar = Progress(console=Console(stderr=True), disable=not sys.stderr.isatty())
        self._task = self.bar.add_task("tokens read", total=n_models * n_tokens)

    def counted(self, name: str, logits: Logits) -> Logits:
        """The same with progress; EngineError when a model computes what cannot be compared."""

        def read(ids: Sequence[int]) -> np.ndarray:
            rows = logits(ids)
            if not np.isfinite(rows).all():
                raise EngineError(f"{name}: computes logits that are no finite numbers")
            self.bar.advance(self._task, len(ids))
            return rows

        return read

    def report(self, kl: Sequence[float]) -> None:
        self._windows_done += 1
        done = min(self._windows_done * self._window, self._n_tokens)
        so_far = " ".join(f"{mean:.4g}" for mean in kl)
        print(f"{done} of {self._n_tokens} tokens, KL so far {so_far}", file=sys.stderr)


def _reference(spec: str, window: int, adapter: str | None) -> tuple[Engine | Reference, Tokenizer]:
    """A weights file or a source model, ready to run; EngineError when a window is too long."""
    if is_weights_file(spec):
        engine = Engine.open(spec, exact=True, context=window, adapter=adapter)
        return engine, engine.tokenizer
    source = open_source(spec)
    if source.config.max_seq_len < window:
        raise EngineError(
            f"{spec}: works with 1 to {source.config.max_seq_len} positions, --window is {window}"
        )
    tokenizer = Tokenizer(source.tokenizer_json, source.chat_template, source.config)
    # No float16 cache: its rounding is the engine's and none of the model's.
    return Reference.from_source(source, cache_dtype=np.float32), tokenizer


def _difference(engine: Engine, vocab_size: int, text: str, token_ids: Sequence[int]) -> str:
    """In what the reference cannot be the same model, to be followed by its name; or nothing."""
    own = engine.config.vocab_size
    if own != vocab_size:
        return f"has a vocabulary of {vocab_size}, not of {own} as"
    if engine.tokenizer.encode(text)[: len(token_ids)] != token_ids:
        return "cuts the text into other tokens than"
    return ""


if __name__ == "__main__":
    sys.exit(main())
