"""ModelConfig: read from Hugging Face, to JSON and back, and every refusal."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from tiny_model import CONFIG, hf_config

from engine.errors import ConfigError
from model.config import ModelConfig
from weights.sources.families import Family, read_family


def test_config_from_hf_keeps_every_size() -> None:
    assert read_family(hf_config(CONFIG)) == Family(CONFIG)


def test_config_reads_the_rope_base_where_newer_versions_put_it() -> None:
    hf = hf_config(CONFIG)
    del hf["rope_theta"]
    hf["rope_parameters"] = {"rope_type": "default", "rope_theta": 12345}
    assert read_family(hf).config.rope_theta == 12345.0


def test_config_accepts_one_or_several_end_tokens() -> None:
    assert read_family({**hf_config(CONFIG), "eos_token_id": 5}).config.eos_token_ids == (5,)
    assert read_family({**hf_config(CONFIG), "eos_token_id": [5, 7]}).config.eos_token_ids == (
        5,
        7,
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gemma"}, "gemma"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": "97"}, "vocab_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"rope_theta": "high"}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"eos_token_id": [97]}, "97"),
        ({"eos_token_id": "</s>"}, "</s>"),
        ({"tie_word_embeddings": "yes"}, "tie_embeddings"),
    ],
)
def test_config_refuses_other_architectures_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read_family({**hf_config(CONFIG), **change})


@pytest.mark.parametrize(
    "change",
    [
        {"dim": 0},
        {"n_layers": True},
        {"hidden_dim": 70.0},
        {"n_heads": 3},
        {"head_dim": 5},
        {"rope_theta": float("inf")},
        {"norm_eps": 0.0},
        {"bos_token_id": 97},
        {"eos_token_ids": (-1,)},
        {"rope_divisors": (1.0,) * 4},
        {"rope_divisors": (1.0,) * 4 + (0.0,)},
        {"attention_scale": 1},
        {"qkv_bias": 1},
        {"unrotated_layers": (2,)},
        {"unrotated_layers": (1, 0)},
        {"sliding_window": 4},
        {"sliding_layers": (0,)},
        {"sliding_window": 0, "sliding_layers": (0,)},
    ],
)
def test_config_checks_itself(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        dataclasses.replace(CONFIG, **change)


def test_config_counts_parameters_and_widths() -> None:
    assert (CONFIG.q_dim, CONFIG.kv_dim) == (40, 20)
    # Per layer: q 40x40, k and v 20x40, o 40x40, gate, up and down 40x70, two norms of 40.
    layer = 1600 + 2 * 800 + 1600 + 3 * 2800 + 80
    assert CONFIG.n_params == 2 * layer + 97 * 40 + 40
    assert dataclasses.replace(CONFIG, tie_embeddings=False).n_params == CONFIG.n_params + 97 * 40


def test_config_survives_json() -> None:
    config = dataclasses.replace(CONFIG, bos_token_id=None, eos_token_ids=(3, 1))
    assert ModelConfig.from_json(config.to_json()) == config
    assert "qk" not in config.to_json()  # a plain Llama says nothing of what it has not
    family = dataclasses.replace(
        config,
        rope_divisors=(1.0, 1.0, 2.5, 8.0, 8.0),
        attention_scale=0.25,
        qk_norm=True,
        unrotated_layers=(1,),
        sliding_window=5,
        sliding_layers=(0, 1),
    )
    assert ModelConfig.from_json(family.to_json()) == family
    assert [family.window(i) for i in (0, 1)] == [5, 5]
    assert [family.is_rotated(i) for i in (0, 1)] == [True, False]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"dim": 40}', "nonsense"])
def test_config_from_json_refuses_anything_else(text: str) -> None:
    with pytest.raises(ConfigError):
        ModelConfig.from_json(text)


def test_config_from_json_refuses_unknown_and_mistyped_fields() -> None:
    fields = json.loads(CONFIG.to_json())
    for change in ({"more": 1}, {"eos_token_ids": 1}, {"eos_token_ids": ["1"]}, {"norm_eps": 1}):
        with pytest.raises(ConfigError):
            ModelConfig.from_json(json.dumps({**fields, **change}))
