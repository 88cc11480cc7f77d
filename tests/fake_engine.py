"""An engine that says what a script tells it to, for chat.py: no GPU, no weights, no model."""

import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace

import chat
import engine
from engine.chat.commands import loop
from engine.chat.talk import Chat
from engine.errors import EngineError

IM_START, IM_END, HE = 256, 257, 258  # ids above the bytes
PIECES = {IM_START: b"<|im_start|>", IM_END: b"<|im_end|>", HE: b"he"}


class FakeTokenizer:
    """A token per byte, the marks of a turn, and "he", so that texts have two tokenizations."""

    chat_template: str | None = "ChatML"

    def encode(self, text):
        rest, ids = text.encode(), []
        while rest:
            token = next((t for t, piece in PIECES.items() if rest.startswith(piece)), rest[0])
            ids.append(token)
            rest = rest[len(PIECES.get(token, b".")) :]
        return ids

    def decode(self, ids):
        return b"".join(PIECES.get(i) or bytes([i]) for i in ids).decode(errors="replace")

    def stream(self):
        return FakeStream()

    def chat_prompt(self, messages):
        turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
        return "".join(turns) + "<|im_start|>assistant\n"


class FakeStream:
    """Holds back bytes until they are characters, as a decode stream does."""

    def __init__(self):
        self.held = b""

    def push(self, token):
        self.held += PIECES.get(token) or bytes([token])
        try:
            text = self.held.decode()
        except UnicodeDecodeError:
            return ""
        self.held = b""
        return text


class FakeEngine:
    """Gives the scripted answers. In an answer, an exception is raised and a float slept,
    which had better be short: a signal just before it does not shorten it."""

    def __init__(self, *answers, context=4096):
        self.answers = [list(a.encode()) if isinstance(a, str) else list(a) for a in answers]
        self.context = context
        self.tokenizer = FakeTokenizer()
        self.config = SimpleNamespace(n_params=134_515_008)
        self.weights = SimpleNamespace(bits_per_weight=lambda block_only: 4.125)
        self.adapter_name = "Fake adapter"
        self.prompts, self.max_tokens, self.sampling, self.slide = [], None, None, None
        self.cached = []

    def memory(self):
        return "91.5 MB: weights 70.0, cache 20.0, scratch 1.5"

    def generate(self, ids, max_tokens, sampling, slide):
        if len(ids) >= self.context:
            raise EngineError("prompt longer than the context")
        self.prompts.append(ids)
        self.max_tokens, self.sampling, self.slide = max_tokens, sampling, slide
        n_common = next(
            (i for i, (a, b) in enumerate(zip(ids, self.cached, strict=False)) if a != b),
            min(len(ids), len(self.cached)),
        )
        self.cached = list(ids)
        return FakeGeneration(self, self.answers.pop(0), n_common)

    def close(self):
        pass

    def prompt_text(self, i=-1):
        return self.tokenizer.decode(self.prompts[i])


class FakeGeneration:
    def __init__(self, engine, answer, n_reused):
        self.engine, self.answer, self.closed = engine, answer, False
        self.stats = SimpleNamespace(
            prompt_tokens=len(engine.cached),
            reused_tokens=n_reused,
            prompt_seconds=0.5,
            generated_tokens=0,
            generate_seconds=0.25,
            drafted_tokens=0,
            accepted_tokens=0,
            slides=0,
            finish_reason=None,
        )

    def __iter__(self):
        room = self.engine.context - self.stats.prompt_tokens + 1  # the last token needs no place
        for token in self.answer:
            if self.stats.generated_tokens == min(self.engine.max_tokens, room):
                full = self.stats.generated_tokens == room
                self.stats.finish_reason = "context" if full else "length"
                return
            if isinstance(token, BaseException):
                raise token
            if isinstance(token, float):
                time.sleep(token)
                continue
            self.engine.cached.append(token)
            self.stats.generated_tokens += 1
            yield token
        self.stats.finish_reason = "stop"

    def close(self):
        self.closed = True


@dataclass(eq=False)
class FakeSampling:
    """Equal to the tuple of its values."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int

    def __post_init__(self):
        if self.temperature < 0:
            raise EngineError("temperature is below 0")

    def __iter__(self):
        return iter(vars(self).values())

    def __eq__(self, other):
        return tuple(self) == other


def lines(*items):
    """A reader of the given lines, then end of file; exceptions among them are raised."""
    rest = iter(items)

    def read():
        item = next(rest, EOFError())
        if isinstance(item, BaseException):
            raise item
        return item

    return read


def start(engine, sampling=None, show_stats=False, **options):
    """A chat with the given engines, one after another if there are several."""
    engines = iter(engine if isinstance(engine, list) else [engine])
    sampling = sampling or FakeSampling(0.0, 0, 1.0, 0.0, 0)
    return Chat(lambda name: next(engines), "fake", sampling, show_stats=show_stats, **options)


def talk(engine, *items, **options):
    """A whole interactive chat; returns its exit code."""
    chat = start(engine, **options)
    chat.greet()
    return loop(chat, lines(*items))


def chatml(*contents, system=None):
    """The prompt text of alternating messages and answers, ending with a message."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]
    head = [{"role": "system", "content": system}] if system else []
    return FakeTokenizer().chat_prompt(head + messages)


def install(fake, setitem=dict.__setitem__):
    """Puts `fake` where chat.main looks for the engine. Returns what it is opened with, later."""
    opened = []

    def open_engine(model, announce, **options):
        opened.append((model, options))
        if isinstance(fake, BaseException):
            raise fake
        if announce:
            announce(fake, fake.memory())
        return fake

    # Through the dictionary: to look them up first would load the GPU library.
    setitem(vars(engine), "Engine", SimpleNamespace(open=open_engine))
    setitem(vars(engine), "Sampling", FakeSampling)
    return opened


def serve(fake, *argv):
    """The whole program in this process, with `fake` for the engine."""
    install(fake)
    sys.exit(chat.main(argv))
