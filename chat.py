"""The streaming terminal chat: flags, the conversation, what is printed where. No GPU, no maths.

Answers go to stdout and nothing else does. The talk about them (model, notes, statistics, the
prompt, errors) goes to stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from engine.errors import EngineError
from weights.bits import parse_bits

if TYPE_CHECKING:
    from engine import Engine, Sampling
    from engine.generate import Stats
    from engine.tokenizer import Tokenizer

COMMANDS = '''\
/help           this list
/reset          forget the conversation; the system prompt stays
/retry          another answer to the last message
/undo           forget the last message and its answer
/edit TEXT      say TEXT in place of the last message
/system [TEXT]  set the system prompt, from the next message on; without TEXT: take it away
/set NAME=VALUE temperature, top_k, top_p, min_p, seed or max_tokens; without NAME: show them
/save FILE      write the conversation, with all that the model has read of it
/load FILE      go on with a conversation that was saved
/stats          the model, the last answer's statistics, the length of the conversation
/exit           leave, as Ctrl-D does
Ctrl-C stops an answer. To send a message that starts with /, put a space before it. Alt-Enter
begins a new line; so does Enter in a message between """ and """.'''

_QUOTES = '"""'  # around a message of several lines

# C0 but newline and tab, DEL, C1. Without them no escape sequence can begin.
_CONTROLS = dict.fromkeys(c for c in (*range(0x20), *range(0x7F, 0xA0)) if chr(c) not in "\n\t")


@dataclass
class Conversation:
    """The turns so far, and the prompt that a new message makes of them.

    Without a chat template there are no turns: every message is a text to continue, on its own.
    """

    tokenizer: Tokenizer
    context: int  # tokens that prompt and answer share
    max_tokens: int  # of an answer
    system: str | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)  # (message, answer)
    # All the model read and said up to its last answer, as text and as the very ids: see _encode.
    _read: tuple[str, list[int]] | None = None

    def prompt(self, message: str) -> tuple[list[int], int]:
        """Token ids of the prompt for `message`, and how many turns were forgotten to make room.

        EngineError, with nothing forgotten, when the message alone does not fit.
        """
        ids = self._encode(self.turns, message)[1]
        limit = self.context - min(self.max_tokens, self.context // 4)
        if len(ids) <= limit:
            return ids, 0
        n_alone = len(self._encode([], message)[1])
        if n_alone >= self.context:
            raise EngineError(
                f"not sent: the message makes {n_alone} tokens, the context holds {self.context}"
            )
        n_turns = len(self.turns)
        while self.turns and len(ids) > limit:
            # The older half at once: one by one, every message from here on would move the start
            # of the prompt, and the engine's cache would be of no use any more.
            del self.turns[: (len(self.turns) + 1) // 2]
            ids = self._encode(self.turns, message)[1]
        return ids, n_turns - len(self.turns)

    @property
    def n_tokens(self) -> int:
        """Tokens of all that was said, up to the last answer."""
        return len(self._read[1]) if self._read and self.turns else 0

    def undo(self) -> str | None:
        """Forgets the last turn; returns its message, None if there is none."""
        if not self.turns:
            return None
        message, _ = self.turns.pop()
        self._read = None
        if self.turns:  # what the model has read ends with the answer before
            before, answer = self.turns[-1]
            text, ids = self._encode(self.turns[:-1], before)
            self._read = text + answer, ids + self.tokenizer.encode(answer)
        return message

    def add(self, message: str, answer: str, answer_ids: list[int]) -> None:
        """Keeps a turn. One without an answer is forgotten: it would teach the model silence."""
        if self.tokenizer.chat_template is not None and answer:
            text, ids = self._encode(self.turns, message)
            self._read = text + answer, ids + answer_ids
            self.turns.append((message, answer))

    def to_json(self) -> str:
        return json.dumps({"system": self.system, "turns": self.turns, "read": self._read})

    def from_json(self, text: str) -> None:
        """Take the place of this conversation; EngineError, with nothing changed, if it is none."""
        try:
            saved = json.loads(text)
            system, read = saved["system"], saved["read"]
            turns = [(str(message), str(answer)) for message, answer in saved["turns"]]
            read = read and (str(read[0]), [int(token) for token in read[1]])
        except (ValueError, TypeError, LookupError):
            raise EngineError(
                "a session, but of no chat: it was saved by another program"
            ) from None
        self.system, self.turns, self._read = system, turns, read

    def _encode(self, turns: list[tuple[str, str]], message: str) -> tuple[str, list[int]]:
        """Prompt of `turns` and `message` as (text, token ids).

        An answer, tokenized again, need not give the tokens that it was generated as, and those
        are what the engine's cache holds: a prompt that continues what was read keeps them.
        """
        if self.tokenizer.chat_template is None:
            return message, self.tokenizer.encode(message)
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for question, answer in turns:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": message})
        text = self.tokenizer.chat_prompt(messages)
        ids = self.tokenizer.encode(text)
        if self._read is not None:
            again = self.tokenizer.encode(self._read[0])
            if ids[: len(again)] == again:
                ids = self._read[1] + ids[len(again) :]
        return text, ids


@dataclass
class Chat:
    """One engine, one conversation, and what the user sees of them."""

    engine: Engine
    name: str  # of the model, as the user gave it
    sampling: Sampling
    conversation: Conversation
    show_stats: bool = True
    slide: bool = False  # where the context is full, an answer goes on without its middle
    _last_stats: str = "no answer yet"

    def greet(self) -> None:
        """Says what runs, and what will not be used of what was asked."""
        if self.show_stats:
            say(self.describe())
        if self.engine.tokenizer.chat_template is None:
            say("no chat template: every message is a text that the model continues, on its own")
            if self.conversation.system:
                say("the system prompt is not used")

    def count(self, typed: str) -> str:
        """How full the context is, with what is typed."""
        n = self.conversation.n_tokens + len(self.engine.tokenizer.encode(typed))
        return f"{n} of {self.engine.context} tokens"

    def describe(self) -> str:
        """Model, adapter and sizes, in two lines."""
        engine = self.engine
        bits = engine.weights.bits_per_weight(block_only=False)
        return (
            f"{self.name}: {engine.config.n_params / 1e6:,.1f} M parameters, {bits:.2f} bit/weight,"
            f" context {engine.context} tokens, on {engine.adapter_name}\n"
            f"memory {engine.memory()}"
        )

    def answer(self, message: str) -> int:
        """Streams the answer to stdout. Returns an exit code: 0, 1 (refused), 130 (interrupted)."""
        # Bytes of the terminal that are not UTF-8 arrive as lone surrogates.
        message = message.encode(errors="replace").decode()
        try:
            prompt, n_left_out = self.conversation.prompt(message)
        except EngineError as error:  # the message's fault: the conversation goes on without it
            say(f"error: {error}", dim=False)
            return 1
        if n_left_out:
            say(f"the context is full: the oldest {_count(n_left_out, 'turn')} left out from here")

        out = answer_writer()
        stream = self.engine.tokenizer.stream()
        ids, text, interrupted = [], "", False
        max_tokens = self.conversation.max_tokens
        generation = self.engine.generate(prompt, max_tokens, self.sampling, slide=self.slide)
        try:
            for token in generation:
                piece = stream.push(token)
                ids.append(token)
                text += piece
                out.push(piece)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            generation.close()
            out.close()
            if interrupted and (not text or text.endswith("\n")):
                print(file=sys.stderr)  # ends the line on which the terminal put its ^C
        self.conversation.add(message, text, ids)

        stats = generation.stats
        if interrupted:
            say("stopped" if text else "stopped before the answer began: the message is forgotten")
        elif stats.finish_reason == "context":
            say(f"the context of {self.engine.context} tokens is full: the answer ends here")
        elif stats.finish_reason == "length":
            say(f"stopped after {_count(max_tokens, 'token')} (-n)")
        if stats.slides:
            say(
                f"the context was full {_count(stats.slides, 'time')}: its beginning and latest "
                "half were read again, what stood between was forgotten"
            )
        self._last_stats = _figures(stats, self.engine.context)
        if self.show_stats:
            say(self._last_stats)
        return 130 if interrupted else 0

    def command(self, line: str) -> bool:
        """Carries out a line that starts with /. False when it asks to leave."""
        name, _, text = line.strip().partition(" ")
        text = text.strip()
        match name:
            case "/exit":
                return False
            case "/help":
                say(COMMANDS)
            case "/reset":
                self.conversation.turns.clear()
                say("the conversation is forgotten")
            case "/retry" | "/undo" | "/edit":
                self.again(name, text)
            case "/set":
                self.set(text)
            case "/system":
                self.conversation.system = text or None
                say(f"system prompt: {text}" if text else "the system prompt is taken away")
            case "/save" | "/load":
                self.keep(name, text)
            case "/stats":
                turns = _count(len(self.conversation.turns), "turn")
                say(f"{self.describe()}\n{self._last_stats}\nconversation of {turns}")
            case _:
                say(f"unknown command {name}; /help lists them")
        return True

    def again(self, name: str, text: str) -> None:
        """/undo takes back the last turn; /retry and /edit TEXT then answer it, or TEXT, anew."""
        if name == "/edit" and not text:
            say("/edit TEXT says TEXT in place of the last message")
            return
        message = self.conversation.undo()
        if message is None:
            say("there is no message to take back")
        elif name == "/undo":
            turns = _count(len(self.conversation.turns), "turn")
            say(f"forgotten: {message}\n{turns} left")
        else:
            # The same seed would draw the same answer.
            seed = (self.sampling.seed + 1) % 2**32
            self.sampling = dataclasses.replace(self.sampling, seed=seed)
            self.answer(text or message)

    def set(self, text: str) -> None:
        """NAME=VALUE, of how tokens are drawn or how many; nothing: says what is set."""
        values = {**vars(self.sampling), "max_tokens": self.conversation.max_tokens}
        name, _, number = (part.strip() for part in text.partition("="))
        name = name.replace("-", "_")
        if not text:
            say("  ".join(f"{name}={value}" for name, value in values.items()))
            return
        if name not in values:
            say(f"{name}: cannot be set; {', '.join(values)} can")
            return
        kind = type(values[name])
        try:
            value = kind(number)
            if name == "max_tokens":
                if value < 1:
                    raise EngineError(f"max_tokens is {value}, expected at least 1")
                self.conversation.max_tokens = value
            else:
                self.sampling = dataclasses.replace(self.sampling, **{name: value})
        except ValueError:
            expected = "a whole number" if kind is int else "a number"
            say(f"{name}: expected {expected}, found {number!r}")
        except EngineError as error:
            say(str(error))
        else:
            say(f"{name}={value}")

    def keep(self, name: str, path: str) -> None:
        """/save or /load."""
        talk = self.conversation
        try:
            if not path:
                raise EngineError(f"{name} needs the name of a file")
            if name == "/save":
                n_tokens = self.engine.save_session(path, talk.to_json())
                say(f"saved: {_count(n_tokens, 'token')} in {path}")
            else:
                talk.from_json(self.engine.load_session(path))
                say(f"loaded: a conversation of {_count(len(talk.turns), 'turn')}")
        except EngineError as error:  # the conversation goes on as it was
            say(f"error: {error}", dim=False)

    def loop(self, read_line: Callable[[], str]) -> int:
        """Talks until the user leaves; `read_line` raises at Ctrl-C and Ctrl-D as input() does."""
        say("/help lists the commands, Ctrl-D leaves")
        warned = False
        while True:
            try:
                line = read_line()
            except EOFError:
                return 0
            except KeyboardInterrupt:
                if warned:
                    return 0
                warned = True
                say("Ctrl-C once more leaves")
                continue
            warned = False
            if line.startswith(_QUOTES):
                try:
                    self.answer(_quoted(line, read_line))
                except EOFError:
                    return 0
                except KeyboardInterrupt:
                    say("the message is dropped")
            elif line.startswith("/"):
                if not self.command(line):
                    return 0
            elif line.strip():
                self.answer(line)


def say(text: str, dim: bool = True) -> None:
    """A note on stderr, dimmed on a terminal unless NO_COLOR (no-color.org) is set."""
    text = text.translate(_CONTROLS)
    if dim and not _plain() and not os.environ.get("NO_COLOR"):
        text = f"\x1b[2m{text}\x1b[0m"
    print(text, file=sys.stderr, flush=True)


def _quoted(line: str, read_line: Callable[[], str]) -> str:
    """A message that begins with three quotes and goes on to a line that ends with them."""
    lines = [line.removeprefix(_QUOTES)]
    while not lines[-1].rstrip().endswith(_QUOTES):
        lines.append(read_line())
    return "\n".join([*lines[:-1], lines[-1].rstrip().removesuffix(_QUOTES)]).strip("\n")


class Writer(Protocol):
    """Where an answer goes, piece by piece."""

    def push(self, piece: str) -> None: ...

    def close(self) -> None: ...


class PlainWriter:
    """Text as it is; on a terminal without control characters. It ends with a whole line."""

    def __init__(self) -> None:
        self._tty = sys.stdout.isatty()
        self._ends_line = True

    def push(self, piece: str) -> None:
        print(piece.translate(_CONTROLS) if self._tty else piece, end="", flush=True)
        self._ends_line = piece.endswith("\n") if piece else self._ends_line

    def close(self) -> None:
        if not self._ends_line:
            print(flush=True)


class MarkdownWriter:
    """Markdown on a terminal that shows colours."""

    def __init__(self) -> None:
        from engine.markdown import MarkdownStream

        self._stream = MarkdownStream(sys.stdout)

    def push(self, piece: str) -> None:
        self._stream.push(piece.translate(_CONTROLS))

    def close(self) -> None:
        self._stream.close()


def answer_writer() -> Writer:
    plain = _plain() or not sys.stdout.isatty() or os.environ.get("NO_COLOR")
    return PlainWriter() if plain else MarkdownWriter()


def line_reader(note: Callable[[str], str] | None = None) -> Callable[[], str]:
    """Reads the user's lines, with editing and a history where the terminal can do that.

    `note` makes, of what is typed so far, a line that stands below it.
    """
    if _plain():
        return _plain_line
    from platformdirs import user_state_path
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output
    from prompt_toolkit.styles import Style

    history: History
    try:
        path = user_state_path("answer", appauthor=False, ensure_exists=True) / "history"
        path.touch(mode=0o600)
        path.open("a+b").close()
        history = FileHistory(str(path))
    except OSError:  # a home that cannot be written costs the history, not the chat
        history = InMemoryHistory()
    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    def toolbar() -> str | None:
        return note(session.default_buffer.text) if note else None

    session: PromptSession[str] = PromptSession(
        history=history,
        output=create_output(sys.stderr),
        multiline=True,
        prompt_continuation="  ",
        key_bindings=keys,
        bottom_toolbar=toolbar if note else None,
        style=Style.from_dict({"bottom-toolbar": "noreverse dim"}),
    )

    def edited_line() -> str:
        while True:
            try:
                return session.prompt("> ")
            except KeyboardInterrupt:
                if not session.default_buffer.text:  # else Ctrl-C has taken back the line
                    raise

    return edited_line


def _plain_line() -> str:
    print("> ", end="", file=sys.stderr, flush=True)
    try:
        return input()
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        raise


def _plain() -> bool:
    """Whether stderr shows control sequences as they are, or goes to a file."""
    return os.environ.get("TERM") == "dumb" or not sys.stderr.isatty()


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _figures(stats: Stats, context: int) -> str:
    """The statistics line of an answer."""
    n_prompt, n_answer = stats.prompt_tokens, stats.generated_tokens
    n_new = n_prompt - stats.reused_tokens
    # The first token's time is the prompt's; a stop token took time but is none of the answer's.
    n_steps = n_answer - (stats.finish_reason != "stop")
    guessed = ""
    if stats.drafted_tokens:
        guessed = f" guessed {stats.drafted_tokens}, {stats.accepted_tokens} right;"
    return (
        f"prompt {_count(n_prompt, 'token')}, {n_new} new{_rate(n_new, stats.prompt_seconds)};"
        f" answer {_count(n_answer, 'token')}{_rate(n_steps, stats.generate_seconds)};{guessed}"
        f" context {min(n_prompt + n_answer, context)} of {context}"
    )


def _rate(n_tokens: int, seconds: float) -> str:
    return f" at {n_tokens / seconds:.1f}/s" if seconds > 0 else ""


def _within(kind: type[float], low: float, high: float = 2**32 - 1) -> Callable[[str], float]:
    """An argparse type: low <= value <= high."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {what} from {low} to {high}, found {text}")
        return value

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="answer chat",
        description="Chat with a language model whose weights stay entropy-coded in GPU memory.",
        epilog='example: answer -p "Why is the sky blue?" -n 200',
    )
    add = parser.add_argument
    count = _within(int, 1)
    model = "weights file or name of a model (smollm2)"
    add("model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL", help=model)
    add("--model", default="smollm2", metavar="MODEL", help="the same")
    add("--bits", type=parse_bits, help="stored bits per weight, or lossless, when it is converted")
    add("--context", type=count, metavar="N", help="tokens of prompt and answer together")
    overflow = (
        "full context: end the answer (stop), or read its latest half again and go on (slide)"
    )
    add("--overflow", choices=("stop", "slide"), default="stop", help=overflow)
    kept = "what is kept of each position: 16 bits, 8, or 8 of keys and 4 of values (f16)"
    add("--cache", choices=("f16", "int8", "int4"), default="f16", help=kept)
    add("--adapter", metavar="NAME", help="GPU to run on: its number or part of its name")
    add("--draft", metavar="MODEL", help="a smaller model of the same family that guesses for it")
    add("--exact", action="store_true", help="float32 activations: slower, true to the weights")
    add("-p", "--prompt", help="answer this and leave; - reads stdin, as a pipe without -p does")
    add("-s", "--system", metavar="TEXT", help="system prompt")
    add("-n", "--max-tokens", type=count, default=1024, metavar="N", help="longest answer (1024)")
    add("--no-stats", action="store_true", help="print no figures of the model and the answers")

    draw = parser.add_argument_group("how tokens are drawn").add_argument
    share = _within(float, 0, 1)
    heat = _within(float, 0, 100)
    warm = "0: always the likeliest (%(default)s)"
    draw("-t", "--temperature", type=heat, default=0.5, metavar="T", help=warm)
    draw("--top-k", type=_within(int, 0), default=0, metavar="K", help="among the K likeliest")
    draw("--top-p", type=share, default=1.0, metavar="P", help="among the likeliest that sum to P")
    least = "none below P times the likeliest (%(default)s)"
    draw("--min-p", type=share, default=0.1, metavar="P", help=least)
    draw("--seed", type=_within(int, 0), metavar="N", help="same seed, same answers")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command `answer`. Returns its exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without the character gets "?"
    try:
        prompt = args.prompt
        if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
            prompt = sys.stdin.buffer.read().decode(errors="replace").rstrip("\r\n")
        if prompt is not None and not prompt.strip():
            parser.error("the prompt is empty")
        # Only now: this loads the GPU library, for which --help and a mistyped flag need not wait.
        from engine import Engine, Sampling

        seed = secrets.randbits(32) if args.seed is None else args.seed
        sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, seed)
        engine = Engine.open(
            args.model,
            exact=args.exact,
            context=args.context,
            cache=args.cache,
            adapter=args.adapter,
            bits=args.bits,
            draft=args.draft,
        )
        talk = Conversation(engine.tokenizer, engine.context, args.max_tokens, args.system)
        chat = Chat(engine, args.model, sampling, talk, not args.no_stats, args.overflow == "slide")
        chat.greet()
        return chat.loop(line_reader(chat.count)) if prompt is None else chat.answer(prompt)
    except EngineError as error:
        say(f"error: {error}", dim=False)
        return 1
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT, as a shell counts
    except BrokenPipeError:  # whoever read the answers has left
        null = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):  # Python flushes them once more on its way out
            os.dup2(null, stream.fileno())
        return 141  # 128 + SIGPIPE


if __name__ == "__main__":
    sys.exit(main())
