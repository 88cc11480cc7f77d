"""Small random Llamas written in the formats of others, for tests of whatever reads them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import tokenizers
from gguf.quants import quantize
from safetensors.numpy import save, save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from model.config import ModelConfig
from weights.layout import matrices, source_shapes, vectors
from weights.sources.source import LazyTensor, Source

Array = npt.NDArray[np.float32]

# No size is a multiple of another's neighbour: an index mix-up does not go unnoticed.
CONFIG = ModelConfig(
    dim=40,
    hidden_dim=70,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=10,
    vocab_size=97,
    max_seq_len=64,
    rope_theta=5000.0,
    norm_eps=1e-5,
    tie_embeddings=True,
    bos_token_id=0,
    eos_token_ids=(1,),
)

SPECIAL = ["<bos>", "<eos>", "<|user|>"]
# 97 tokens: 3 special, a space, 92 printable characters and one merge.
TOKENS = [*SPECIAL, "Ġ", *map(chr, range(33, 125)), "ab"]
MERGES = ["a b"]
CHAT_TEMPLATE = (
    "{% for message in messages %}\n{{ '<|user|>' + message['content'] + eos_token }}{% endfor %}\n"
    "{% if add_generation_prompt %}>{% endif %}"
)


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, Array]:
    """Gaussian weights under Hugging Face names, all of them exact in bfloat16."""
    rng = np.random.default_rng(seed)
    kv, q, dim, hidden = config.kv_dim, config.q_dim, config.dim, config.hidden_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, dim)}
    for i in range(config.n_layers):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "self_attn.q_proj.weight": (q, dim),
            layer + "self_attn.k_proj.weight": (kv, dim),
            layer + "self_attn.v_proj.weight": (kv, dim),
            layer + "self_attn.o_proj.weight": (dim, q),
            layer + "mlp.gate_proj.weight": (hidden, dim),
            layer + "mlp.up_proj.weight": (hidden, dim),
            layer + "mlp.down_proj.weight": (dim, hidden),
            layer + "input_layernorm.weight": (dim,),
            layer + "post_attention_layernorm.weight": (dim,),
        }
    shapes["model.norm.weight"] = (dim,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, dim)
    shapes |= {name: shape for name, shape in source_shapes(config).items() if name not in shapes}
    return {
        name: _bfloat16_exact(rng.standard_normal(shape) * 0.05) for name, shape in shapes.items()
    }


def random_source(config: ModelConfig, seed: int = 0) -> Source:
    """Rows of length 1: activations neither vanish nor explode on the way."""
    rng = np.random.default_rng(seed)
    tensors = {name: rng.normal(1, 0.2, config.dim) for name in vectors(config)}
    for matrix in matrices(config):
        for name, rows in matrix.parts:
            tensors[name] = rng.normal(0, matrix.cols**-0.5, (rows, matrix.cols))
    lazy = {name: LazyTensor(w.shape, partial(np.float32, w)) for name, w in tensors.items()}
    return Source("random", config, lazy, tokenizer_json(), CHAT_TEMPLATE)


def tokenizer_json() -> bytes:
    vocab = {token: i for i, token in enumerate(TOKENS)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=[tuple(merge.split()) for merge in MERGES])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    )
    return tokenizer.to_str().encode()


def hf_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
    }


def write_hf_folder(
    folder: Path,
    config: ModelConfig,
    tensors: dict[str, Array],
    dtype: str = "float32",
    n_shards: int = 1,
) -> Path:
    """A Hugging Face model folder; dtype "float32", "float16" or "bfloat16"."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(config)))
    (folder / "tokenizer.json").write_bytes(tokenizer_json())
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    if n_shards == 1:
        _save_safetensors(folder / "model.safetensors", tensors, dtype)
        return folder
    weight_map = {}
    for i in range(n_shards):
        shard = f"model-{i + 1:05}-of-{n_shards:05}.safetensors"
        names = list(tensors)[i::n_shards]
        _save_safetensors(folder / shard, {name: tensors[name] for name in names}, dtype)
        weight_map |= dict.fromkeys(names, shard)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def write_gguf(
    path: Path,
    config: ModelConfig,
    tensors: dict[str, Array],
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F16,
    pre: str = "smollm",
    architecture: str = "llama",
) -> Path:
    """A GGUF file as llama.cpp's converter writes it: vectors in F32, q and k permuted but for
    Qwen's. What the gguf package cannot quantize becomes random blocks.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_block_count(config.n_layers)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_ids[0])
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, values in tensors.items():
        if not architecture.startswith("qwen"):
            if ".q_proj." in name:
                values = _permuted(values, config.n_heads)
            elif ".k_proj." in name:
                values = _permuted(values, config.n_kv_heads)
        stored_kind = kind if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        stored = gguf_blocks(values, stored_kind)
        writer.add_tensor(gguf_name(name), stored, raw_dtype=stored_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Where a block of a K-quant has its scales, of type float16: there random bits could be no numbers.
_K_SCALES = {
    "Q2_K": slice(80, 84),
    "Q3_K": slice(108, 110),
    "Q4_K": slice(0, 4),
    "Q5_K": slice(0, 4),
    "Q6_K": slice(208, 210),
}


def gguf_blocks(values: Array, kind: gguf.GGMLQuantizationType) -> npt.NDArray[Any]:
    """(rows, cols) as a GGUF stores them; of K-quants random blocks, the same for a shape."""
    if kind.name not in _K_SCALES:
        return quantize(values, kind)
    per_block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows, cols = values.shape
    rng = np.random.default_rng(rows)
    blocks = rng.integers(0, 256, (rows, cols // per_block, n_bytes), np.uint8)
    place = _K_SCALES[kind.name]
    n_scales = (place.stop - place.start) // 2
    scales = rng.uniform(0.0005, 0.001, (rows, cols // per_block, n_scales)).astype(np.float16)
    blocks[..., place] = scales.view(np.uint8)
    return blocks.reshape(rows, -1)


def _permuted(weights: Array, n_heads: int) -> Array:
    """GGUF's order: a head's rows 2i and 2i + 1 are Hugging Face's i and i + head_dim/2."""
    half = len(weights) // n_heads // 2
    order = [
        head * 2 * half + i + side * half
        for head in range(n_heads)
        for i in range(half)
        for side in range(2)
    ]
    return weights[order]


def gguf_name(name: str) -> str:
    parts = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers": "blk",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for theirs, gguf_part in parts.items():
        name = name.replace(theirs, gguf_part)
    return name


def _bfloat16_exact(values: npt.NDArray[np.float64]) -> Array:
    bits = values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)


def _save_safetensors(path: Path, tensors: dict[str, Array], dtype: str) -> None:
    if dtype != "bfloat16":
        save_file({name: values.astype(dtype) for name, values in tensors.items()}, path)
        return
    # numpy has no bfloat16: write its bits as U16, then call them by their name.
    data = save(
        {name: (values.view(np.uint32) >> 16).astype(np.uint16) for name, values in tensors.items()}
    )
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end].replace(b'"U16"', b'"BF16"')
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
