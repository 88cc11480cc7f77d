"""Sizes of a model and what its family adds to a Llama, checked. No tensors here.

The names are llama2.c's. All is a Llama as `LlamaForCausalLM` defines it: RMSNorm, rotary positions
that rotate the halves of a head (i, i + head_dim/2), grouped-query attention, SwiGLU. What other
families do otherwise are fields whose defaults mean a plain Llama.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from dataclasses import dataclass
from typing import Any, Self

from engine.errors import ConfigError


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

    # What divides RoPE's head_dim / 2 frequencies to stretch the context; empty: nothing does.
    rope_divisors: tuple[float, ...] = ()
    attention_scale: float | None = None  # of q k; None: 1 / sqrt(head_dim)
    qkv_bias: bool = False  # q, k and v have a bias
    qk_norm: bool = False  # each head of q and k goes through an RMSNorm before RoPE
    unrotated_layers: tuple[int, ...] = ()  # have no RoPE; ascending
    # In these layers (ascending) a token sees itself and the `sliding_window` - 1 before it.
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field, most in _SIZES.items():
            value = getattr(self, field)
            if not _is_int(value) or not 1 <= value <= most:
                raise ConfigError(
                    f"config: {field} is {value!r}, expected a whole number from 1 to {most}"
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
        if len(self.rope_divisors) not in (0, self.head_dim // 2):
            raise ConfigError(
                f"config: rope_divisors are {len(self.rope_divisors)}, expected head_dim / 2 = "
                f"{self.head_dim // 2} or none"
            )
        scale = () if self.attention_scale is None else (self.attention_scale,)
        for value in (*self.rope_divisors, *scale):
            if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
                raise ConfigError(
                    f"config: {value!r} among rope_divisors and attention_scale, expected finite "
                    f"numbers above 0"
                )
        for field in ("qkv_bias", "qk_norm"):
            if not isinstance(getattr(self, field), bool):
                raise ConfigError(
                    f"config: {field} is {getattr(self, field)!r}, expected true or false"
                )
        for field in ("unrotated_layers", "sliding_layers"):
            layers = getattr(self, field)
            if not all(_is_int(layer) and 0 <= layer < self.n_layers for layer in layers) or any(
                a >= b for a, b in itertools.pairwise(layers)
            ):
                raise ConfigError(
                    f"config: {field} is {layers!r}, expected ascending layers of {self.n_layers}"
                )
        window = self.sliding_window
        if bool(self.sliding_layers) != (window is not None):
            raise ConfigError("config: sliding_window and sliding_layers: one without the other")
        if window is not None and (not _is_int(window) or window < 1):
            raise ConfigError(
                f"config: sliding_window is {window!r}, expected a whole number of at least 1"
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
    def score_scale(self) -> float:
        """What q k is multiplied by before the softmax."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def kv_dim(self) -> int:
        return self.n_kv_heads * self.head_dim

    @property
    def n_params(self) -> int:
        """Weights in the model; a tied embedding counts once."""
        attention = self.dim * (self.q_dim + 2 * self.kv_dim) + self.q_dim * self.dim
        layer = attention + 3 * self.dim * self.hidden_dim + 2 * self.dim
        layer += (self.q_dim + 2 * self.kv_dim) * self.qkv_bias + 2 * self.head_dim * self.qk_norm
        embeddings = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        return self.n_layers * layer + embeddings + self.dim

    def is_rotated(self, layer: int) -> bool:
        """Whether RoPE rotates this layer's q and k."""
        return layer not in self.unrotated_layers

    def window(self, layer: int) -> int | None:
        """How many positions a token of this layer sees, its own the last; None: all."""
        return self.sliding_window if layer in self.sliding_layers else None

    def to_json(self) -> str:
        """An object of the fields; those of a family are left out where they say plain Llama."""
        fields = dataclasses.asdict(self)
        for name, default in _OPTIONAL.items():
            if fields[name] == default:
                del fields[name]
        return json.dumps(fields, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`: its fields and no others, or ConfigError."""
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"config: not JSON ({error})") from None
        names = {field.name for field in dataclasses.fields(cls)} - _OPTIONAL.keys()
        if not isinstance(fields, dict) or fields.keys() - _OPTIONAL.keys() != names:
            found = sorted(fields) if isinstance(fields, dict) else fields
            raise ConfigError(
                f"config: expected an object with {sorted(names)} and, of a family's own, "
                f"{sorted(_OPTIONAL)}; found {found}"
            )
        for name in _LISTS & fields.keys():
            if not isinstance(fields[name], list):
                raise ConfigError(f"config: {name} is {fields[name]!r}, expected a list")
            fields[name] = tuple(fields[name])
        return cls(**fields)


_OPTIONAL = {
    field.name: field.default
    for field in dataclasses.fields(ModelConfig)
    if field.default is not dataclasses.MISSING
}
_LISTS = {"eos_token_ids", "rope_divisors", "unrotated_layers", "sliding_layers"}
# Far beyond what models have: a damaged number is named before anybody counts up to it.
MAX_LAYERS, MAX_HEAD_DIM = 1 << 12, 1 << 16
_SIZES = {
    "dim": 1 << 31,
    "hidden_dim": 1 << 31,
    "n_layers": MAX_LAYERS,
    "n_heads": 1 << 31,
    "n_kv_heads": 1 << 31,
    "head_dim": MAX_HEAD_DIM,
    "vocab_size": 1 << 31,
    "max_seq_len": 1 << 31,
}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
