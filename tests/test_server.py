"""`answer serve` as the official client sees it, on a small random model."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from running_server import MODEL, TOKENS, Running, says
from running_server import running as running
from running_server import weights as weights

from engine import Engine, Sampling

pytestmark = pytest.mark.gpu


def streamed(running: Running, text: str, **options: Any) -> tuple[str, str]:
    """The text of a streamed answer, and why it ended."""
    chunks = list(running.chat(text, stream=True, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    content = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    (reason,) = [
        c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason
    ]
    return content, reason


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"seed": 7, "top_p": 0.9}], ids=["greedy", "seed"]
)
def test_a_stream_is_the_answer_in_pieces(running: Running, options: dict[str, Any]) -> None:
    whole = running.chat("Hello", max_tokens=24, **options)
    (choice,) = whole.choices
    assert (choice.finish_reason, whole.usage.completion_tokens) == ("length", 24)
    assert choice.message.role == "assistant" and choice.message.content
    assert streamed(running, "Hello", max_completion_tokens=24, **options) == (
        choice.message.content,
        "length",
    )
    assert whole.model == MODEL and whole.object == "chat.completion"


def test_answers_are_the_engines_own(running: Running, weights: Path) -> None:
    engine = Engine.open(weights)
    prompt = engine.tokenizer.chat_prompt([{"role": "user", "content": "Hi"}])
    ids = engine.tokenizer.encode(prompt)
    for sampling in (Sampling(), Sampling(temperature=0.8, top_k=20, min_p=0.05, seed=5)):
        want = list(engine.generate(ids, 20, sampling))
        for tell in (False, True):  # on the GPU, on the host
            got = running.chat(
                "Hi",
                max_tokens=20,
                temperature=sampling.temperature,
                seed=sampling.seed,
                logprobs=tell,
                extra_body={"top_k": sampling.top_k, "min_p": sampling.min_p},
            )
            stream = engine.tokenizer.stream()
            assert got.choices[0].message.content == "".join(map(stream.push, want))
            assert got.usage.prompt_tokens == len(ids)
            assert got.usage.completion_tokens == len(want)


def test_streams_side_by_side_are_what_they_are_alone(running: Running) -> None:
    asked = [
        (
            f"Question {i}" * (i + 1),
            {"seed": i, "temperature": 0.9 if i % 2 else 0, "max_tokens": 16 + i},
        )
        for i in range(8)
    ]
    alone = [streamed(running, text, **options) for text, options in asked]
    assert len({text for text, _ in alone}) > 4
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda one: streamed(running, one[0], **one[1]), asked))
    assert together == alone


def test_characters_are_never_torn(running: Running) -> None:
    text = "grüße, 世界 😀 ab"
    chunks = list(running.chat("x", stream=True, response_format=says(text)))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert json.loads("".join(pieces)) == text
    assert {"ü", "ß", "世", "界", "😀"} <= set(pieces)
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("stop", "left"),
    [
        ("to be", '"not '),  # many tokens long
        (["be, th", "e, t"], '"not to b'),  # whichever is complete first
        (["to bee", "be, tx"], '"not to be, that"'),  # only begun
        ('"', ""),
    ],
    ids=["one", "the first", "begun", "at once"],
)
def test_stop_strings_reach_over_tokens(running: Running, stop: Any, left: str) -> None:
    options = {"response_format": says("not to be, that"), "stop": stop, "max_tokens": 60}
    whole = running.chat("x", logprobs=True, **options)
    assert whole.choices[0].message.content == left
    assert whole.choices[0].finish_reason == "stop"
    assert b"".join(bytes(t.bytes) for t in whole.choices[0].logprobs.content) == left.encode()
    assert streamed(running, "x", **options) == (left, "stop")


def test_json_follows_its_schema(running: Running) -> None:
    properties = {
        "name": {"type": "string", "maxLength": 9},
        "ages": {"type": "array", "maxItems": 3},
    }
    properties["ages"]["items"] = {"type": "integer", "minimum": 0, "maximum": 99}
    schema = {
        "type": "object",
        "properties": properties,
        "required": ["name", "ages"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    for seed in range(2):
        got = running.chat("x", response_format=wanted, temperature=1, seed=seed, n=2)
        for choice in got.choices:
            assert choice.finish_reason == "stop"
            value = json.loads(choice.message.content)
            assert list(value) == ["name", "ages"] and len(value["name"]) <= 9
            assert all(0 <= age < 100 for age in value["ages"])
    some = running.chat("x", response_format={"type": "json_object"}, max_tokens=40)
    assert some.choices[0].message.content.startswith("{")


def test_probabilities(running: Running, weights: Path) -> None:
    got = running.chat("Hi", max_tokens=12, temperature=0, logprobs=True, top_logprobs=3)
    engine = Engine.open(weights)
    ids = engine.tokenizer.encode(engine.tokenizer.chat_prompt([{"role": "user", "content": "Hi"}]))
    answer = list(engine.generate(ids, 12))
    logits = engine.logits([*ids, *answer[:-1]])[len(ids) - 1 :].astype(float)
    entries = got.choices[0].logprobs.content
    assert len(entries) == len(answer)
    for row, token, entry in zip(logits, answer, entries, strict=True):
        # The engine may have added in another order: int8 activations round apart now and then.
        want = row[token] - np.log(np.exp(row).sum())
        assert entry.logprob == pytest.approx(want, abs=0.05)
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == entry.logprob  # greedy: it is the likeliest
        assert sorted(t.logprob for t in entry.top_logprobs)[::-1] == [
            t.logprob for t in entry.top_logprobs
        ]


def test_completions(running: Running) -> None:
    create = partial(running.client.completions.create, model=MODEL, temperature=0)
    one = create(prompt="Once upon")
    assert one.usage.completion_tokens == 16 and one.object == "text_completion"
    both = create(prompt=["Once upon", "a time"], n=2, max_tokens=16, logprobs=2)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in both.choices]
    assert texts[0] == texts[1] == one.choices[0].text and texts[2] == texts[3]
    for choice in both.choices:
        told = choice.logprobs
        assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs)
        assert told.text_offset == sorted(told.text_offset) and told.text_offset[0] == 0
        assert all(len(top) == 2 for top in told.top_logprobs)
    n_tokens = sum(len(choice.logprobs.tokens) for choice in both.choices)
    assert both.usage.completion_tokens == n_tokens
    chunks = list(create(prompt="Once upon", stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == one.choices[0].text
    assert chunks[-1].choices == [] and chunks[-1].usage == one.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_prompt_that_goes_on_is_not_read_again(running: Running) -> None:
    """A conversation's next turn finds the turns before it in the cache."""
    text = "Some long question. " * 6
    first = running.chat(text, temperature=0, max_tokens=8)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    again = running.chat(text, temperature=0, max_tokens=8)
    assert 64 <= again.usage.prompt_tokens_details.cached_tokens < again.usage.prompt_tokens
    assert again.choices[0].message.content == first.choices[0].message.content


def test_penalties_and_bias(running: Running) -> None:
    token = TOKENS.index("Q")
    options = {"max_tokens": 12, "temperature": 0}
    forced = running.chat("x", logit_bias={token: 100}, **options)
    assert forced.choices[0].message.content == "Q" * 12
    varied = running.chat("x", presence_penalty=2, frequency_penalty=2, **options)
    assert len(set(varied.choices[0].message.content)) > 6


def test_what_a_stream_says_beside_its_text(running: Running) -> None:
    """`n` choices in one stream, the usage last where it is asked for, and nowhere else."""
    options = {"n": 2, "max_completion_tokens": 5, "temperature": 0, "stop": ["\n", "ab"]}
    whole = running.chat("x", **options)
    for asked in (True, False):
        chunks = list(
            running.chat("x", stream=True, stream_options={"include_usage": asked}, **options)
        )
        texts = ["", ""]
        for choice in (choice for chunk in chunks for choice in chunk.choices):
            texts[choice.index] += choice.delta.content or ""
        assert texts == [choice.message.content for choice in whole.choices]
        assert len({chunk.id for chunk in chunks}) == 1
        told = [chunk for chunk in chunks if chunk.usage is not None]
        assert told == chunks[-1:] * asked
        if asked:
            assert chunks[-1].choices == []
            assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_models_health_and_page(running: Running) -> None:
    (model,) = running.client.models.list().data
    assert model.id == MODEL and running.client.models.retrieve(MODEL).id == MODEL
    assert running.http.get("/health").json() == {"status": "ok"}
    page = running.http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for path in ("/", "/health", "/v1/models"):  # what watches a server asks for heads
        head = running.http.head(path)
        assert head.status_code == 200 and not head.content
    asked = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    for method, path in (("OPTIONS", "/v1/chat/completions"), ("GET", "/v1/models")):
        got = running.http.request(method, path, headers=asked)
        assert not any(name.startswith("access-control") for name in got.headers)
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt' here, but 'tiny'"):
        running.client.models.retrieve("gpt")


def test_its_page_shows_how(running: Running, capfd: pytest.CaptureFixture[str]) -> None:
    """Its examples, with this model and this port."""
    page = (Path(__file__).parents[1] / "docs" / "server.md").read_text("utf-8")
    (python,) = re.findall(r"```python\n(from openai .*?)```", page, re.DOTALL)
    python = python.replace("http://127.0.0.1:8080", running.url).replace("smollm2", MODEL)
    exec(python.replace("response_format", "max_tokens=30, response_format"), {})
    assert capfd.readouterr().out.startswith("{")
    if shutil.which("curl"):
        (curl,) = re.findall(r"^curl localhost.*?'$", page, re.DOTALL | re.MULTILINE)
        curl = curl.replace("localhost:8080", running.url.removeprefix("http://"))
        got = json.loads(subprocess.check_output(curl.replace("curl", "curl -s", 1), shell=True))
        assert got["choices"][0]["message"]["role"] == "assistant"
