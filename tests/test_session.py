"""Sessions on disk: what comes back is what was there, and nothing comes of a file that is not."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engine import FakeEngine, talk
from safetensors.numpy import load, safe_open, save
from tiny_model import random_source

from engine.device import Device
from engine.errors import EngineError
from engine.generate import Engine
from model.config import ModelConfig
from weights import container
from weights.convert import CalibrationText, convert
from weights.store import WeightsFile

PROMPT = [5, 9, 60, 7, 33, 12, 90, 41, 8, 19, 77]


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: ModelConfig
) -> dict[str, WeightsFile]:
    folder, files = tmp_path_factory.mktemp("models"), {}
    config = dataclasses.replace(tiny_config, head_dim=10)  # padded in the cache
    for seed, name in enumerate(("model", "other")):
        source = dataclasses.replace(random_source(config, seed), name=name)
        path = folder / f"{name}.safetensors"
        convert(source, path, 6, embed_bits=6, text=CalibrationText(0), progress=False)
        files[name] = WeightsFile.open(path)
    return files


Build = Callable[..., Engine]


@pytest.fixture(scope="module")
def build(files: dict[str, WeightsFile]) -> Build:
    def opened(name: str = "model", adapter: str = "software", **options: Any) -> Engine:
        device = Device.open()
        device.software = adapter == "software"
        return Engine(files[name], device, **{"context": 48, **options})

    return opened


@pytest.fixture(scope="module")
def engine(build: Build) -> Engine:
    return build()


@pytest.fixture
def saved(engine: Engine, tmp_path: Path) -> tuple[Path, list[int]]:
    """A session of a prompt and its answer, and all of their tokens."""
    answer = list(engine.generate(PROMPT, 9, stop_ids=()))
    path = tmp_path / "talk.session"
    assert engine.save_session(path, "a note") == len(PROMPT) + len(answer) - 1
    return path, [*PROMPT, *answer]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("adapter", "options", "context"),
    [
        ("software", {}, 30),
        ("gpu", {"exact": True}, 64),
        ("software", {"cache": "int4"}, 64),
        ("gpu", {"cache": "int8"}, 30),
    ],
)
def test_a_session_goes_on_where_it_was_saved(
    build: Build, tmp_path: Path, adapter: str, options: dict[str, Any], context: int
) -> None:
    engine = build(adapter=adapter, **options)
    answer = list(engine.generate(PROMPT, 9, stop_ids=()))
    engine.save_session(tmp_path / "s", "a note")
    turn = [*PROMPT, *answer, 3, 4]
    want = list(engine.generate(turn, 8, stop_ids=()))

    later = build(adapter=adapter, context=context, **options)
    list(later.generate([70, 71, 72], 20, stop_ids=()))  # something else is in the cache
    assert later.load_session(tmp_path / "s") == "a note"
    assert later.cached_tokens == turn[:-3]
    generation = later.generate(turn, 8, stop_ids=())
    assert list(generation) == want
    assert generation.stats.reused_tokens == len(turn) - 3  # the answer's last was never an input


@pytest.mark.gpu
def test_an_empty_session(build: Build, tmp_path: Path) -> None:
    assert build().save_session(tmp_path / "s") == 0
    engine = build()
    assert engine.load_session(tmp_path / "s") == "" and engine.cached_tokens == []


def refused(engine: Engine, path: Path, text: str) -> None:
    """One line, and the engine has what it had."""
    before = engine.cached_tokens
    with pytest.raises(EngineError, match=text) as caught:
        engine.load_session(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert engine.cached_tokens == before


@pytest.mark.gpu
def test_sessions_of_others_are_refused(build: Build, saved: tuple[Path, list[int]]) -> None:
    path, _ = saved
    refused(build("other"), path, r"session of another model \(model\)")
    refused(build(exact=True), path, r"session of another activations \(fast\)")
    refused(build(cache="int8"), path, r"session of another cache \(f16\)")
    refused(build(context=12), path, r"holds 19 tokens, the context 12; .*--context")


@pytest.mark.gpu
def test_files_that_are_no_sessions_are_refused(
    engine: Engine, files: dict[str, WeightsFile], saved: tuple[Path, list[int]], tmp_path: Path
) -> None:
    whole = saved[0].read_bytes()
    path = tmp_path / "wrong"
    refused(engine, path, "cannot be read as a session")
    for length in (0, 7, 200, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(engine, path, "cannot be read as a session")
    refused(engine, files["model"].path, "not a session")
    for at in (len(whole) - 1, len(whole) - 3000):  # one bit of the data
        changed = bytearray(whole)
        changed[at] ^= 4
        path.write_bytes(changed)
        refused(engine, path, "damaged .*CRC-32")


@pytest.mark.gpu
def test_sessions_with_wrong_contents_are_refused(
    engine: Engine, saved: tuple[Path, list[int]], tmp_path: Path
) -> None:
    """Their checksums are right: somebody wrote them on purpose."""
    with safe_open(saved[0], framework="numpy") as file:
        metadata = file.metadata()
    tensors = load(saved[0].read_bytes())
    path = tmp_path / "wrong"

    def write(changed: dict[str, np.ndarray], **fields: str) -> None:
        crc32 = {name: zlib.crc32(np.ascontiguousarray(v).data) for name, v in changed.items()}
        crc32["note"] = zlib.crc32(metadata["note"].encode())
        data = save(changed, {**metadata, "crc32": json.dumps(crc32), **fields})
        path.write_bytes(data)

    write(tensors)
    engine.load_session(path)
    write({**tensors, "tokens": tensors["tokens"] + 97})
    refused(engine, path, "beyond the vocabulary")
    write({**tensors, "tokens": tensors["tokens"][:-1]})
    refused(engine, path, "another shape")
    write({**tensors, "tokens": tensors["tokens"].astype(np.float32)})
    refused(engine, path, "another shape")
    write({name: values for name, values in tensors.items() if name != "layers.1.values"})
    refused(engine, path, "another shape")
    write({**tensors, "more": np.zeros(3, np.uint32)})
    refused(engine, path, "another shape")
    write(tensors, format_version="3")
    refused(engine, path, "version 3, expected 2")
    write(tensors, crc32="")
    refused(engine, path, "no checksums")


@pytest.mark.gpu
def test_a_session_is_written_whole_or_not_at_all(
    engine: Engine, saved: tuple[Path, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, before = saved[0], saved[0].read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(container.os, "fsync", full)
    with pytest.raises(EngineError, match="No space left"):
        engine.save_session(path, "other")
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


# In the chat


class Keeper(FakeEngine):
    """Keeps notes in a dictionary, and refuses names that are not there."""

    def __init__(self, *answers: Any, notes: dict[str, str], **options: Any) -> None:
        super().__init__(*answers, **options)
        self.notes = notes

    def save_session(self, path: str, note: str) -> int:
        self.notes[path] = note
        return len(self.cached)

    def load_session(self, path: str) -> str:
        if path not in self.notes:
            raise EngineError(f"{path}: cannot be read as a session (no such file)")
        return self.notes[path]


def test_a_saved_conversation_goes_on_in_another_chat(capsys: pytest.CaptureFixture[str]) -> None:
    notes: dict[str, str] = {}
    the = [ord(c) for c in "the"]  # not as the tokenizer would have it
    first = Keeper(the, "two", notes=notes)
    talk(first, "a", "/save my talk", "b", system="S")
    second = Keeper("x", "two", notes=notes)
    talk(second, "z", "/load my talk", "b")
    assert second.prompts[-1] == first.prompts[-1]  # system prompt, turns, and the very tokens
    err = capsys.readouterr().err
    assert "tokens in my talk" in err and "loaded: a conversation of 1 turn" in err


def test_what_cannot_be_loaded_leaves_the_conversation(
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine = Keeper("one", "two", notes={"bad": "[]", "worse": "{", "foreign": ""})
    talk(engine, "a", "/load nowhere", "/load bad", "/load worse", "/load foreign", "/save", "b")
    assert "a<|im_end|>\n<|im_start|>assistant\none" in engine.prompt_text()
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 5 and "nowhere: cannot be read" in errors[0]
    assert all("of no chat" in line for line in errors[1:4])
    assert "/save needs the name of a file" in errors[4]
