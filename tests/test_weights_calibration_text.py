"""Calibration text: sampled from the model as the oracle would, or read from a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from tiny_model import CONFIG, random_tensors, write_hf_folder

from engine.errors import EngineError
from model.config import ModelConfig
from model.reference import Reference
from weights.calibration import read_windows, sample, sample_tokens
from weights.calibration.sample import BatchedLlama, DenseLlama, draw, softmax
from weights.sources import Source, open_source

AssertClose = Callable[[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike], None]

UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False)
EPS32 = 2.0**-24
BOS, EOS, USER = 0, 1, 2


def tiny_source(folder: Path, config: ModelConfig) -> Source:
    return open_source(write_hf_folder(folder / "tiny", config, random_tensors(config)))


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_batched_logits_are_the_oracles(
    tmp_path: Path, config: ModelConfig, assert_close: AssertClose
) -> None:
    source = tiny_source(tmp_path, config)
    tokens = np.random.default_rng(3).integers(0, config.vocab_size, (5, 11))
    model = BatchedLlama(config, DenseLlama.read(source), batch=5, length=11)
    found = np.stack([model.step(column) for column in tokens.T], axis=1)  # (5, 11, vocab_size)
    reference = Reference.from_source(source, cache_dtype=np.float32)
    # The same sums in another order: as test_reference_is_a_llama, for logits below 1.
    for text, logits in zip(tokens, found, strict=True):
        assert_close(logits, reference.logits(text), 128 * EPS32)


@pytest.mark.parametrize("rows", [3, 8, 43, 48])  # less than a part, one, parts with a rest, parts
def test_product_in_parts_is_the_product(
    rows: int, monkeypatch: pytest.MonkeyPatch, assert_close: AssertClose
) -> None:
    monkeypatch.setattr(sample, "_SMALL", 8 * 70 * 5)
    monkeypatch.setattr(sample, "_SHARED", 0)
    rng = np.random.default_rng(4)
    w, x = rng.normal(size=(rows, 70)), rng.normal(size=(5, 70))
    with ThreadPoolExecutor(3) as pool:
        found = [sample.product(w, x, pool, ways) for ways in (0, 1, 2, 5, 40)]
    assert_close(found[0], x @ w.T, 70 * 2.0**-53 * (np.abs(x) @ np.abs(w.T)))
    assert all(np.array_equal(found[0], other) for other in found[1:])


def test_samples_are_the_same_on_any_number_of_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_source(tmp_path, CONFIG)
    monkeypatch.setattr(sample, "_TEXTS", 2)
    monkeypatch.setattr(sample, "_SMALL", 1)  # parts of 8 rows,
    monkeypatch.setattr(sample, "_SHARED", 0)  # and with 7 cores two to each text
    found = []
    for n_cores in (1, 2, 7):
        monkeypatch.setattr("os.cpu_count", lambda n=n_cores: n)
        found.append(sample_tokens(source, 5, 23, openings=[[5, 6]]))
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])
    # Every text is written from its own numbers, whichever it is together with.
    monkeypatch.setattr(sample, "_TEXTS", 16)
    assert np.array_equal(found[0], sample_tokens(source, 5, 23, openings=[[5, 6]]))


def test_draw_inverts_the_cumulated_probability() -> None:
    uniform = np.array([0.1, 0.25, 0.26, 0.74, 0.76, 1 - 2.0**-53])
    p = np.tile(np.array([0.25, 0.5, 0, 0.25], np.float32), (6, 1))
    assert draw(p, uniform).tolist() == [0, 0, 1, 1, 3, 3]


def test_softmax_survives_large_logits() -> None:
    found = softmax(np.array([[1000.0, 1000.0, -1000.0], [0.0, np.log(3.0), -np.inf]]))
    assert np.abs(found - [[0.5, 0.5, 0], [0.25, 0.75, 0]]).max() < 1e-15


def test_sampled_texts_follow_from_the_seed(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, CONFIG)
    tokens = sample_tokens(source, 5, 23, seed=3)
    assert tokens.shape == (5, 23) and tokens.dtype == np.int64
    assert tokens.min() >= 0 and tokens.max() < CONFIG.vocab_size
    assert np.array_equal(sample_tokens(source, 5, 23, seed=3), tokens)
    assert not np.array_equal(sample_tokens(source, 5, 23, seed=4), tokens)


def test_sampling_tells_its_progress(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    source = tiny_source(tmp_path, CONFIG)
    sample_tokens(source, 17, 20, progress=lambda *step: steps.append(step))  # 16 texts and one
    assert sorted(steps) == [(step, 38) for step in range(1, 39)]


def test_sampling_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error where one text is written, as Ctrl-C is one, ends the others too."""
    monkeypatch.setattr(sample, "_TEXTS", 1)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    steps = 0

    def progress(done: int, total: int) -> None:
        nonlocal steps
        steps = done
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_tokens(tiny_source(tmp_path, CONFIG), 40, 60, progress=progress)
    assert steps < 40 * 59 // 4


@pytest.mark.parametrize("n_cores", [1, 3])
def test_stopped_sampling_goes_on_where_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_cores: int
) -> None:
    source = tiny_source(tmp_path, CONFIG)
    monkeypatch.setattr(sample, "_TEXTS", 2)
    monkeypatch.setattr("os.cpu_count", lambda: n_cores)
    whole = sample_tokens(source, 9, 20)
    written: list[int] = []

    def stop(done: int, total: int) -> None:
        if done == 4 * 19 - 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_tokens(source, 9, 20, progress=stop, folder=tmp_path)
    kept = len(list(tmp_path.glob("*.npy")))
    assert kept == 3 if n_cores == 1 else 1 <= kept <= 4  # others may go on for a while
    softmax_of = sample.softmax
    monkeypatch.setattr(sample, "softmax", lambda x: (written.append(len(x)), softmax_of(x))[1])
    steps: list[int] = []
    found = sample_tokens(
        source, 9, 20, progress=lambda done, _: steps.append(done), folder=tmp_path
    )
    assert np.array_equal(found, whole)
    assert len(written) == (5 - kept) * 19 and sorted(steps) == list(range(1, 5 * 19 + 1))


@pytest.mark.parametrize(
    ("bos", "eos", "opening"),
    [
        (BOS, (EOS,), BOS),
        (None, (EOS, USER), EOS),
        (None, (), None),  # nothing marks a beginning
    ],
)
def test_sampling_begins_with_what_the_model_has(
    tmp_path: Path, bos: int | None, eos: tuple[int, ...], opening: int | None
) -> None:
    config = dataclasses.replace(CONFIG, bos_token_id=bos, eos_token_ids=eos)
    source = dataclasses.replace(tiny_source(tmp_path, CONFIG), config=config)
    first = sample_tokens(source, 6, 3)[:, 0]
    assert (first == opening).all() if opening is not None else len(set(first)) > 1


def test_every_second_text_has_an_opening(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, CONFIG)
    openings = [[5, 6, 7], [8], [9] * 30]
    tokens = sample_tokens(source, 9, 20, openings)
    plain = sample_tokens(source, 9, 20)
    assert np.array_equal(tokens[::2], plain[::2])
    assert tokens[1::2, :3].tolist()[0] == tokens[7, :3].tolist() == [5, 6, 7]
    assert tokens[3, 0] == 8 and (tokens[5] == 9).all()
    assert not np.array_equal(tokens[1, 3:], tokens[7, 3:])  # what follows is the model's own


def test_colder_sampling_is_likelier(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, CONFIG)
    reference = Reference.from_source(source)
    likelihood = []
    for temperature in (0.25, 1.0):
        tokens = sample_tokens(source, 8, 24, temperature=temperature)
        p = [softmax(reference.logits(text[:-1])) for text in tokens]
        likelihood.append(
            np.mean([np.log(p[i][np.arange(23), text[1:]]) for i, text in enumerate(tokens)])
        )
    assert likelihood[0] > likelihood[1]


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_windows_are_spread_over_the_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(48 + i) for i in range(50)), "utf-8")  # 7 windows of 7 and a rest
    windows = read_windows(path, encode, n_windows=3, length=7)
    assert windows.dtype == np.int64
    assert (windows - 48).tolist() == [list(range(i, i + 7)) for i in (0, 21, 42)]
    assert len(read_windows(path, encode, n_windows=100, length=7)) == 7


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abc", "utf-8-sig")
    assert read_windows(path, encode, n_windows=1, length=3).tolist() == [[97, 98, 99]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, r"cannot be read \(No such file"),
        (b"", "is empty; calibration needs 8 tokens or more"),
        (b" \n\n", "is empty; calibration needs 8 tokens or more"),
        (b"ab\0cdefghijk", r"expected a text in UTF-8, found a binary file \(a NUL byte\)"),
        (b"abc\xe9def", "expected a text in UTF-8, found byte 0xe9 at 3"),
        (b"abcdefg", "makes 7 tokens, calibration needs 8 or more; give a longer text"),
    ],
)
def test_text_that_is_none_is_refused(tmp_path: Path, data: bytes | None, message: str) -> None:
    path = tmp_path / "text.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(EngineError, match=message) as caught:
        read_windows(path, encode, n_windows=2, length=8)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"cannot be read \(Is a directory\)"):
        read_windows(tmp_path, encode, n_windows=2, length=8)
