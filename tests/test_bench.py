"""The command `engine.bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_files import UNTIED, error_line
from tiny_files import folder as folder
from tiny_files import model as model
from tiny_files import text as text
from tiny_files import untied as untied
from tiny_model import CONFIG

from engine import bench
from engine.errors import EngineError
from engine.generate import Engine


@pytest.mark.gpu
def test_bench_rows(model: str) -> None:
    engine = Engine.open(model)
    rows = bench.bench(engine, pp=[5, 16], tg=[4, 9], depths=[0, 7], repeats=3)
    assert [row.test for row in rows] == ["pp5", "pp16", "tg4", "tg9", "tg4@d7", "tg9@d7"]
    for row in rows:
        assert 0 < row.slowest <= row.tokens_per_second <= row.fastest
    for row in rows[:2]:
        assert row.weight_bytes_per_token is row.gweights_per_second is row.host_share is None
    names = engine.weights.matrix_names
    for row in rows[2:]:
        rate = row.tokens_per_second
        # All streams, and what is kept beside them: tables, entry points, descriptions of rows.
        assert row.weight_bytes_per_token == engine.weight_bytes_per_token
        words = sum(engine.weights.matrix(name).words.nbytes for name in names)
        assert words < row.weight_bytes_per_token < engine.memory().weights_bytes
        assert row.weight_gb_per_second == pytest.approx(row.weight_bytes_per_token * rate / 1e9)
        assert row.gweights_per_second == pytest.approx(CONFIG.n_params * rate / 1e9)
        assert row.host_share is None or 0 <= row.host_share < 1


@pytest.mark.gpu
def test_bench_counts_one_row_of_an_embedding_that_is_not_the_head(untied: str) -> None:
    engine = Engine.open(untied)
    (row,) = bench.bench(engine, pp=[], tg=[3], depths=[0], repeats=1)
    n_weights = UNTIED.n_params - UNTIED.vocab_size * UNTIED.dim
    assert row.gweights_per_second == pytest.approx(n_weights * row.tokens_per_second / 1e9)
    embedding = engine.weights.matrix("model.embed_tokens").words.nbytes
    assert engine.weight_bytes_per_token < engine.memory().weights_bytes - embedding


@pytest.mark.gpu
def test_bench_uses_the_context_to_its_last_position(untied: str) -> None:
    engine = Engine.open(untied)  # 32 positions
    rows = bench.bench(engine, pp=[32], tg=[3], depths=[30], repeats=1)
    assert [row.test for row in rows] == ["pp32", "tg3@d30"]
    assert rows[1].host_share is None  # no room for further tokens
    for pp, tg, depths in (([33], [], []), ([], [4], [0, 30]), ([], [33], [0])):
        with pytest.raises(EngineError, match="need 33 positions, there are 32"):
            bench.bench(engine, pp, tg, depths, repeats=1)


@pytest.mark.gpu
def test_bench_prints_markdown_and_json_and_draws(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--pp", "5", "--tg", "4", "--depth", "0", "6", "--repeats", "2", "--exact"]
    assert bench.main([model, *flags, "--plot", str(tmp_path / "depth.svg")]) == 0
    drawn = (tmp_path / "depth.svg").read_text("utf-8")
    assert "<!-- tokens in the context before -->" in drawn
    assert "<!-- tokens of the prompt -->" not in drawn  # there is one only
    about, _, head, rule, *rows, blank, last = capsys.readouterr().out.splitlines()
    assert about.startswith("model, 0.0 M parameters, ") and "exact activations" in about
    assert blank == ""
    n_columns = head.count("|")
    assert n_columns == 8
    assert [line.count("|") for line in (rule, *rows)] == [n_columns] * 4
    assert [row.split("|")[1].strip() for row in rows] == ["pp5", "tg4", "tg4@d6"]
    document = json.loads(last)
    assert document["parameters"] == CONFIG.n_params
    assert document["activations"] == "exact" and document["context"] == 64
    assert 5 < document["bits_per_weight_blocks"] < 7
    assert document["device_bytes"] > Path(model).stat().st_size / 2
    assert [row["test"] for row in document["rows"]] == ["pp5", "tg4", "tg4@d6"]
    assert all(row["tokens_per_second"] > 0 for row in document["rows"])


@pytest.mark.gpu
def test_bench_sets_speculation_beside_single_steps(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "TASKS", {"quote": "ab" * 9, "write": "xyz"})
    flags = ["--pp", "--tg", "--speculation", "--draft", model, "--repeats", "1"]
    assert bench.main([model, *flags]) == 0
    *_, head, rule, quote, write, blank, last = capsys.readouterr().out.splitlines()
    assert {line.count("|") for line in (head, rule, quote, write)} == {10} and blank == ""
    rows = json.loads(last)["speculation"]
    assert [row["task"] for row in rows] == ["quote", "write"]
    for row in rows:
        assert row["tokens_per_second"] > 0 and row["single_step_tokens_per_second"] > 0
        assert row["drafted_tokens"] >= row["accepted_tokens"] >= 0
        assert row["same_text"]


def test_bench_flags_reach_the_engine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []

    def refuse(*args: Any, **options: Any) -> Engine:
        calls.append((args, options))
        raise EngineError("not today")

    monkeypatch.setattr(Engine, "open", refuse)
    assert bench.main([]) == 1
    assert error_line(capsys.readouterr()) == "error: not today\n"
    flags = ["--bits", "3", "--context", "99", "--adapter", "1", "--draft", "d", "--cache", "int4"]
    assert bench.main(["m.gguf", *flags]) == 1
    assert bench.main(["--batch", "2", "20"]) == 1
    plain = {"exact": False, "context": None, "adapter": None, "bits": None, "draft": None}
    plain["cache"] = "f16"
    given = {"context": 99, "adapter": "1", "bits": 3.0, "draft": "d", "cache": "int4"}
    assert calls == [
        (("smollm2",), plain),
        (("m.gguf",), {**plain, **given}),
        (("smollm2",), {**plain, "cache_positions": 4096}),  # more than they need
    ]


@pytest.mark.gpu
def test_bench_runs_sequences_at_once(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--pp", "--tg", "4", "--repeats", "1", "--batch", "1", "3"]
    assert bench.main([model, *flags]) == 0
    *_, head, _, one, three, blank, last = capsys.readouterr().out.splitlines()
    assert head.startswith("| sequences | tokens/s |") and blank == ""
    assert [row.split("|")[1].strip() for row in (one, three)] == ["1", "3"]
    for row, n in zip(json.loads(last)["batch"], (1, 3), strict=True):
        assert row["sequences"] == n and row["tokens_per_second"] > 0
        assert row["step_ms"] == pytest.approx(1e3 * n / row["tokens_per_second"])
    assert bench.main([model, *flags, "2000"]) == 1
    assert "max_sequences is 2000, expected 1 to 64" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--pp", "0"],
        ["--tg", "1"],
        ["--depth", "-1"],
        ["--repeats", "0"],
        ["--pp", "x"],
        ["--batch", "0"],
    ],
)
def test_bench_refuses_wrong_flags(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        bench.main(flags)
    assert exit_.value.code == 2
    assert flags[0] in capsys.readouterr().err
