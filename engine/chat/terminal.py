"""The user's side: notes on stderr, lines from the keyboard, the clipboard."""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Callable

# C0 but newline and tab, DEL, C1. Without them no escape sequence can begin.
CONTROLS = dict.fromkeys(c for c in (*range(0x20), *range(0x7F, 0xA0)) if chr(c) not in "\n\t")

# Terminals that pass over OSC 52, by a variable that they set and (where it matters) its value.
_NO_CLIPBOARD = {"TERM": "linux", "TERM_PROGRAM": "Apple_Terminal", "VTE_VERSION": None}
_MOST_COPIED = 74_000  # bytes; what the terminals with the least room take, in base64 100,000


def is_plain() -> bool:
    """Whether stderr shows control sequences as they are, or goes to a file."""
    return os.environ.get("TERM") == "dumb" or not sys.stderr.isatty()


def say(text: str, dim: bool = True) -> None:
    """A note on stderr, dimmed on a terminal unless NO_COLOR (no-color.org) is set."""
    text = text.translate(CONTROLS)
    if dim and not is_plain() and not os.environ.get("NO_COLOR"):
        text = f"\x1b[2m{text}\x1b[0m"
    print(text, file=sys.stderr, flush=True)


def complain(error: Exception) -> None:
    """An error's line on stderr."""
    say(f"error: {error}", dim=False)


def to_clipboard(text: str) -> str:
    """Hands `text` to the terminal for the clipboard (OSC 52); returns what is to be said of it.

    A terminal does not say whether it has taken it.
    """
    env = os.environ
    if is_plain() or any(
        name in env and value in (None, env[name]) for name, value in _NO_CLIPBOARD.items()
    ):
        return "this terminal cannot copy; /copy FILE writes the answer there"
    data = text.encode()
    if len(data) > _MOST_COPIED:
        return f"too long to copy ({len(data)} bytes); /copy FILE writes the answer there"
    print(f"\x1b]52;c;{base64.b64encode(data).decode()}\x07", end="", file=sys.stderr, flush=True)
    hint = "tmux needs: set -s set-clipboard on" if "TMUX" in env else "if your terminal allows it"
    return f"copied: {len(text)} characters, {hint}"


def line_reader(note: Callable[[str], str] | None = None) -> Callable[[], str]:
    """Reads the user's lines, with editing and a history where the terminal can do that.

    `note` makes, of what is typed so far, a line that stands below it.
    """
    if is_plain():
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
