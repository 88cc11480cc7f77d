"""chat.py as a process, on a pseudo-terminal where it wants one; the engine is a fake."""

import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

import chat

termios = pytest.importorskip("termios")
ROOT = Path(chat.__file__).parent


def child_env(**more):
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    # Buffered as for a user, and no question to the terminal that nothing here would answer.
    fixed = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "", "PROMPT_TOOLKIT_NO_CPR": "1"}
    return {**os.environ, **fixed, "TERM": "xterm", **more}


def test_help_needs_no_engine():
    code = (
        "import sys, chat\n"
        "try: chat.main(['--help'])\n"
        "except SystemExit as leave: assert leave.code == 0\n"
        "heavy = {'engine.generate', 'wgpu', 'rich', 'numpy', 'tokenizers', 'prompt_toolkit'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert 'answer -p "Why is the sky blue?"' in done.stdout


def test_a_reader_that_leaves_ends_the_answer_quietly():
    program = (
        "from fake_engine import *; serve(FakeEngine('a' * 100_000, context=10**6), '-p', 'x')"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        env=child_env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    child.stdout.close()
    err = child.stderr.read().decode()
    child.stderr.close()
    assert child.wait(60) == 141
    assert "Traceback" not in err and "BrokenPipe" not in err


class Terminal:
    """`program` on a pseudo-terminal of its own, and what that has shown so far."""

    def __init__(self, program, stdout=None, stderr=None, **env):
        self.screen, self.side = os.openpty()
        self.settings = termios.tcgetattr(self.side)
        own = (
            "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)"  # or Ctrl-C goes nowhere
        )
        self.child = subprocess.Popen(
            [sys.executable, "-c", f"{own}; from fake_engine import *; {program}"],
            start_new_session=True,
            stdin=self.side,
            stdout=self.side if stdout is None else stdout,
            stderr=self.side if stderr is None else stderr,
            env=child_env(**env),
        )
        self.plain = env.get("TERM") == "dumb"
        self.shown = self.unread = ""

    def expect(self, text):
        """Reads on until `text` has been shown after what was expected last."""
        deadline = time.monotonic() + 60
        while text not in self.unread:
            left = deadline - time.monotonic()
            if left < 0 or not select.select([self.screen], [], [], left)[0]:
                pytest.fail(f"{text!r} did not come after {self.shown!r}")
            new = os.read(self.screen, 65536).decode(errors="replace")
            self.shown, self.unread = self.shown + new, self.unread + new
        self.unread = self.unread.partition(text)[2]

    def expect_prompt(self):
        # The line editor turns bracketed paste on once it has taken over the keyboard.
        self.expect("> " if self.plain else "\x1b[?2004h")

    def send(self, keys):
        os.write(self.screen, keys.encode())

    def leave(self):
        """Exit code; the terminal must be as it was found."""
        code = self.child.wait(60)
        while select.select([self.screen], [], [], 0)[0]:
            self.shown += os.read(self.screen, 65536).decode(errors="replace")
        assert termios.tcgetattr(self.side) == self.settings
        return code

    def close(self):
        self.child.kill()
        self.child.wait(60)
        os.close(self.screen)
        os.close(self.side)


@pytest.fixture
def terminal():
    opened = []

    def start(*args, **kwargs):
        opened.append(Terminal(*args, **kwargs))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


SCRIPT = "serve(FakeEngine('First answer.', [*b'Second', *[0.01] * 6000], 'Third\\x1b[31m.'))"


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_a_chat_on_a_terminal(terminal, tmp_path, term):
    tty = terminal(SCRIPT, XDG_STATE_HOME=str(tmp_path), TERM=term)
    tty.expect("134.5 M parameters")
    tty.expect_prompt()
    tty.send("one\r")
    tty.expect("First answer.")
    tty.expect_prompt()
    tty.send("two\r")
    tty.expect("Second")
    tty.send("\x03")
    tty.expect("stopped")
    tty.expect_prompt()
    tty.send("/stats\r")
    tty.expect("conversation of 2 turns")
    tty.expect_prompt()
    tty.send("three\r")
    tty.expect("Third[31m.")
    tty.expect_prompt()
    tty.send("\x04")
    assert tty.leave() == 0
    assert "Traceback" not in tty.shown
    assert ("\x1b[2m" in tty.shown) == (term == "xterm")


def test_ctrl_c_at_the_terminal_takes_back_the_line_then_hints_then_leaves(terminal, tmp_path):
    tty = terminal("serve(FakeEngine())", XDG_STATE_HOME=str(tmp_path))
    tty.expect_prompt()
    tty.send("abc")
    tty.expect("abc")
    tty.send("\x03")
    tty.expect_prompt()
    assert "once more" not in tty.shown
    tty.send("\x03")
    tty.expect("Ctrl-C once more leaves")
    tty.expect_prompt()
    tty.send("\x03")
    assert tty.leave() == 0
    assert "Traceback" not in tty.shown


def test_stdout_of_a_chat_holds_only_the_answers(terminal, tmp_path):
    with open(tmp_path / "answers", "wb") as answers:
        tty = terminal(SCRIPT, stdout=answers, XDG_STATE_HOME=str(tmp_path))
    tty.expect_prompt()
    tty.send("one\r")
    tty.expect("answer 13 tokens")
    tty.expect_prompt()
    tty.send("/exit\r")
    assert tty.leave() == 0
    assert (tmp_path / "answers").read_bytes() == b"First answer.\n"


def test_notes_may_go_to_a_file(terminal, tmp_path):
    with open(tmp_path / "notes", "wb") as notes:
        tty = terminal(SCRIPT, stderr=notes, XDG_STATE_HOME=str(tmp_path))
    tty.send("one\n\x04")
    assert tty.leave() == 0
    assert "First answer.\r\n" in tty.shown
    assert "\x1b" not in tty.shown and "> " not in tty.shown
    assert b"/help lists" in (tmp_path / "notes").read_bytes()


def test_an_answer_in_characters_that_stdout_lacks():
    program = "from fake_engine import *; serve(FakeEngine('caf\\u00e9'), '-p', 'x')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=child_env(PYTHONIOENCODING="ascii"),
        capture_output=True,
    )
    assert (done.returncode, done.stdout) == (0, b"caf?\n")


def test_lines_are_remembered_from_chat_to_chat(terminal, tmp_path):
    program = "serve(FakeEngine('First answer.'))"
    for keys in ("quokka\r", "\x1b[A\r"):  # the second chat gets it by the up key
        tty = terminal(program, XDG_STATE_HOME=str(tmp_path))
        tty.expect_prompt()
        tty.send(keys)
        tty.expect("quokka")
        tty.expect("First answer.")
        tty.expect_prompt()
        tty.send("\x04")
        assert tty.leave() == 0
    history = tmp_path / "answer" / "history"
    assert "+quokka" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600


def test_a_home_that_cannot_be_written_does_not_stop_the_chat(terminal, tmp_path):
    not_a_directory = tmp_path / "file"
    not_a_directory.touch()
    tty = terminal(SCRIPT, XDG_STATE_HOME=str(not_a_directory))
    tty.expect_prompt()
    tty.send("one\r")
    tty.expect("First answer.")
    tty.expect_prompt()
    tty.send("\x04")
    assert tty.leave() == 0
    assert "Traceback" not in tty.shown


def test_a_terminal_shows_markdown_and_takes_lines_by_alt_enter(terminal, tmp_path):
    program = "serve(FakeEngine('Some *soft* `code`.\\n\\n- one', 'Plain.'))"
    tty = terminal(program, XDG_STATE_HOME=str(tmp_path), PROMPT_TOOLKIT_NO_CPR="0")
    tty.expect("\x1b[6n")
    tty.send("\x1b[5;1R")  # the terminal says where the cursor is: there is room for a line below
    tty.send("abcdef\x1b\rghijkl")
    tty.expect("13 of 4096 tokens")
    tty.send("\r")
    tty.expect("Some \x1b[3msoft\x1b[0m ")
    tty.expect(" • \x1b[0mone")
    tty.expect("\x1b[6n")
    tty.send("\x1b[5;1R/retry\r")
    tty.expect("Plain.")
    tty.expect("\x1b[6n")
    tty.send("\x1b[5;1R\x04")
    assert tty.leave() == 0
    assert "Traceback" not in tty.shown


def test_without_colours_an_answer_is_as_the_model_wrote_it(terminal, tmp_path):
    program = "serve(FakeEngine('Some *soft* `code`.'))"
    tty = terminal(program, XDG_STATE_HOME=str(tmp_path), TERM="xterm", NO_COLOR="1")
    tty.expect_prompt()
    tty.send("a\r")
    tty.expect("Some *soft* `code`.")
    tty.expect_prompt()
    tty.send("\x04")
    assert tty.leave() == 0
