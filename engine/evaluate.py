"""How much of a model's quality a weights file keeps, measured on a text against a reference.

    python -m engine.evaluate smollm2 --bits 4 --reference smollm2 --text book.txt --tokens 8192

The reference is another weights file, run by the engine in exact mode, or a model before its
conversion, run in float32 by the numpy oracle. The text is cut into windows that do not see each
other. KL is the mean over tokens of KL(reference || model), in nats.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import EngineError
from engine.generate import Engine
from model.reference import Reference
from weights.convert import parse_bits
from weights.sources import open_source

Logits = Callable[[Sequence[int]], npt.NDArray[Any]]  # token ids (n,) -> (n, vocab_size)

_ROWS = 64  # compared at a time: in float64 the logits of a whole window would be large


@dataclass(frozen=True)
class Comparison:
    tokens: int  # positions that were compared
    perplexity: float
    reference_perplexity: float
    kl_mean: float
    kl_p99: float  # 99th percentile over the positions
    top1_agreement: float  # share of the positions at which both have the same best token


def compare(
    model: Logits,
    reference: Logits,
    token_ids: Sequence[int],
    window: int,
    progress: bool = False,
) -> Comparison:
    """Both models on a text of at least 2 tokens, in windows of at least 2."""
    kl, agree, nll_model, nll_reference = [], [], [], []
    for end, ids in _windows(token_ids, window):
        ours, theirs = model(ids), reference(ids)
        for begin in range(0, len(ids), _ROWS):
            part = slice(begin, begin + _ROWS)
            p, q = log_softmax(theirs[part]), log_softmax(ours[part])
            kl.append((np.exp(p) * (p - q)).sum(axis=-1))
            agree.append(p.argmax(axis=-1) == q.argmax(axis=-1))
            following = ids[begin + 1 : begin + _ROWS + 1]  # the window's last token has none
            rows = np.arange(len(following))
            nll_model.append(-q[rows, following])
            nll_reference.append(-p[rows, following])
        if progress:
            so_far = f"{end} of {len(token_ids)} tokens, KL {np.concatenate(kl).mean():.4f}"
            print(f"\r{so_far}", end="", file=sys.stderr, flush=True)
    if progress:
        print(file=sys.stderr)
    all_kl = np.concatenate(kl)
    return Comparison(
        tokens=all_kl.size,
        perplexity=float(np.exp(np.concatenate(nll_model).mean())),
        reference_perplexity=float(np.exp(np.concatenate(nll_reference).mean())),
        kl_mean=float(all_kl.mean()),
        kl_p99=float(np.percentile(all_kl, 99)),
        top1_agreement=float(np.concatenate(agree).mean()),
    )


def log_softmax(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Along the last axis; in float64, because differences of close distributions are looked at."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def _windows(token_ids: Sequence[int], window: int) -> Iterator[tuple[int, list[int]]]:
    """(where it ends, its tokens); a last window of one token predicts nothing and is left out."""
    for begin in range(0, len(token_ids) - 1, window):
        ids = list(token_ids[begin : begin + window])
        yield begin + len(ids), ids


def _reference(spec: str, vocab_size: int, window: int, adapter: str | None) -> Logits:
    """Logits of a weights file or a source model; EngineError when it cannot be the same model."""
    path = Path(spec)
    runner: Engine | Reference
    if path.is_file() and path.suffix != ".gguf":
        runner = Engine.open(path, exact=True, context=window, adapter=adapter)
    else:
        # No float16 cache: its rounding is the engine's and none of the model's.
        runner = Reference.from_source(open_source(spec), cache_dtype=np.float32)
    config = runner.config
    if config.vocab_size != vocab_size:
        raise EngineError(
            f"{spec}: has a vocabulary of {config.vocab_size}, the model one of {vocab_size}; "
            "give a reference of the same model"
        )
    if config.max_seq_len < window:
        raise EngineError(
            f"{spec}: works with 1 to {config.max_seq_len} positions, --window is {window}"
        )
    return runner.logits


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except OSError as error:
        raise EngineError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise EngineError(f"{path}: expected a text in UTF-8: {error}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m engine.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", help="weights file or name of a model")
    add("--reference", required=True, metavar="MODEL", help="weights file or unconverted model")
    add("--text", required=True, metavar="FILE", help="a text in UTF-8")
    add("--tokens", type=int, default=8192, metavar="N", help="how much of it (%(default)s)")
    add("--window", type=int, default=1024, metavar="N", help="tokens at once (%(default)s)")
    bits_help = "stored bits per weight, or lossless, when the model is converted"
    add("--bits", type=parse_bits, help=bits_help)
    add("--adapter", metavar="NAME", help="GPU to run on: its number or part of its name")
    add("--exact", action="store_true", help="float32 activations instead of int8 ones")
    add("--json", action="store_true", help="print one line of JSON instead of a table")
    a = parser.parse_args(arguments)
    if min(a.tokens, a.window) < 2:
        parser.error("--tokens and --window take 2 or more")
    try:
        text = _read_text(a.text)
        engine = Engine.open(
            a.model, exact=a.exact, context=a.window, adapter=a.adapter, bits=a.bits
        )
        token_ids = engine.tokenizer.encode(text)[: a.tokens]
        if len(token_ids) < 2:
            raise EngineError(f"{a.text}: makes {len(token_ids)} tokens, expected 2 or more")
        reference = _reference(a.reference, engine.config.vocab_size, a.window, a.adapter)
        result = compare(engine.logits, reference, token_ids, a.window, sys.stderr.isatty())
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    blocks, whole = (engine.weights.bits_per_weight(block_only=only) for only in (True, False))
    if a.json:
        about = {"model": a.model, "reference": a.reference, "text": a.text, "window": a.window}
        bits = {"bits_per_weight_blocks": blocks, "bits_per_weight_file": whole}
        print(json.dumps({**about, **bits, **dataclasses.asdict(result)}))
        return 0
    print(f"tokens                 {result.tokens} in windows of {a.window}")
    print(f"stored bit/weight      {blocks:.3f} in the blocks, {whole:.3f} in all")
    print(f"perplexity             {result.perplexity:.3f}")
    print(f"reference perplexity   {result.reference_perplexity:.3f}")
    print(f"KL(reference || model) {result.kl_mean:.5f}, 99th percentile {result.kl_p99:.5f}")
    print(f"same best token        {100 * result.top1_agreement:.2f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
