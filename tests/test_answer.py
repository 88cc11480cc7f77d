"""The command `answer`: its words, and the models that it lists and deletes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_engine import FakeEngine, install
from tiny_model import CONFIG, random_tensors, write_hf_folder

from engine.__main__ import COMMANDS, HELP, main
from weights import cache, models
from weights.convert import RECIPE_VERSION, CalibrationText

ROOT = Path(__file__).parents[1]


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two rates of one model, another version's file and a damaged one."""
    folder = tmp_path / "cache"
    for module in (cache, models):
        monkeypatch.setattr(module, "cache_folder", lambda: folder)
    monkeypatch.setattr(cache, "QUICK", CalibrationText(0))
    model = write_hf_folder(tmp_path / "tiny", CONFIG, random_tensors(CONFIG))
    paths = cache.resolve_each(model, [6, "lossless"])
    name = f"owner--tiny-6bit-v{RECIPE_VERSION}.safetensors"
    paths[0].rename(folder / name)
    paths[1].rename(folder / name.replace("6bit", "lossless"))
    (folder / name.replace(f"v{RECIPE_VERSION}", "v1")).write_bytes((folder / name).read_bytes())
    (folder / f"torn-4.5bit-v{RECIPE_VERSION}.safetensors").write_bytes(b"torn")
    (folder / "calibration").mkdir()
    (folder / "notes.safetensors").write_text("of someone else")
    return folder


def test_a_word_picks_a_command_and_chat_needs_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["-p", "Why?"], ["chat", "-p", "Why?"], ["chat", "a/b", "-p", "Why?"]):
        opened = install(FakeEngine("Because."), monkeypatch.setitem)
        assert main([*words, "--no-stats"]) == 0
        assert capsys.readouterr() == ("Because.\n", "")
        assert opened[0][0] == ("a/b" if "a/b" in words else "smollm2")
    opened = install(FakeEngine("Because."), monkeypatch.setitem)
    assert main(["a/b", "-p", "Why?"]) == 0
    assert opened[0][0] == "a/b"


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["-h"], ["help"]):
        assert main(words) == 0
        assert capsys.readouterr().out == HELP


@pytest.mark.parametrize("word", COMMANDS)
def test_every_command_tells_of_itself(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([word, "--help"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: answer {word} ")
    assert f"  {word} " in HELP


def test_list_shows_what_is_kept(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == "model bits MB bit/parameter parameters converted from".split()
    assert [row.split()[:2] for row in rows] == [
        ["owner/tiny", "6"],
        ["owner/tiny", "6"],
        ["owner/tiny", "lossless"],
        ["torn", "4.5"],
    ]
    assert rows[0].endswith(" tiny (by another version: not used)") and rows[1].endswith(" tiny")
    assert rows[3].endswith("cannot be read")

    assert main(["list", "--json"]) == 0
    old, new, lossless, torn = json.loads(capsys.readouterr().out)
    assert (old["current"], new["current"]) == (False, True)
    assert new["n_params"] == CONFIG.n_params and torn["n_params"] is None
    assert new["size_bytes"] == Path(new["path"]).stat().st_size
    assert new["bits_per_parameter"] == 8 * new["size_bytes"] / CONFIG.n_params
    assert new["bits_per_parameter"] < lossless["bits_per_parameter"]


def test_list_of_nothing_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "cache_folder", lambda: tmp_path / "none")
    assert main(["list"]) == 0
    assert "no converted models yet" in capsys.readouterr().err
    assert main(["list", "--json"]) == 0
    assert capsys.readouterr().out == "[]\n"


def test_rm_deletes_one_model(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def there() -> list[str]:
        return sorted(path.name for path in kept.glob("*.safetensors"))

    before = there()
    for words, complaint in (
        (["nothing"], "nothing: no such model in the cache, which holds owner/tiny, torn"),
        (["owner/tiny"], "is there with 6, lossless bits; say which with --bits 6"),
        (["owner/tiny", "--bits", "5"], "is there with 6, lossless bits"),
        (["notes"], "no such model"),
        (["calibration"], "no such model"),
    ):
        assert main(["rm", *words]) == 1
        line = capsys.readouterr().err
        assert line.startswith("error: ") and complaint in line and line.count("\n") == 1
    assert there() == before

    assert main(["rm", "owner/tiny", "--bits", "6"]) == 0  # with what another version left
    assert capsys.readouterr().err.count("removed") == 2
    assert main(["rm", f"owner--tiny-lossless-v{RECIPE_VERSION}"]) == main(["rm", "torn"]) == 0
    assert there() == ["notes.safetensors"]


def test_inspect_takes_a_name(
    kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(tmp_path / "tiny"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["dim"] == CONFIG.dim
    assert main(["inspect", "no-such-model"]) == 1
    assert "no such file or folder" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes that break")
def test_a_reader_that_leaves_is_no_error(kept: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as out:
        command = [sys.executable, "-m", "engine", "list", "--json"]
        done = subprocess.run(command, cwd=ROOT, stdout=out, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (141, b"")
