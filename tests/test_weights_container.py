"""The safetensors container: read by others, strict with headers, written whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engine.errors import WeightsError
from weights.container import ContainerWriter, check_place, read_container, replacing

ROOT = Path(__file__).parents[1]
TENSORS: dict[str, tuple[str, np.ndarray]] = {
    "words": ("U32", np.arange(7, dtype=np.uint32) << 27),
    "none": ("U32", np.zeros(0, np.uint32)),
    "norm": ("F32", np.array([[1.5, -2.0, 3.25]], np.float32)),
    "odd": ("U16", np.array([1, 2, 65535], np.uint16)),
    "bytes": ("U8", np.frombuffer(b"text!", np.uint8)),
}


def write(path: Path, reserved_bytes: int = 1000) -> Path:
    with replacing(path) as file:
        writer = ContainerWriter(file, reserved_bytes)
        for name, (dtype, values) in TENSORS.items():
            assert writer.add(name, dtype, values) == values.tobytes()
        writer.finish({"key": "välue"})
    return path


def test_container_gives_back_what_was_written(tmp_path: Path) -> None:
    container = read_container(write(tmp_path / "new folder" / "a.safetensors"))
    assert container.metadata == {"key": "välue"}
    assert container.entries.keys() == TENSORS.keys()
    for name, (dtype, values) in TENSORS.items():
        entry = container.entries[name]
        assert (entry.dtype, entry.shape) == (dtype, values.shape)
        assert entry.values.dtype == values.dtype
        assert (entry.values == values).all()
    assert container.entries["words"].values.base is not None  # a view, not a copy


def test_container_is_read_by_the_safetensors_library(tmp_path: Path) -> None:
    loaded = load_file(write(tmp_path / "a.safetensors"))
    assert loaded.keys() == TENSORS.keys()
    assert all((loaded[name] == values).all() for name, (_, values) in TENSORS.items())


def test_container_reads_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    tensors = {
        "a": np.ones((2, 3), np.float16),
        "b": np.zeros((0, 4), np.float32),
        "c": np.arange(3),
    }
    save_file(tensors, tmp_path / "b.safetensors")
    entries = read_container(tmp_path / "b.safetensors").entries
    assert all((entries[name].values == values).all() for name, values in tensors.items())


def test_container_header_that_does_not_fit_is_a_mistake_of_the_program(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reserved"):
        write(tmp_path / "a.safetensors", reserved_bytes=16)
    assert list(tmp_path.iterdir()) == []


def raw(path: Path, header: Any, data: bytes = b"\0" * 8) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def tensor(dtype: Any = "U32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_container_reads_the_smallest_header(tmp_path: Path) -> None:
    assert (read_container(raw(tmp_path / "a", {"x": tensor()})).entries["x"].values == 0).all()


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"\xff\xff",
        b"[" * 100_000,
        b"[]",
        b'{"x": {"dtype": "U32", "shape": [2], "data_offsets": [0, 8]}} more',
        b'{"x": {"dtype": "U32", "shape": [1], "data_offsets": [0, 4]},'
        b' "x": {"dtype": "U32", "shape": [1], "data_offsets": [4, 8]}}',
        {"__metadata__": [], "x": tensor()},
        {"__metadata__": {"key": 1}, "x": tensor()},
        {"x": 1},
        {"x": {"dtype": "U32", "shape": [2]}},
        {"x": {**tensor(), "more": 1}},
        {"x": tensor(dtype="U31")},
        {"x": tensor(dtype=["U32"])},
        {"x": tensor(shape=2)},
        {"x": tensor(shape=(True, 2))},
        {"x": tensor(shape=(2.0,))},
        {"x": tensor(shape=(-1, -2))},
        {"x": tensor(shape=(3,))},
        {"x": tensor(offsets=(0,))},
        {"x": tensor(offsets=(0, 4, 8))},
        {"x": tensor(offsets=(8, 0))},
        {"x": tensor(offsets=(-8, 0))},
        {"x": tensor(offsets=(4, 12))},  # a hole, and beyond the end
        {"x": tensor(shape=(3,), offsets=(0, 12))},  # beyond the end
        {"x": tensor(shape=(1,), offsets=(0, 4))},  # bytes that belong to no tensor
        {"x": tensor(), "y": tensor()},  # the same bytes twice
        {"x": tensor(), "y": tensor(shape=(0, 10**30), offsets=(8, 8))},
        {"x": tensor(), "y": tensor(shape=(0,) * 70, offsets=(8, 8))},
        {},
    ],
)
def test_container_refuses_a_wrong_header(tmp_path: Path, header: Any) -> None:
    with pytest.raises(WeightsError, match="damaged"):
        read_container(raw(tmp_path / "a.safetensors", header))


@pytest.mark.parametrize("length", [2**64 - 1, 200_000_000, 100])
def test_container_refuses_a_header_longer_than_the_file(tmp_path: Path, length: int) -> None:
    path = raw(tmp_path / "a.safetensors", {"x": tensor()})
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(WeightsError, match="header"):
        read_container(path)


def test_container_missing_or_a_folder(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="No such file"):
        read_container(tmp_path / "none.safetensors")
    with pytest.raises(WeightsError, match="directory"):
        read_container(tmp_path)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ZeroDivisionError])
def test_replacing_that_is_interrupted_leaves_the_old_file(
    tmp_path: Path, failure: type[BaseException]
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_text("old")
    with pytest.raises(failure), replacing(path) as file:
        file.write(b"new")
        raise failure
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="another kind of lock")
def test_what_a_killed_process_left_is_removed_and_what_is_being_written_is_not(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a[1].safetensors"
    program = (
        "import sys, time; from pathlib import Path; from weights.container import replacing\n"
        "with replacing(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); print(flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with replacing(path) as file:
            file.write(b"whole")
        assert len(list(tmp_path.iterdir())) == 2 and path.read_text() == "whole"
        other.kill()
        other.wait(60)
    assert len(list(tmp_path.iterdir())) == 2 and path.read_text() == "whole"
    with replacing(path) as file:
        file.write(b"anew")
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "anew"


def test_replacing_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(WeightsError, match="cannot be written"),
        replacing(tmp_path / "file" / "a.safetensors"),
    ):
        pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(WeightsError, match="cannot be written"), replacing(tmp_path / "folder"):
        pass
    for path in (tmp_path / "file" / "a.safetensors", tmp_path / "folder"):
        with pytest.raises(WeightsError, match=r"cannot be written \((Not a dir|Is a dir)"):
            check_place(path)
    check_place(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
