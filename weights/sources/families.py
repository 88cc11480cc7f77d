"""What config.json says, family by family, in the engine's words: sizes and factors. No tensors.

A family is what `model_type` names. Most are a Llama and something besides (model/config.py), and a
key that is absent has the family's own default, those of transformers 5. Granite's factors need no
arithmetic of their own: they become part of weights, once (`Family`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import ConfigError
from model.config import MAX_HEAD_DIM, MAX_LAYERS, ModelConfig

_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
# model_type -> defaults of its own
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {
        "max_position_embeddings": 32768,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "smollm3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "rope_theta": 2000000.0,
        "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
    },
    "granite": {},
}
SUPPORTED = (
    "works: Llama (SmolLM, SmolLM2, TinyLlama, Llama 2, 3.1, 3.2 and the like), Mistral, Qwen2, "
    "Qwen2.5, Qwen3, SmolLM3 and Granite"
)

# Key -> the only value that is computed with.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
}
_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)


@dataclass(frozen=True)
class Family:
    """A model's sizes, and the factors that its weights take up when they are read.

    With a residual stream of 1/m of what the original has, m Granite's embedding_multiplier, the
    embedding stays as it is, norms see the same but for their epsilon, which becomes 1/m^2, and
    what a block adds is multiplied by `branch`, residual_multiplier / m.
    """

    config: ModelConfig
    branch: float = 1.0  # of the rows of o_proj and down_proj
    final_norm: float = 1.0  # of the last norm's weight: 1 / logits_scaling

    def factor(self, tensor: str) -> float:
        """What the tensor of this Hugging Face name is multiplied by."""
        if tensor.endswith(("o_proj.weight", "down_proj.weight")):
            return self.branch
        return self.final_norm if tensor == "model.norm.weight" else 1.0


def read_family(hf: Mapping[str, Any], where: str = "config.json") -> Family:
    """From the object in a config.json; ConfigError for what would be computed wrongly.

    `where` begins each message.
    """
    kind = hf.get("model_type", "none")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        raise ConfigError(f"{where}: model_type is {kind!r}; {SUPPORTED}")
    for key, only in _FIXED.items():
        if hf.get(key, only) != only:
            raise ConfigError(f"{where}: {key} is {hf[key]!r}, expected {only!r}; {SUPPORTED}")
    hf = {**_DEFAULTS, **_FAMILIES[kind], **hf}
    missing = [key for key in _REQUIRED if not _is_int(hf.get(key))]
    if missing:
        raise ConfigError(f"{where}: {', '.join(missing)} missing or not a whole number")
    n_heads, n_layers = hf["num_attention_heads"], hf["num_hidden_layers"]
    for key, most in (("num_attention_heads", 1 << 31), ("num_hidden_layers", MAX_LAYERS)):
        if not 1 <= hf[key] <= most:
            raise ConfigError(f"{where}: {key} is {hf[key]}, expected 1 to {most}")
    n_kv_heads, head_dim, eos = (
        hf.get(key) for key in ("num_key_value_heads", "head_dim", "eos_token_id")
    )
    head_dim = hf["hidden_size"] // n_heads if head_dim is None else head_dim
    theta, divisors, rope_factor = _rope(hf, head_dim, where)

    sliding = _sliding_layers(hf, kind, where)
    granite = kind == "granite"
    embedding, residual, attention, logits = (
        _number(hf, key, 1.0, where) if granite else 1.0
        for key in (
            "embedding_multiplier",
            "residual_multiplier",
            "attention_multiplier",
            "logits_scaling",
        )
    )
    scale = attention if granite else None
    unrotated = _unrotated_layers(hf, kind, where)
    if rope_factor != 1:  # q and k are both multiplied by it
        if unrotated:
            raise ConfigError(f"{where}: RoPE scaling 'yarn' with layers that have no RoPE")
        scale = (_power(head_dim, -0.5) if scale is None else scale) * rope_factor**2
    eps = _as_float(hf["rms_norm_eps"])
    config = ModelConfig(
        dim=hf["hidden_size"],
        hidden_dim=hf["intermediate_size"],
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads if n_kv_heads is None else n_kv_heads,
        head_dim=head_dim,
        vocab_size=hf["vocab_size"],
        max_seq_len=hf["max_position_embeddings"],
        rope_theta=_as_float(theta),
        norm_eps=eps / embedding**2 if isinstance(eps, float) else eps,
        tie_embeddings=hf["tie_word_embeddings"],
        bos_token_id=hf.get("bos_token_id"),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        rope_divisors=divisors,
        attention_scale=scale,
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        unrotated_layers=unrotated,
        sliding_window=hf["sliding_window"] if sliding else None,
        sliding_layers=sliding,
    )
    return Family(config, residual / embedding, 1 / logits)


def _unrotated_layers(hf: Mapping[str, Any], kind: str, where: str) -> tuple[int, ...]:
    """SmolLM3: a list of 1 for a layer with RoPE and 0 for one without, or each n-th is without."""
    if kind != "smollm3":
        return ()
    n_layers, rotated = hf["num_hidden_layers"], hf.get("no_rope_layers")
    if rotated is None:
        interval = hf["no_rope_layer_interval"]
        if not _is_int(interval) or interval < 1:
            raise ConfigError(
                f"{where}: no_rope_layer_interval is {interval!r}, expected 1 or more"
            )
        return tuple(i for i in range(n_layers) if (i + 1) % interval == 0)
    is_list = isinstance(rotated, list) and len(rotated) == n_layers
    if not is_list or not all(type(has_rope) is int and has_rope in (0, 1) for has_rope in rotated):
        raise ConfigError(f"{where}: no_rope_layers is {rotated!r}, expected {n_layers} of 0 and 1")
    return tuple(i for i, has_rope in enumerate(rotated) if not has_rope)


def _sliding_layers(hf: Mapping[str, Any], kind: str, where: str) -> tuple[int, ...]:
    """Layers with a sliding window, all of Mistral's; other families say that they have any."""
    n_layers, kinds = hf["num_hidden_layers"], hf.get("layer_types")
    if hf.get("sliding_window") is None or kind in ("llama", "granite"):
        return ()
    if kind != "mistral" and not hf.get("use_sliding_window", False):
        return ()
    if kinds is not None:
        if (
            not isinstance(kinds, list)
            or len(kinds) != n_layers
            or any(kind not in ("full_attention", "sliding_attention") for kind in kinds)
        ):
            raise ConfigError(
                f"{where}: layer_types is {kinds!r}, expected full_attention or sliding_attention "
                f"for each of {n_layers} layers"
            )
        return tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    first: Any = 0 if kind == "mistral" else hf.get("max_window_layers")
    if not _is_int(first):
        raise ConfigError(f"{where}: use_sliding_window without layer_types says not for which")
    return tuple(range(max(first, 0), n_layers))


def _rope(hf: Mapping[str, Any], head_dim: Any, where: str) -> tuple[Any, tuple[float, ...], float]:
    """RoPE's base, what its frequencies are divided by, and what q and k are multiplied by.

    From `rope_theta` and `rope_scaling` or (transformers 5) `rope_parameters`.
    """
    theta: Any = hf["rope_theta"]
    scaling: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        rope = hf.get(key)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise ConfigError(f"{where}: {key} is {rope!r}, expected an object")
        theta = rope.get("rope_theta", theta)
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ConfigError(f"{where}: RoPE rotates a part of the head; {SUPPORTED}")
        scaling = {**hf, **rope}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, (), 1.0
    if not _is_int(head_dim) or not 2 <= head_dim <= MAX_HEAD_DIM:
        raise ConfigError(f"{where}: head_dim is {head_dim!r}, expected 2 to {MAX_HEAD_DIM}")
    if not isinstance(_as_float(theta), float):
        raise ConfigError(f"{where}: rope_theta is {theta!r}, expected a number")
    half = head_dim // 2

    def number(key: str, default: float | None = None) -> float:
        value = _number(scaling, key, default, f"{where}: RoPE scaling {kind!r}")
        if not 1e-6 <= value <= 1e9:
            raise ConfigError(f"{where}: RoPE scaling {kind!r}: {key} is {value:g}")
        return value

    if kind == "linear":
        return theta, (number("factor"),) * half, 1.0
    if kind not in ("llama3", "yarn"):
        raise ConfigError(
            f"{where}: RoPE scaling {kind!r}, expected linear, llama3 or yarn; {SUPPORTED}"
        )
    factor, length = number("factor"), number("original_max_position_embeddings")
    # Turns that each pair makes over the length of the texts that training began with.
    turns = [length * _power(theta, -i / half) / (2 * math.pi) for i in range(half)]
    if kind == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        if not low < high:
            raise ConfigError(f"{where}: low_freq_factor is {low:g}, expected below {high:g}")
        kept = [min(max((t - low) / (high - low), 0.0), 1.0) for t in turns]
        return theta, tuple(1 / ((1 - k) / factor + k) for k in kept), 1.0
    # YaRN (Peng et al. 2023), section 3.2: a ramp over the pairs rather than over their turns.
    log_theta = math.log(theta) if theta > 1 else 1.0
    ends = [
        half * math.log(length / (number(key, default) * 2 * math.pi)) / log_theta
        for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0))
    ]
    if scaling.get("truncate", True):
        ends = [float(math.floor(ends[0])), float(math.ceil(ends[1]))]
    first, last = max(ends[0], 0.0), min(ends[1], head_dim - 1.0)
    width = last - first or 0.001
    stretched = [min(max((i - first) / width, 0.0), 1.0) for i in range(half)]
    divisors = tuple(1 / (s / factor + 1 - s) for s in stretched)
    for key in ("mscale", "mscale_all_dim"):
        if scaling.get(key):
            raise ConfigError(f"{where}: RoPE scaling 'yarn' with {key} does not work")
    own = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    return theta, divisors, number("attention_factor", own)


def _number(hf: Mapping[str, Any], key: str, default: float | None, where: str) -> float:
    found = hf.get(key)
    value = _as_float(default if found is None else found)
    if not isinstance(value, float) or not 0 < value < math.inf:
        raise ConfigError(f"{where}: {key} is {found!r}, expected a number above 0")
    return value


def _power(base: Any, exponent: float) -> float:
    """base ** exponent; NaN, which every check refuses, for a base that is no number above 0."""
    usable = isinstance(base, int | float) and base > 0
    return float(base) ** exponent if usable else math.nan


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_float(value: Any) -> Any:
    """JSON writes 10000.0 as 10000; anything that is not a number is left for the check to name."""
    return float(value) if _is_int(value) and abs(value) < 2**53 else value
