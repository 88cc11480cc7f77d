"""What tests of commands share: the files of small models, a text, and what an error looks like.
Fixtures are imported by name.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from tiny_model import CONFIG, random_tensors, write_hf_folder

from weights.convert import CalibrationText, convert
from weights.sources import open_source

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
