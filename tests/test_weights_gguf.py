"""GGUF files of every kind: the same weights and tokenizer, and each wrong one a clear error."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
from gguf.quants import dequantize
from tiny_model import (
    CHAT_TEMPLATE,
    CONFIG,
    TOKENS,
    gguf_blocks,
    hf_config,
    random_tensors,
    write_gguf,
)

from engine.errors import ConfigError, EngineError, WeightsError
from engine.tokenizer import Tokenizer
from model.config import ModelConfig
from weights.sources import gguf as gguf_source
from weights.sources import open_source
from weights.sources.families import read_family

GOLDEN = Path(__file__).parent / "golden"

# Rows of whole 32-blocks, as Q8_0 needs them.
CONFIG_Q8 = dataclasses.replace(
    CONFIG, dim=64, hidden_dim=96, n_heads=8, n_kv_heads=2, head_dim=12, tie_embeddings=False
)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_gguf_gives_the_folders_weights_in_the_folders_row_order(tmp_path: Path, kind: str) -> None:
    tensors = random_tensors(CONFIG)
    source = open_source(
        write_gguf(tmp_path / "tiny.gguf", CONFIG, tensors, gguf.GGMLQuantizationType[kind])
    )
    assert (source.name, source.config, source.chat_template) == ("tiny", CONFIG, CHAT_TEMPLATE)
    assert source.tensors.keys() == tensors.keys()
    for name, values in tensors.items():
        wanted = (
            values.astype(np.float16).astype(np.float32)
            if kind == "F16" and values.ndim == 2
            else values
        )
        assert (source.tensors[name].read() == wanted).all(), name


def test_gguf_dequantizes_blocks(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG_Q8)
    source = open_source(
        write_gguf(tmp_path / "q8.gguf", CONFIG_Q8, tensors, gguf.GGMLQuantizationType.Q8_0)
    )
    assert source.config == CONFIG_Q8
    for name, values in tensors.items():
        # Q8_0: half a step of max/127 per block, the step rounded to float16 (2**-11 of 127 steps).
        bound = np.abs(values).max() / 127 * (0.5 + 127 * 2**-11)
        assert np.abs(source.tensors[name].read() - values).max() <= bound, name
        if values.ndim == 2:
            assert (source.tensors[name].read() != values).any()


@pytest.mark.parametrize(
    "kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
)
def test_gguf_of_every_kind_gives_what_its_blocks_stand_for(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_source, "_WEIGHTS_AT_ONCE", 9 * 256)  # the last part is shorter
    config = dataclasses.replace(
        CONFIG, dim=256, hidden_dim=512, n_layers=1, head_dim=64, qk_norm=True
    )
    tensors = random_tensors(config)
    type_ = gguf.GGMLQuantizationType[kind]
    source = open_source(write_gguf(tmp_path / "t.gguf", config, tensors, type_, "gpt-2", "qwen3"))
    for name, values in tensors.items():
        if values.ndim == 2:
            wanted = dequantize(gguf_blocks(values, type_), type_).reshape(values.shape)
            assert wanted.std() > 0.005
            assert (source.read(name) == wanted).all(), name


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "smollm3", "granite"])
def test_gguf_of_every_family_is_the_folder_of_it(tmp_path: Path, architecture: str) -> None:
    config = dataclasses.replace(
        CONFIG,
        n_layers=4,
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        unrotated_layers=(3,) if architecture == "smollm3" else (),
        attention_scale=0.25 if architecture == "granite" else None,
        rope_divisors=(1.0, 1.0, 1.5, 8.0, 8.0) if architecture == "llama" else (),
    )
    factors = {"embedding_scale": 2.0, "residual_scale": 0.5, "logit_scale": 4.0}
    factors |= {"attention.scale": 0.25}
    tensors = random_tensors(config)

    def edit(writer: gguf.GGUFWriter) -> None:
        if architecture == "granite":
            for key, value in factors.items():
                writer.add_float32(f"granite.{key}", value)
        if architecture == "llama":
            divisors = np.array(config.rope_divisors, np.float32)
            writer.add_tensor("rope_freqs.weight", divisors)

    path = tmp_path / "t.gguf"
    source = open_source(_gguf_with(path, edit, config, tensors, architecture=architecture))
    read = {name: source.read(name) for name in tensors}
    multiplied: tuple[str, ...] = ()
    if architecture == "granite":
        config = dataclasses.replace(config, norm_eps=CONFIG.norm_eps / 4)
        multiplied = ("o_proj.weight", "down_proj.weight", "model.norm.weight")  # each by 1 / 4
    assert source.config == config
    for name, values in tensors.items():
        wanted = values.astype(np.float16).astype(np.float32) if values.ndim == 2 else values
        assert (read[name] == wanted / (4 if name.endswith(multiplied) else 1)).all(), name


@pytest.mark.parametrize("scaling", ["linear", "yarn"])
def test_gguf_scales_rope_as_a_folder_does(tmp_path: Path, scaling: str) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_string("llama.rope.scaling.type", scaling)
        writer.add_float32("llama.rope.scaling.factor", 4.0)
        writer.add_uint32("llama.rope.scaling.original_context_length", 16)

    tensors = random_tensors(CONFIG)
    source = open_source(_gguf_with(tmp_path / "t.gguf", edit, CONFIG, tensors))
    rope = {"rope_type": scaling, "factor": 4.0, "original_max_position_embeddings": 16}
    assert source.config == read_family({**hf_config(CONFIG), "rope_scaling": rope}).config
    assert len(source.config.rope_divisors) == CONFIG.head_dim // 2


def test_gguf_rebuilds_the_tokenizer(tmp_path: Path) -> None:
    source = open_source(write_gguf(tmp_path / "t.gguf", CONFIG, random_tensors(CONFIG)))
    tokenizer = Tokenizer(source.tokenizer_json, source.chat_template, source.config)
    ids = tokenizer.encode("ab 12<eos>")
    assert [TOKENS[i] for i in ids] == ["ab", "Ġ", "1", "2", "<eos>"]
    assert tokenizer.chat_prompt([{"role": "user", "content": "x"}]) == "<|user|>x<eos>>"


def test_gguf_llama3_texts_start_with_bos_and_numbers_are_split_in_threes(tmp_path: Path) -> None:
    source = open_source(
        write_gguf(tmp_path / "t.gguf", CONFIG, random_tensors(CONFIG), pre="llama-bpe")
    )
    tokenizer = Tokenizer(source.tokenizer_json, None, source.config)
    assert tokenizer.encode("ab") == [0, 96]
    described = json.loads(source.tokenizer_json)
    assert r"\p{N}{1,3}" in described["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]


TEXT = "It's  7 o'clock: 12345 times,\n\n she SAID-it über$x^2  \t日本 12,5\r\n."


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", "It|'s| | 7| o|'|clock|:| 12345| times|,|\n\n| she| SAID|-|it| über|$|x|^|2|"),
        ("smollm", "It|'s|  |7| o|'|clock|:| |1|2|3|4|5| times|,|\n\n| she| SAID|-|it| über|$|x"),
        ("default", "It|'|s| | |7| o|'|clock|:| |123|45| times|,|\n\n| she| SAID|-|it| über|$|x|^"),
        ("llama-bpe", "It|'s| | |7| o|'clock|:| |123|45| times|,\n\n| she| SAID|-it| über|$x|^|2"),
        ("qwen2", "It|'s| | |7| o|'clock|:| |1|2|3|4|5| times|,\n\n| she| SAID|-it| über|$x|^|2|"),
        ("tekken", "It|'s| | |7| o|'clock|:| |1|2|3|4|5| times|,\n\n| she| SAID|-it| über|$x|^|2|"),
    ],
)
def test_gguf_cuts_words_as_its_pre_tokenizer_says(tmp_path: Path, pre: str, words: str) -> None:
    source = open_source(write_gguf(tmp_path / "t.gguf", CONFIG, random_tensors(CONFIG), pre=pre))
    tokenizer = tokenizers.Tokenizer.from_str(source.tokenizer_json.decode())
    spans = [span for _, span in tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)]
    assert "|".join(TEXT[a:b] for a, b in spans).startswith(words)


def _sentencepiece(writer: gguf.GGUFWriter) -> None:
    """Llama 2's kind of tokenizer in place of the usual one: bytes, letters and a few words."""
    keys = writer.kv_data[0]
    for key in [key for key in keys if key.startswith("tokenizer.ggml.")]:
        del keys[key]
    pieces = {"<unk>": 2, "<s>": 3, "</s>": 3} | {f"<0x{i:02X}>": 6 for i in range(256)}
    pieces |= dict.fromkeys(["\u2581", *"abcdeé", "ab", "\u2581ab", "abc", "cd", "\u2581\u2581"], 1)
    scores = [-float(i) for i in range(len(pieces))]
    scores[list(pieces).index("cd")] = -1.0  # before all others
    writer.add_tokenizer_model("llama")
    writer.add_token_list(list(pieces))
    writer.add_token_types(list(pieces.values()))
    writer.add_token_scores(scores)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


@pytest.mark.parametrize("prefix", [True, False])
def test_gguf_rebuilds_a_sentencepiece_tokenizer(tmp_path: Path, prefix: bool) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        _sentencepiece(writer)
        if not prefix:
            writer.add_add_space_prefix(False)

    config = dataclasses.replace(CONFIG, vocab_size=300)
    source = open_source(_gguf_with(tmp_path / "t.gguf", edit, config))
    tokenizer = Tokenizer(source.tokenizer_json, None, source.config)
    pieces = json.loads(source.tokenizer_json)["model"]["vocab"]
    spelled = {i: piece for piece, i in pieces.items()}

    def cut(text: str) -> list[str]:
        return [spelled[i] for i in tokenizer.encode(text)]

    # The best score goes first: c joins d, not ab. What is no piece is its bytes in UTF-8.
    head = ["<s>", "\u2581ab"] if prefix else ["<s>", "ab"]
    assert cut("abcd  ü") == [*head, "cd", "\u2581\u2581", "<0xC3>", "<0xBC>"]
    for text in ("abcd  ü", " ab", "日本 abé", "a\nb", "é<s>ab"):
        assert tokenizer.decode(tokenizer.encode(text)[1:]).replace("<s> ", "<s>") == text
        stream = tokenizer.stream()
        assert "".join(map(stream.push, tokenizer.encode(text)[1:])).replace("<s> ", "<s>") == text


def test_gguf_sentencepiece_cuts_texts_as_sentencepiece_does(tmp_path: Path) -> None:
    golden = json.loads((GOLDEN / "sentencepiece.json").read_text("utf-8"))

    def edit(writer: gguf.GGUFWriter) -> None:
        _sentencepiece(writer)
        keys = writer.kv_data[0]
        for key, name in (("tokens", "pieces"), ("scores", "scores"), ("token_type", "kinds")):
            keys[f"tokenizer.ggml.{key}"].value = golden[name]

    config = dataclasses.replace(CONFIG, vocab_size=len(golden["pieces"]))
    source = open_source(_gguf_with(tmp_path / "t.gguf", edit, config))
    tokenizer = Tokenizer(source.tokenizer_json, None, source.config)
    for text, ids in golden["texts"]:
        assert tokenizer.encode(text) == [1, *ids], text
        assert tokenizer.decode(ids) == text


def _gguf_with(
    path: Path,
    edit: Callable[[gguf.GGUFWriter], object],
    config: ModelConfig = CONFIG,
    tensors: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """A GGUF file whose writer was changed just before its keys are written."""
    write = gguf.GGUFWriter.write_header_to_file

    def edited(writer: gguf.GGUFWriter, *args: Any) -> None:
        edit(writer)
        write(writer, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", edited)
        return write_gguf(path, config, tensors or random_tensors(config), **options)


def _set_key(key: str, value: Any) -> Callable[[gguf.GGUFWriter], None]:
    def edit(writer: gguf.GGUFWriter) -> None:
        if value is None:
            del writer.kv_data[0][key]
        elif key in writer.kv_data[0]:
            writer.kv_data[0][key].value = value
        else:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))

    return edit


@pytest.mark.parametrize(
    ("key", "value", "error", "named"),
    [
        ("general.architecture", "gemma", ConfigError, "gemma"),
        ("llama.rope.scaling.type", "yarn", ConfigError, "yarn"),
        ("llama.rope.dimension_count", 8, ConfigError, "8 of 10"),
        ("llama.embedding_length", None, WeightsError, "embedding_length is missing"),
        ("llama.block_count", 3, WeightsError, r"layers\.2"),
        ("tokenizer.ggml.model", "t5", WeightsError, "tokenizer of kind 't5'"),
        ("tokenizer.ggml.model", "llama", WeightsError, "scores are missing"),
        ("tokenizer.ggml.pre", "new-pre", WeightsError, "new-pre"),
        ("tokenizer.ggml.tokens", ["a", "a", *TOKENS[2:]], WeightsError, "twice"),
        ("tokenizer.ggml.tokens", TOKENS[:-2], WeightsError, "do not match"),
        ("tokenizer.ggml.merges", ["a zz"], WeightsError, "merges"),
        ("tokenizer.ggml.merges", ["ab"], WeightsError, "merges"),
    ],
)
def test_gguf_wrong_in_one_key_says_so(
    tmp_path: Path, key: str, value: Any, error: type[EngineError], named: str
) -> None:
    path = _gguf_with(tmp_path / "t.gguf", _set_key(key, value))
    with pytest.raises(error, match=named):
        open_source(path)


def test_gguf_refuses_tensors_of_other_architectures(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG) | {"cls.weight": np.ones(5, np.float32)}
    with pytest.raises(ConfigError, match=r"cls\.weight"):
        open_source(write_gguf(tmp_path / "t.gguf", CONFIG, tensors))


def test_gguf_damaged_anywhere_in_its_length_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "t.gguf", CONFIG, random_tensors(CONFIG))
    data = path.read_bytes()
    for length in [0, 3, 4, 20, 100, len(data) // 3, len(data) // 2, len(data) - 100]:
        path.write_bytes(data[:length])
        with pytest.raises(WeightsError, match="GGUF"):
            open_source(path)


def test_gguf_with_damaged_text_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "t.gguf", CONFIG, random_tensors(CONFIG))
    path.write_bytes(path.read_bytes().replace(b"<|user|>", b"<|\xffser|>"))
    with pytest.raises(WeightsError, match=r"tokenizer\.\S+ is damaged"):
        open_source(path)
