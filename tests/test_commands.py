"""The commands `engine.bench` and `engine.evaluate`, and every command without an adapter."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
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
    for pp, tg, depths in (([33], [], []), ([], [4], [0, 30]), ([], [33], [0])):
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
    half, other, last = log(1 / 2, 1 / 4, 1 / 4), log(1 / 8, 3 / 4, 1 / 8), log(1 / 8, 1 / 8, 3 / 4)

    def model(ids: Sequence[int]) -> npt.NDArray[np.float32]:
        return np.array([half, other, last])[: len(ids)]

    def reference(ids: Sequence[int]) -> npt.NDArray[np.float32]:
        return np.array([half, half, last])[: len(ids)]

    # Windows 0 2 1 and 1 0: the models differ at the second position of each.
    result = evaluate.compare(model, reference, [0, 2, 1, 1, 0], window=3)
    kl = math.log(4) / 2 + math.log(1 / 3) / 4 + math.log(2) / 4  # KL(half || other)
    want = evaluate.Comparison(
        tokens=5,
        perplexity=(4 * 4 / 3 * 2) ** (1 / 3),  # 2 after 0, 1 after 2; 0 after 1
        reference_perplexity=(4 * 4 * 2) ** (1 / 3),
        kl_mean=2 * kl / 5,
        kl_p99=kl,
        top1_agreement=3 / 5,
    )
    # Logits are float32: half an ulp of numbers below 4.
    assert dataclasses.astuple(result) == pytest.approx(dataclasses.astuple(want), rel=1e-6)


@pytest.mark.parametrize(
    ("n_tokens", "window", "windows"),
    # What a window's last token predicts is never seen; a window of one token predicts nothing.
    [(2, 9, [2]), (9, 4, [4, 4]), (10, 4, [4, 4, 2]), (65, 64, [64]), (200, 150, [150, 50])],
)
def test_compare_looks_at_every_token_of_every_window(
    n_tokens: int, window: int, windows: list[int]
) -> None:
    rng = np.random.default_rng(3)
    ids = rng.integers(0, 5, n_tokens).tolist()
    tables = rng.normal(size=(2, n_tokens, 5)).astype(np.float32)
    sizes: list[int] = []

    def model(ids: Sequence[int]) -> npt.NDArray[np.float32]:
        sizes.append(len(ids))
        return tables[0, : len(ids)]

    result = evaluate.compare(model, lambda ids: tables[1, : len(ids)], ids, window)
    assert sizes == windows
    assert result.tokens == sum(windows)
    nll, kl = [], []
    for begin, size in zip(np.cumsum([0, *windows]), windows, strict=False):
        for i in range(size):
            q, p = (np.exp(table[i]) / np.exp(table[i]).sum() for table in tables.astype(float))
            kl.append(sum(p * np.log(p / q)))
            if i + 1 < size:
                nll.append(-np.log(q[ids[begin + i + 1]]))
    assert result.perplexity == pytest.approx(np.exp(np.mean(nll)), rel=1e-12)
    assert result.kl_mean == pytest.approx(np.mean(kl), rel=1e-12)
    assert result.kl_p99 == pytest.approx(np.percentile(kl, 99), rel=1e-12)


def test_compare_of_equals_finds_nothing() -> None:
    # Where a softmax that is not shifted overflows.
    table = np.random.default_rng(3).normal(1000, 5, (70, 11)).astype(np.float32)
    ids = [3] * 70
    result = evaluate.compare(lambda ids: table, lambda ids: table, ids, window=70)
    assert result.kl_mean == result.kl_p99 == 0
    assert result.top1_agreement == 1
    assert result.perplexity == result.reference_perplexity


def evaluated(
    capsys: pytest.CaptureFixture[str], model: str, reference: str | Path, text: str, *flags: str
) -> dict[str, Any]:
    arguments = [model, "--reference", str(reference), "--text", text, "--window", "24", "--json"]
    assert evaluate.main([*arguments, *flags]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""  # a progress line is for terminals
    document: dict[str, Any] = json.loads(captured.out)
    return document


@pytest.mark.gpu
def test_evaluate_against_the_same_file(
    model: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    same = evaluated(capsys, model, model, text, "--exact", "--tokens", "50")
    assert same["tokens"] == 50 and same["window"] == 24
    assert same["kl_mean"] == same["kl_p99"] == 0
    assert same["top1_agreement"] == 1
    assert same["perplexity"] == same["reference_perplexity"] > 1
    assert 5 < same["bits_per_weight_blocks"] < 7
    int8 = evaluated(capsys, model, model, text, "--tokens", "50")
    assert int8["reference_perplexity"] == same["perplexity"]
    assert 0 < int8["kl_mean"] < int8["kl_p99"] < 0.1


@pytest.mark.gpu
def test_evaluate_against_the_source(
    folder: Path, model: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fine = evaluated(capsys, model, folder, text, "--exact")
    coarse_model = model.replace(".safetensors", "-coarse.safetensors")
    convert(open_source(folder), coarse_model, bits=3, embed_bits=3, progress=False)
    coarse = evaluated(capsys, coarse_model, folder, text, "--exact")
    # Three bits less make steps 8 times as wide, and a divergence goes with their square.
    assert 0 < 10 * fine["kl_mean"] < coarse["kl_mean"]
    assert fine["reference_perplexity"] == coarse["reference_perplexity"]
    # The text is shorter than the default number of tokens: all of it.
    assert fine["tokens"] == len(Engine.open(model).tokenizer.encode(Path(text).read_text()))


@pytest.mark.gpu
def test_evaluate_prints_a_table(model: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([model, "--reference", model, "--text", text, "--window", "64"]) == 0
    printed = capsys.readouterr().out
    for word in ("tokens", "bit/weight", "perplexity", "KL(reference || model)", "best token"):
        assert word in printed
    assert "windows of 64" in printed


@pytest.mark.gpu
def test_evaluate_says_what_is_wrong_in_one_line(
    tmp_path: Path, model: str, untied: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    binary, short = tmp_path / "binary", tmp_path / "short"
    binary.write_bytes(b"text \xff\xfe")
    short.write_text("a")
    other = untied.removesuffix(".safetensors")
    for reference, file, flags, complaint in (
        (model, "no-such-file", [], "no-such-file: cannot be read: No such file"),
        (model, str(tmp_path), [], "cannot be read: Is a directory"),
        (model, str(binary), [], "binary: expected a text in UTF-8"),
        (model, str(short), [], "short: makes 1 tokens, expected 2 or more"),
        (model, text, ["--window", "65"], "context is 65, .* 1 to 64"),
        ("no-such-model", text, [], "no-such-model: no such file or folder"),
        (str(binary), text, [], "binary.*not a|binary.*safetensors"),
        (untied, text, ["--window", "8"], "vocabulary of 101, the model one of 97"),
        (other, text, ["--window", "8"], "vocabulary of 101, the model one of 97"),
    ):
        flags = [*flags] if flags else ["--window", "16"]
        command = [model, "--reference", reference, "--text", file, *flags]
        assert evaluate.main(command) == 1
        line = error_line(capsys.readouterr())
        assert re.search(complaint, line), line
    short_context = dataclasses.replace(CONFIG, max_seq_len=20)
    brother = write_hf_folder(tmp_path / "brother", short_context, random_tensors(short_context))
    command = [model, "--reference", str(brother), "--text", text, "--window", "21"]
    assert evaluate.main(command) == 1
    assert "1 to 20 positions, --window is 21" in error_line(capsys.readouterr())


@pytest.mark.parametrize("flags", [["--tokens", "1"], ["--window", "1"], ["--window", "x"]])
def test_evaluate_refuses_wrong_flags(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        evaluate.main(["m", "--reference", "m", "--text", "t", *flags])
    assert exit_.value.code == 2
    assert flags[0] in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="hides the drivers of Vulkan's loader")
@pytest.mark.parametrize(
    "command",
    [
        ["-m", "engine.bench", "MODEL"],
        ["-m", "engine.evaluate", "MODEL", "--reference", "MODEL", "--text", "TEXT"],
        ["chat.py", "--model", "MODEL", "-p", "Hello"],
    ],
    ids=["bench", "evaluate", "chat"],
)
def test_no_adapter_is_one_clear_line(
    command: list[str], model: str, text: str, tmp_path: Path
) -> None:
    nowhere = str(tmp_path / "none.json")
    done = subprocess.run(
        [sys.executable, *(word.replace("MODEL", model).replace("TEXT", text) for word in command)],
        cwd=ROOT,
        env={**os.environ, "VK_DRIVER_FILES": nowhere, "VK_ICD_FILENAMES": nowhere},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: no GPU adapter found: ")
    assert "mesa-vulkan-drivers" in done.stderr
    assert done.stderr.count("\n") == 1
