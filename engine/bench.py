"""How fast a model runs here: prompt and generation speed, bytes read, the share of the host.

    answer bench
    answer bench model.safetensors --pp 128 512 --tg 128 --depth 0 1024
    answer bench --pp --tg --speculation --draft small.safetensors

Rows are named as llama-bench names them: ppN is a prompt of N tokens, tgN the generation of N
tokens after an (almost) empty context, tgN@dD the same after D tokens. Tokenizing is not part of
any row; greedy sampling is. Medians over repeats, after the device has worked for half a second:
an idle GPU runs at a third of its clock. These rows take single steps; --speculation adds tasks
that are answered with and without guessing, in turns. The last line of stdout is the same as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.bench_batch import bench_batch, positions
from engine.bench_batch import markdown as batch_markdown
from engine.bench_kernels import SHAPES, bench_kernels
from engine.bench_kernels import markdown as kernels_markdown
from engine.device import Device
from engine.errors import EngineError
from engine.flags import add_cache
from engine.generate import DEFAULT_CONTEXT, Engine, Stats
from engine.profile import markdown as profile_markdown
from engine.profile import profile
from weights.bits import parse_bits
from weights.cache import DEFAULT_MODEL
from weights.synthetic import shape, write_synthetic

_WARM_UP_SECONDS = 0.5

_PROSE = (
    "The harbour was quiet that morning. Anna had counted eleven boats before breakfast, and none "
    "of them had moved. Her brother said that the wind would turn by noon, but he had said the "
    "same on Monday, and on Tuesday the boats were still there, with their sails rolled up."
)
_JSON = """\
{
  "name": "lamp",
  "color": "green",
  "price": 24,
  "in_stock": true,
  "tags": ["home", "light"]
}
"""
_CODE = """\
def move(robot):
    robot.turn("left")
    robot.forward(10)
    robot.turn("right")
    robot.forward(25)
    robot.lift("arm")
    robot.wait(3)
    robot.drop("arm")
    robot.turn("left")
    robot.home()
"""
# What a user asks: answers that stand in the question for the most part, as even the default model
# gives them (after the code it explains what it has written), and one that does not.
TASKS = {
    "quote": f"Repeat the following text word for word.\n\n{_PROSE}",
    "edit": f'Replace "Anna" with "Maria" in the following text.\n\n{_PROSE}',
    "json": f'Replace "green" with "blue" in the following JSON.\n\n{_JSON}',
    "code": f'Replace "robot" with "drone" in the following code.\n\n{_CODE}',
    "write": "Write a short story about a lighthouse.",
}


@dataclass(frozen=True)
class Row:
    """One test. What a step reads and what it leaves to the host are facts of generation only."""

    test: str
    tokens_per_second: float  # median of the repeats
    slowest: float
    fastest: float
    weight_bytes_per_token: int | None = None
    weight_gb_per_second: float | None = None
    gweights_per_second: float | None = None
    host_share: float | None = None  # of a step's time; also None where a GPU has no timestamps


@dataclass(frozen=True)
class SpeculationRow:
    """One task, greedily answered by single steps and with drafts."""

    task: str
    answer_tokens: int
    tokens_per_second: float  # medians of the repeats
    single_step_tokens_per_second: float
    checks: int
    drafted_tokens: int
    accepted_tokens: int
    same_text: bool  # only ties within rounding make it another


def bench(
    engine: Engine, pp: Sequence[int], tg: Sequence[int], depths: Sequence[int], repeats: int
) -> list[Row]:
    """A row for each prompt length in `pp`, and for each number of tokens in `tg` at each depth.

    EngineError when a test needs more positions than the engine has.
    """
    needed = max([*pp, *(_start(depth) + n - 1 for depth in depths for n in tg)], default=0)
    if needed > engine.context:
        raise EngineError(
            f"these tests need {needed} positions, there are {engine.context}; ask for fewer "
            "tokens or a larger --context"
        )
    rng = np.random.default_rng(0)
    start = time.perf_counter()
    while time.perf_counter() - start < _WARM_UP_SECONDS:
        _generate(engine, _random_tokens(engine, rng, 1), 16)
    rows = [_prompt_row(engine, rng, length, repeats) for length in pp]
    for depth in depths:
        prompt = _random_tokens(engine, rng, _start(depth))
        rows += [_generation_row(engine, prompt, depth, n, repeats) for n in tg]
    return rows


def bench_speculation(engine: Engine, max_tokens: int, repeats: int) -> list[SpeculationRow]:
    """A row for each of TASKS; each is answered once more before, for the engine to learn from."""
    rows = []
    for name, task in TASKS.items():
        tokenizer, text = engine.tokenizer, task
        if tokenizer.chat_template is not None:
            text = tokenizer.chat_prompt([{"role": "user", "content": task}])
        prompt = tokenizer.encode(text)
        rates: dict[bool, list[float]] = {False: [], True: []}
        answers = {}
        for repeat in range(repeats + 1):
            for speculate in (False, True):
                generation = engine.generate(prompt, max_tokens, speculate=speculate)
                answers[speculate] = list(generation)
                stats = generation.stats
                # The first token is the prompt's; a stop token took time and is not counted.
                n_steps = stats.generated_tokens - (stats.finish_reason != "stop")
                if repeat and n_steps:
                    rates[speculate].append(n_steps / stats.generate_seconds)
        rows.append(
            SpeculationRow(
                name,
                len(answers[True]),
                statistics.median(rates[True] or [0.0]),
                statistics.median(rates[False] or [0.0]),
                stats.checks,
                stats.drafted_tokens,
                stats.accepted_tokens,
                answers[True] == answers[False],
            )
        )
    return rows


def _prompt_row(engine: Engine, rng: np.random.Generator, length: int, repeats: int) -> Row:
    def rate() -> float:
        stats = _generate(engine, _random_tokens(engine, rng, length), 1)
        # Two random prompts may begin alike, and what is in the cache is not read again.
        return (stats.prompt_tokens - stats.reused_tokens) / stats.prompt_seconds

    return Row(f"pp{length}", *_spread(rate, repeats))


def _generation_row(
    engine: Engine, prompt: list[int], depth: int, n_tokens: int, repeats: int
) -> Row:
    n_steps = n_tokens - 1  # the first token is the prompt's

    def rate() -> float:
        return n_steps / _generate(engine, prompt, n_tokens).generate_seconds

    median, slowest, fastest = _spread(rate, repeats)
    gpu_seconds = engine.gpu_seconds(n_steps)
    read = engine.weight_bytes_per_token
    return Row(
        f"tg{n_tokens}@d{depth}" if depth else f"tg{n_tokens}",
        median,
        slowest,
        fastest,
        weight_bytes_per_token=read,
        weight_gb_per_second=read * median / 1e9,
        gweights_per_second=_weights_per_token(engine) * median / 1e9,
        host_share=None if gpu_seconds is None else max(0.0, 1 - gpu_seconds / n_steps * median),
    )


def _start(depth: int) -> int:
    """Tokens of the prompt: something must be there to continue."""
    return max(1, depth)


def _random_tokens(engine: Engine, rng: np.random.Generator, n: int) -> list[int]:
    tokens: list[int] = rng.integers(0, engine.config.vocab_size, n).tolist()
    return tokens


def _generate(engine: Engine, prompt: list[int], max_tokens: int) -> Stats:
    generation = engine.generate(prompt, max_tokens, stop_ids=(), speculate=False)
    for _ in generation:
        pass
    return generation.stats


def _spread(rate: Callable[[], float], repeats: int) -> tuple[float, float, float]:
    """Median, least and most."""
    rates = [rate() for _ in range(repeats)]
    return statistics.median(rates), min(rates), max(rates)


def _weights_per_token(engine: Engine) -> int:
    c = engine.config
    # Of an embedding that is not the head as well, one row is read.
    return c.n_params - (0 if c.tie_embeddings else c.vocab_size * c.dim)


def _describe(engine: Engine) -> dict[str, Any]:
    """What was measured, and where."""
    activations = "exact" if engine.exact else "int8"
    if engine.weights.lossless:
        activations = "float32"
    return {
        "model": engine.weights.source,
        "parameters": engine.config.n_params,
        "bits_per_weight_blocks": engine.weights.bits_per_weight(block_only=True),
        "bits_per_weight_file": engine.weights.bits_per_weight(block_only=False),
        "activations": activations,
        "cache": engine.cache.kind,
        "context": engine.context,
        "device_bytes": engine.memory().total_bytes,
        "adapter": engine.adapter_name,
        "date": time.strftime("%Y-%m-%d"),
    }


def _markdown(about: dict[str, Any], rows: list[Row]) -> str:
    lines = [
        f"{about['model']}, {about['parameters'] / 1e6:.1f} M parameters, "
        f"{about['bits_per_weight_blocks']:.2f} bit/weight in the blocks, "
        f"{about['bits_per_weight_file']:.2f} in all, {about['activations']} activations, "
        f"{about['device_bytes'] / 2**20:.0f} MiB with {about['context']} positions, "
        f"on {about['adapter']}, {about['date']}",
        "",
        "| test | tokens/s | slowest to fastest | MB of weights/token | GB/s | Gweight/s | host |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row.test,
            f"{row.tokens_per_second:.1f}",
            f"{row.slowest:.1f} to {row.fastest:.1f}",
            _cell(row.weight_bytes_per_token, "{:.1f}", 1e-6),
            _cell(row.weight_gb_per_second, "{:.2f}"),
            _cell(row.gweights_per_second, "{:.2f}"),
            _cell(row.host_share, "{:.0f} %", 100),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _speculation_markdown(rows: list[SpeculationRow]) -> str:
    lines = [
        "| task | tokens | tokens/s | single steps | times | checks | drafted | accepted | text |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        plain = row.single_step_tokens_per_second
        cells = [
            row.task,
            f"{row.answer_tokens}",
            f"{row.tokens_per_second:.1f}",
            f"{plain:.1f}",
            _cell(row.tokens_per_second / plain if plain else None, "{:.2f}"),
            f"{row.checks}",
            f"{row.drafted_tokens}",
            f"{row.accepted_tokens}",
            "the same" if row.same_text else "differs",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: float | None, form: str, unit: float = 1) -> str:
    return "" if value is None else form.format(value * unit)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="answer bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", nargs="?", default=DEFAULT_MODEL, help="weights file or model (%(default)s)")
    bits_help = "stored bits per weight, or lossless, when it is converted"
    add("--bits", type=parse_bits, help=bits_help)
    add("--pp", type=int, nargs="*", default=[128], metavar="N", help="prompt lengths (128)")
    add("--tg", type=int, nargs="*", default=[64], metavar="N", help="tokens to generate (64)")
    add("--depth", type=int, nargs="*", default=[0], metavar="N", help="tokens before them (0)")
    add("--repeats", type=int, default=5, metavar="N", help="runs per row (%(default)s)")
    add("--context", type=int, metavar="N", help="positions to make room for")
    add_cache(parser)
    add("--adapter", metavar="NAME", help="GPU to run on: its number or part of its name")
    add("--exact", action="store_true", help="float32 activations instead of int8 ones")
    add("--speculation", action="store_true", help="tasks with and without guessed tokens")
    add("--draft", metavar="MODEL", help="a smaller model that guesses for this one")
    batch_help = "sequences at once, each of the first --tg tokens: all tokens/s"
    add("--batch", type=int, nargs="*", default=[], metavar="N", help=batch_help)
    matvec_help = "of those, up to how many multiply weights where they are decoded (16)"
    add("--matvec-rows", type=int, metavar="N", help=matvec_help)
    shape_help = "random weights at --bits (3.1) in this shape (8b, 1b, 135m or a config.json)"
    add("--shape", metavar="NAME", help=f"in place of a model, {shape_help}")
    add("--profile", action="store_true", help="where a token's time goes, by kernel")
    kernels_help = "matvecs alone at --bits (3), coded beside uncompressed; no model"
    add("--kernels", action="store_true", help=kernels_help)
    add("--tokens", type=int, nargs="*", default=[1], metavar="N", help="of those, 1 to 8 (1)")
    add("--plot", type=Path, metavar="FILE", help="draw what is measured into a .png or .svg")
    a = parser.parse_args(arguments)
    if min([a.repeats, *a.pp]) < 1 or min(a.tg, default=2) < 2 or min(a.depth, default=0) < 0:
        parser.error("--repeats and --pp take 1 or more, --tg 2 or more, --depth 0 or more")
    if a.batch and (min(a.batch) < 1 or not a.tg):
        parser.error("--batch takes 1 or more, and --tg a number")
    if (a.kernels or a.shape) and a.bits == "lossless":
        parser.error("--kernels and --shape take a number for --bits")
    try:
        if a.plot is not None:
            from engine.plot import check_picture  # matplotlib is optional

            check_picture(a.plot)
        if a.kernels:
            return _bench_kernels(a.adapter, a.bits or 3.0, a.tokens, a.plot)
        engine = _open(a)
        rows = bench(engine, a.pp, a.tg, a.depth, a.repeats)
        tasks = bench_speculation(engine, 200, a.repeats) if a.speculation else []
        launches = profile(engine) if a.profile else []
        batches = bench_batch(engine, a.batch, a.tg[0], a.repeats, a.matvec_rows) if a.batch else []
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    about = _describe(engine)
    print(_markdown(about, rows))
    print()
    if tasks:
        print(_speculation_markdown(tasks))
        print()
    if launches:
        print(profile_markdown(launches))
        print()
    if batches:
        print(batch_markdown(batches))
        print()
    about["rows"] = [dataclasses.asdict(row) for row in rows]
    about["speculation"] = [dataclasses.asdict(task) for task in tasks]
    about["batch"] = [dataclasses.asdict(row) for row in batches]
    about["profile"] = [dataclasses.asdict(launch) for launch in launches]
    return _finish(about, a.plot)


def _open(a: argparse.Namespace) -> Engine:
    options: dict[str, Any] = dict(
        exact=a.exact, context=a.context, cache=a.cache, adapter=a.adapter, draft=a.draft
    )
    if a.batch:  # the default context may be more than they need
        needed = positions(max(a.batch), a.tg[0])
        options["cache_positions"] = max(needed, a.context or DEFAULT_CONTEXT)
    if a.shape is None:
        return Engine.open(a.model, bits=a.bits, **options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "synthetic.safetensors"
        write_synthetic(shape(a.shape), path, a.bits or 3.1)
        return Engine.open(path, **options)


def _bench_kernels(
    adapter: str | None, bits: float, tokens: Sequence[int], plot: Path | None
) -> int:
    device = Device.open(adapter)
    rows = list(bench_kernels(device, SHAPES, bits, tokens))
    about = {"adapter": device.name, "date": time.strftime("%Y-%m-%d")}
    print(f"{device.name}, {about['date']}\n\n{kernels_markdown(rows)}\n")
    return _finish({**about, "rows": [dataclasses.asdict(row) for row in rows]}, plot)


def _finish(run: dict[str, Any], plot: Path | None) -> int:
    """The line for machines, and the picture."""
    print(json.dumps(run))
    if plot is not None:
        from engine.draw import draw

        try:
            draw([run], plot)
        except EngineError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
