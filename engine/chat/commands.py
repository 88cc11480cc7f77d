"""The commands of a chat: lines that begin with a slash, and the loop that reads all lines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.chat.conversation import END_OF_THINK
from engine.chat.talk import Chat, count, describe
from engine.chat.terminal import say, to_clipboard
from engine.errors import EngineError

_QUOTES = '"""'  # around a message of several lines
_NOTES = '''\
Ctrl-C stops an answer and keeps what there is of it. To send a message that begins with /, put a
space before it. Alt-Enter begins a new line; so does Enter in a message between """ and """. The
arrow up brings back what was typed before. Answers are shown as Markdown, what stands between
<think> and </think> dim; in pipes, on dumb terminals and with NO_COLOR as the model wrote them.
Below the line that is typed stands how full the context is.'''


@dataclass(frozen=True)
class Command:
    usage: str
    what: str
    run: Callable[[Chat, str], None]  # with what follows the name


def loop(chat: Chat, read_line: Callable[[], str]) -> int:
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
        try:
            if line.startswith(_QUOTES):
                chat.ask(_quoted(line, read_line))
            elif line.startswith("/"):
                carry_out(chat, line)
            elif line.strip():
                chat.ask(line)
        except EOFError:
            return 0
        except KeyboardInterrupt:  # while a message was typed, or a command carried out
            say("dropped")


def carry_out(chat: Chat, line: str) -> None:
    """One line that begins with a slash; EOFError when it asks to leave."""
    name, _, text = line.strip().partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        say(f"unknown command {name}; /help lists them")
        return
    with chat.survives():
        command.run(chat, text.strip())


def _quoted(line: str, read_line: Callable[[], str]) -> str:
    """A message that begins with three quotes and goes on to a line that ends with them."""
    lines = [line.removeprefix(_QUOTES)]
    while not lines[-1].rstrip().endswith(_QUOTES):
        lines.append(read_line())
    return "\n".join([*lines[:-1], lines[-1].rstrip().removesuffix(_QUOTES)]).strip("\n")


def _help(chat: Chat, text: str) -> None:
    width = max(len(command.usage) for command in COMMANDS.values()) + 2
    for command in COMMANDS.values():
        say(f"{command.usage:{width}}{command.what}")
    say(_NOTES)


def _reset(chat: Chat, text: str) -> None:
    chat.conversation.turns.clear()
    say("the conversation is forgotten")


def _undo(chat: Chat, text: str) -> None:
    message = _take_back(chat)
    say(f"forgotten: {message}\n{count(len(chat.conversation.turns), 'turn')} left")


def _retry(chat: Chat, text: str) -> None:
    _answer_anew(chat, _take_back(chat))


def _edit(chat: Chat, text: str) -> None:
    if not text:
        raise EngineError("/edit TEXT says TEXT in place of the last message")
    _take_back(chat)
    _answer_anew(chat, text)


def _take_back(chat: Chat) -> str:
    message = chat.conversation.undo()
    if message is None:
        raise EngineError("there is no message to take back")
    return message


def _answer_anew(chat: Chat, message: str) -> None:
    # The same seed would draw the same answer.
    seed = (chat.sampling.seed + 1) % 2**32
    chat.sampling = dataclasses.replace(chat.sampling, seed=seed)
    chat.ask(message)


def _system(chat: Chat, text: str) -> None:
    chat.conversation.system = text or None
    say(f"system prompt: {text}" if text else "the system prompt is taken away")


def _set(chat: Chat, text: str) -> None:
    values = {**vars(chat.sampling), "max_tokens": chat.conversation.max_tokens}
    name, _, number = (part.strip() for part in text.partition("="))
    name = name.replace("-", "_")
    if not text:
        say("  ".join(f"{name}={value}" for name, value in values.items()))
        return
    if name not in values:
        raise EngineError(f"{name}: cannot be set; {', '.join(values)} can")
    kind = type(values[name])
    try:
        value = kind(number)
    except ValueError:
        expected = "a whole number" if kind is int else "a number"
        raise EngineError(f"{name}: expected {expected}, found {number!r}") from None
    if name == "max_tokens":
        if value < 1:
            raise EngineError(f"max_tokens is {value}, expected at least 1")
        chat.conversation.max_tokens = value
    else:
        chat.sampling = dataclasses.replace(chat.sampling, **{name: value})
    say(f"{name}={value}")


def _model(chat: Chat, name: str) -> None:
    from weights.cache import resolve
    from weights.models import cached_models

    if not name:
        others = {model.name for model in cached_models() if model.current}
        say(f"{chat.name}; in the cache: {', '.join(sorted(others)) or 'nothing'}")
        return
    resolve(name)  # what can go wrong or is converted first, does and is beside the old model
    before = chat.name
    chat.give_up()
    chat.name = name
    try:
        chat.greet()
    except BaseException:
        chat.name = before
        say(f"{before} stays, and is opened again for the next message")
        raise
    say(f"{name} goes on with the conversation")


def _copy(chat: Chat, path: str) -> None:
    said = chat.last_answer.rpartition(END_OF_THINK)[2].strip()
    if not said:
        raise EngineError("there is no answer to copy")
    if not path:
        say(to_clipboard(said))
        return
    try:
        Path(path).write_text(f"{said}\n", "utf-8")
    except OSError as error:
        raise EngineError(f"{path}: cannot be written: {error.strerror}") from None
    say(f"written: {count(len(said), 'character')} to {path}")


def _save(chat: Chat, path: str) -> None:
    if not path:
        raise EngineError("/save needs the name of a file")
    n_tokens = chat.engine.save_session(path, chat.conversation.to_json())
    say(f"saved: {count(n_tokens, 'token')} in {path}")


def _load(chat: Chat, path: str) -> None:
    if not path:
        raise EngineError("/load needs the name of a file")
    chat.conversation.from_json(chat.engine.load_session(path))
    say(f"loaded: a conversation of {count(len(chat.conversation.turns), 'turn')}")


def _stats(chat: Chat, text: str) -> None:
    turns = count(len(chat.conversation.turns), "turn")
    about = describe(chat.name, chat.engine, chat.engine.memory())
    say(f"{about}\n{chat.last_stats}\nconversation of {turns}")


def _exit(chat: Chat, text: str) -> None:
    raise EOFError


COMMANDS = {
    command.usage.split()[0]: command
    for command in (
        Command("/help", "this list", _help),
        Command("/reset", "forget the conversation; the system prompt stays", _reset),
        Command("/retry", "another answer to the last message", _retry),
        Command("/undo", "forget the last message and its answer", _undo),
        Command("/edit TEXT", "say TEXT in place of the last message", _edit),
        Command("/system [TEXT]", "system prompt from the next message on; no TEXT: none", _system),
        Command(
            "/set [NAME=VALUE]",
            "temperature, top_k, top_p, min_p, seed or max_tokens; nothing: show them",
            _set,
        ),
        Command("/model [NAME]", "go on with another model; without NAME: which there are", _model),
        Command("/copy [FILE]", "the last answer to the clipboard, or into FILE", _copy),
        Command("/save FILE", "the conversation, with all that the model has read of it", _save),
        Command("/load FILE", "go on with a conversation that was saved", _load),
        Command(
            "/stats", "the model, the last answer's figures, the conversation's length", _stats
        ),
        Command("/exit", "leave, as Ctrl-D does", _exit),
    )
}
