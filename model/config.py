"""Sizes of a model: translated from Hugging Face's words and checked. No tensors here.

The names are llama2.c's. The one architecture is Llama as `LlamaForCausalLM` defines it: RMSNorm,
rotary positions that rotate the halves of a head (i, i + head_dim/2), grouped-query attention,
SwiGLU, no biases.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from engine.errors import ConfigError

_SUPPORTED = "only Llama models work (LlamaForCausalLM: silu, no biases, no RoPE scaling)"

# What an absent key means in a Hugging Face Llama config.json.
_HF_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}

# Hugging Face key -> the only value this engine computes with.
_HF_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
}


@dataclass(frozen=True)
class ModelConfig:
    """A Llama's sizes and constants; ConfigError names a field that breaks its rule."""

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int  # divides n_heads
    head_dim: int  # even: RoPE rotates pairs
    vocab_size: int
    max_seq_len: int  # positions the model was trained for
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool  # the classifier is the embedding
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]  # any of them ends an answer; may be empty

    def __post_init__(self) -> None:
        for field in _SIZES:
            value = getattr(self, field)
            if not _is_int(value) or value < 1:
                raise ConfigError(
                    f"config: {field} is {value!r}, expected a whole number of at least 1"
                )
        for field in ("rope_theta", "norm_eps"):
            value = getattr(self, field)
            if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
                raise ConfigError(f"config: {field} is {value!r}, expected a finite number above 0")
        if not isinstance(self.tie_embeddings, bool):
            raise ConfigError(
                f"config: tie_embeddings is {self.tie_embeddings!r}, expected true or false"
            )
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"config: n_heads is {self.n_heads}, expected a multiple of "
                f"n_kv_heads = {self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"config: head_dim is {self.head_dim}, expected an even number (RoPE rotates pairs)"
            )
        special = (
            self.eos_token_ids
            if self.bos_token_id is None
            else (self.bos_token_id, *self.eos_token_ids)
        )
        for token in special:
            if not _is_int(token) or not 0 <= token < self.vocab_size:
                raise ConfigError(
                    f"config: bos or eos token id {token!r} is not in the vocabulary of "
                    f"{self.vocab_size}"
                )

    @property
    def q_dim(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        return self.n_kv_heads * self.head_dim

    @property
    def n_params(self) -> int:
        """Weights in the model; a tied embedding counts once."""
        attention = self.dim * (self.q_dim + 2 * self.kv_dim) + self.q_dim * self.dim
        layer = attention + 3 * self.dim * self.hidden_dim + 2 * self.dim
        embeddings = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        return self.n_layers * layer + embeddings + self.dim

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        """From a Hugging Face config.json; ConfigError for what would be computed wrongly."""
        model_type = hf.get("model_type", "none")
        if model_type != "llama":
            raise ConfigError(f"config.json: model_type is {model_type!r}; {_SUPPORTED}")
        for key, only in _HF_FIXED.items():
            if hf.get(key, only) != only:
                raise ConfigError(
                    f"config.json: {key} is {hf[key]!r}, expected {only!r}; {_SUPPORTED}"
                )
        rope_theta = _hf_rope_theta(hf)

        hf = {**_HF_DEFAULTS, **hf}
        missing = [key for key in _HF_REQUIRED if not _is_int(hf.get(key))]
        if missing:
            raise ConfigError(f"config.json: {', '.join(missing)} missing or not a whole number")
        n_heads = hf["num_attention_heads"]
        if n_heads < 1:
            raise ConfigError(f"config.json: num_attention_heads is {n_heads}, expected at least 1")
        n_kv_heads = hf.get("num_key_value_heads")
        head_dim = hf.get("head_dim")
        eos = hf.get("eos_token_id")
        return cls(
            dim=hf["hidden_size"],
            hidden_dim=hf["intermediate_size"],
            n_layers=hf["num_hidden_layers"],
            n_heads=n_heads,
            n_kv_heads=n_heads if n_kv_heads is None else n_kv_heads,
            head_dim=hf["hidden_size"] // n_heads if head_dim is None else head_dim,
            vocab_size=hf["vocab_size"],
            max_seq_len=hf["max_position_embeddings"],
            rope_theta=_as_float(rope_theta),
            norm_eps=_as_float(hf["rms_norm_eps"]),
            tie_embeddings=hf["tie_word_embeddings"],
            bos_token_id=hf.get("bos_token_id"),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`: exactly its fields, or ConfigError."""
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"config: not JSON ({error})") from None
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or set(fields) != names:
            found = sorted(fields) if isinstance(fields, dict) else fields
            raise ConfigError(
                f"config: expected an object with exactly {sorted(names)}, found {found}"
            )
        eos = fields["eos_token_ids"]
        if not isinstance(eos, list):
            raise ConfigError(f"config: eos_token_ids is {eos!r}, expected a list")
        return cls(**{**fields, "eos_token_ids": tuple(eos)})


_SIZES = (
    "dim",
    "hidden_dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "vocab_size",
    "max_seq_len",
)
_HF_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)


def _hf_rope_theta(hf: Mapping[str, Any]) -> Any:
    """RoPE's base, from `rope_theta` or (transformers 5) `rope_parameters`; no scaling works."""
    theta = hf.get("rope_theta", 10000.0)
    for key in ("rope_scaling", "rope_parameters"):
        rope = hf.get(key)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise ConfigError(f"config.json: {key} is {rope!r}, expected an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ConfigError(f"config.json: {key} is of type {kind!r}; {_SUPPORTED}")
        theta = rope.get("rope_theta", theta)
    return theta


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_float(value: Any) -> Any:
    """JSON writes 10000.0 as 10000; anything that is not a number is left for the check to name."""
    return float(value) if _is_int(value) and abs(value) < 2**53 else value
