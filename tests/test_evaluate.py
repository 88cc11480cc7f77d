"""The command `engine.evaluate`."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_files import error_line
from tiny_files import folder as folder
from tiny_files import model as model
from tiny_files import text as text
from tiny_files import untied as untied
from tiny_model import CONFIG, random_tensors, write_hf_folder

from engine import draw, evaluate
from engine.compare import Comparison
from engine.generate import Engine
from weights import cache
from weights.convert import CalibrationText, convert
from weights.sources import open_source
from weights.store import WeightsFile

FIGURES = {field.name for field in dataclasses.fields(Comparison)}


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
