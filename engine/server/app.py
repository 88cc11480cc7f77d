"""The routes: requests in, answers out, whole or as they grow; who may ask, and for how much."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from engine.errors import EngineError
from engine.server.answer import Answer, Piece
from engine.server.choose import Chooser
from engine.server.gate import Gate, reply
from engine.server.metrics import CONTENT_TYPE, Metrics
from engine.server.replies import ChatReplies, Choice, TextReplies, usage
from engine.server.schema import (
    ChatRequest,
    CompletionRequest,
    RequestError,
    parse,
)
from engine.server.worker import Worker

_BODY_BYTES = 4 << 20
_BODY_SECONDS = 30.0
_SILENCE_SECONDS = 15.0  # then a comment tells a stream's client, and what is between, to wait

_PAGE = Path(__file__).with_name("page.html")
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

Replies = ChatReplies | TextReplies
Given = TypeVar("Given")
Made = TypeVar("Made")


class Api:
    """The endpoints of one worker's model."""

    def __init__(self, worker: Worker, metrics: Metrics, model: str) -> None:
        self._worker, self._metrics, self._model = worker, metrics, model
        self._created = int(time.time())

    def app(self, api_key: str | None) -> Starlette:
        """With a key, whoever asks must have it; without, it must be somebody on this machine."""
        routes = [
            Route("/", self._page),
            Route("/health", self._health),
            Route("/metrics", self._figures),
            Route("/v1/models", self._models),
            Route("/v1/models/{model:path}", self._one_model),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
        ]
        paths = [route.path for route in routes if "{" not in route.path]
        return Starlette(
            routes=routes,
            middleware=[Middleware(Gate, api_key, self._metrics, paths)],
            exception_handlers={
                RequestError: _refused,
                HTTPException: _http_error,
                ClientDisconnect: _left,
                Exception: _unforeseen,
            },
        )

    async def _page(self, request: Request) -> Response:
        return HTMLResponse(
            _PAGE.read_text("utf-8"), headers={"content-security-policy": _PAGE_POLICY}
        )

    async def _health(self, request: Request) -> Response:
        self._worker.check_room(0)
        return JSONResponse({"status": "ok"})

    async def _figures(self, request: Request) -> Response:
        return Response(self._metrics.text(), headers={"content-type": CONTENT_TYPE})

    def _about(self) -> dict[str, Any]:
        return {
            "id": self._model,
            "object": "model",
            "created": self._created,
            "owned_by": "answer",
            "max_model_len": self._worker.context,
        }

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._about()]})

    async def _one_model(self, request: Request) -> Response:
        self._check_model(request.path_params["model"])
        return JSONResponse(self._about())

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self._model):
            raise RequestError(
                404,
                f"there is no model {name!r} here, but {self._model!r}",
                code="model_not_found",
                param="model",
            )

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, ChatRequest, ChatReplies)

    async def _complete(self, request: Request) -> Response:
        return await self._answer(request, CompletionRequest, TextReplies)

    async def _answer(
        self,
        request: Request,
        kind: type[ChatRequest] | type[CompletionRequest],
        replies_of: type[Replies],
    ) -> Response:
        self._worker.check_room(1)  # before anything is read
        asked = parse(kind, await _body(request))
        self._check_model(asked.model)
        self._worker.check_room(asked.n_prompts * asked.n_choices)
        queue: asyncio.Queue[Piece | None] = asyncio.Queue()
        answers = await run_in_threadpool(self._prepare, asked, _delivery(queue))
        n_prompt = sum(len(answer.ids) for answer in answers[:: asked.n_choices])
        replies = replies_of(
            self._model, self._worker.grammars.bytes_of, asked.n_logprobs is not None
        )
        self._worker.submit(answers)
        pieces = self._pieces(request, answers, queue)
        opening = await anext(pieces)  # from here on it is accepted
        if asked.stream:
            events = _events(opening, pieces, replies, n_prompt, asked.include_usage)
            return StreamingResponse(
                events,
                media_type="text/event-stream",
                headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
            )
        choices = [Choice() for _ in answers]
        last: dict[int, Piece] = {}
        async with aclosing(pieces):
            async for piece in pieces:
                if piece is not None:
                    choices[piece.index].add(piece)
                    last[piece.index] = piece
        return JSONResponse(replies.whole(choices, usage(n_prompt, last.values())))

    def _prepare(
        self, asked: ChatRequest | CompletionRequest, deliver: Callable[[Piece], None]
    ) -> list[Answer]:
        """Prompts as tokens, and all that it takes to answer them. Runs beside the event loop."""
        worker = self._worker
        try:
            prompts = asked.encode(worker.tokenizer)
        except EngineError as error:
            raise RequestError(400, str(error)) from None
        bias = {int(token): value for token, value in (asked.logit_bias or {}).items()}
        tokens = [*bias, *(token for ids in prompts for token in ids)]
        if not all(0 <= token < worker.vocab_size for token in tokens):
            raise RequestError(400, f"a token id is outside the vocabulary of {worker.vocab_size}")
        schema = asked.response_format and asked.response_format.schema_text()
        if asked.n_logprobs is not None:
            _possible("logprobs", worker.grammars.bytes_of, 0)
        answers: list[Answer] = []
        for ids, sampling in itertools.product(prompts, asked.samplings()):
            room = worker.context - len(ids)
            if not ids or room < 1:
                raise RequestError(
                    400,
                    f"the prompt has {len(ids)} tokens; with an answer it must fit into the "
                    f"context of {worker.context}",
                    code="context_length_exceeded" if ids else None,
                )
            matcher = None
            if schema:
                matcher = _possible("response_format", worker.grammars.matcher, schema)
            chooser = Chooser(
                sampling,
                pos=len(ids),
                n_top=asked.n_logprobs,
                presence_penalty=asked.presence_penalty or 0.0,
                frequency_penalty=asked.frequency_penalty or 0.0,
                bias=bias,
                matcher=matcher,
            )
            stream, most = worker.tokenizer.stream(), min(asked.most_tokens or room, room)
            answers.append(Answer(len(answers), ids, most, chooser, asked.stops, stream, deliver))
        return answers

    async def _pieces(
        self, request: Request, answers: Sequence[Answer], queue: asyncio.Queue[Piece | None]
    ) -> AsyncGenerator[Piece | None, None]:
        """Until all answers have ended; None where nothing has come for a while.

        RequestError when one fails, ClientDisconnect when nobody listens any more. However this
        ends, the answers end with it.
        """
        watch = asyncio.create_task(_until_gone(request, queue))
        n_running = len(answers)
        try:
            while n_running:
                try:
                    async with asyncio.timeout(_SILENCE_SECONDS):
                        piece = await queue.get()
                except TimeoutError:
                    yield None
                    continue
                if piece is None:
                    raise ClientDisconnect
                if piece.error is not None:
                    raise piece.error
                n_running -= piece.finished is not None
                yield piece
        finally:
            watch.cancel()
            self._worker.cancel(answers)


def _possible(param: str, make: Callable[[Given], Made], given: Given) -> Made:
    """What `make` makes of it, or the RequestError that it cannot."""
    try:
        return make(given)
    except ValueError as error:
        raise RequestError(400, f"{param}: {error}", param=param) from None


async def _events(
    opening: Piece | None,
    pieces: AsyncGenerator[Piece | None, None],
    replies: Replies,
    n_prompt: int,
    include_usage: bool,
) -> AsyncGenerator[str, None]:
    """Server-sent events of an answer that grows; an error is the last of them."""

    def event(chunk: Any) -> str:
        return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"

    extra = {"usage": None} if include_usage else {}
    last: dict[int, Piece] = {}
    async with aclosing(pieces):
        try:
            piece: Piece | None = opening
            while True:
                if piece is None:
                    yield ": still at it\n\n"
                else:
                    last[piece.index] = piece
                    if (chunk := replies.chunk(piece)) is not None:
                        yield event({**chunk, **extra})
                piece = await anext(pieces)
        except StopAsyncIteration:
            pass
        except ClientDisconnect:
            return
        except RequestError as error:
            yield event(error.body)
            return
    if include_usage:
        yield event({**replies.closing(), "usage": usage(n_prompt, last.values())})
    yield "data: [DONE]\n\n"


def _delivery(queue: asyncio.Queue[Piece | None]) -> Callable[[Piece], None]:
    """What brings a piece from the worker's thread to the event loop."""
    loop = asyncio.get_running_loop()

    def deliver(piece: Piece) -> None:
        with suppress(RuntimeError):  # the loop has ended, and who would read it with it
            loop.call_soon_threadsafe(queue.put_nowait, piece)

    return deliver


async def _until_gone(request: Request, queue: asyncio.Queue[Piece | None]) -> None:
    """Puts None once the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    queue.put_nowait(None)


async def _body(request: Request) -> bytes:
    """All of it, if it is JSON, not too long and not too slow; RequestError."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        # It also keeps pages of other sites away, which may send anything but that unasked.
        raise RequestError(415, "expected a body of content-type application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > _BODY_BYTES:
                    raise RequestError(413, f"the body is longer than {_BODY_BYTES} bytes")
    except TimeoutError:
        raise RequestError(408, f"the body has not come within {_BODY_SECONDS:g} s") from None
    return bytes(body)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return reply(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}: {error.detail}"
    return reply(RequestError(error.status_code, what))


async def _left(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it but the metrics


async def _unforeseen(request: Request, error: Exception) -> Response:
    return reply(RequestError(500, "an error of the server", kind="server_error"))
