"""The server as a whole: a socket, uvicorn, the routes and the worker, from start to end."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn

from engine.errors import EngineError
from engine.generate import Engine
from engine.server.app import Api
from engine.server.gate import is_loopback
from engine.server.metrics import Metrics
from engine.server.worker import Worker

_CONNECTIONS = 1024  # beyond them uvicorn answers 503 by itself
_IDLE_SECONDS = 75  # longer than clients keep a connection: none should find it closed
_LAST_SECONDS = 2  # for the news of the end to reach those who were cut off


def listen(host: str, port: int, api_key: str | None) -> socket.socket:
    """A socket at `host`; EngineError: it cannot be had, or must not without a key."""
    if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable()):
        raise EngineError(
            "the API key must be of ASCII characters, at least one that can be printed"
        )
    if api_key is None and not is_loopback(host):
        raise EngineError(
            f"--host {host}: others could reach the server, so it needs --api-key (or "
            "ANSWER_API_KEY); use --host 127.0.0.1 for this machine alone"
        )
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise EngineError(
            f"cannot listen at {host}:{port} ({error.strerror}); choose another --port or --host"
        ) from None


class Server(uvicorn.Server):
    """Serves one model at one socket, until a signal, `should_exit` or the end of the device."""

    def __init__(
        self,
        listener: socket.socket,
        open_engine: Callable[[], Engine],
        model: str,
        *,
        api_key: str | None = None,
        max_sequences: int = 16,
        max_waiting: int = 64,
        grace_seconds: int = 10,
    ) -> None:
        """`open_engine` is called in the worker's thread, again when the device has failed;
        `model` is what clients call it. See `answer serve --help` for the rest.
        """
        metrics = Metrics()
        self.worker = Worker(open_engine, max_sequences, max_waiting, metrics, self._give_up)
        self._listener, self._model, self._grace_seconds = listener, model, grace_seconds
        self._error: str | None = None
        super().__init__(
            uvicorn.Config(
                Api(self.worker, metrics, model).app(api_key),
                http="h11",
                ws="none",
                lifespan="off",
                log_level="warning",
                server_header=False,
                limit_concurrency=_CONNECTIONS,
                timeout_keep_alive=_IDLE_SECONDS,
                timeout_graceful_shutdown=grace_seconds + _LAST_SECONDS,
            )
        )

    def serve_until_stopped(self) -> None:
        """EngineError when the engine cannot be opened, at first or after the device has failed."""
        with self._listener:
            self.worker.start()
            host, port = self._listener.getsockname()[:2]
            where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            print(f"{self._model}: {self.worker.about}", file=sys.stderr)
            print(
                f"serving http://{where}/v1 and a page to chat at http://{where}", file=sys.stderr
            )
            try:
                self.run(sockets=[self._listener])
            finally:
                self.worker.close()
                if not self.force_exit:
                    self.worker.join()
        if self._error is not None:
            raise EngineError(self._error)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """At a signal; at a second one without waiting. uvicorn's own would raise it once more."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._error is None:
            self.worker.close(self._grace_seconds)
        await super().shutdown(sockets)

    def _give_up(self, reason: str) -> None:
        self._error = reason
        self.should_exit = True
