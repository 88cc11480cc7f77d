"""Tokenizer: ids, streamed text and chat prompts."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
from conftest import Golden
from tiny_model import CHAT_TEMPLATE, CONFIG, tokenizer_json

from engine.errors import EngineError, WeightsError
from engine.tokenizer import Tokenizer
from weights.sources import Source


@pytest.fixture
def tiny() -> Tokenizer:
    return Tokenizer(tokenizer_json(), CHAT_TEMPLATE, CONFIG)


@pytest.fixture(scope="module")
def smollm2(default_model: Source) -> Tokenizer:
    return Tokenizer(
        default_model.tokenizer_json, default_model.chat_template, default_model.config
    )


def test_tokenizer_merges_and_parses_special_tokens(tiny: Tokenizer) -> None:
    # 0 <bos>, 1 <eos>, 3 space, then the printable characters from "!" on, 96 the merge of a and b.
    assert tiny.encode("ab!<eos> a") == [96, 4, 1, 3, 4 + ord("a") - ord("!")]
    assert tiny.decode([96, 4, 1, 3]) == "ab!<eos> "
    assert tiny.encode("") == []
    assert tiny.eos_ids == (1,)


def test_tokenizer_adds_bos_only_where_the_text_has_none() -> None:
    described = json.loads(tokenizer_json())
    described["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<bos>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [0], "tokens": ["<bos>"]}},
    }
    tokenizer = Tokenizer(json.dumps(described).encode(), None, CONFIG)
    assert tokenizer.encode("!") == [0, 4]
    assert tokenizer.encode("<bos>!") == [0, 4]


def test_tokenizer_ignores_settings_for_training_batches() -> None:
    described = json.loads(tokenizer_json())
    described["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    tokenizer = Tokenizer(json.dumps(described).encode(), None, CONFIG)
    assert tokenizer.encode("!!!!") == [4, 4, 4, 4]


def test_tokenizer_chat_prompt_applies_the_template(tiny: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    assert tiny.chat_prompt(messages) == "<|user|>hi<eos><|user|>yo<eos>>"
    assert tiny.chat_prompt(messages[:1], add_generation_prompt=False) == "<|user|>hi<eos>"


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{% for %}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[7]['content'] + '' }}",
        "{{ messages.append(1) }}",  # the sandbox forbids changing what it was given
        "{{ 1 / 0 }}",
    ],
)
def test_tokenizer_chat_prompt_says_why_it_cannot(template: str | None) -> None:
    tokenizer = Tokenizer(tokenizer_json(), template, CONFIG)
    with pytest.raises(EngineError, match="template"):
        tokenizer.chat_prompt([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "0.2 s"),
        ("{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", "more than 16777216 char"),
        ("{{ ('x' * 9999) * 9999 }}", "repeats something 9999 times"),
        ("{{ 9 * [0] * 10000000 }}", "repeats something 10000000 times"),
        ("{{ 10 ** 10 ** 10 }}", "a power"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ raise_exception('roles\n\nmust') }}", "messages: roles must$"),
    ],
)
def test_tokenizer_stops_a_template_that_goes_too_far(
    template: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if said.endswith(" s"):
        monkeypatch.setattr("engine.template._SECONDS", 0.2)
    tokenizer = Tokenizer(tokenizer_json(), template, CONFIG)
    trace = sys.gettrace()
    with pytest.raises(EngineError, match=said):
        tokenizer.chat_prompt([{"role": "user", "content": "hi"}])
    assert sys.gettrace() is trace


@pytest.mark.parametrize(
    "damaged", [b"", b"{}", b"\xff\xfe", b'{"model": 1}', tokenizer_json()[:-1]]
)
def test_tokenizer_refuses_a_damaged_file(damaged: bytes) -> None:
    with pytest.raises(WeightsError, match=r"tokenizer\.json"):
        Tokenizer(damaged, None, CONFIG)


def test_tokenizer_refuses_ids_beyond_the_models_vocabulary() -> None:
    with pytest.raises(WeightsError, match="96"):
        Tokenizer(tokenizer_json(), None, dataclasses.replace(CONFIG, vocab_size=96))


@pytest.mark.real_weights
def test_tokenizer_gives_the_golden_ids(smollm2: Tokenizer, goldens: list[Golden]) -> None:
    for golden in goldens:
        assert smollm2.encode(golden.prompt_text) == golden.prompt_ids
        assert smollm2.decode(golden.prompt_ids) == golden.prompt_text
        assert smollm2.decode(golden.gen_ids) == golden.gen_text
        if golden.messages is not None:
            assert smollm2.chat_prompt(golden.messages) == golden.prompt_text


@pytest.mark.real_weights
def test_tokenizer_splits_digits_before_words(smollm2: Tokenizer) -> None:
    # The digit after two spaces stands alone: a word "  7" would have swallowed its second space.
    assert [smollm2.decode([i]) for i in smollm2.encode("x  78")] == ["x", "  ", "7", "8"]


@pytest.mark.real_weights
def test_tokenizer_stream_holds_back_incomplete_characters(smollm2: Tokenizer) -> None:
    text = "schöne 🙂🚀 日本語 Ελληνικά<|im_end|>"
    ids = smollm2.encode(text)
    assert len(ids) > len(smollm2.decode(ids).split())
    stream = smollm2.stream()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) == text
    assert "" in pieces  # some token ended inside a character
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.real_weights
def test_tokenizer_stream_survives_bytes_that_are_no_text(smollm2: Tokenizer) -> None:
    ids = [
        i for i in range(17, 400, 3) for _ in range(2)
    ]  # single bytes, most of them continuing nothing
    stream = smollm2.stream()
    assert smollm2.decode(ids).startswith("".join(stream.push(i) for i in ids))
