"""Tokens that are drawn on the host: the GPU's own draw, with what it does not know."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tokenizers
from tiny_model import CONFIG, TOKENS, tokenizer_json
from tokenizers import models

from engine.sampler import Sampling
from engine.server.choose import Chooser, Grammars
from model.reference import sampling_scores

GRAMMARS = Grammars(tokenizer_json(), CONFIG)


def logits(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, CONFIG.vocab_size).astype(np.float32)


def test_draws_are_the_samplers() -> None:
    sampling = Sampling(temperature=0.9, top_p=0.8, seed=3)
    chooser = Chooser(sampling, pos=7)
    assert not chooser.needed
    drawn = [chooser(logits(i)) for i in range(50)]
    assert drawn == [np.argmax(sampling_scores(logits(i), sampling, 7 + i)) for i in range(50)]


def test_penalties_grow_with_what_was_drawn() -> None:
    chooser = Chooser(Sampling(), 0, presence_penalty=0.5, frequency_penalty=1.0, bias={4: 10.0})
    assert chooser.needed
    scores = np.zeros(CONFIG.vocab_size, np.float32)
    scores[9] = 7.25
    # From 10 to 8.5, 7.5, 6.5, which is below the other token's 7.25 ...
    assert [chooser(scores) for _ in range(4)] == [4, 4, 4, 9]
    # ... and that is at 5.75 then.
    assert chooser(scores) == 4
    assert scores[9] == 7.25 and not scores[4]  # they are the caller's


def test_probabilities_are_the_models_own() -> None:
    scores = logits(0)
    chooser = Chooser(Sampling(temperature=0.3, seed=1), 0, n_top=5, bias={6: 100.0})
    assert chooser(scores) == 6
    (noted,) = chooser.noted
    probabilities = np.exp(scores.astype(float)) / np.exp(scores.astype(float)).sum()
    assert noted.token == 6 and noted.logprob == pytest.approx(np.log(probabilities[6]))
    best = np.argsort(-probabilities)[:5]
    assert [token for token, _ in noted.top] == list(best)
    assert [logprob for _, logprob in noted.top] == pytest.approx(list(np.log(probabilities[best])))


def test_a_schema_leaves_what_may_follow() -> None:
    chooser = Chooser(Sampling(), 0, matcher=GRAMMARS.matcher('{"enum": ["ab", "ax"]}'))
    scores = np.zeros(CONFIG.vocab_size, np.float32)
    scores[TOKENS.index("x")] = 9
    drawn = [TOKENS[chooser(scores)] for _ in range(4)]
    assert drawn == ['"', "a", "x", '"'] and chooser.complete and chooser.error is None


def test_spaces_between_parts_are_bounded() -> None:
    scores = np.zeros(CONFIG.vocab_size, np.float32)
    scores[TOKENS.index("Ġ")] = 9
    chooser = Chooser(Sampling(), 0, matcher=GRAMMARS.matcher('{"type": "array", "items": {}}'))
    text = "".join(TOKENS[chooser(scores)] for _ in range(9))
    assert text[0] == "[" and "ĠĠ" not in text.split('"')[0]


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ValueError, match="Invalid type: no"):
        GRAMMARS.matcher('{"type": "no"}')
    words = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>"))
    config = dataclasses.replace(CONFIG, eos_token_ids=())
    grammars = Grammars(words.to_str().encode(), config)
    for use in (lambda: grammars.bytes_of(0), lambda: grammars.matcher('{"type": "object"}')):
        with pytest.raises(ValueError, match="not with this model's tokenizer: "):
            use()
