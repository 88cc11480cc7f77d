"""What README.md and docs/ tell to type does what they say: every `answer ...` of their code blocks
is run, with small models under the names that stand there."""

from __future__ import annotations

import dataclasses
import io
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_model import CONFIG, random_tensors, write_gguf, write_hf_folder

from engine import bench
from engine.__main__ import COMMANDS, main
from weights import cache, models, synthetic
from weights.convert import CalibrationText, convert
from weights.sources import open_source

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL = dataclasses.replace(CONFIG, dim=200, max_seq_len=2048)
ELSEWHERE = {"serve"}  # it runs until it is stopped: tests/test_server.py starts it


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Language and text of the fenced blocks."""
    yield from re.findall(
        r"^```(\w*)\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )


def commands(page: Path) -> list[str]:
    command = re.compile(rf" *answer ({'|'.join(COMMANDS)}|-p)\b(?! --help)")
    lines = [line for _, text in blocks(page) for line in text.splitlines()]
    return [line.strip() for line in lines if command.match(line)]


def test_every_command_is_named() -> None:
    text = "".join(page.read_text("utf-8") for page in PAGES)
    assert not [word for word in COMMANDS if f"answer {word}" not in text]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text("utf-8")):
        assert (page.parent / link).exists(), link


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the names in the commands are those of small models."""
    folder = tmp_path_factory.mktemp("place")
    tensors = random_tensors(SMALL)
    for name in ("SOURCE", "smollm2", "HuggingFaceTB/SmolLM2-1.7B-Instruct"):
        write_hf_folder(folder / name, SMALL, tensors)
    write_gguf(folder / "model.gguf", SMALL, tensors)
    for name in "AB":
        convert(
            open_source(folder / "smollm2"),
            folder / f"{name}.safetensors",
            6,
            text=CalibrationText(0),
            progress=False,
        )
    (folder / "book.txt").write_text("It was a dark and stormy night. ab " * 3)
    return folder


@pytest.mark.gpu
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_work(
    page: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    for module in (cache, models):
        monkeypatch.setattr(module, "cache_folder", lambda: place / "cache")
    monkeypatch.setattr(cache, "QUICK", CalibrationText(0))
    monkeypatch.setattr("weights.convert.FULL", CalibrationText(0))
    monkeypatch.setattr(bench, "SHAPES", [(64, 96)])
    monkeypatch.setattr(bench, "TASKS", {"quote": "ab" * 9})
    monkeypatch.setattr(bench, "_WARM_UP_SECONDS", 0)
    monkeypatch.setattr(bench, "_spread", lambda rate, repeats: 3 * (rate(),))
    tasks = bench.bench_speculation
    monkeypatch.setattr(bench, "bench_speculation", lambda engine, n, repeats: tasks(engine, 20, 1))
    together = bench.bench_batch
    monkeypatch.setattr("engine.bench_batch._WARM_UP_SECONDS", 0)
    monkeypatch.setattr(
        bench,
        "bench_batch",
        lambda engine, sizes, n_tokens, repeats, rows: together(engine, sizes, 4, 1, rows),
    )
    for name in synthetic.SHAPES:
        monkeypatch.setitem(synthetic.SHAPES, name, SMALL)
    found = commands(page)
    assert found or page.name != "README.md"
    for command in found:
        words = shlex.split(command, comments=True)[1:]
        if words[0] in ELSEWHERE:
            continue
        if ">" in words:  # the shell's part
            words, out = words[: words.index(">")], words[words.index(">") + 1]
        else:
            out = None
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello")))
        code = main(words)
        printed = capsys.readouterr()
        assert code == 0, f"{command}: {printed.err}"
        if out:
            Path(out).write_text(printed.out)
        for picture in re.findall(r"\w+\.(?:png|svg)", command):
            assert (place / picture).stat().st_size > 1000, command


@pytest.mark.gpu
def test_the_python_of_its_page_works(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(cache, "cache_folder", lambda: place / "cache")
    monkeypatch.setattr(cache, "QUICK", CalibrationText(0))
    page = blocks(ROOT / "docs" / "python.md")
    names: dict[str, Any] = {}
    for language, program in page:  # one goes on with what another has defined
        if language == "python":
            exec(program, names)
    assert "engine" in names
    assert "MB: weights" in capsys.readouterr().out
    assert (place / "tale.session").is_file()
