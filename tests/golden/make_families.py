"""Makes tests/golden/families/*.safetensors: tiny random models and transformers' logits of them.

    pip install torch transformers safetensors
    python tests/golden/make_families.py

One file a model: its weights in float16 under Hugging Face names, `token_ids`, and `logits` in
float32; the metadata have its config.json and what made it. No size divides another.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "families"
N_TOKENS = 29
SIZES = {
    "hidden_size": 40,
    "intermediate_size": 70,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "rope_theta": 5000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
# RoPE is scaled as if training had begun with these few positions: all kinds of pairs occur.
STRETCHED = {"factor": 4.0, "original_max_position_embeddings": 16}

# name -> (model_type, what config.json says beyond SIZES)
MODELS = {
    "llama2": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama3": (
        "llama",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                **STRETCHED,
            },
        },
    ),
    "llama_linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.5}}),
    "llama_yarn": ("llama", {"rope_scaling": {"rope_type": "yarn", **STRETCHED}}),
    "mistral": ("mistral", {"sliding_window": 7, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", {}),
    "qwen2_sliding": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 14}),
    "smollm3": ("smollm3", {"num_hidden_layers": 3, "no_rope_layer_interval": 2}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.3,
            "logits_scaling": 0.7,
        },
    ),
}


def make(name: str, kind: str, more: dict) -> None:
    hf = {**SIZES, **more}
    torch.manual_seed(sum(name.encode()))
    config = transformers.AutoConfig.for_model(kind, **hf, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for parameter_name, parameter in model.named_parameters():
        # Rows of about length 2, norms of about 1, biases that matter: logits of a few units, and
        # attention that looks at something.
        values = torch.randn(parameter.shape)
        if parameter.ndim == 2:
            values *= 2 * parameter.shape[1] ** -0.5
        elif parameter_name.endswith("norm.weight"):
            values = 1 + 0.2 * values
        parameter.data = values.half().float()
    ids = torch.randint(2, config.vocab_size, (N_TOKENS,))
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    tensors = {key: value.half() for key, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    made_by = f"transformers {transformers.__version__}, torch {torch.__version__}"
    described = json.dumps({"model_type": kind, "hidden_act": "silu", **hf})
    save_file(
        {**tensors, "token_ids": ids.int(), "logits": logits.contiguous()},
        FOLDER / f"{name}.safetensors",
        {"config.json": described, "made_by": made_by},
    )
    print(f"{name}: logits from {logits.min():.2f} to {logits.max():.2f}")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, (kind, more) in MODELS.items():
        make(name, kind, more)
