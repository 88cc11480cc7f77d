"""Conversion without loss: every source's weights bit for bit, at the cost that the report says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny_model import CONFIG, random_tensors, write_gguf, write_hf_folder

from codec.lossless import LosslessMatrix
from engine.errors import WeightsError
from model.reference import Reference
from weights import cache, inspect, layout
from weights import convert as command
from weights.convert import RECIPE_VERSION, convert
from weights.sources import LazyTensor, Source, open_source
from weights.store import WeightsFile

UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False)
DOWN = "model.layers.1.mlp.down_proj"


def all_mantissas(seed: int = 0) -> dict[str, np.ndarray]:
    """`random_tensors`, which are exact in bfloat16, with lower bits, zeros and subnormals."""
    rng = np.random.default_rng(seed)
    tensors = random_tensors(UNTIED)
    for name, w in tensors.items():
        lower = rng.integers(0, 2**16, w.shape, np.uint32)
        tensors[name] = (w.view(np.uint32) | lower).view(np.float32)
    tensors[f"{DOWN}.weight"][3, :5] = 0.0, -0.0, 1e-42, -1e-42, 1e37
    return tensors


def write_source(folder: Path, kind: str) -> Path:
    if kind in ("float32", "float16", "bfloat16"):
        tensors = all_mantissas()
        if kind == "float16":
            tensors[f"{DOWN}.weight"][3, 2:5] = (
                2.0**-24,
                -(2.0**-15),
                6e4,
            )  # subnormals, and nearly the largest
        return write_hf_folder(folder / kind, UNTIED, tensors, kind)
    config = dataclasses.replace(UNTIED, dim=64, hidden_dim=96, n_heads=4, head_dim=16)  # of 32
    path = folder / f"{kind}.gguf"
    return write_gguf(path, config, random_tensors(config), gguf.GGMLQuantizationType[kind])


# kind of source -> mantissa bits of all its matrices, or None where they differ
KINDS = {"float32": 23, "float16": 10, "bfloat16": 7, "F16": 7, "Q8_0": None, "Q4_1": None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("log2_states", [11, 12])
def test_convert_keeps_every_bit(tmp_path: Path, kind: str, log2_states: int) -> None:
    source = open_source(write_source(tmp_path, kind))
    convert(source, tmp_path / "out", bits="lossless", log2_states=log2_states)
    file = WeightsFile.open(tmp_path / "out")
    assert file.lossless
    got, want = Reference.from_weights(file).tensors, Reference.from_source(source).tensors
    assert got.keys() == want.keys()
    for name, w in want.items():
        assert w.dtype == got[name].dtype == np.float32
        assert np.array_equal(got[name].view(np.uint32), w.view(np.uint32)), name
    for name in file.matrix_names:
        matrix = file.matrix(name)
        assert isinstance(matrix, LosslessMatrix)
        assert matrix.exponents.log2_states == log2_states
        assert KINDS[kind] in (None, matrix.mantissa_bits)


def test_convert_without_loss_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    source = open_source(write_source(tmp_path, "bfloat16"))
    convert(source, tmp_path / "a", bits="lossless")
    convert(source, tmp_path / "b", bits="lossless")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [f"{DOWN}.weight", "model.norm.weight"])
def test_convert_without_loss_names_weights_that_are_not_finite(
    tmp_path: Path, name: str, value: float
) -> None:
    tensors = all_mantissas()
    tensors[name].flat[7] = value
    source = open_source(write_hf_folder(tmp_path / "tiny", UNTIED, tensors))
    with pytest.raises(WeightsError, match=rf"{name}\[.*7\] is {value}"):
        convert(source, tmp_path / "out", bits="lossless")
    assert not (tmp_path / "out").exists()


def test_convert_without_loss_takes_no_rate_for_the_embedding(tmp_path: Path) -> None:
    source = open_source(write_source(tmp_path, "bfloat16"))
    with pytest.raises(WeightsError, match="lossless holds for all matrices"):
        convert(source, tmp_path / "out", bits="lossless", embed_bits=6)


def test_convert_without_loss_names_a_matrix_too_wide(tmp_path: Path) -> None:
    config = dataclasses.replace(
        CONFIG, dim=2, hidden_dim=65536, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=2
    )
    shapes = layout.source_shapes(config)
    lazy = {n: LazyTensor(s, lambda s=s: np.ones(s, np.float32)) for n, s in shapes.items()}
    with pytest.raises(WeightsError, match=r"layers\.0\.mlp\.down_proj.*65535 columns"):
        convert(Source("wide", config, lazy, b"{}", None), tmp_path / "out", bits="lossless")


def test_convert_command_without_loss_reports_exponents_and_raw_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = write_source(tmp_path, "float16"), tmp_path / "out"
    assert command.main([str(folder), str(out), "--bits", "lossless"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert inspect.main([str(out)]) == 0
    assert capsys.readouterr().out == printed.out
    assert inspect.main([str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    file = WeightsFile.open(out)
    tensors = Reference.from_weights(file).tensors
    for report in found["matrices"]:
        w = tensors[report["name"]]
        share = np.unique(w.view(np.uint32) >> 23 & 255, return_counts=True)[1] / w.size
        assert report["raw_bits"] == 11
        assert report["entropy"] == pytest.approx(11 - (share * np.log2(share)).sum())
        assert report["stored_bits"] * w.size == pytest.approx(file.stored_bits(report["name"]))
    assert [total["raw_bits"] for total in found["totals"]] == [11, 11, 11]


@pytest.mark.parametrize("bits", ["less", "", "1e"])
def test_convert_command_names_bits_that_are_none(
    bits: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(["smollm2", "out", "--bits", bits])
    assert (
        f"argument --bits: expected 0.25 to 8, or lossless, found {bits}" in capsys.readouterr().err
    )


def test_resolve_keeps_a_model_without_loss_under_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cache, "cache_folder", lambda: tmp_path / "cache")
    folder = write_hf_folder(tmp_path / "tiny", UNTIED, random_tensors(UNTIED))
    path = cache.resolve(folder, "lossless", progress=False)
    assert path.name.endswith(f"-lossless-v{RECIPE_VERSION}.safetensors")
    assert "without loss" in capsys.readouterr().err
    assert WeightsFile.open(path).lossless
    assert cache.resolve(folder, "lossless") == path != cache.resolve(folder, 5.0)
