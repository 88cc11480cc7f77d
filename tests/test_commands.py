"""The commands `engine.bench` and `engine.evaluate`, and every command without an adapter."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tiny_model import CONFIG, random_tensors, write_hf_folder

from engine import bench, evaluate
from engine.errors import EngineError
from engine.generate import Engine
from weights.convert import convert
from weights.sources import open_source

ROOT = Path(__file__).parents[1]
UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False, vocab_size=101, max_seq_len=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is not converted yet."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    # Ten times the usual size, so that its tokens are not all equally likely.
    tensors = {name: 10 * tensor for name, tensor in random_tensors(CONFIG).items()}
    return write_hf_folder(folder, CONFIG, tensors)


@pytest.fixture(scope="module")
def model(folder: Path) -> str:
    path = folder.with_suffix(".safetensors")
    convert(open_source(folder), path, bits=6, progress=False)
    return str(path)


@pytest.fixture(scope="module")
def untied(folder: Path) -> str:
    """Another model: its vocabulary is larger, its context shorter."""
    other = write_hf_folder(folder.with_name("untied"), UNTIED, random_tensors(UNTIED))
    path = other.with_suffix(".safetensors")
    convert(open_source(other), path, bits=6, progress=False)
    return str(path)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("ab is a token, and so is each other character; 97 in all." * 2)
    return str(path)


def error_line(captured: Any) -> str:
    """What a command says when it fails: one line and nothing else."""
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.endswith("\n")
    assert captured.err.count("\n") == 1
    line: str = captured.err
    return line


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
    for pp, tg, depths in (([33], [], []), ([], [4], [0, 30]), ([], [34], [0])):
        with pytest.raises(EngineError, match="need 33 positions, there are 32"):
            bench.bench(engine, pp, tg, depths, repeats=1)


@pytest.mark.gpu
def test_bench_prints_markdown_and_json(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--pp", "5", "--tg", "4", "--depth", "0", "6", "--repeats", "2", "--exact"]
    assert bench.main([model, *flags]) == 0
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
    assert bench.main(["m.gguf", "--bits", "3", "--context", "99", "--adapter", "1"]) == 1
    plain = {"exact": False, "context": None, "adapter": None, "bits": None}
    assert calls == [
        (("smollm2",), plain),
        (("m.gguf",), {**plain, "context": 99, "adapter": "1", "bits": 3.0}),
    ]


@pytest.mark.parametrize(
    "flags", [["--pp", "0"], ["--tg", "1"], ["--depth", "-1"], ["--repeats", "0"], ["--pp", "x"]]
)
def test_bench_refuses_wrong_flags(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        bench.main(flags)
    assert exit_.value.code == 2
    assert flags[0] in capsys.readouterr().err


@pytest.mark.parametrize("command", [bench.main, evaluate.main])
def test_ctrl_c_leaves_quietly(
    command: Callable[[Sequence[str]], int],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*args: Any, **options: Any) -> Engine:
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "open", interrupted)
    flags = ["--reference", "m", "--text", text] if command is evaluate.main else []
    assert command(["m", *flags]) == 130
    assert capsys.readouterr() == ("", "")


def log(*probabilities: float) -> npt.NDArray[np.float32]:
    """Logits of a distribution, shifted: only differences count."""
    return np.log(np.array(probabilities, np.float32)) + np.float32(3)


def test_compare_on_numbers_worked_out_by_hand() -> None:
    half, quarters = log(1 / 2, 1 / 4, 1 / 4), log(1 / 4, 1 / 2, 1 / 4)
    eighths = log(1 / 8, 1 / 8, 3 / 4)
    seen: list[list[int]] = []

    def model(ids: Sequence[int]) -> npt.NDArray[np.float32]:
        seen.append(list(ids))
        return np.array([half, quarters, eighths])[: len(ids)]

    def reference(ids: Sequence[int]) -> npt.NDArray[np.float32]:
        return np.array([half, half, eighths])[: len(ids)]

    # Windows 0 2 2 and 1 0; the last token has a window of its own and predicts nothing.
    result = evaluate.compare(model, reference, [0, 2, 2, 1, 0, 1], window=3)
    assert seen == [[0, 2, 2], [1, 0]] or seen == [[0, 2, 2], [1, 0, 1]]
