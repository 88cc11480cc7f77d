"""A server in a thread, on a small random model with a token for every byte; and its clients."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import httpx
import openai
import pytest
import tokenizers
from tiny_model import CONFIG, SPECIAL, random_source
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from engine import Engine
from engine.server.run import Server, listen
from weights.convert import CalibrationText, convert

# Any text, and characters of several tokens.
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
MODEL = "tiny"
CONTEXT = 300


def write_model(path: Path) -> Path:
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(TOKENS)}, merges=[("a", "b")])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    config = dataclasses.replace(CONFIG, vocab_size=len(TOKENS), max_seq_len=CONTEXT)
    source = dataclasses.replace(random_source(config), tokenizer_json=tokenizer.to_str().encode())
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()
        assert not self.errors

    def chat(self, text: str, **options: Any) -> Any:
        """What the official client gets."""
        messages = [{"role": "user", "content": text}]
        return self.client.chat.completions.create(model=MODEL, messages=messages, **options)

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
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("server") / "tiny.safetensors")


@pytest.fixture(scope="module")
def running(weights: Path) -> Iterator[Running]:
    with Running(weights, max_sequences=8, max_waiting=24) as running:
        yield running


def says(text: str) -> dict[str, Any]:
    """A format that leaves the model but one answer, of JSON: that text in quotes."""
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": text}}}
