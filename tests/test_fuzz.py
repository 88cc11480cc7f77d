"""Some damaged files of each kind; `python -m tests.fuzz 20000` goes through many more."""

from __future__ import annotations

import pytest

pytest.importorskip("resource", reason="an alarm ends what hangs")

from fuzz import TARGETS, Files, run

N_FILES = 100  # of each kind


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("target", TARGETS)
def test_a_damaged_file_is_refused_in_one_line_or_read_right(target: str, files: Files) -> None:
    assert list(run(target, files, range(N_FILES))) == []


# What once was found: sizes that were counted up to, a type that could not be looked up, a divisor
# of 0, lists longer than their file, a panic and a contradiction inside tokenizers.
@pytest.mark.parametrize(
    ("target", "seed"),
    [
        ("config", 48),
        ("config", 1302),
        ("config", 2186),
        ("config", 3896),
        ("weights_file_with_right_checksums", 1944),
        ("config", 1016379),
        ("gguf_file", 1008172),
        ("gguf_file", 1019191),
        ("tokenizer", 2204),
        ("tokenizer", 1012328),
    ],
)
def test_what_was_found_stays_fixed(target: str, seed: int, files: Files) -> None:
    assert list(run(target, files, range(seed, seed + 1))) == []
