"""Models of the Hugging Face hub: its cache stands in for it, and its failures are made up."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from tiny_model import CONFIG, random_tensors, write_gguf, write_hf_folder

from engine.errors import WeightsError
from weights import cache
from weights.convert import RECIPE_VERSION, CalibrationText
from weights.sources import open_source
from weights.sources.hub import HubName, parse_hub_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library's cache, without network, holding owner/tiny: a folder's files and two GGUF."""
    repository = tmp_path / "hub" / "models--owner--tiny"
    snapshot = write_hf_folder(repository / "snapshots" / COMMIT, CONFIG, random_tensors(CONFIG))
    for kind in ("Q8_0", "f16"):
        write_gguf(snapshot / f"tiny-{kind}.gguf", CONFIG, random_tensors(CONFIG, seed=1))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "refs" / "v2").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(cache, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(cache, "QUICK", CalibrationText(0))
    return repository


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (
            "HuggingFaceTB/SmolLM2-1.7B-Instruct",
            ("HuggingFaceTB/SmolLM2-1.7B-Instruct", None, None),
        ),
        ("a/b@refs/pr/1", ("a/b", "refs/pr/1", None)),
        ("a/b@v1.0:Q4_K_M", ("a/b", "v1.0", "Q4_K_M")),
        ("smollm2", None),
        ("./models/tiny", None),
        ("/models/tiny", None),
        ("models/tiny.gguf", None),
        ("a/b/c", None),
        ("a/..", None),
    ],
)
def test_hub_names(spec: str, name: tuple[str, str | None, str | None] | None) -> None:
    assert parse_hub_name(spec) == (name and HubName(*name))


def test_hub_model_opens_from_what_is_downloaded(hub: Path) -> None:
    source = open_source("owner/tiny")
    assert (source.name, source.config) == ("owner--tiny", CONFIG)
    tensors = random_tensors(CONFIG)
    assert (source.read("model.norm.weight") == tensors["model.norm.weight"]).all()
    assert open_source("owner/tiny@v2").name == "owner--tiny-v2"


def test_hub_gguf_is_picked_by_its_kind(hub: Path) -> None:
    source = open_source("owner/tiny:q8_0")
    assert source.name == "owner--tiny-q8_0"
    norm = random_tensors(CONFIG, seed=1)["model.norm.weight"]
    assert (source.read("model.norm.weight") == norm).all()
    for kind, found in (("Q4_0", "found none"), ("tiny", r"found tiny-Q8_0\.gguf, tiny-f16\.gguf")):
        with pytest.raises(WeightsError, match=found):
            open_source(f"owner/tiny:{kind}")


def test_converted_hub_model_needs_no_hub(hub: Path, tmp_path: Path) -> None:
    path = cache.resolve("owner/tiny", bits=6)
    assert path.name == f"owner--tiny-6bit-v{RECIPE_VERSION}.safetensors"
    shutil.rmtree(hub)
    assert cache.resolve("owner/tiny", bits=6) == path
    with pytest.raises(WeightsError, match=r"owner/tiny.*not downloaded yet"):
        cache.resolve("owner/tiny", bits=5)


def test_hub_asks_for_what_is_needed_alone(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    snapshot = hub / "snapshots" / COMMIT

    def download(repository: str, **options: Any) -> str:
        asked.append({"repository": repository, **options})
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    open_source("owner/tiny@v2")
    open_source("owner/tiny:Q8_0")
    assert [call["revision"] for call in asked] == ["v2", None]
    assert "model*.safetensors" in asked[0]["allow_patterns"]
    assert not any(
        ".bin" in pattern or "*.json" == pattern for pattern in asked[0]["allow_patterns"]
    )
    assert "*Q8_0*.gguf" in asked[1]["allow_patterns"]


def _answer(kind: type[Exception], status: int) -> Exception:
    response = SimpleNamespace(headers={}, request=None, status_code=status)
    error: Any = kind
    return error("long\nstory", response=response)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (lambda: _answer(errors.GatedRepoError, 403), "accept the terms.*HF_TOKEN"),
        (lambda: _answer(errors.RepositoryNotFoundError, 404), "no such repository.*hf auth login"),
        (lambda: _answer(errors.RevisionNotFoundError, 404), "has no revision 'v9'"),
        (lambda: errors.LocalEntryNotFoundError("x"), "the hub cannot be reached"),
        (lambda: OSError("No space left on device\nmore"), r"No space left on device\); run it"),
        (RuntimeError, "RuntimeError"),
    ],
)
def test_hub_says_in_one_line_why_it_cannot(
    error: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(repository: str, **options: Any) -> str:
        raise error()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(
        WeightsError, match=f"^owner/tiny on the Hugging Face hub: .*{said}"
    ) as found:
        open_source("owner/tiny@v9")
    assert "\n" not in str(found.value)
