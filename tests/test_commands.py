"""Every command: Ctrl-C, and a machine without an adapter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_files import folder as folder
from tiny_files import model as model
from tiny_files import text as text

from engine import bench, evaluate
from engine.generate import Engine

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("command", [bench.main, evaluate.main])
def test_ctrl_c_leaves_quietly(
    command: Callable[[Sequence[str]], int],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*args: Any, **options: Any) -> Engine:
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "open", interrupted)
    # Any file will do: none is opened.
    flags = ["--reference", text, "--text", text] if command is evaluate.main else []
    assert command([text, *flags]) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.skipif(sys.platform != "linux", reason="hides the drivers of Vulkan's loader")
@pytest.mark.parametrize(
    "command",
    [
        ["-m", "engine.bench", "MODEL"],
        ["-m", "engine.evaluate", "MODEL", "--reference", "MODEL", "--text", "TEXT"],
        ["chat.py", "--model", "MODEL", "-p", "Hello"],
    ],
    ids=["bench", "evaluate", "chat"],
)
def test_no_adapter_is_one_clear_line(
    command: list[str], model: str, text: str, tmp_path: Path
) -> None:
    nowhere = str(tmp_path / "none.json")
    done = subprocess.run(
        [sys.executable, *(word.replace("MODEL", model).replace("TEXT", text) for word in command)],
        cwd=ROOT,
        env={**os.environ, "VK_DRIVER_FILES": nowhere, "VK_ICD_FILENAMES": nowhere},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: no GPU adapter found: ")
    assert "mesa-vulkan-drivers" in done.stderr
    assert done.stderr.count("\n") == 1
