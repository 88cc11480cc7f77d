"""Asks `answer serve` for so many streams at once, and looks whether each is what it is alone.

    python -m tests.crowd --clients 1 8 16 [--model MODEL] [--exact]

It starts the server by itself. A round is one question of each client, all sent together, none of
them asked before; afterwards each is asked alone, all at temperature 0. With --exact it fails if an
answer differs from that one. Without, activations are rounded to int8 after sums in another order
now and then, and of two tokens that are nearly as likely the other may come out. Times are the
clients': from the request to the first text, and tokens from the first request to the last end.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

TOPICS = "the sea, a lighthouse, rain, bread, prime numbers, a long winter, ravens, maps".split(
    ", "
)


@dataclass(frozen=True)
class Heard:
    """A streamed answer as its client saw it."""

    text: str
    n_tokens: int
    first_seconds: float  # from the request to the first text
    seconds: float


def ask(address: str, question: str, max_tokens: int) -> Heard:
    body = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection = http.client.HTTPConnection(address, timeout=300)
    texts, n_tokens, first = [], 0, None
    begin = time.perf_counter()
    connection.request(
        "POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"}
    )
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"{response.status}: {response.read().decode()}")
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            raise SystemExit(f"{event['error']}")
        for choice in event["choices"]:
            if text := choice["delta"].get("content"):
                texts.append(text)
                first = first or time.perf_counter()
        n_tokens = (event.get("usage") or {}).get("completion_tokens", n_tokens)
    end = time.perf_counter()
    connection.close()
    return Heard("".join(texts), n_tokens, (first or end) - begin, end - begin)


def crowd(address: str, clients: int, rounds: int, max_tokens: int) -> bool:
    """Prints the row of so many clients; whether all answers were those of the clients alone."""
    heard: list[Heard] = []
    rates: list[float] = []
    n_same = 0
    with ThreadPoolExecutor(clients) as pool:
        for i in range(rounds):
            questions = [
                f"Question {clients}.{i}.{k}: tell me something about {TOPICS[k % len(TOPICS)]}, "
                f"in {k + 3} sentences."
                for k in range(clients)
            ]
            begin = time.perf_counter()
            together = list(pool.map(lambda q: ask(address, q, max_tokens), questions))
            rates.append(sum(h.n_tokens for h in together) / (time.perf_counter() - begin))
            alone = [ask(address, question, max_tokens) for question in questions]
            n_same += sum(a.text == b.text for a, b in zip(together, alone, strict=True))
            heard += together
    first = [1e3 * h.first_seconds for h in heard]
    each = statistics.median(h.n_tokens / h.seconds for h in heard)
    print(
        f"| {clients} | {statistics.median(first):.0f} | {max(first):.0f} | "
        f"{statistics.median(rates):.1f} | {min(rates):.1f} to {max(rates):.1f} | {each:.1f} | "
        f"{n_same} of {len(heard)} |",
        flush=True,
    )
    return n_same == len(heard)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="smollm2", metavar="MODEL", help="(%(default)s)")
    add("--clients", type=int, nargs="+", default=[1, 8, 16], metavar="N", help="(1 8 16)")
    add("--rounds", type=int, default=3, metavar="N", help="of each (%(default)s)")
    add("--max-tokens", type=int, default=128, metavar="N", help="(%(default)s)")
    add("--exact", action="store_true", help="serve with float32 activations")
    a = parser.parse_args(arguments)
    command = [sys.executable, "-m", "engine", "serve", a.model, "--port", "0"]
    command += ["--exact"] * a.exact
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        said = []
        for line in server.stderr:
            said.append(line)
            if found := re.search(r"serving http://([^/]+)/", line):
                break
        else:
            print("".join(said), end="", file=sys.stderr)
            return 1
        print("".join(said[:-1]))
        ask(found[1], "Hello", a.max_tokens)
        print("| clients | ms to first text | worst | tokens/s of all | rounds | of each | alike |")
        print("|---|---|---|---|---|---|---|")
        same = [crowd(found[1], n, a.rounds, a.max_tokens) for n in a.clients]
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)
    return int(a.exact and not all(same))


if __name__ == "__main__":
    sys.exit(main())
