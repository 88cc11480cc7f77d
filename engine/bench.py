"""How fast a model runs here: prompt and generation speed, bytes read, the share of the host.

    python -m engine.bench smollm2
    python -m engine.bench model.safetensors --pp 128 512 --tg 128 --depth 0 1024

Rows are named as llama-bench names them: ppN is a prompt of N tokens, tgN the generation of N
tokens after an (almost) empty context, tgN@dD the same after D tokens. Tokenizing is not part of
any row; sampling (greedy) is. Medians over repeats, after the device has worked for half a second:
an idle GPU runs at a third of its clock. The last line of stdout is the same as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

from engine.errors import EngineError
from engine.generate import Engine

WARM_UP_SECONDS = 0.5


def _prompt(engine: Engine, rng: np.random.Generator, length: int) -> list[int]:
    return [int(token) for token in rng.integers(0, engine.config.vocab_size, length)]


def _generate(engine: Engine, prompt: list[int], n_tokens: int) -> tuple[float, float]:
    """Seconds of the prompt (its first answer token included) and of each further token."""
    generation = engine.generate(prompt, n_tokens, stop_ids=())
    for _ in generation:
        pass
    stats = generation.stats
    return stats.prompt_seconds, stats.generate_seconds / max(1, stats.generated_tokens - 1)


def _repeat(measure: Callable[[], float], repeats: int) -> dict[str, float]:
    rates = sorted(measure() for _ in range(repeats))
    return {"median": statistics.median(rates), "least": rates[0], "most": rates[-1]}


def bench(
    engine: Engine, pp: list[int], tg: list[int], depths: list[int], repeats: int
) -> list[dict[str, object]]:
    """One row per test: its name and tokens per second (median, least, most); for tg also what a step reads."""
    rng = np.random.default_rng(0)
    start = time.perf_counter()
    while time.perf_counter() - start < WARM_UP_SECONDS:
        _generate(engine, _prompt(engine, rng, 1), min(16, engine.context))
    rows: list[dict[str, object]] = []
    for length in pp:
        rate = _repeat(lambda n=length: n / _generate(engine, _prompt(engine, rng, n), 1)[0], repeats)
        rows.append({"test": f"pp{length}", "tokens_per_second": rate})
    n_weights = engine.config.n_params
    if not engine.config.tie_embeddings:
        n_weights -= engine.config.vocab_size * engine.config.dim  # of the embedding one row is read
    for depth in depths:
        prompt = _prompt(engine, rng, max(1, depth))
        for length in tg:
            rate = _repeat(lambda n=length, p=prompt: 1 / _generate(engine, p, n)[1], repeats)
            gpu = engine.gpu_seconds(length - 1)
            step = 1 / rate["median"]
            rows.append(
                {
                    "test": f"tg{length}" + (f"@d{depth}" if depth else ""),
                    "tokens_per_second": rate,
                    "weight_bytes_per_token": engine.weight_bytes_per_token,
                    "weight_gb_per_second": engine.weight_bytes_per_token / step / 1e9,
                    "gweights_per_second": n_weights / step / 1e9,
                    "host_share": None if gpu is None else max(0.0, 1 - gpu / (length - 1) / step),
                }
            )
    return rows


def _table(rows: list[dict]) -> str:
    lines = [
        "| test | tokens/s | spread | MB of weights/token | GB/s | Gweight/s | host's share |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rate = row["tokens_per_second"]
        cells = [row["test"], f"{rate['median']:.1f}", f"{rate['least']:.1f} to {rate['most']:.1f}"]
        if "weight_bytes_per_token" in row:
            share = row["host_share"]
            cells += [
                f"{row['weight_bytes_per_token'] / 1e6:.1f}",
                f"{row['weight_gb_per_second']:.2f}",
                f"{row['gweights_per_second']:.2f}",
                "" if share is None else f"{100 * share:.0f} %",
            ]
        else:
            cells += [""] * 4
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m engine.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a weights file, or a model to convert")
    parser.add_argument("--bits", type=float, help="stored bits per weight, when the model is to be converted")
    parser.add_argument("--pp", type=int, nargs="*", default=[128], help="prompt lengths (default 128)")
    parser.add_argument("--tg", type=int, nargs="*", default=[64], help="tokens to generate, at least 2 (default 64)")
    parser.add_argument("--depth", type=int, nargs="*", default=[0], help="tokens before them (default 0)")
    parser.add_argument("--repeats", type=int, default=5, help="runs per row (default 5)")
    parser.add_argument("--context", type=int, help="positions to make room for")
    parser.add_argument("--adapter", help="number of the adapter, or part of its name")
    parser.add_argument("--exact", action="store_true", help="f32-like activations instead of int8")
    a = parser.parse_args(argv)
    if a.repeats < 1 or any(n < 1 for n in a.pp) or any(n < 2 for n in a.tg) or any(n < 0 for n in a.depth):
        parser.error("--repeats and --pp take 1 or more, --tg 2 or more, --depth 0 or more")
    try:
        engine = Engine.open(a.model, exact=a.exact, context=a.context, adapter=a.adapter, bits=a.bits)
        rows = bench(engine, a.pp, a.tg, a.depth, a.repeats)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    weights, memory = engine.weights, engine.memory()
    about = {
        "model": weights.source,
        "adapter": engine.adapter_name,
        "parameters": engine.config.n_params,
        "bits_per_weight": {
            "blocks": weights.bits_per_weight(block_only=True),
            "file": weights.bits_per_weight(block_only=False),
        },
        "mode": "exact" if a.exact else "int8",
        "device_bytes": memory.total_bytes,
        "context": engine.context,
        "date": time.strftime("%Y-%m-%d"),
    }
    blocks, whole = about["bits_per_weight"].values()
    print(
        f"{weights.source}, {engine.config.n_params / 1e6:.0f} M parameters, {blocks:.2f} bit/weight in the "
        f"blocks, {whole:.2f} in the file, {about['mode']} activations, on {engine.adapter_name}: "
        f"{memory.total_bytes / 2**20:.0f} MiB with {engine.context} positions\n"
    )
    print(_table(rows) + "\n")
    print(json.dumps({**about, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
