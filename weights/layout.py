"""Which tensors a Llama has: Hugging Face's in a source, fused ones in a weights file.

Names and shapes only.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import ModelConfig

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"


@dataclass(frozen=True)
class Matrix:
    """One matrix of a weights file: the source's tensors stacked by rows, in this order."""

    name: str
    parts: tuple[tuple[str, int], ...]  # (Hugging Face tensor name, its rows)
    cols: int

    @property
    def rows(self) -> int:
        return sum(rows for _, rows in self.parts)

    @property
    def in_block(self) -> bool:
        """Whether it belongs to a transformer block; the embedding and the head do not."""
        return self.name not in (EMBEDDING, HEAD)


def matrices(config: ModelConfig) -> list[Matrix]:
    """Every matrix of the file, in the order in which a token meets them."""
    found = [_matrix(EMBEDDING, [("", config.vocab_size)], config.dim)]
    for layer in range(config.n_layers):
        prefix = f"model.layers.{layer}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        qkv = [("q_proj", config.q_dim), ("k_proj", config.kv_dim), ("v_proj", config.kv_dim)]
        gate_up = [("gate_proj", config.hidden_dim), ("up_proj", config.hidden_dim)]
        found += [
            _matrix(
                attention + "qkv_proj", [(attention + name, rows) for name, rows in qkv], config.dim
            ),
            _matrix(attention + "o_proj", [("", config.dim)], config.q_dim),
            _matrix(
                mlp + "gate_up_proj", [(mlp + name, rows) for name, rows in gate_up], config.dim
            ),
            _matrix(mlp + "down_proj", [("", config.dim)], config.hidden_dim),
        ]
    if not config.tie_embeddings:
        found.append(_matrix(HEAD, [("", config.vocab_size)], config.dim))
    return found


def vectors(config: ModelConfig) -> dict[str, int]:
    """Every vector of the file and its length: the RMSNorms, and the biases of q, k, v, fused."""
    per_layer = {
        "input_layernorm.weight": config.dim,
        "post_attention_layernorm.weight": config.dim,
    }
    if config.qkv_bias:
        per_layer["self_attn.qkv_proj.bias"] = config.q_dim + 2 * config.kv_dim
    if config.qk_norm:
        per_layer |= dict.fromkeys(
            ("self_attn.q_norm.weight", "self_attn.k_norm.weight"), config.head_dim
        )
    found = {
        f"model.layers.{i}.{name}": size
        for i in range(config.n_layers)
        for name, size in per_layer.items()
    }
    return {**found, "model.norm.weight": config.dim}


def vector_parts(name: str) -> list[str]:
    """What a source calls a vector: Hugging Face tensor names, to be put one after the other."""
    prefix, fused, _ = name.partition("qkv_proj.bias")
    return [f"{prefix}{part}_proj.bias" for part in "qkv"] if fused else [name]


def source_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face tensor name -> shape, for every tensor that a source must have."""
    biases = {
        "q_proj.bias": config.q_dim,
        "k_proj.bias": config.kv_dim,
        "v_proj.bias": config.kv_dim,
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name, size in vectors(config).items():
        for part in vector_parts(name):
            shapes[part] = (biases.get(part.rpartition("self_attn.")[2], size),)
    for matrix in matrices(config):
        shapes.update({name: (rows, matrix.cols) for name, rows in matrix.parts})
    return shapes


def _matrix(name: str, parts: list[tuple[str, int]], cols: int) -> Matrix:
    return Matrix(name, tuple((f"{part or name}.weight", rows) for part, rows in parts), cols)
