"""Models of random weights: whole files, whose matrices decode to rows that repeat."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from codec.matrix import check, decode_matrix
from engine.errors import ConfigError, WeightsError
from model.config import ModelConfig
from weights.store import WeightsFile
from weights.synthetic import SHAPES, main, matrix, shape, write_synthetic


@pytest.mark.parametrize("rows", [70, 2048, 5000])
def test_rows_repeat(rows: int) -> None:
    m = matrix(rows, 100, 3.0)
    check(m)
    assert m.rows == rows and m.bits_per_weight == pytest.approx(3.0, abs=0.25)  # rows so short
    q = decode_matrix(m)
    assert 1 < q.std() < 3
    if rows > 2048:
        same = [n for n in range(1, 2049) if (q[0] == q[n]).all()]
        assert same and (q[same[0] :] == q[: -same[0]]).all()


def test_rate_is_the_one_asked_for() -> None:
    assert matrix(4096, 1024, 3.1).bits_per_weight == pytest.approx(3.1, abs=0.02)
    assert matrix(4096, 1024, 5.0).bits_per_weight == pytest.approx(5.0, abs=0.02)


def test_file_is_whole(tmp_path: Path, tiny_config: ModelConfig) -> None:
    write_synthetic(tiny_config, tmp_path / "tiny.safetensors", 4)
    file = WeightsFile.open(tmp_path / "tiny.safetensors")
    assert file.config == tiny_config
    for name in file.matrix_names:
        assert np.isfinite(decode_matrix(file.matrix(name))).all()


def test_a_shape_has_a_name_or_a_config(tmp_path: Path) -> None:
    assert shape("8b").n_params == 8_030_261_248
    assert SHAPES["1b"].n_params == 1_235_814_400
    assert SHAPES["135m"].n_params == 134_515_008
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(ConfigError, match="mamba"):
        shape(config)
    with pytest.raises(WeightsError, match=r"neither a config.json nor one of 135m, 1b, 8b"):
        shape("9b")


def test_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["135m", str(tmp_path / "out"), "--bits", "9"]) == 1
    assert "bits is 9, expected 1 to 8" in capsys.readouterr().err
