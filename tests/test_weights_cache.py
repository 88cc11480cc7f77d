"""The cache: a model is converted once, found again, and converted anew when it has changed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from tiny_model import CONFIG, random_tensors, write_gguf, write_hf_folder

from engine.errors import WeightsError
from weights import cache
from weights.cache import resolve
from weights.sources import Source, open_source
from weights.store import WeightsFile


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setattr(cache, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def test_resolve_converts_once_and_says_where(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_hf_folder(tmp_path / "tiny", CONFIG, random_tensors(CONFIG))
    path = resolve(model, bits=5.5)
    said = capsys.readouterr()
    assert said.out == ""
    assert str(path) in said.err
    assert path.parent == folder
    assert path.name.startswith("tiny-")
    assert path.name.endswith("-5.5bit-v2.safetensors")
    assert WeightsFile.open(path).config == CONFIG

    written = path.stat().st_mtime_ns
    assert resolve(str(model), bits=5.5) == path
    assert path.stat().st_mtime_ns == written
    assert capsys.readouterr().err == ""


def test_resolve_keeps_rates_and_places_apart(tmp_path: Path) -> None:
    model = write_hf_folder(tmp_path / "tiny", CONFIG, random_tensors(CONFIG))
    other = write_hf_folder(tmp_path / "elsewhere" / "tiny", CONFIG, random_tensors(CONFIG, seed=1))
    paths = {resolve(model, bits=5.5), resolve(model, bits=6), resolve(other, bits=6)}
    assert len(paths) == 3


def test_resolve_converts_a_changed_model_again(tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "tiny.gguf", CONFIG, random_tensors(CONFIG))
    before = resolve(model, bits=6)
    write_gguf(model, CONFIG, random_tensors(CONFIG, seed=1))
    os.utime(model, ns=(0, 0))
    after = resolve(model, bits=6)
    assert after != before
    name = "model.layers.0.mlp.down_proj"
    words = [WeightsFile.open(path).matrix(name).words for path in (before, after)]
    assert not np.array_equal(*words)


def test_resolve_gives_back_a_weights_file(tmp_path: Path) -> None:
    model = write_hf_folder(tmp_path / "tiny", CONFIG, random_tensors(CONFIG))
    path = resolve(model, bits=6)
    assert resolve(path) == path
    with pytest.raises(WeightsError, match="bits"):
        resolve(path, bits=6)


def test_resolve_names_what_it_cannot_find(tmp_path: Path, folder: Path) -> None:
    for model in ("no-such-model", tmp_path / "none.gguf", tmp_path / "none.safetensors"):
        with pytest.raises(WeightsError, match="no such file"):
            resolve(model)
    assert not folder.exists()


def test_resolve_a_failed_conversion_leaves_nothing(tmp_path: Path, folder: Path) -> None:
    tensors = random_tensors(CONFIG)
    tensors["model.norm.weight"][3] = np.nan
    model = write_hf_folder(tmp_path / "tiny", CONFIG, tensors)
    with pytest.raises(WeightsError, match="nan"):
        resolve(model, bits=6)
    assert not folder.exists() or list(folder.iterdir()) == []


def test_resolve_damaged_cached_file_says_what_to_delete(tmp_path: Path) -> None:
    model = write_hf_folder(tmp_path / "tiny", CONFIG, random_tensors(CONFIG))
    path = resolve(model, bits=6)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=rf"{path}.*delete it"):
        WeightsFile.open(resolve(model, bits=6))


@pytest.mark.real_weights
def test_resolve_names_the_default_models_file(
    folder: Path, default_model: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not converted here: that it is called with the right things is enough.
    calls = []
    monkeypatch.setattr(cache, "convert", lambda *args, **options: calls.append((args, options)))
    monkeypatch.setattr(cache, "open_source", lambda spec: default_model)
    assert resolve("smollm2") == folder / "smollm2-5bit-v2.safetensors"
    assert calls == [
        ((default_model, folder / "smollm2-5bit-v2.safetensors", 5.0), {"progress": True})
    ]
    assert default_model.name == "smollm2"
    assert open_source is not cache.open_source
