"""Every family of models: the oracle and the engine against transformers, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from tiny_model import tokenizer_json

from engine.errors import ConfigError
from model.reference import Reference
from weights.calibration.layer import Layer, backward, forward, recompute
from weights.convert import CalibrationText, convert
from weights.sources import Source, open_source
from weights.sources.families import read_family
from weights.store import WeightsFile

AssertClose = Callable[[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike], None]

GOLDEN = Path(__file__).parent / "golden" / "families"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))
MADE_BY = "tests/golden/make_families.py made it"

# Float32 on both sides, logits of up to 8 through some ten sums of up to 97 terms: 6e-6 was seen.
TOLERANCE = 1e-4


def golden(name: str, folder: Path) -> tuple[Source, list[int], npt.NDArray[np.float32]]:
    """The model, opened from a Hugging Face folder; its tokens; transformers' logits of them."""
    with safe_open(GOLDEN / f"{name}.safetensors", "np") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        described = file.metadata()["config.json"]
    ids, logits = tensors.pop("token_ids").tolist(), tensors.pop("logits")
    folder = folder / name
    folder.mkdir()
    (folder / "config.json").write_text(described)
    (folder / "tokenizer.json").write_bytes(tokenizer_json())
    save_file(tensors, folder / "model.safetensors")
    return open_source(folder), ids, logits


def test_there_is_a_golden_of_every_family() -> None:
    assert {"llama2", "llama3", "mistral", "qwen2", "qwen3", "smollm3", "granite"} <= {*NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_reference_computes_what_transformers_computes(
    name: str, tmp_path: Path, assert_close: AssertClose
) -> None:
    source, ids, logits = golden(name, tmp_path)
    reference = Reference.from_source(source, cache_dtype=np.float32)
    assert_close(reference.logits(ids), logits, TOLERANCE)
    steps = [reference.logits(ids[:1])[0], *map(reference.step, ids[1:])]
    assert_close(steps, logits, TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_family_adds_survives_the_file(
    name: str, tmp_path: Path, assert_close: AssertClose
) -> None:
    source, ids, logits = golden(name, tmp_path)
    path = tmp_path / "model.safetensors"
    convert(source, path, "lossless", progress=False)
    file = WeightsFile.open(path)
    assert file.config == source.config
    assert_close(
        Reference.from_weights(file, cache_dtype=np.float32).logits(ids), logits, TOLERANCE
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_engine_computes_what_transformers_computes(
    name: str, tmp_path: Path, assert_close: AssertClose
) -> None:
    from engine.generate import Engine

    source, ids, logits = golden(name, tmp_path)
    path = tmp_path / "model.safetensors"
    convert(source, path, "lossless", progress=False)
    engine = Engine.open(path, exact=True)
    assert_close(engine.logits(ids), logits, 1e-3)
    # A token at a time, in passes of their own.
    greedy = int(np.argmax(logits[-1]))
    assert list(engine.generate(ids, 1, stop_ids=[])) == [greedy]
    (second,) = engine.generate([*ids, greedy], 1, stop_ids=[])
    wanted = Reference.from_source(source, cache_dtype=np.float32).logits([*ids, greedy])[-1]
    assert wanted[second] > wanted.max() - 2e-3


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "smollm3"])
def test_engine_reads_prompts_of_every_family_with_int8_activations(
    name: str, tmp_path: Path
) -> None:
    from engine.generate import Engine

    source = golden(name, tmp_path)[0]
    path = tmp_path / "model.safetensors"
    convert(source, path, 8, text=CalibrationText(0), progress=False)
    ids = np.random.default_rng(0).integers(2, 97, 64).tolist()
    wanted = Reference.from_weights(WeightsFile.open(path), int8=True).logits(ids)
    engine = Engine.open(path)
    found = engine.logits(ids)
    # Two roundings of an activation may differ where sums were added up in another order: such a
    # step, 1/127 of a block's largest, was seen to move logits by 0.01 of their spread.
    assert np.sqrt(np.mean((found - wanted) ** 2)) < 0.04 * np.std(wanted)
    (drawn,) = engine.generate(ids, 1, stop_ids=[])
    assert wanted[-1, drawn] > wanted[-1].max() - 0.2 * np.std(wanted)


@pytest.mark.gpu
def test_engine_slides_its_window_over_many_tiles(
    tmp_path: Path, assert_close: AssertClose
) -> None:
    from engine.generate import Engine

    source = golden("mistral", tmp_path)[0]
    config = dataclasses.replace(
        source.config, sliding_window=70, max_seq_len=300, sliding_layers=(1,)
    )
    source = dataclasses.replace(source, config=config)
    path = tmp_path / "model.safetensors"
    convert(source, path, "lossless", progress=False)
    ids = np.random.default_rng(0).integers(2, 97, 213).tolist()
    wanted = Reference.from_source(source, cache_dtype=np.float32).logits(ids)
    assert_close(Engine.open(path, exact=True).logits(ids), wanted, 1e-3)


@pytest.mark.parametrize("name", ["granite", "qwen2"])
def test_calibrated_conversion_stays_near_the_model(name: str, tmp_path: Path) -> None:
    """Scales of columns move through biases."""
    source, ids, logits = golden(name, tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("".join(map(chr, np.random.default_rng(0).integers(33, 125, 2000))))
    path = tmp_path / "model.safetensors"
    convert(source, path, 8, text=CalibrationText(1024, text), progress=False)
    found = Reference.from_weights(WeightsFile.open(path), cache_dtype=np.float32).logits(ids)
    # 8 bits: steps of some 1/40 of a weight's size, through ten products: 0.05 was seen.
    assert np.sqrt(np.mean((found - logits) ** 2)) < 0.1 * np.std(logits)


@pytest.mark.parametrize("name", ["granite", "mistral", "qwen2", "qwen3", "smollm3"])
def test_calibration_goes_back_through_every_family(name: str, tmp_path: Path) -> None:
    source = golden(name, tmp_path)[0]
    c, rng = source.config, np.random.default_rng(1)
    batch, n = 2, 11
    x = rng.standard_normal((n * batch, c.dim))
    weight = rng.standard_normal(x.shape)
    for index in range(c.n_layers):
        layer = Layer.read(source, index)
        d = backward(c, layer, recompute(c, layer, x, batch), weight)
        direction = rng.standard_normal(x.shape)

        def loss(t: float, layer: Layer = layer, direction: Any = direction) -> float:
            return float(np.sum(forward(c, layer, x + t * direction, batch) * weight))

        # Central differences: off by t^2 times a third derivative, and roundings of 1e-16 / t.
        slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
        assert np.sum(d.x * direction) == pytest.approx(slope, rel=1e-6)


LLAMA = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "vocab_size": 50,
}


def test_family_fills_in_its_own_defaults() -> None:
    def config(**more: Any) -> Any:
        return read_family({**LLAMA, **more}).config

    plain = config()
    assert (plain.n_kv_heads, plain.head_dim, plain.max_seq_len) == (6, 8, 2048)
    assert (plain.rope_theta, plain.norm_eps, plain.tie_embeddings) == (10000.0, 1e-6, False)
    mistral = config(model_type="mistral", num_key_value_heads=2)
    assert (mistral.sliding_window, mistral.sliding_layers) == (4096, (0, 1, 2))
    assert config(model_type="mistral", num_key_value_heads=2, sliding_window=None) == config(
        num_key_value_heads=2, max_position_embeddings=131072
    )
    qwen2 = config(model_type="qwen2", use_sliding_window=True, max_window_layers=2)
    assert qwen2.qkv_bias and qwen2.sliding_layers == (2,)
    assert config(model_type="qwen2").sliding_window is None
    assert config(model_type="qwen3").head_dim == 128
    smollm3 = config(model_type="smollm3", num_key_value_heads=2, no_rope_layer_interval=2)
    assert smollm3.unrotated_layers == (1,) and smollm3.tie_embeddings
    listed = config(model_type="smollm3", num_key_value_heads=2, no_rope_layers=[0, 1, 0])
    assert listed.unrotated_layers == (0, 2)


def test_llama3_divides_low_frequencies_alone() -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    hf = {**LLAMA, "head_dim": 128, "rope_theta": 500000.0, "rope_scaling": rope}
    divisors = read_family(hf).config.rope_divisors
    turns = 8192 * 500000.0 ** (-np.arange(64) / 64) / (2 * np.pi)
    assert set(np.array(divisors)[turns >= 4]) == {1.0}
    assert set(np.array(divisors)[turns <= 1]) == {8.0}
    assert sorted(divisors) == list(divisors) and len(set(divisors)) > 3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gpt2"}, "gpt2.*works: Llama.*Mistral.*Qwen3.*SmolLM3 and Granite"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic.*linear, llama3 or"),
        ({"rope_scaling": {"type": "longrope"}}, "longrope"),
        ({"rope_scaling": {"type": "linear"}}, "linear.*factor is None"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "factor is -2"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "original_max_position_embeddings"),
        ({"rope_scaling": "yarn"}, "rope_scaling"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "a part of the head"),
        ({"model_type": "smollm3", "num_key_value_heads": 6, "no_rope_layers": [1]}, "3 of 0 and"),
        ({"model_type": "granite", "residual_multiplier": 0}, "residual_multiplier is 0"),
        (
            {
                "model_type": "smollm3",
                "num_key_value_heads": 6,
                "no_rope_layer_interval": 2,
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 2,
                    "original_max_position_embeddings": 9,
                },
            },
            "'yarn' with layers that have no RoPE",
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["chunked"] * 3},
            "layer_types",
        ),
        ({"model_type": "mistral", "num_key_value_heads": 6, "sliding_window": 0}, "window is 0"),
        ({"attention_bias": True}, "attention_bias"),
    ],
)
def test_family_names_what_it_cannot_compute(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read_family({**json.loads(json.dumps(LLAMA)), **change})
