"""Pictures of benchmarks: what is in them, from lines of JSON that a run has left."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine import draw
from engine.bench import main as bench
from engine.bench_kernels import KernelRow
from engine.plot import OURS
from engine.plot_bench import rates
from engine.profile import ProfileRow


def row(test: str, rate: float) -> dict[str, Any]:
    return {"test": test, "tokens_per_second": rate, "slowest": 0.9 * rate, "fastest": rate + 1}


def run(model: str, rows: list[dict[str, Any]], profile: list[ProfileRow] | None = None) -> str:
    about = {"model": model, "bits_per_weight_file": 3.5, "activations": "int8"}
    about |= {"adapter": "A card", "date": "2026-01-31", "speculation": []}
    return json.dumps({**about, "rows": rows, "profile": [vars(p) for p in profile or []]})


DEPTHS = [row("pp128", 900.0), row("tg64", 100.0), row("tg64@d512", 80.0), row("tg64@d4096", 50.0)]
PROFILE = [
    ProfileRow("matvec", "o_proj", (96, 2, 1), 32, 20.0, 640.0),
    ProfileRow("attention", "", (9, 1, 1), 32, 5.0, 160.0),
    ProfileRow("step", "", (0, 0, 0), 64, 12.0, 768.0),
]


def kernel(name: str, bits: float, rows: int, us: float, tokens: int = 1) -> dict[str, Any]:
    weights = rows * 4096
    gweights = weights / us / 1e3
    gb = gweights * bits / 8
    return vars(KernelRow(name, rows, 4096, tokens, bits, "cut", us, us, us, gweights, gb, 7.5))


KERNELS = json.dumps(
    {
        "adapter": "A card",
        "date": "2026-01-31",
        "rows": [
            kernel(name, bits, rows, us, tokens)
            for rows in (512, 8192)
            for name, bits, us, tokens in (
                ("matvec", 3.2, 0.01 * rows, 1),
                ("matvec", 3.2, 0.02 * rows, 8),
                ("f16", 16.0, 0.016 * rows, 1),
                ("int8", 8.0, 0.008 * rows, 1),
                ("int4", 4.0, 0.005 * rows, 1),
            )
        ],
    }
)


def drawn(tmp_path: Path, *texts: str) -> str:
    """The SVG of these runs; matplotlib notes each text beside the curves that it becomes."""
    files = []
    for i, text in enumerate(texts):
        files.append(str(tmp_path / f"{i}.txt"))
        Path(files[-1]).write_text(f"| a | table |\n{{no json\n{text}\n", "utf-8")
    assert draw.main([*files, "--out", str(tmp_path / "picture.svg")]) == 0
    return (tmp_path / "picture.svg").read_text("utf-8")


def test_rates_by_depth_by_prompt_and_by_sequences() -> None:
    found = json.loads(run("8b", [*DEPTHS[::-1], row("tg64@d1@x", 1.0)]))
    found["batch"] = [{"sequences": n, **row("", 70.0 * n)} for n in (16, 4)]
    assert rates(found, "tg") == [(0, 100, 90, 101), (512, 80, 72, 81), (4096, 50, 45, 51)]
    assert rates(found, "pp") == [(128, 900, 810, 901)]
    assert rates(found, "batch") == [(4, 280, 252, 281), (16, 1120, 1008, 1121)]


def test_runs_of_several_models_share_a_picture(tmp_path: Path) -> None:
    svg = drawn(tmp_path, run("8b", DEPTHS, PROFILE), run("1b", [*DEPTHS, row("pp512", 990.0)]))
    for words in (
        "8b, 3.50 bit, int8", "1b, 3.50 bit, int8", "A card, 2026-01-31",
        "tokens in the context before", "tokens of the prompt",
        "tokens per second: median, slowest, fastest",
        "8b, 3.50 bit, int8:", "768 µs a token on the GPU",
        "32 x matvec, o_proj", "32 x attention", "640, 83 %",
    ):  # fmt: skip
        assert f"<!-- {words} -->" in svg, words
    assert "step" not in svg


def test_products_that_make_their_input_decode_weights_too(tmp_path: Path) -> None:
    def fills(kernel: str) -> int:
        profile = [replace(PROFILE[0], kernel=kernel), *PROFILE[1:]]
        return drawn(tmp_path, run("8b", DEPTHS, profile)).count(f"fill: {OURS}")

    assert fills("matvec") == fills("norm_matvec") > fills("attention")


def test_single_figures_become_bars(tmp_path: Path) -> None:
    svg = drawn(tmp_path, run("8b", DEPTHS[:2]))
    assert "<!-- tokens per second -->" in svg and "pp128" in svg and "tg64" in svg


def test_kernels_lie_under_the_roof_of_the_memory(tmp_path: Path) -> None:
    svg = drawn(tmp_path, KERNELS)
    roof = max(row["gb_per_second"] for row in json.loads(KERNELS)["rows"])
    for words in (
        "coded", "coded, 8 tokens", "f16", "int8", "int4", "8192 x 4096", "512 x 4096", "GB/s",
        "weights per byte read", f"{roof:,.0f} GB/s, the best of this run",
    ):  # fmt: skip
        assert f"<!-- {words} -->" in svg, words


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("nothing", "holds no line of JSON"),
        (run("8b", []), "nothing was measured"),
        ('{"rows": [{"test": "tg1"}]}', "the runs lack something"),
        (f'{KERNELS}\n{{"kl_mean": 1}}', "do not fit into one picture"),
    ],
)
def test_what_cannot_be_drawn_is_one_clear_line(
    tmp_path: Path, text: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.txt").write_text(text)
    assert draw.main([str(tmp_path / "run.txt"), "--out", str(tmp_path / "p.png")]) == 1
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and complaint in line
    assert draw.main([str(tmp_path / "none"), "--out", str(tmp_path / "p.png")]) == 1
    assert "none: cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "p.png").exists()


def test_a_picture_that_cannot_be_is_refused_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert bench(["no-such-model", "--plot", "x.pdf"]) == 1
    assert "x.pdf: expected a name that ends in .png or .svg" in capsys.readouterr().err
