"""Conversion with calibration: what it gains, what it keeps, and models that are hard to learn."""

from __future__ import annotations

import _thread
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from divergence import kl
from tiny_model import CONFIG, random_tensors, write_hf_folder

from codec.matrix import decode_matrix
from engine.errors import WeightsError
from model.config import ModelConfig
from weights import convert as command
from weights import layout
from weights.calibration import calibration as calibrating
from weights.convert import CalibrationText, convert
from weights.rates import LEAST_EMBED_BITS
from weights.sources import LazyTensor, Source, open_source
from weights.store import WeightsFile

Array = npt.NDArray[np.float32]

UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False)
WIDE = dataclasses.replace(CONFIG, dim=136, hidden_dim=210, n_heads=6, head_dim=22, vocab_size=97)
SAMPLED = CalibrationText(256, in_turn=True)
NONE = CalibrationText(0)


@pytest.fixture(autouse=True)
def calibrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where calibrations are kept."""
    monkeypatch.setattr(command, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "calibration"


def kept(calibrations: Path) -> list[Path]:
    """Without the texts that models wrote, which are small."""
    return [path for path in calibrations.iterdir() if path.is_dir()]


def lively(config: ModelConfig, seed: int = 0) -> dict[str, Array]:
    """Rows of about length 1, norms of about 1: tokens are not all equally likely."""
    return {
        name: 20 * w / np.float32(w.shape[-1] ** 0.5) if w.ndim == 2 else 1 + 4 * w
        for name, w in random_tensors(config, seed).items()
    }


def source_of(folder: Path, config: ModelConfig, tensors: dict[str, Array]) -> Source:
    return open_source(write_hf_folder(folder / "tiny", config, tensors))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("bits", [0.7, 2.5, 4, 7])
def test_calibrated_conversion_meets_the_asked_rate(
    tmp_path: Path, tied: bool, bits: float
) -> None:
    config = dataclasses.replace(WIDE, tie_embeddings=tied)
    source = source_of(tmp_path, config, lively(config))
    convert(source, tmp_path / "out", bits, text=SAMPLED)
    file = WeightsFile.open(tmp_path / "out")
    weighed = [m for m in layout.matrices(config) if tied or m.name != layout.EMBEDDING]
    stored = sum(file.stored_bits(m.name) for m in weighed)
    # Matrices of so few rows are probed whole, at a constant near the last one; in turn they become
    # a little larger.
    assert stored / sum(m.rows * m.cols for m in weighed) == pytest.approx(bits, abs=0.03)
    if not tied:
        wanted = max(bits, LEAST_EMBED_BITS)
        rate = file.stored_bits(layout.EMBEDDING) / (97 * 136)
        assert rate == pytest.approx(wanted, abs=0.05)


def test_embedding_has_its_own_rate_if_that_is_asked_for(tmp_path: Path) -> None:
    source = source_of(tmp_path, WIDE, lively(WIDE))
    convert(source, tmp_path / "out", 3, embed_bits=7, text=SAMPLED)
    file = WeightsFile.open(tmp_path / "out")
    assert file.bits_per_weight(block_only=True) == pytest.approx(3, abs=0.02)
    assert file.stored_bits(layout.EMBEDDING) / (97 * 136) == pytest.approx(7, abs=0.05)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_calibration_saves_what_inputs_have_in_common(tmp_path: Path, tied: bool) -> None:
    """A residual of 5 dimensions among 136: errors that it does not see cost nothing."""
    config = dataclasses.replace(WIDE, tie_embeddings=tied)
    tensors = lively(config)
    basis = np.linalg.qr(np.random.default_rng(7).normal(size=(136, 5)))[0]
    onto = (basis @ basis.T).astype(np.float32)
    for name, w in tensors.items():
        if name.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight")):
            size = np.linalg.norm(w)
            w[:] = w @ onto if "embed" in name else onto @ w
            w *= size / np.linalg.norm(w)
        elif w.ndim == 1:
            w[:] = 1
    source = source_of(tmp_path, config, tensors)
    reports = convert(source, tmp_path / "with", 3.5, embed_bits=5, text=CalibrationText(1024))
    assert len(reports) == len(layout.matrices(config))
    convert(source, tmp_path / "without", 3.5, embed_bits=5, text=NONE)
    sizes = [WeightsFile.open(tmp_path / name).size_bytes for name in ("with", "without")]
    assert sizes[0] < 1.002 * sizes[1]
    assert kl(tmp_path / "with", source) < 0.2 * kl(tmp_path / "without", source)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_calibrated_file_is_the_model(tmp_path: Path, tied: bool) -> None:
    config = dataclasses.replace(WIDE, tie_embeddings=tied)
    source = source_of(tmp_path, config, lively(config))
    convert(source, tmp_path / "5", 5, text=SAMPLED)
    convert(source, tmp_path / "8", 8, text=SAMPLED)
    fine, coarse = kl(tmp_path / "8", source), kl(tmp_path / "5", source)
    # Three bits are steps of an eighth, and a divergence goes with their square.
    assert 0 < 36 * fine < coarse < 0.012


def test_pruned_model_has_zeros_in_its_blocks(tmp_path: Path) -> None:
    source = source_of(tmp_path, WIDE, lively(WIDE))
    convert(source, tmp_path / "out", 4, text=SAMPLED, sparsity=0.4)
    file = WeightsFile.open(tmp_path / "out")
    assert file.bits_per_weight(block_only=False) == pytest.approx(4, abs=0.03)
    for matrix in layout.matrices(WIDE):
        zero = np.mean(decode_matrix(file.matrix(matrix.name)) == 0)
        # At 4 bits, steps are about a third of a row's root mean square: an eighth is zero anyway.
        assert 0.4 <= zero < 0.55 if matrix.in_block else zero < 0.25


def test_pruned_model_has_the_asked_rate(tmp_path: Path) -> None:
    source = source_of(tmp_path, WIDE, lively(WIDE))
    convert(source, tmp_path / "out", 3, text=SAMPLED, sparsity=0.7)
    file = WeightsFile.open(tmp_path / "out")
    assert file.bits_per_weight(block_only=False) == pytest.approx(3, abs=0.03)
    with pytest.raises(WeightsError, match=r"the model: 3 bits .* the nearest is [12]\.\d\d; ask"):
        convert(source, tmp_path / "out", 3, text=SAMPLED, sparsity=0.97)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "sparsity is 1, expected 0 to less than 1"),
        ({"sparsity": -0.1}, "sparsity is -0.1, expected 0 to less than 1"),
        ({"sparsity": 0.5, "text": NONE}, "sparsity needs a calibration"),
        ({"sparsity": 0.5, "bits": "lossless"}, "lossless keeps all weights"),
        ({"text": CalibrationText(-1)}, "calibration-tokens is -1, expected 0 or more"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(WeightsError, match=message):
        convert(source_of(tmp_path, CONFIG, lively(CONFIG)), tmp_path / "out", **options)


def test_calibration_reads_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_hf_folder(tmp_path / "tiny", CONFIG, lively(CONFIG))
    text = tmp_path / "text.txt"
    outs = []
    for content in ("It is what it is. " * 40, "9+8=17; 7*6=42; " * 40):
        text.write_text(content.replace(" ", ""))
        outs.append(tmp_path / f"{len(outs)}.safetensors")
        flags = ["--calibration", str(text), "--calibration-tokens", "256", "--bits", "4"]
        assert command.main([str(folder), str(outs[-1]), *flags]) == 0
        printed = capsys.readouterr()
        assert printed.err == "" and "model.layers.1.mlp.down_proj" in printed.out
    assert outs[0].read_bytes() != outs[1].read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "is empty"),
        (b"\x7fELF\0\0\0", "binary"),
        (b"abcd" * 10, "makes 30 tokens, calibration needs 64 or more"),  # `ab` is one
    ],
)
def test_calibration_text_that_cannot_be_used_is_one_line(
    tmp_path: Path,
    calibrations: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes | None,
    message: str,
) -> None:
    folder = write_hf_folder(tmp_path / "tiny", CONFIG, lively(CONFIG))
    text, out = tmp_path / "text.txt", tmp_path / "new" / "out"
    if content is not None:
        text.write_bytes(content)
    assert command.main([str(folder), str(out), "--calibration", str(text)]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith(f"error: {text}: ") and message in printed.err
    assert not out.parent.exists() and not calibrations.exists()


@pytest.mark.parametrize("keep", [False, True])
def test_calibration_is_removed_unless_it_is_to_be_kept(
    tmp_path: Path, calibrations: Path, monkeypatch: pytest.MonkeyPatch, keep: bool
) -> None:
    folder = write_hf_folder(tmp_path / "tiny", CONFIG, lively(CONFIG))
    arguments = [str(folder), str(tmp_path / "out"), "--calibration-tokens", "128", "--quiet"]
    assert command.main([*arguments, *["--keep-calibration"] * keep]) == 0
    assert len(kept(calibrations)) == keep
    blocks: list[int] = []

    def counted(*args: object) -> object:
        blocks.append(1)
        return statistics(*args)  # type: ignore[arg-type]

    statistics = calibrating.layer_statistics
    monkeypatch.setattr(calibrating, "layer_statistics", counted)
    assert command.main([*arguments, "--bits", "3"]) == 0
    assert len(blocks) == (0 if keep else CONFIG.n_layers)
    assert kept(calibrations) == []


@pytest.mark.parametrize("reads", range(1, 9))
def test_stopped_conversion_goes_on_where_it_ended(
    tmp_path: Path, calibrations: Path, reads: int
) -> None:
    source = source_of(tmp_path, CONFIG, lively(CONFIG))
    convert(source, tmp_path / "whole", text=SAMPLED)
    name = "model.layers.1.mlp.down_proj.weight"
    w = source.tensors[name].read()
    seen: list[str] = []

    def read() -> Array:
        seen.append(name)
        if len(seen) == reads:
            _thread.interrupt_main()
        return w.copy()

    tensors = {**source.tensors, name: LazyTensor(w.shape, read)}
    out = tmp_path / "new" / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(dataclasses.replace(source, tensors=tensors), out, text=SAMPLED)
    assert not out.exists()
    # Sampling, the folder's name, forward and backward, measuring, twice probing, encoding.
    assert len(seen) == reads
    convert(source, out, text=SAMPLED)
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()
    assert list(out.parent.iterdir()) == [out]
    assert kept(calibrations) == []


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.mlp.up_proj.weight",
    ],
)
@pytest.mark.parametrize("from_file", [False, True])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, name: str, from_file: bool) -> None:
    tensors = lively(UNTIED)
    tensors[name].flat[7] = np.nan
    source = source_of(tmp_path, UNTIED, tensors)
    text = tmp_path / "text.txt"
    text.write_text("abc" * 100)
    with pytest.raises(WeightsError, match=rf"{name}\[.*7\] is nan; the source model is damaged"):
        convert(source, tmp_path / "out", text=CalibrationText(256, text if from_file else None))
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("error")
def test_weights_too_large_to_compute_with_are_one_error(tmp_path: Path) -> None:
    tensors = lively(CONFIG)
    tensors["model.layers.1.mlp.up_proj.weight"].flat[7] = 1e25
    source = source_of(tmp_path, CONFIG, tensors)
    with pytest.raises(WeightsError, match="block 1 gives activations that are not finite, or who"):
        convert(source, tmp_path / "out", text=SAMPLED)


def test_model_that_always_says_the_same_is_one_error(tmp_path: Path) -> None:
    """No block's errors matter at all, only the head's."""
    tensors = lively(CONFIG)
    tensors["model.embed_tokens.weight"][:] = tensors["model.embed_tokens.weight"][0]
    source = source_of(tmp_path, CONFIG, tensors)
    with pytest.raises(WeightsError, match="some weights matter so much more than all others"):
        convert(source, tmp_path / "out", 4, text=SAMPLED)


def test_rate_out_of_reach_says_the_nearest(tmp_path: Path) -> None:
    tensors = lively(CONFIG)
    for w in tensors.values():
        if w.ndim == 2:  # a weight a row that is not zero: nothing to store
            w[np.arange(w.shape[1]) != np.arange(len(w))[:, None] % w.shape[1]] = 0
    source = source_of(tmp_path, CONFIG, tensors)
    with pytest.raises(WeightsError, match=r"the model: 8 bits .* the nearest is [0-3]\.\d\d; ask"):
        convert(source, tmp_path / "out", 8, text=SAMPLED)
    assert not (tmp_path / "out").exists()


def zeros(tensors: dict[str, Array], name: str, *places: int) -> None:
    tensors[name][..., list(places) or slice(None)] = 0


@pytest.mark.parametrize(
    "kill",
    [
        partial(zeros, name="model.layers.0.input_layernorm.weight"),
        partial(zeros, name="model.layers.1.self_attn.o_proj.weight"),
    ],
    ids=["norm", "o"],
)
def test_parts_that_do_nothing_do_no_harm(tmp_path: Path, kill: partial[None]) -> None:
    tensors = lively(WIDE)
    kill(tensors)
    source = source_of(tmp_path, WIDE, tensors)
    convert(source, tmp_path / "out", 6, text=SAMPLED)
    file = WeightsFile.open(tmp_path / "out")
    assert file.bits_per_weight(block_only=False) == pytest.approx(6, abs=0.01)
    assert kl(tmp_path / "out", source) < 0.01


def test_inputs_that_are_always_zero_do_no_harm(tmp_path: Path) -> None:
    tensors = lively(WIDE)
    for norm in ("layers.0.input_layernorm", "layers.1.post_attention_layernorm", "norm"):
        tensors[f"model.{norm}.weight"][[3, 100]] = 0
    tensors["model.layers.1.self_attn.v_proj.weight"][5:9] = 0
    tensors["model.layers.0.mlp.up_proj.weight"][::7] = 0
    source = source_of(tmp_path, WIDE, tensors)
    convert(source, tmp_path / "out", 6, text=SAMPLED)
    assert kl(tmp_path / "out", source) < 0.004
