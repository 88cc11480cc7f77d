"""A GGUF file (llama.cpp's format) as a `Source`: read and dequantized by the `gguf` package."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor
from gguf.quants import dequantize

from engine.errors import ConfigError, WeightsError
from weights.sources.families import SUPPORTED, Family, read_family
from weights.sources.gguf_tokenizer import build_tokenizer_json
from weights.sources.source import LazyTensor, Source, scaled

# GGUF name -> Hugging Face name, `.weight` or `.bias` left out on both sides; {} is the layer.
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "blk.{}.attn_k_norm": "model.layers.{}.self_attn.k_norm",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}
# Architecture -> whether its rows of q and k are in an order of their own (`_unpermute`).
# Mistral's and SmolLM's are called llama.
_PERMUTED = {"llama": True, "smollm3": True, "granite": True, "qwen2": False, "qwen3": False}
# Key of config.json -> key behind the architecture's name, of what has the same meaning in both.
_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
}
_SCALING_KEYS = {
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "attention_factor": "rope.scaling.attn_factor",
}
_NEEDED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)
_EOS_KEYS = (
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.eom_token_id",
)
_ROPE_DIVISORS = "rope_freqs.weight"
_WEIGHTS_AT_ONCE = 1 << 24  # dequantized: the package takes a few times their memory


def open_gguf(path: Path) -> Source:
    """Reads the header and the tokenizer; WeightsError or ConfigError when they do not fit."""
    try:
        reader = _Reader(path)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # whatever numpy or the package stumbles over first
        raise WeightsError(f"{path}: not a complete GGUF file ({error})") from None
    if reader.byte_order != "I":
        raise WeightsError(f"{path}: written for the other byte order")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    fields = _Fields(path, reader)
    family = _family(path, fields, tensors)
    config = family.config
    n_heads = {}
    if _PERMUTED[fields.need("general.architecture")]:
        n_heads = {"attn_q": config.n_heads, "attn_k": config.n_kv_heads}
    lazy = {
        _hugging_face_name(name): _lazy(
            path, tensor, n_heads.get(name.split(".")[-2]) if "." in name else None
        )
        for name, tensor in tensors.items()
        if name != _ROPE_DIVISORS
    }
    return Source(
        name=path.stem,
        config=config,
        tensors=scaled(lazy, family),
        tokenizer_json=build_tokenizer_json(path, fields.get),
        chat_template=fields.get("tokenizer.chat_template"),
    )


class _Reader(GGUFReader):
    """Ends at the file's end: the package itself goes on in a damaged list of 2^60 elements. And
    reads plain arrays: a vocabulary takes a quarter of a million of its memory-mapped ones.
    """

    def _get(
        self, offset: int, dtype: npt.DTypeLike, count: int = 1, override_order: Any = None
    ) -> Any:
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > self.data.size:
            raise ValueError(f"something ends at byte {end} of {self.data.size}")
        ordered = np.dtype(dtype).newbyteorder(override_order or self.byte_order)
        return np.frombuffer(self.data, ordered, int(count), int(offset))


class _Fields:
    """The file's key-value pairs as Python values."""

    def __init__(self, path: Path, reader: GGUFReader) -> None:
        self._path = path
        self._fields = reader.fields

    def get(self, key: str, default: Any = None) -> Any:
        field = self._fields.get(key)
        try:
            return default if field is None else field.contents()
        except UnicodeDecodeError:
            raise WeightsError(f"{self._path}: the text of {key} is damaged") from None

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise WeightsError(f"{self._path}: the key {key} is missing")
        return value


def _family(path: Path, fields: _Fields, tensors: dict[str, ReaderTensor]) -> Family:
    """The sizes, said in the words of config.json."""
    architecture = fields.need("general.architecture")
    if architecture not in _PERMUTED:
        raise ConfigError(f"{path}: architecture {architecture!r}; {SUPPORTED}")
    if "token_embd.weight" not in tensors:
        raise WeightsError(f"{path}: token_embd.weight is missing")

    def found(keys: dict[str, str]) -> dict[str, Any]:
        values = {ours: fields.get(f"{architecture}.{theirs}") for ours, theirs in keys.items()}
        return {
            key: _shortest(value) if isinstance(value, float) else value
            for key, value in values.items()
            if value is not None
        }

    hf = {"model_type": architecture, "sliding_window": None, "head_dim": None, **found(_KEYS)}
    for key in _NEEDED:
        if key not in hf:
            raise WeightsError(f"{path}: the key {architecture}.{_KEYS[key]} is missing")
    hf |= {
        "use_sliding_window": hf["sliding_window"] is not None,
        "vocab_size": _shape(tensors["token_embd.weight"])[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": [
            *dict.fromkeys(token for key in _EOS_KEYS if (token := fields.get(key)) is not None)
        ],
    }
    if architecture == "llama" and hf["sliding_window"] is not None:
        hf["model_type"] = "mistral"
    scaling = fields.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":
        hf["rope_scaling"] = {"rope_type": scaling, **found(_SCALING_KEYS)}
    family = read_family(hf, str(path))

    config = family.config
    rotated = fields.get(f"{architecture}.rope.dimension_count", config.head_dim)
    if rotated != config.head_dim:
        raise ConfigError(
            f"{path}: RoPE rotates {rotated} of {config.head_dim} dimensions, expected all of them"
        )
    if _ROPE_DIVISORS in tensors:  # what Llama 3.1's scaling comes to
        divisors = _to_float32(path, tensors[_ROPE_DIVISORS], None).ravel()
        config = replace(config, rope_divisors=tuple(map(_shortest, divisors)))
    return replace(family, config=config)


def _shortest(value: float | np.float32) -> float:
    """The decimal number that a float32 was made from: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _hugging_face_name(name: str) -> str:
    """A tensor that Llama does not have keeps its own name, under which `Source` refuses it."""
    stem, _, kind = name.rpartition(".")
    layer = re.search(r"\d+", stem)
    pattern = re.sub(r"\d+", "{}", stem, count=1)
    if kind not in ("weight", "bias") or pattern not in _NAMES:
        return name
    return f"{_NAMES[pattern].format(layer.group() if layer else '')}.{kind}"


def _lazy(path: Path, tensor: ReaderTensor, permuted_heads: int | None) -> LazyTensor:
    return LazyTensor(_shape(tensor), partial(_to_float32, path, tensor, permuted_heads))


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    return tuple(
        int(size) for size in reversed(tensor.shape)
    )  # GGUF counts from the fastest dimension


def _to_float32(
    path: Path, tensor: ReaderTensor, permuted_heads: int | None
) -> npt.NDArray[np.float32]:
    shape = _shape(tensor)
    stored = tensor.data.reshape(-1, tensor.data.shape[-1])  # a row of blocks for each of ours
    weights = np.empty((len(stored), shape[-1]), np.float32)
    step = max(1, _WEIGHTS_AT_ONCE // shape[-1])
    try:
        for begin in range(0, len(stored), step):
            some = slice(begin, begin + step)
            weights[some] = dequantize(stored[some], tensor.tensor_type)
    except NotImplementedError:
        kind = GGMLQuantizationType(tensor.tensor_type).name
        raise WeightsError(
            f"{path}: {tensor.name} is of type {kind}, which the gguf package cannot read"
        ) from None
    weights = weights.reshape(shape)
    return weights if permuted_heads is None else _unpermute(weights, permuted_heads)


def _unpermute(weights: npt.NDArray[np.float32], n_heads: int) -> npt.NDArray[np.float32]:
    """Rows of q or k from GGUF's order to Hugging Face's.

    There RoPE rotates a head's neighbours (2i, 2i + 1), here (i, i + head_dim/2).
    This is the inverse of `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py.
    """
    neighbours = weights.reshape(n_heads, len(weights) // n_heads // 2, 2, *weights.shape[1:])
    return neighbours.swapaxes(1, 2).reshape(weights.shape)
