"""Facts about the project as a whole: what is packaged, who may import whom, what README quotes."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
PACKAGES: list[str] = SETUPTOOLS["packages"]
FOLDERS = sorted({package.split(".")[0] for package in PACKAGES})

# First-party imports that each part may have: dependencies point one way.
MAY_IMPORT = {
    "codec": ["codec"],
    "weights": [
        "weights",
        "codec",
        "model.config",
        "engine.errors",
        "engine.interrupt",
        "engine.tokenizer",
    ],
    "weights/calibration": [
        "weights",
        "codec",
        "model.config",
        "model.reference",
        "engine.errors",
        "engine.tokenizer",
    ],
    "engine/server": ["engine", "model.config", "model.reference", "weights.bits", "weights.cache"],
    "model/config.py": ["engine.errors"],
    "model/reference.py": ["model.config", "weights", "codec", "engine.sampler"],
    "chat.py": ["engine", "weights.bits", "weights.cache"],
}


def _files(*patterns: str) -> Iterator[Path]:
    """The project's own files of these names, below its folders and beside them."""
    for pattern in patterns:
        yield from ROOT.glob(pattern)
        for folder in (*FOLDERS, "tests", "docs", ".ci"):
            yield from (ROOT / folder).rglob(pattern)


def _part(path: Path) -> str | None:
    """The part of MAY_IMPORT that a module belongs to: the innermost one."""
    parts = [part for part in MAY_IMPORT if path.is_relative_to(ROOT / part)]
    return max(parts, key=len, default=None)


def _imports(path: Path) -> set[str]:
    """What a module imports: `a.b` for `import a.b`, `a.b.c` for `from a.b import c`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_folder_of_code_is_packaged_with_its_shaders() -> None:
    patterns = SETUPTOOLS["package-data"]["*"]
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".wgsl", ".html"):
                package = ".".join(path.parent.relative_to(ROOT).parts)
                assert package in PACKAGES, f"{path.relative_to(ROOT)} is in no package"
            if path.suffix in (".wgsl", ".html"):
                assert any(fnmatch(path.name, pattern) for pattern in patterns), path
    assert any((ROOT / "shaders").glob("*.wgsl"))


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_dependencies_point_one_way(part: str) -> None:
    modules = [path for path in _files("*.py") if _part(path) == part]
    assert modules
    own = (*FOLDERS, "chat")
    for path in modules:
        for name in _imports(path):
            if name.split(".")[0] in own:
                allowed = any(f"{name}.".startswith(f"{prefix}.") for prefix in MAY_IMPORT[part])
                assert allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_only_the_engine_talks_to_the_gpu() -> None:
    for path in _files("*.py"):
        if path.is_relative_to(ROOT / "tests") or path.is_relative_to(ROOT / "engine"):
            continue
        assert not any(name.split(".")[0] == "wgpu" for name in _imports(path)), path


@pytest.mark.parametrize(("page", "words"), [("README.md", []), ("docs/chat.md", ["chat"])])
def test_pages_quote_the_help_text(page: str, words: list[str]) -> None:
    text = (ROOT / page).read_text("utf-8")
    command = " ".join(["answer", *words, "--help"])
    quoted = re.search(rf"<!-- {command} -->\s*```\w*\n(.*?)```", text, re.DOTALL)
    assert quoted, f"{page}: no fenced block follows <!-- {command} -->"
    printed = subprocess.run(
        [sys.executable, "-m", "engine", *words, "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "80", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert _normal(quoted[1]) == _normal(printed), f"{page}: quote `{command}` again"


def _normal(help_text: str) -> str:
    """Without what Python 3.13 changed: line breaks, and `-n N, --max N` became `-n, --max N`."""
    return re.sub(r"(-\w) (\S+), (--[\w-]+ \2)", r"\1, \3", " ".join(help_text.split()))


def test_nothing_is_left_over() -> None:
    leftover = re.compile(
        r"\b(TODO|FIXME|XXX|HACK|raise NotImplementedError)\b"  # unfinished
        r"|\b(breakpoint|pdb\.set_trace)\("
        r"|(?<![\w.])/(home|root|tmp|work|Users)/"  # one machine's paths
    )
    for path in _files("*.py", "*.wgsl", "*.md", "*.toml", "Makefile", "run"):
        if path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            assert not leftover.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


def test_repository_holds_no_large_file() -> None:
    for path in _files("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert path.stat().st_size < 1_000_000, f"{path.relative_to(ROOT)} is over 1 MB"
