"""How much of a model's quality a weights file keeps, measured on a text against a reference.

    python -m engine.evaluate smollm2 --bits 4 --reference smollm2 --text book.txt --tokens 8192

The reference is another weights file, run by the engine in exact mode, or a model to convert, run
unquantized in float32 by the numpy oracle. The text is cut into windows that do not see each other.
KL is the mean over tokens of KL(reference || model) in nats.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from engine.errors import EngineError
from engine.generate import Engine

Logits = Callable[[Sequence[int]], np.ndarray]  # token ids (n,) -> float32 (n, vocab_size)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Along the last axis, in float64: differences of close distributions are what is looked at."""
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return logits


def compare(
    model: Logits, reference: Logits, token_ids: Sequence[int], window: int, progress: bool = False
) -> dict[str, float]:
    """Perplexities of both, mean and 99th percentile of KL(reference || model), share of equal best tokens."""
    kl, agree, nll_model, nll_reference = [], [], [], []
    for done, ids in _windows(token_ids, window):
        ours, theirs = model(ids), reference(ids)
        for begin in range(0, len(ids), 64):  # the float64 copies of a whole window would be large
            p, q = log_softmax(theirs[begin : begin + 64]), log_softmax(ours[begin : begin + 64])
            kl.append((np.exp(p) * (p - q)).sum(axis=-1))
            agree.append(p.argmax(axis=-1) == q.argmax(axis=-1))
            following = np.asarray(ids[begin + 1 : begin + 65])
            rows = np.arange(following.size)
            nll_reference.append(-p[rows, following])
            nll_model.append(-q[rows, following])
        if progress:
            mean = np.concatenate(kl).mean()
            print(f"\r{done} of {len(token_ids)} tokens, KL {mean:.4f}", end="", file=sys.stderr, flush=True)
    if progress:
        print(file=sys.stderr)
    all_kl = np.concatenate(kl)
    return {
        "tokens": all_kl.size,
        "perplexity": float(np.exp(np.concatenate(nll_model).mean())),
        "reference_perplexity": float(np.exp(np.concatenate(nll_reference).mean())),
        "kl_mean": float(all_kl.mean()),
        "kl_p99": float(np.percentile(all_kl, 99)),
        "top1_agreement": float(np.concatenate(agree).mean()),
    }


def _windows(token_ids: Sequence[int], window: int) -> Iterator[tuple[int, Sequence[int]]]:
    for begin in range(0, len(token_ids), window):
        ids = token_ids[begin : begin + window]
        if len(ids) > 1:  # one token predicts nothing that could be checked
            yield begin + len(ids), ids


def _reference(spec: str, model: Engine, window: int, adapter: str | None) -> Logits:
    if Path(spec).suffix == ".safetensors" and Path(spec).is_file():
        engine = Engine.open(spec, exact=True, context=window, adapter=adapter)
        config, logits = engine.config, engine.logits
    else:
        from model.reference import Reference
        from weights.sources import open_source

        oracle = Reference.from_source(open_source(spec))
        config, logits = oracle.config, oracle.logits
    if config.vocab_size != model.config.vocab_size:
        raise EngineError(
            f"{spec}: has a vocabulary of {config.vocab_size}, the model one of {model.config.vocab_size}: "
            "the reference must be the same model"
        )
    return logits


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"{path}: expected a text file in UTF-8: {error}") from error


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m engine.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a weights file, or a model to convert")
    parser.add_argument("--reference", required=True, help="a weights file, or an unquantized model")
    parser.add_argument("--text", required=True, help="a UTF-8 text file")
    parser.add_argument("--tokens", type=int, default=8192, help="how much of it to read (default 8192)")
    parser.add_argument("--window", type=int, default=1024, help="tokens that see each other (default 1024)")
    parser.add_argument("--bits", type=float, help="stored bits per weight, when the model is to be converted")
    parser.add_argument("--exact", action="store_true", help="f32-like activations instead of int8")
    parser.add_argument("--adapter", help="number of the adapter, or part of its name")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    a = parser.parse_args(argv)
    if a.tokens < 2 or a.window < 2:
        parser.error("--tokens and --window take 2 or more")
    try:
        text = _read_text(a.text)
        engine = Engine.open(a.model, exact=a.exact, context=a.window, adapter=a.adapter, bits=a.bits)
        token_ids = engine.tokenizer.encode(text)[: a.tokens]
        if len(token_ids) < 2:
            raise EngineError(f"{a.text}: has {len(token_ids)} tokens, expected 2 or more")
        reference = _reference(a.reference, engine, a.window, a.adapter)
        result = compare(engine.logits, reference, token_ids, a.window, progress=sys.stderr.isatty())
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    result["bits_per_weight_blocks"] = engine.weights.bits_per_weight(block_only=True)
    result["bits_per_weight_file"] = engine.weights.bits_per_weight(block_only=False)
    if a.json:
        print(json.dumps({"model": a.model, "reference": a.reference, "text": a.text, **result}))
        return 0
    print(f"tokens                    {result['tokens']} in windows of {a.window}")
    print(f"stored bit/weight         {result['bits_per_weight_blocks']:.3f} in the blocks")
    print(f"                          {result['bits_per_weight_file']:.3f} in the whole file")
    print(f"perplexity                {result['perplexity']:.3f} (reference {result['reference_perplexity']:.3f})")
    print(f"KL(reference || model)    {result['kl_mean']:.5f} mean, {result['kl_p99']:.4f} 99th percentile")
    print(f"same best token           {100 * result['top1_agreement']:.2f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
