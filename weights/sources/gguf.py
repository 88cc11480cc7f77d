"""A GGUF file (llama.cpp's format) as a `Source`: read and dequantized by the `gguf` package."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor
from gguf.quants import dequantize

from engine.errors import ConfigError, WeightsError
from model.config import ModelConfig
from weights.sources.gguf_tokenizer import build_tokenizer_json
from weights.sources.source import LazyTensor, Source

# GGUF name -> Hugging Face name, `.weight` left out on both sides; {} is the layer.
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}
_EOS_KEYS = (
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.eom_token_id",
)


def open_gguf(path: Path) -> Source:
    """Reads the header and the tokenizer; WeightsError or ConfigError when they do not fit."""
    try:
        reader = GGUFReader(path)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # whatever numpy or the package stumbles over first
        raise WeightsError(f"{path}: not a complete GGUF file ({error})") from None
    if reader.byte_order != "I":
        raise WeightsError(f"{path}: written for the other byte order")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    fields = _Fields(path, reader)
    config = _config(path, fields, tensors)
    n_heads = {"attn_q": config.n_heads, "attn_k": config.n_kv_heads}
    return Source(
        name=path.stem,
        config=config,
        tensors={
            _hugging_face_name(name): _lazy(
                path, tensor, n_heads.get(name.split(".")[-2]) if "." in name else None
            )
            for name, tensor in tensors.items()
        },
        tokenizer_json=build_tokenizer_json(path, fields.get),
        chat_template=fields.get("tokenizer.chat_template"),
    )


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


def _config(path: Path, fields: _Fields, tensors: dict[str, ReaderTensor]) -> ModelConfig:
    architecture = fields.need("general.architecture")
    if architecture != "llama":
        raise ConfigError(
            f"{path}: architecture {architecture!r}, expected 'llama', the only one that works"
        )
    scaling = fields.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise ConfigError(f"{path}: RoPE scaling {scaling!r}, expected none")
    if "token_embd.weight" not in tensors:
        raise WeightsError(f"{path}: token_embd.weight is missing")

    dim = fields.need("llama.embedding_length")
    n_heads = fields.need("llama.attention.head_count")
    if (
        not isinstance(n_heads, int) or n_heads < 1
    ):  # newer architectures give a list, one number per layer
        raise ConfigError(
            f"{path}: llama.attention.head_count is {n_heads!r}, expected one number of at least 1"
        )
    head_dim = fields.get("llama.attention.key_length", dim // n_heads)
    rotated = fields.get("llama.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise ConfigError(
            f"{path}: RoPE rotates {rotated} of {head_dim} dimensions, expected all of them"
        )
    return ModelConfig(
        dim=dim,
        hidden_dim=fields.need("llama.feed_forward_length"),
        n_layers=fields.need("llama.block_count"),
        n_heads=n_heads,
        n_kv_heads=fields.get("llama.attention.head_count_kv", n_heads),
        head_dim=head_dim,
        vocab_size=_shape(tensors["token_embd.weight"])[0],
        max_seq_len=fields.need("llama.context_length"),
        rope_theta=_shortest(fields.get("llama.rope.freq_base", 10000.0)),
        norm_eps=_shortest(fields.need("llama.attention.layer_norm_rms_epsilon")),
        tie_embeddings="output.weight" not in tensors,
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=tuple(
            dict.fromkeys(token for key in _EOS_KEYS if (token := fields.get(key)) is not None)
        ),
    )


def _shortest(value: float) -> float:
    """The decimal number that a float32 was made from: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _hugging_face_name(name: str) -> str:
    """A tensor that Llama does not have keeps its own name, under which `Source` refuses it."""
    stem = name.removesuffix(".weight")
    layer = re.search(r"\d+", stem)
    pattern = re.sub(r"\d+", "{}", stem, count=1)
    if stem == name or pattern not in _NAMES:
        return name
    return _NAMES[pattern].format(layer.group() if layer else "") + ".weight"


def _lazy(path: Path, tensor: ReaderTensor, permuted_heads: int | None) -> LazyTensor:
    return LazyTensor(_shape(tensor), partial(_to_float32, path, tensor, permuted_heads))


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    return tuple(
        int(size) for size in reversed(tensor.shape)
    )  # GGUF counts from the fastest dimension


def _to_float32(
    path: Path, tensor: ReaderTensor, permuted_heads: int | None
) -> npt.NDArray[np.float32]:
    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        kind = GGMLQuantizationType(tensor.tensor_type).name
        raise WeightsError(
            f"{path}: {tensor.name} is of type {kind}, which the gguf package cannot read"
        ) from None
    weights = np.array(values, np.float32).reshape(_shape(tensor))
    return weights if permuted_heads is None else _unpermute(weights, permuted_heads)


def _unpermute(weights: npt.NDArray[np.float32], n_heads: int) -> npt.NDArray[np.float32]:
    """Rows of q or k from GGUF's order to Hugging Face's.

    There RoPE rotates a head's neighbours (2i, 2i + 1), here (i, i + head_dim/2).
    This is the inverse of `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py.
    """
    rows, cols = weights.shape
    neighbours = weights.reshape(n_heads, rows // n_heads // 2, 2, cols)
    return neighbours.swapaxes(1, 2).reshape(rows, cols)
