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


# Lists that were longer than their file; other faults that were found have tests where they were.
@pytest.mark.parametrize("seed", [1008172, 1019191])
def test_a_gguf_file_ends_where_it_ends(seed: int, files: Files) -> None:
    assert list(run("gguf_file", files, range(seed, seed + 1))) == []
