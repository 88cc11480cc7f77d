"""`answer serve` and those who mean it no good, or leave, or are too many; and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import browser
import httpx
import openai
import pytest
from running_server import Running, says
from running_server import running as running
from running_server import weights as weights
from wgpu.backends.wgpu_native._api import libf

from engine import Batch, Engine
from engine.errors import DeviceError, EngineError
from engine.server import app, command

pytestmark = pytest.mark.gpu


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
    assert set(error) == {"message", "type", "param", "code"}


def test_malformed_requests_are_refused(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    post = partial(running.http.post, "/v1/chat/completions")
    json_type = {"content-type": "application/json"}
    for content in (b"", b"{", b"[" * 100_000, b"null", b"[]", b'{"messages": "\xff"}', b"{}" * 9):
        got = post(content=content, headers=json_type)
        assert got.status_code == 400 and got.json()["error"]["message"], content[:20]
    for prompt in ([], [[]], "", [1, "a"], [[1], "a"], [-1], [1 << 70], None, 1, {}):
        got = running.http.post("/v1/completions", json={"prompt": prompt})
        assert got.status_code == 400 and re.search("prompt|token id", got.text), prompt
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
    monkeypatch.setattr(app, "_BODY_SECONDS", 0.1)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: [::1]:80\r\nContent-Type: application/json\r\n"
    with socket.create_connection(running.address, timeout=10) as client:
        client.sendall(head + b"Content-Length: 9\r\n\r\n{")
        assert client.recv(1000).startswith(b"HTTP/1.1 408 ")
    assert running.http.get("/health").status_code == 200


def test_a_client_that_leaves_frees_its_place(
    running: Running, capfd: pytest.CaptureFixture[str]
) -> None:
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
        assert capfd.readouterr().err == ""  # it is nothing to be told of
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


def lose_device(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    """Before the next step, as a driver would: what is mapped just then wgpu would not survive."""
    step = Batch.step

    def lost(batch: Batch) -> Any:
        libf.wgpuDeviceDestroy(engine.device.wgpu._internal)
        monkeypatch.setattr(Batch, "step", step)
        return step(batch)

    monkeypatch.setattr(Batch, "step", lost)


def test_a_lost_device_is_told_of_and_opened_again(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = running.chat("Hi", max_tokens=8, temperature=0).choices[0].message.content
    stream = running.chat("Hi", temperature=0, stream=True)
    for _ in range(3):
        next(stream)
    lose_device(monkeypatch, running.engines[-1])
    with pytest.raises(openai.APIError, match="the device failed"):
        list(stream)
    end = time.monotonic() + 20
    while running.http.get("/health").status_code == 503 and time.monotonic() < end:
        time.sleep(0.02)
    assert running.chat("Hi", max_tokens=8, temperature=0).choices[0].message.content == want
    assert running.metric("answer_engine_restarts_total") == 1
    running.wait_idle()


def test_a_device_that_is_gone_for_good_ends_the_server(weights: Path) -> None:
    def gone() -> Engine:
        raise DeviceError("there is no such adapter")

    running = Running(weights)
    running.server.worker._open_engine = gone
    libf.wgpuDeviceDestroy(running.engines[-1].device.wgpu._internal)
    with pytest.raises(openai.APIError, match="the device failed"):
        running.chat("Hi")
    running.thread.join(20)
    (error,) = running.errors
    assert isinstance(error, EngineError) and str(error) == "there is no such adapter"
    running.stop()


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
    stream = running.chat("Hi", stream=True)
    next(stream)
    running.server.should_exit = True
    with pytest.raises(openai.APIError, match="shutting down"):
        list(stream)
    running.stop()
    assert not running.errors
    with pytest.raises(ConnectionError):
        socket.create_connection(running.address, timeout=1)


def test_the_process_ends_at_a_signal(weights: Path) -> None:
    command = [sys.executable, "-m", "engine", "serve", str(weights), "--port", "0"]
    environment = {key: value for key, value in os.environ.items() if key != "ANSWER_API_KEY"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    about, where = process.stderr.readline(), process.stderr.readline()
    assert about.startswith("tiny: 0.0 M parameters, context 300 tokens, on ")
    url = where.split()[1]
    assert httpx.get(f"{url}/models").json()["data"][0]["id"] == "tiny"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert process.stderr.read() == ""


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert command.main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    line: str = err
    return line


def test_the_command_says_what_is_wrong(
    weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ANSWER_API_KEY", raising=False)
    assert "others could reach the server" in error_of(["--host", "0.0.0.0"], capsys)
    assert "one that can be printed" in error_of(["--api-key", ""], capsys)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"cannot listen at 127.0.0.1:{port}" in error_of(["--port", port], capsys)
    torn = weights.with_name("torn.safetensors")
    torn.write_bytes(weights.read_bytes()[:1000])
    assert str(torn) in error_of([str(torn), "--port", "0"], capsys)
    assert "context is 999" in error_of([str(weights), "--port", "0", "--context", "999"], capsys)
    monkeypatch.delitem(sys.modules, "engine.server.run", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)  # as if it were not installed
    assert "serving needs uvicorn: pip install 'answer-llm[server]'" in error_of([], capsys)
    with pytest.raises(SystemExit):
        command.main(["--port", "70000"])


@pytest.mark.browser
def test_the_page_chats(running: Running, tmp_path: Path) -> None:
    with browser.Page(tmp_path) as page:
        page.open(running.url)
        page.wait("document.title === 'tiny'")
        page.wait("document.getElementById('memory').textContent.endsWith(' MB')")
        for name, value in (("temperature", 0), ("max_tokens", 20), ("text", "<b>Hi</b>")):
            page.run(f"document.getElementById('{name}').value = {json.dumps(value)}")
        page.run("document.getElementById('form').requestSubmit()")
        page.wait("document.querySelector('.note')")
        shown = page.run("[...document.querySelectorAll('article')].map(a => a.textContent)")
        answer = running.chat("<b>Hi</b>", temperature=0, max_tokens=20).choices[0].message.content
        assert shown[:2] == ["<b>Hi</b>", answer]
        assert "answer 20 tokens at " in shown[2] and shown[2].endswith("cut at its longest")
        page.wait("speeds.some(speed => speed > 0)")  # the curve has seen it
        # A longer answer is stopped by the button, and the server hears of it.
        page.run("document.getElementById('max_tokens').value = ''; send('Hi'); 0")
        page.wait("document.querySelectorAll('.assistant')[1].textContent")
        page.run("document.getElementById('send').click()")
        page.wait("[...document.querySelectorAll('.note')].at(-1).textContent === 'stopped'")
        running.wait_idle()
