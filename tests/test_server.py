"""`answer serve`: what the official client gets from a small random model, and what limits hold."""

from __future__ import annotations

import dataclasses
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import tokenizers
from tiny_model import CONFIG, SPECIAL, random_source
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from engine import Engine, Sampling
from engine.server.run import Server, listen
from weights.convert import CalibrationText, convert

pytestmark = pytest.mark.gpu

# A token for every byte: any text, and characters of several tokens.
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
MODEL = "tiny"
CONTEXT = 300


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(TOKENS)}, merges=[("a", "b")])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    config = dataclasses.replace(CONFIG, vocab_size=len(TOKENS), max_seq_len=CONTEXT)
    source = dataclasses.replace(random_source(config), tokenizer_json=tokenizer.to_str().encode())
    path = tmp_path_factory.mktemp("server") / "tiny.safetensors"
    convert(source, path, bits=6, text=CalibrationText(0), progress=False)
    return path


class Running:
    """A server in a thread, and the clients that talk to it."""

    def __init__(self, weights: Path, *, key: str | None = None, **options: Any) -> None:
        self.engines: list[Engine] = []

        def open_engine() -> Engine:
            self.engines.append(Engine.open(weights))
            return self.engines[-1]

        listener = listen("127.0.0.1", 0, key)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.address = listener.getsockname()
        self.server = Server(listener, open_engine, MODEL, api_key=key, **options)
        self.errors: list[BaseException] = []
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()
        self.client = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key or "none", max_retries=0, timeout=60
        )
        self.http = httpx.Client(base_url=self.url, timeout=60)
        while self.thread.is_alive() and not self.server.started:
            time.sleep(0.01)

    def _serve(self) -> None:
        try:
            self.server.serve_until_stopped()
        except BaseException as error:
            self.errors.append(error)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        self.http.close()
        self.client.close()
        assert not self.thread.is_alive()

    def metric(self, name: str) -> float:
        headers = {"authorization": f"Bearer {self.client.api_key}"}
        lines = self.http.get("/metrics", headers=headers).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    def wait_idle(self) -> None:
        """Until no answer runs or waits."""
        end = time.monotonic() + 20
        while self.metric("answer_sequences"):
            assert time.monotonic() < end
            time.sleep(0.02)


@pytest.fixture(scope="module")
def running(weights: Path) -> Iterator[Running]:
    running = Running(weights, max_sequences=8, max_waiting=24)
    yield running
    running.stop()
    assert not running.errors


def chat(running: Running, text: str, **options: Any) -> Any:
    messages = [{"role": "user", "content": text}]
    return running.client.chat.completions.create(model=MODEL, messages=messages, **options)


def streamed(running: Running, text: str, **options: Any) -> tuple[str, str]:
    """The text of a streamed answer, and why it ended."""
    chunks = list(chat(running, text, stream=True, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    content = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    (reason,) = [
        c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason
    ]
    return content, reason


def says(text: str) -> dict[str, Any]:
    """A format that leaves the model but one answer, of JSON: that text in quotes."""
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": text}}}


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"seed": 7, "top_p": 0.9}], ids=["greedy", "seed"]
)
def test_a_stream_is_the_answer_in_pieces(running: Running, options: dict[str, Any]) -> None:
    whole = chat(running, "Hello", max_tokens=24, **options)
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
            got = chat(
                running,
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
    chunks = list(chat(running, "x", stream=True, response_format=says(text)))
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
    whole = chat(running, "x", logprobs=True, **options)
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
        got = chat(running, "x", response_format=wanted, temperature=1, seed=seed, n=2)
        for choice in got.choices:
            assert choice.finish_reason == "stop"
            value = json.loads(choice.message.content)
            assert list(value) == ["name", "ages"] and len(value["name"]) <= 9
            assert all(0 <= age < 100 for age in value["ages"])
    some = chat(running, "x", response_format={"type": "json_object"}, max_tokens=40)
    assert some.choices[0].message.content.startswith("{")


def test_probabilities(running: Running, weights: Path) -> None:
    got = chat(running, "Hi", max_tokens=12, temperature=0, logprobs=True, top_logprobs=3)
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


def test_penalties_and_bias(running: Running) -> None:
    token = TOKENS.index("Q")
    options = {"max_tokens": 12, "temperature": 0}
    forced = chat(running, "x", logit_bias={token: 100}, **options)
    assert forced.choices[0].message.content == "Q" * 12
    varied = chat(running, "x", presence_penalty=2, frequency_penalty=2, **options)
    assert len(set(varied.choices[0].message.content)) > 6


def test_models_health_and_page(running: Running) -> None:
    (model,) = running.client.models.list().data
    assert model.id == MODEL and running.client.models.retrieve(MODEL).id == MODEL
    assert running.http.get("/health").json() == {"status": "ok"}
    page = running.http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt' here, but 'tiny'"):
        running.client.models.retrieve("gpt")


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"messages": None}, 400, "messages: "),
        ({"messages": []}, 400, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "poet", "content": "x"}]}, 400, "messages.0.role: "),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "messages.0.content.0.type: ",
        ),
        (
            {"messages": [{"role": "user", "content": "x" * 400}]},
            400,
            "fit into the context of 300",
        ),
        ({"temperature": 3}, 400, "temperature: Input should be less than or equal to 2"),
        ({"temperature": "hot"}, 400, "temperature: Input should be a valid number"),
        ({"max_tokens": 0}, 400, "max_tokens: "),
        ({"n": 33}, 400, "33 answers at once are too many: there is room for 32"),
        ({"stop": [""]}, 400, "stop: at most 16 texts"),
        ({"top_logprobs": 3}, 400, "top_logprobs needs logprobs"),
        ({"logit_bias": {"a": 1}}, 400, "logit_bias has token ids"),
        ({"logit_bias": {"999": 1}}, 400, "outside the vocabulary of 260"),
        ({"tools": [{"type": "function"}]}, 400, "tools is not supported"),
        ({"response_format": {"type": "json_schema"}}, 400, "json_schema goes with type"),
        ({"response_format": says("x")["json_schema"]}, 400, "response_format.type: "),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}},
            400,
            "response_format: Invalid type: no",
        ),
        ({"model": "gpt-4"}, 404, "there is no model 'gpt-4' here"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_named(
    running: Running, changes: dict[str, Any], status: int, message: str
) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], **changes}
    got = running.http.post("/v1/chat/completions", json=body)
    assert got.status_code == status
    error = got.json()["error"]
    assert message in error["message"] and "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"


def test_malformed_requests_are_refused(running: Running) -> None:
    post = partial(running.http.post, "/v1/chat/completions")
    json_type = {"content-type": "application/json"}
    for content in (b"", b"{", b"[" * 100_000, b"null", b"[]", b'{"messages": "\xff"}', b"{}" * 9):
        got = post(content=content, headers=json_type)
        assert got.status_code == 400 and got.json()["error"]["message"], content[:20]
    assert post(content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    assert post(content=b" " * (4 << 20) + b"{}", headers=json_type).status_code == 413
    wrong = [("GET", "/v1/completions", 405), ("POST", "/health", 405), ("GET", "/v1/files", 404)]
    for method, path, status in wrong:
        got = running.http.request(method, path)
        assert got.status_code == status and path in got.json()["error"]["message"]
    # A page of another site that has given its name this machine's address.
    assert running.http.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
    for raw in (
        b"\x16\x03\x01\x02\x00\x01",
        b"GET\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
    ):
        with socket.create_connection(running.address, timeout=10) as client:
            client.sendall(raw)
            assert client.recv(1000).startswith(b"HTTP/1.1 400 ")
    assert running.http.get("/health").status_code == 200


def test_a_client_that_leaves_frees_its_place(running: Running) -> None:
    for asked_to_stream in (True, False):
        before = running.metric("answer_generated_tokens_total")
        body = {"messages": [{"role": "user", "content": "x"}], "stream": asked_to_stream, "n": 8}
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        head += "Content-Type: application/json\r\n"
        text = json.dumps(body)
        with socket.create_connection(running.address, timeout=10) as client:
            client.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n{text}".encode())
            while running.metric("answer_generated_tokens_total") < before + 8:
                time.sleep(0.01)
        running.wait_idle()
        # 8 answers of 280 tokens were not run to their end.
        assert running.metric("answer_generated_tokens_total") - before < 8 * 200


def test_200_connections_at_once(running: Running) -> None:
    """As many as there is room for are answered, and the others told to come again."""
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
    limits = httpx.Limits(max_connections=200)
    with httpx.Client(base_url=running.url, timeout=60, limits=limits) as http:
        with ThreadPoolExecutor(200) as pool:
            post = partial(http.post, "/v1/chat/completions", json=body)
            replies = list(pool.map(lambda _: post(), range(200)))
    texts = {r.json()["choices"][0]["message"]["content"] for r in replies if r.status_code == 200}
    refused = [reply for reply in replies if reply.status_code == 429]
    answered = len(replies) - len(refused)
    assert 32 <= answered < 200 and texts
    for reply in refused:
        assert reply.headers["retry-after"] == "1"
        assert reply.json()["error"]["code"] == "rate_limit_exceeded"
    assert all(reply.status_code in (200, 429) for reply in replies)
    running.wait_idle()


def test_a_lost_device_is_told_of_and_opened_again(running: Running) -> None:
    want = chat(running, "Hi", max_tokens=8, temperature=0).choices[0].message.content
    stream = chat(running, "Hi", temperature=0, stream=True)
    for _ in range(3):
        next(stream)
    running.engines[-1].device.wgpu.destroy()
    with pytest.raises(openai.APIError, match="the device failed"):
        list(stream)
    end = time.monotonic() + 20
    while running.http.get("/health").status_code == 503 and time.monotonic() < end:
        time.sleep(0.02)
    assert chat(running, "Hi", max_tokens=8, temperature=0).choices[0].message.content == want
    assert running.metric("answer_engine_restarts_total") == 1
    running.wait_idle()


def test_a_key_and_the_end(weights: Path) -> None:
    """Whoever has the key is served; at the end, what runs may end or is told."""
    running = Running(weights, key="se cret", max_sequences=1, max_waiting=1, grace_seconds=0)
    for path, status in (("/v1/models", 401), ("/metrics", 401), ("/health", 200), ("/", 200)):
        for key in ("", "Bearer wrong", "se cret" if status == 401 else "x"):
            got = running.http.get(path, headers={"authorization": key} if key else {})
            assert got.status_code == (200 if key == "se cret" else status)
    wrong = openai.OpenAI(base_url=f"{running.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="API key"):
        wrong.models.list()
    stream = chat(running, "Hi", stream=True)
    next(stream)
    threading.Timer(0.05, running.stop).start()
    with pytest.raises(openai.APIError, match="shutting down"):
        list(stream)
    running.thread.join(30)
    assert not running.errors and not running.thread.is_alive()
    with pytest.raises(ConnectionError):
        socket.create_connection(running.address, timeout=1)
