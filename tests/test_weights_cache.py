"""The cache: a model is converted once, found again, and converted anew when it has changed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from tiny_model import CONFIG, random_tensors, write_gguf, write_hf_folder

from engine.errors import WeightsError
from weights import cache
from weights.cache import resolve, resolve_each
from weights.convert import QUICK, RECIPE_VERSION, CalibrationText
from weights.sources import Source, open_source
from weights.store import WeightsFile


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, for models converted without calibration."""
    monkeypatch.setattr(cache, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(cache, "QUICK", CalibrationText(0))
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
    assert path.name.endswith(f"-5.5bit-v{RECIPE_VERSION}.safetensors")
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
    monkeypatch.setattr(cache, "QUICK", QUICK)
    monkeypatch.setattr(cache, "convert", lambda *args, **options: calls.append((args, options)))
    monkeypatch.setattr(cache, "open_source", lambda spec: default_model)
    path = folder / f"smollm2-5bit-v{RECIPE_VERSION}.safetensors"
    assert resolve("smollm2") == path
    options = {"text": QUICK, "progress": True, "keep_calibration": False}
    assert calls == [((default_model, path, 5.0), options)]
    assert default_model.name == "smollm2"
    assert open_source is not cache.open_source


def test_resolve_each_calibrates_once(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_hf_folder(tmp_path / "tiny", CONFIG, random_tensors(CONFIG))
    there = resolve(model, bits=6)
    calls = []
    monkeypatch.setattr(
        cache,
        "convert",
        lambda source, path, bits, **o: calls.append((bits, o["keep_calibration"])),
    )
    paths = resolve_each(model, [4.5, 3, 6, 4.5, None])
    # What is there is not converted, and what is asked for twice is converted once: the last
    # conversion, which need keep nothing, is not always that of the last rate.
    assert calls == [(4.5, True), (3, True), (5.0, False)]
    assert [path.name for path in paths] == [
        there.name.replace("-6bit", f"-{bits}bit") for bits in ("4.5", "3", "6", "4.5", "5")
    ]
    calls.clear()
    resolve_each(model, [4.5, 6])
    assert calls == [(4.5, False)]
    assert resolve_each(there, [None, None]) == [there, there]
    with pytest.raises(WeightsError, match="its bits are fixed"):
        resolve_each(there, [None, 4])
