"""The weights file: whatever is wrong with it, opening says so in a WeightsError."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from tiny_model import CONFIG, random_tensors, write_hf_folder

from codec.matrix import CodedMatrix, pack_side
from codec.scale import LARGEST, ZERO
from codec.side import pack_outliers, unpack_outliers
from engine.errors import WeightsError
from weights import inspect
from weights.container import ContainerWriter, read_container, replacing
from weights.convert import CalibrationText, convert
from weights.sources import open_source
from weights.store import WeightsFile

SMALL = dataclasses.replace(CONFIG, n_layers=1)
QKV = "model.layers.0.self_attn.qkv_proj"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    tensors = random_tensors(SMALL)
    # On both sides of 0 and too far out for any symbol.
    tensors["model.layers.0.self_attn.v_proj.weight"][[19, 3], [39, 5]] = -11, 10
    source = open_source(write_hf_folder(folder / "tiny", SMALL, tensors))
    convert(
        source,
        folder / "tiny.safetensors",
        bits=6.5,
        embed_bits=7.5,
        log2_states=12,
        text=CalibrationText(0),
    )
    return folder / "tiny.safetensors"


@pytest.fixture(scope="module")
def lossless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lossless")
    tensors = random_tensors(SMALL)
    tensors["model.layers.0.self_attn.v_proj.weight"][[19, 3], [39, 5]] = -1e30, 1e-30
    source = open_source(write_hf_folder(folder / "tiny", SMALL, tensors, "bfloat16"))
    convert(source, folder / "tiny.safetensors", bits="lossless")
    return folder / "tiny.safetensors"


@pytest.fixture(params=["path", "lossless"])
def either(request: pytest.FixtureRequest) -> Path:
    """A file of quantized matrices, and one of matrices without loss."""
    found: Path = request.getfixturevalue(request.param)
    return found


def test_store_opens_its_file(path: Path) -> None:
    file = WeightsFile.open(str(path))
    assert file.path == path
    assert file.size_bytes == path.stat().st_size
    assert file.matrix(QKV).outliers.size >= 1
    assert not file.matrix(QKV).words.flags.owndata  # a view into the mapped file
    with pytest.raises(KeyError):
        file.matrix("model.layers.1.self_attn.qkv_proj")


def test_store_opens_a_file_without_loss(lossless: Path, path: Path) -> None:
    file = WeightsFile.open(lossless)
    assert file.lossless and not WeightsFile.open(path).lossless
    matrix = file.matrix(QKV)
    assert matrix.mantissa_bits == 7
    assert matrix.exponents.outliers.size >= 1
    assert not matrix.mantissas.flags.owndata


def test_store_counts_every_bit_of_a_matrix(either: Path) -> None:
    file = WeightsFile.open(either)
    blocks = [name for name in file.matrix_names if "layers" in name]
    for name in file.matrix_names:
        assert file.stored_bits(name) == file.matrix(name).stored_bits
    weights = sum(file.matrix(name).n_weights for name in blocks)
    assert weights == 80 * 40 + 40 * 40 + 140 * 40 + 40 * 70
    bits = sum(map(file.stored_bits, blocks))
    assert file.bits_per_weight(block_only=True) == bits / weights
    bits += file.stored_bits("model.embed_tokens")
    assert file.bits_per_weight(block_only=False) == bits / (weights + 97 * 40)


def test_store_file_is_an_ordinary_safetensors_file(path: Path) -> None:
    file = WeightsFile.open(path)
    with safe_open(path, framework="np") as theirs:
        assert theirs.metadata()["format"] == "answer"
        assert (theirs.get_tensor(f"{QKV}.words") == file.matrix(QKV).words).all()
        assert zlib.decompress(theirs.get_tensor("tokenizer.json").tobytes()) == file.tokenizer_json


def test_store_aligns_every_tensor(either: Path) -> None:
    for entry in read_container(either).entries.values():
        assert entry.values.flags.aligned


def refused(path: Path, data: bytes | bytearray) -> None:
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=str(path)):
        WeightsFile.open(path)


def test_store_refuses_a_file_cut_anywhere(either: Path, tmp_path: Path) -> None:
    data = either.read_bytes()
    end_of_header = 8 + int.from_bytes(data[:8], "little")
    rng = np.random.default_rng(0)
    lengths = {0, 1, 7, 8, 9, end_of_header - 1, end_of_header, end_of_header + 1, len(data) - 1}
    lengths |= set(rng.integers(0, len(data), 100).tolist())
    for length in lengths:
        refused(tmp_path / "cut", data[:length])
    refused(tmp_path / "longer", data + b"\0")


def test_store_refuses_a_flipped_bit_anywhere_in_the_header(path: Path, tmp_path: Path) -> None:
    data = path.read_bytes()
    end_of_header = 8 + int.from_bytes(data[:8], "little")
    rng = np.random.default_rng(1)
    for position in [*range(8), *rng.integers(8, end_of_header, 500).tolist()]:
        flipped = bytearray(data)
        flipped[position] ^= 1 << rng.integers(8)
        refused(tmp_path / "flipped", flipped)


def test_store_refuses_a_flipped_bit_in_any_tensor(either: Path, tmp_path: Path) -> None:
    data = either.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    del header["__metadata__"]
    rng = np.random.default_rng(2)
    for fields in header.values():
        begin, end = fields["data_offsets"]
        if begin == end:
            continue
        for position in [begin, end - 1, *rng.integers(begin, end, 6).tolist()]:
            flipped = bytearray(data)
            flipped[start + position] ^= 1 << rng.integers(8)
            refused(tmp_path / "flipped", flipped)


Tensors = dict[str, tuple[str, np.ndarray]]


def rewrite(path: Path, edit: Callable[[dict[str, Any], Tensors], object], out: Path) -> Path:
    """The file with changes under valid CRCs: damage that only a program can do."""
    container = read_container(path)
    metadata: dict[str, Any] = dict(container.metadata)
    for key in ("config", "matrices"):
        metadata[key] = json.loads(metadata[key])
    tensors = {name: (e.dtype, e.values.copy()) for name, e in container.entries.items()}
    edit(metadata, tensors)
    for key in ("config", "matrices"):
        metadata[key] = json.dumps(metadata[key])
    with replacing(out) as file:
        writer = ContainerWriter(file, 100_000)
        crcs = {name: zlib.crc32(writer.add(name, *tensors[name])) for name in tensors}
        metadata["crc32"] = json.dumps(crcs)
        del metadata["metadata_crc32"]
        text = json.dumps(metadata, sort_keys=True, separators=(",", ":"))
        writer.finish({**metadata, "metadata_crc32": str(zlib.crc32(text.encode()))})
    return out


def test_store_opens_a_rewritten_file(path: Path, tmp_path: Path) -> None:
    # So that the refusals below are about what was changed.
    out = rewrite(path, lambda metadata, tensors: None, tmp_path / "same")
    assert (
        WeightsFile.open(out).matrix(QKV).words == WeightsFile.open(path).matrix(QKV).words
    ).all()


def set_field(field: str, value: Any) -> Callable[[dict[str, Any], Tensors], object]:
    return lambda metadata, tensors: metadata["matrices"][QKV].update({field: value})


def set_tensor(
    name: str, change: Callable[[np.ndarray], np.ndarray], dtype: str | None = None
) -> Callable[[dict[str, Any], Tensors], object]:
    def edit(metadata: dict[str, Any], tensors: Tensors) -> None:
        old_dtype, values = tensors[name]
        tensors[name] = (dtype or old_dtype, change(values))

    return edit


def put(index: int, value: Any) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values[index] = value
        return values

    return change


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda m, t: m.update(format="other"), "answer convert"),
        (lambda m, t: m.update(format_version="2"), "version 2, expected 5"),
        (lambda m, t: m.pop("source"), "source"),
        (lambda m, t: m.update(config=[]), "config"),
        (lambda m, t: m["config"].update(n_kv_heads=3), "n_kv_heads"),
        (lambda m, t: m["config"].update(n_layers=2), r"layers\.1"),
        (lambda m, t: m["config"].update(tie_embeddings=False), "lm_head"),
        (lambda m, t: m["config"].update(hidden_dim=71), "gate_up_proj"),
        (lambda m, t: m["config"].update(dim=41), "norm"),
        (lambda m, t: m.update(matrices=[]), "matrices"),
        (lambda m, t: m["matrices"].pop(QKV), "matrices"),
        (lambda m, t: m["matrices"].update(more={}), "matrices"),
        (lambda m, t: m["matrices"].update({QKV: 3}), QKV),
        (lambda m, t: m["matrices"][QKV].pop("rows"), QKV),
        (lambda m, t: t.pop(f"{QKV}.side"), r"missing: .*side"),
        (lambda m, t: t.update(more=t["model.norm.weight"]), r"not expected: .*more"),
        (set_field("rows", 79), QKV),
        (set_field("cols", 41), QKV),
        (set_field("log2_states", 13), "log2_states"),
        (set_field("log2_states", 11), QKV),
        (set_field("log2_states", "12"), "whole numbers"),
        (set_field("group", 3), "groups of 3"),
        (set_field("group", 4), QKV),
        (lambda m, t: m["matrices"][QKV].pop("group"), QKV),
        (set_field("raw_bits", 5), "raw_bits"),
        (set_field("raw_bits", -1), "raw_bits"),
        (set_field("n_narrow", 1), "narrow"),
        (set_field("n_narrow", -1), "narrow"),
        (set_field("narrow_raw_bits", 4), "narrow"),
        (set_field("raw_bits", True), "whole numbers"),
        (set_field("min_symbol", 1), QKV),
        (set_field("min_symbol", -99), QKV),
        (set_field("n_classes", 0), "0 classes"),
        (set_field("n_classes", 5), "5 classes"),
        (set_field("n_classes", 2), QKV),
        (set_tensor(f"{QKV}.marginals", lambda v: v[:1]), "symbol"),
        (set_tensor(f"{QKV}.marginals", lambda v: np.full(33, 1985, "u2")), "33 symbols"),
        (set_tensor(f"{QKV}.marginals", put(0, 0)), "marginal"),
        (set_tensor(f"{QKV}.marginals", put(0, 60000)), "marginal"),
        (set_tensor(f"{QKV}.marginals", lambda v: v.astype("u4"), "U32"), "expected U16"),
        (set_tensor(f"{QKV}.marginals", lambda v: v.reshape(1, -1)), "one dimension"),
        (set_tensor(f"{QKV}.words", lambda v: v[:-1]), "words"),
        (set_tensor(f"{QKV}.words", lambda v: np.append(v, v[:1])), "words"),
        (set_tensor(f"{QKV}.side", lambda v: v[:-1]), QKV),
        (set_tensor(f"{QKV}.side", lambda v: v[:0]), QKV),
        (set_tensor(f"{QKV}.outliers", lambda v: v[:-1]), "outliers"),
        (set_tensor(f"{QKV}.outliers", lambda v: v | 0xFFFF), "outlier"),
        (set_tensor("model.norm.weight", put(0, np.nan)), "not finite"),
        (set_tensor("model.norm.weight", lambda v: v[:-1]), r"\(39,\)"),
        (set_tensor("tokenizer.json", put(0, 0)), "zlib"),
    ],
)
def test_store_refuses_facts_that_do_not_fit(
    path: Path, tmp_path: Path, edit: Callable[[dict[str, Any], Tensors], object], named: str
) -> None:
    out = rewrite(path, edit, tmp_path / "wrong")
    with pytest.raises(WeightsError, match=named):
        WeightsFile.open(out)


DOWN = "model.layers.0.mlp.down_proj"


def make_quantized(path: Path) -> Callable[[dict[str, Any], Tensors], object]:
    """An edit that takes one matrix from the quantized file at `path`."""

    def edit(metadata: dict[str, Any], tensors: Tensors) -> None:
        container = read_container(path)
        metadata["matrices"][DOWN] = json.loads(container.metadata["matrices"])[DOWN]
        del tensors[f"{DOWN}.mantissas"]
        for part in ("words", "side", "outliers", "marginals"):
            entry = container.entries[f"{DOWN}.{part}"]
            tensors[f"{DOWN}.{part}"] = (entry.dtype, entry.values)

    return edit


def not_finite(words: np.ndarray) -> np.ndarray:
    """The exponents of the two outliers made those of infinities."""
    outliers = unpack_outliers(words, 2, SMALL.dim)
    return pack_outliers(outliers | np.uint32(255 << 24), SMALL.dim)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda m, t: m["matrices"][QKV].pop("anchor"), r"not expected: .*mantissas"),
        (lambda m, t: t.pop(f"{QKV}.mantissas"), r"missing: .*mantissas"),
        (lambda m, t: t.update({f"{QKV}.scale": t["model.norm.weight"]}), r"not expected: .*scale"),
        (set_field("rows", 79), QKV),
        (set_field("anchor", 0), "anchor"),
        (set_field("anchor", 255), "anchor"),
        (set_field("anchor", 1), "exponent fields"),
        (set_field("anchor", "120"), "whole numbers"),
        (set_field("min_symbol", -99), QKV),
        (set_field("mantissa_bits", -1), "mantissa_bits"),
        (set_field("mantissa_bits", 24), "mantissa_bits"),
        (set_field("mantissa_bits", 8), "mantissas"),
        (set_tensor(f"{QKV}.mantissas", lambda v: v[:-1]), "mantissas"),
        (set_tensor(f"{QKV}.mantissas", lambda v: v.astype("u2"), "U16"), "expected U32"),
        (set_tensor(f"{QKV}.words", lambda v: v[:-1]), "words"),
        (set_tensor(f"{QKV}.side", lambda v: v[:-1]), QKV),
        (set_tensor(f"{QKV}.outliers", lambda v: v[:-1]), "outliers"),
        (set_tensor(f"{QKV}.outliers", lambda v: v | 0xFFFF), "outlier"),
        (set_tensor(f"{QKV}.outliers", not_finite), "not a finite number"),
    ],
)
def test_store_refuses_facts_that_do_not_fit_without_loss(
    lossless: Path, tmp_path: Path, edit: Callable[[dict[str, Any], Tensors], object], named: str
) -> None:
    assert WeightsFile.open(rewrite(lossless, lambda m, t: None, tmp_path / "same")).lossless
    with pytest.raises(WeightsError, match=named):
        WeightsFile.open(rewrite(lossless, edit, tmp_path / "wrong"))


def test_store_refuses_matrices_of_both_kinds(path: Path, lossless: Path, tmp_path: Path) -> None:
    out = rewrite(lossless, make_quantized(path), tmp_path / "mixed")
    with pytest.raises(WeightsError, match="some matrices are quantized"):
        WeightsFile.open(out)


def test_store_refuses_outliers_out_of_order(path: Path, tmp_path: Path) -> None:
    # The same outlier twice in one row.
    matrix = WeightsFile.open(path).matrix(QKV)
    moved = np.repeat(matrix.outliers[:1], 2)
    counts = np.zeros(80, np.uint32)
    counts[3] = 2
    doubled = dataclasses.replace(
        matrix, outliers=moved, outlier_offsets=np.append(0, counts.cumsum()).astype(np.uint32)
    )

    def edit(metadata: dict[str, Any], tensors: Tensors) -> None:
        tensors[f"{QKV}.outliers"] = ("U32", pack_outliers(moved, matrix.cols))
        tensors[f"{QKV}.side"] = ("U32", pack_side(doubled))

    with pytest.raises(WeightsError, match="order"):
        WeightsFile.open(rewrite(path, edit, tmp_path / "wrong"))


@pytest.mark.parametrize("k", [ZERO + 1, -LARGEST - 1, LARGEST + 1])
def test_store_refuses_scales_off_the_grid(path: Path, tmp_path: Path, k: int) -> None:
    matrix = WeightsFile.open(path).matrix(QKV)
    assert isinstance(matrix, CodedMatrix)
    wrong = dataclasses.replace(matrix, scale_log2=np.full(80, k, np.int16))
    edit = set_tensor(f"{QKV}.side", lambda values: pack_side(wrong))
    with pytest.raises(WeightsError, match=QKV):
        WeightsFile.open(rewrite(path, edit, tmp_path / "wrong"))


def test_store_refuses_side_information_of_noise(path: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    for size in range(0, 80, 2):
        noise = rng.integers(0, 2**32, size, np.uint32)
        edit = set_tensor(f"{QKV}.side", lambda values, noise=noise: noise)
        with pytest.raises(WeightsError, match=QKV):
            WeightsFile.open(rewrite(path, edit, tmp_path / "wrong"))


def test_inspect_finds_streams_that_do_not_end(
    either: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = rewrite(either, set_tensor(f"{QKV}.words", lambda words: ~words), tmp_path / "wrong")
    WeightsFile.open(out)  # of the words themselves, opening checks the CRC only
    assert inspect.main([str(out)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert QKV in error


def test_store_names_a_file_of_another_kind(path: Path, tmp_path: Path) -> None:
    folder = write_hf_folder(tmp_path / "hf", SMALL, random_tensors(SMALL))
    with pytest.raises(WeightsError, match=r"not of this engine.*answer convert"):
        WeightsFile.open(folder / "model.safetensors")
    with pytest.raises(WeightsError, match="No such file"):
        WeightsFile.open(tmp_path / "none.safetensors")
