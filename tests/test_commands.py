"""The commands `engine.bench` and `engine.evaluate`, and every command without an adapter."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_model import CONFIG, random_tensors, write_hf_folder

from engine import bench, draw, evaluate
from engine.compare import Comparison
from engine.errors import EngineError
from engine.generate import Engine
from weights import cache
from weights.convert import CalibrationText, convert
from weights.sources import open_source
from weights.store import WeightsFile

ROOT = Path(__file__).parents[1]
FIGURES = {field.name for field in dataclasses.fields(Comparison)}
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
    convert(open_source(folder), path, bits=6, text=CalibrationText(0), progress=False)
    return str(path)


@pytest.fixture(scope="module")
def untied(folder: Path) -> str:
    """Another model: its vocabulary is larger, its context shorter."""
    other = write_hf_folder(folder.with_name("untied"), UNTIED, random_tensors(UNTIED))
    path = other.with_suffix(".safetensors")
    convert(open_source(other), path, bits=6, text=CalibrationText(0), progress=False)
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
    # Any file will do: none is opened.
    flags = ["--reference", text, "--text", text] if command is evaluate.main else []
    assert command([text, *flags]) == 130
    assert capsys.readouterr() == ("", "")


def evaluated(
    capsys: pytest.CaptureFixture[str], models: Sequence[str | Path], *flags: str | Path
) -> list[dict[str, Any]]:
    """The lines of JSON; each of the windows has left one on stderr."""
    command = [*map(str, models), "--window", "24", "--tokens", "50", "--json", *map(str, flags)]
    assert evaluate.main(command) == 0
    captured = capsys.readouterr()
    told = [line.split(" of ")[0] for line in captured.err.splitlines() if "KL so far" in line]
    assert told == ["24", "48", "50"]
    return [json.loads(line) for line in captured.out.splitlines()]


@pytest.fixture(scope="module")
def coarse(folder: Path) -> str:
    """`model` with half its bits."""
    path = folder.with_name("coarse.safetensors")
    convert(
        open_source(folder), path, bits=3, embed_bits=3, text=CalibrationText(0), progress=False
    )
    return str(path)


@pytest.mark.gpu
def test_evaluate_against_the_same_file(
    model: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    against = ["--reference", model, "--text", text]
    (same,) = evaluated(capsys, [model], *against, "--exact")
    assert same["tokens"] == 50 and same["window"] == 24
    assert same["kl_mean"] == same["kl_p99"] == same["kl_standard_error"] == 0
    assert same["top1_agreement"] == 1
    assert same["perplexity"] == same["reference_perplexity"] > 1
    (int8,) = evaluated(capsys, [model], *against)
    assert int8["reference_perplexity"] == same["perplexity"]
    assert 0 < int8["kl_mean"] < int8["kl_p99"] < 0.1
    assert 0 < int8["kl_standard_error"] < int8["kl_mean"]


@pytest.mark.gpu
def test_evaluate_against_the_source(
    folder: Path, model: str, coarse: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    against = ["--reference", folder, "--text", text, "--exact"]
    together = evaluated(capsys, [model, coarse], *against)
    fine, rough = together
    # Three bits less make steps 8 times as wide, and a divergence goes with their square.
    assert 0 < 10 * fine["kl_mean"] < rough["kl_mean"]
    assert fine["reference_perplexity"] == rough["reference_perplexity"]
    # Nothing of one model reaches another's figures.
    for row, path in zip(together, (model, coarse), strict=True):
        assert evaluated(capsys, [path], *against) == [row]
    file = WeightsFile.open(model)
    about = {
        "model": model,
        "bits": None,
        "source": "model",
        "reference": str(folder),
        "text": text,
        "window": 24,
        "activations": "exact",
        "bits_per_weight_blocks": file.bits_per_weight(block_only=True),
        "bits_per_weight_file": file.bits_per_weight(block_only=False),
        "file_bytes": Path(model).stat().st_size,
    }
    assert fine.keys() == about.keys() | FIGURES
    assert {key: fine[key] for key in about} == about


@pytest.mark.gpu
def test_evaluate_converts_to_each_rate(
    folder: Path,
    model: str,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cache, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(cache, "QUICK", CalibrationText(0))
    against = ["--reference", folder, "--text", text]
    rows = evaluated(capsys, [folder], *against, "--bits", "4.5,6")
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert [row["bits"] for row in rows] == [4.5, 6]
    assert rows[0]["kl_mean"] > rows[1]["kl_mean"]
    (converted,) = evaluated(capsys, [model], *against)
    assert rows[1] == {**converted, "model": str(folder), "bits": 6}


@pytest.mark.gpu
def test_evaluate_tells_activations_from_weights(
    folder: Path, model: str, coarse: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(models: list[str], reference: str | Path, *flags: str) -> list[dict[str, Any]]:
        return evaluated(capsys, models, "--reference", reference, "--text", text, *flags)

    int8 = run([model, coarse], folder, "--activations")
    exact = run([model, coarse], folder, "--activations", "--exact")
    for path, a, b in zip((model, coarse), int8, exact, strict=True):
        # The same number whatever the file is judged by: what it loses against its own exact mode.
        (alone,) = run([path], path)
        assert a["kl_activations"] == b["kl_activations"] == alone["kl_mean"] > 0
        assert a["kl_activations_standard_error"] == alone["kl_standard_error"]
        assert a["activations"] == "int8" and b["activations"] == "exact"
        assert a["kl_mean"] != b["kl_mean"]
    # Steps eight times as wide cost a lot more, but not in the activations.
    assert exact[1]["kl_mean"] > 10 * exact[0]["kl_mean"]
    assert int8[1]["kl_activations"] < 10 * int8[0]["kl_activations"]


@pytest.mark.gpu
def test_evaluate_prints_a_table(
    folder: Path, model: str, coarse: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--reference", model, "--text", text, "--window", "64", "--activations"]
    assert evaluate.main([model, coarse, *flags]) == 0
    captured = capsys.readouterr()
    about, blank, head, rule, *rows = captured.out.splitlines()
    n_tokens = len(Engine.open(model).tokenizer.encode(Path(text).read_text()))
    assert f"text.txt, {n_tokens} tokens in windows of 64, int8 activations" in about
    assert blank == ""
    assert [line.count("|") for line in (head, rule, *rows)] == [10] * 4
    for word in ("bit/weight", "MiB", "KL", "best token", "perplexity (reference ", "int8"):
        assert word in head
    assert [row.split(" | ")[0] for row in rows] == [f"| {model}", f"| {coarse}"]
    # The text is shorter than the default number of tokens: all of it.
    assert f"text.txt: makes {n_tokens} tokens, not 8192: all of them are used" in captured.err


@pytest.mark.gpu
def test_evaluate_draws(
    folder: Path, model: str, coarse: str, text: str, tmp_path: Path, capsys: Any
) -> None:
    against = ["--reference", folder, "--text", text]
    picture = tmp_path / "picture.svg"
    rows = evaluated(capsys, [model, coarse], *against, "--plot", picture)
    drawn = picture.read_text("utf-8")
    # Matplotlib notes each text beside the curves that it becomes.
    for words in (
        "model",
        "coarse",
        "model on text.txt, 50 tokens in windows of 24, int8 activations",
    ):
        assert f"<!-- {words} -->" in drawn
    assert "Q4_0" not in drawn  # of another model
    # Equals differ by nothing, which a logarithmic axis has no place for.
    picture = tmp_path / "picture.png"
    evaluated(capsys, [model], "--reference", model, "--text", text, "--exact", "--plot", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".png", ".svg", ".txt"]

    # A run on the default model: beside it what others made of it.
    line = json.dumps({**rows[0], "source": "smollm2", "reference": "smollm2"})
    (tmp_path / "run.txt").write_text(f"as it was printed\n{line}\n")
    assert draw.main([str(tmp_path / "run.txt"), "--out", str(tmp_path / "both.svg")]) == 0
    both = (tmp_path / "both.svg").read_text("utf-8")
    for words in ("Q4_0", "Q8_0", "llama.cpp, measured on another English text"):
        assert f"<!-- {words} -->" in both


@pytest.mark.gpu
def test_evaluate_says_what_is_wrong_in_one_line(
    tmp_path: Path,
    folder: Path,
    model: str,
    untied: str,
    text: str,
    capsys: pytest.CaptureFixture[str],
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
        (untied, text, ["--window", "8"], "vocabulary of 101, not of 97 as the model"),
        (other, text, ["--window", "8"], "vocabulary of 101, not of 97 as the model"),
        (model, text, ["--bits", "4,5"], "its bits are fixed"),
        (model, text, ["--plot", "x.pdf"], "x.pdf: expected a name that ends in .png or .svg"),
        (model, text, ["--plot", str(binary / "x.png")], r"x.png: cannot be written \(Not a dir"),
        (model, text, ["--plot", str(tmp_path / "d.png")], r"d.png: cannot be written \(Is a dir"),
    ):
        (tmp_path / "d.png").mkdir(exist_ok=True)
        flags = [*flags] if "--window" in flags else [*flags, "--window", "16"]
        command = [model, "--reference", reference, "--text", file, "--tokens", "40", *flags]
        assert evaluate.main(command) == 1
        line = error_line(capsys.readouterr())
        assert re.search(complaint, line), line
    command = [model, "--text", text, "--tokens", "40", "--reference"]
    short_context = dataclasses.replace(CONFIG, max_seq_len=20)
    brother = write_hf_folder(tmp_path / "brother", short_context, random_tensors(short_context))
    assert evaluate.main([*command, str(brother), "--window", "21"]) == 1
    assert "1 to 20 positions, --window is 21" in error_line(capsys.readouterr())

    # As many tokens, but others.
    tokenizer = json.loads((brother / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (brother / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert evaluate.main([*command, str(brother), "--window", "20"]) == 1
    assert "cuts the text into other tokens than the model" in error_line(capsys.readouterr())

    # Before anything is converted, which would be said.
    assert evaluate.main([str(folder), "nowhere", *command[1:], model, "--bits", "5"]) == 1
    assert "nowhere: no such file" in error_line(capsys.readouterr())


@pytest.mark.gpu
def test_evaluate_trusts_no_logits_that_are_not_finite(
    model: str, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def logits(self: Engine, token_ids: Sequence[int]) -> Any:
        return np.where(np.arange(97) == 96, np.nan, np.zeros((len(token_ids), 1)))

    monkeypatch.setattr(Engine, "logits", logits)
    command = [model, "--reference", model, "--text", text, "--tokens", "9", "--window", "9"]
    assert evaluate.main(command) == 1
    assert f"{model}: computes logits that are no finite" in error_line(capsys.readouterr())


def test_plot_without_matplotlib_is_one_clear_line(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "engine.plot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)  # as if it were not installed
    command = ["m", "--reference", "m", "--text", text, "--plot", str(tmp_path / "p.png")]
    assert evaluate.main(command) == 1
    assert "pip install 'answer-llm[plot]'" in error_line(capsys.readouterr())


@pytest.mark.parametrize(
    "flags",
    [
        ["--tokens", "1"],
        ["--window", "1"],
        ["--window", "x"],
        ["--bits", "4,x"],
        ["--bits", "4,"],
        ["--bits", "0.2,4"],
        ["--bits", "nan"],
    ],
)
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
