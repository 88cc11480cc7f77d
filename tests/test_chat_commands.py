"""The commands of a chat, against a fake engine."""

import base64
import os
import re
from pathlib import Path

import pytest
from fake_engine import FakeEngine, FakeSampling, chatml, start, talk

from engine.chat.commands import COMMANDS, carry_out
from engine.errors import DeviceLostError, EngineError


def test_reset_forgets_the_turns_and_keeps_the_system_prompt():
    engine = FakeEngine("one", "two")
    talk(engine, "a", "/reset", "b", system="S")
    assert engine.prompt_text() == chatml("b", system="S")


def test_system_sets_and_takes_away_the_system_prompt():
    engine = FakeEngine("one", "two", "three")
    talk(engine, "a", "/system  Be brief. ", "b", "/system", "c")
    assert engine.prompt_text(1) == chatml("a", "one", "b", system="Be brief.")
    assert engine.prompt_text(2) == chatml("a", "one", "b", "two", "c")


def test_stats_tells_model_answer_and_conversation(capsys):
    talk(FakeEngine("one"), "/stats", "a", "/stats")
    err = capsys.readouterr().err
    assert "no answer yet\nconversation of 0 turns\n" in err
    assert err.count("134.5 M parameters") == 2
    assert err.endswith("of 4096\nconversation of 1 turn\n")


def test_help_tells_of_every_command_and_key(capsys):
    talk(FakeEngine(), "/help")
    out, err = capsys.readouterr()
    assert out == ""
    assert all(
        f"\n{command.usage} " in err and command.what in err for command in COMMANDS.values()
    )
    assert all(
        key in err for key in ("Ctrl-C", "Alt-Enter", "arrow up", '"""', "<think>", "NO_COLOR")
    )


def test_the_page_of_the_chat_names_every_command():
    page = (Path(__file__).parents[1] / "docs" / "chat.md").read_text("utf-8")
    assert not [name for name in COMMANDS if f"`{name}" not in page]


def test_exit_leaves_at_once():
    engine = FakeEngine("one")
    assert talk(engine, "/exit", "a") == 0
    assert engine.prompts == []


def test_a_template_that_refuses_the_messages_does_not_end_the_chat(capsys):
    engine = FakeEngine("one")
    render = engine.tokenizer.chat_prompt

    def refuse_system(messages):
        if messages[0]["role"] == "system":
            raise EngineError("no system role here")
        return render(messages)

    engine.tokenizer.chat_prompt = refuse_system
    talk(engine, "/system S", "a", "/system", "b")
    assert engine.prompt_text() == chatml("b")
    assert "error: no system role here" in capsys.readouterr().err


def test_unknown_command_is_one_line_and_not_sent(capsys):
    engine = FakeEngine("one")
    talk(engine, "/frobnicate now", " /etc/hosts is what?")
    assert engine.prompt_text() == chatml(" /etc/hosts is what?")
    notes = capsys.readouterr().err.splitlines()
    assert notes[1:] == ["unknown command /frobnicate; /help lists them"]


def test_retry_draws_another_answer_to_the_same_message():
    engine = FakeEngine("One.", "Two.", "Three.")
    seeds, generate = [], engine.generate

    def noted(ids, max_tokens, sampling, **options):
        seeds.append(sampling.seed)
        return generate(ids, max_tokens, sampling, **options)

    engine.generate = noted
    sampling = FakeSampling(0.5, 0, 1.0, 0.1, 2**32 - 1)
    assert talk(engine, "a", "b", "/retry", sampling=sampling) == 0
    assert engine.prompt_text(2) == engine.prompt_text(1) == chatml("a", "One.", "b")
    assert seeds == [2**32 - 1, 2**32 - 1, 0]


def test_undo_and_edit_take_back_the_last_message(capsys):
    engine = FakeEngine("One.", "Two.", "Three.", "Four.")
    assert talk(engine, "a", "b", "/undo", "c", "/edit d", "/undo", "/undo", "/undo") == 0
    assert engine.prompt_text(2) == chatml("a", "One.", "c")
    assert engine.prompt_text(3) == chatml("a", "One.", "d")
    err = capsys.readouterr().err
    assert "forgotten: b\n1 turn left" in err and "forgotten: a\n0 turns left" in err
    assert "there is no message to take back" in err


def test_after_undo_the_cache_is_of_use_still():
    # "he" was said as two tokens: read again it would be one, and the rest another prompt.
    engine = FakeEngine("One.", "Two.", "Three.")
    talk(engine, "a", "b", "/retry")
    assert engine.prompts[2] == engine.prompts[1]


def test_set_changes_how_tokens_are_drawn(capsys):
    engine = FakeEngine("One.")
    lines_ = ("/set temperature=0.9", "/set top-k = 40", "/set max_tokens=7", "/set", "a")
    talk(engine, *lines_, sampling=FakeSampling(0.5, 0, 1.0, 0.1, 3))
    assert engine.sampling == (0.9, 40, 1.0, 0.1, 3) and engine.max_tokens == 7
    said = "temperature=0.9  top_k=40  top_p=1.0  min_p=0.1  seed=3  max_tokens=7"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/set warmth=1", "warmth: cannot be set; temperature, top_k,"),
        ("/set temperature=warm", "temperature: expected a number, found 'warm'"),
        ("/set top_k=1.5", "top_k: expected a whole number, found '1.5'"),
        ("/set temperature", "expected a number, found ''"),
        ("/set temperature=-1", "temperature is below 0"),
        ("/set max_tokens=0", "max_tokens is 0, expected at least 1"),
        ("/edit", "/edit TEXT says TEXT"),
        ("/retry", "there is no message to take back"),
    ],
)
def test_commands_say_what_is_wrong_with_them(line, said, capsys):
    engine = FakeEngine("One.")
    talk(engine, line, "a", sampling=FakeSampling(0.5, 0, 1.0, 0.1, 3))
    assert said in capsys.readouterr().err
    assert engine.sampling == (0.5, 0, 1.0, 0.1, 3) and engine.max_tokens == 1024


def test_quotes_hold_a_message_of_several_lines(capsys):
    engine = FakeEngine("One.", "Two.", "Three.")
    quoted = (
        ('"""', "/help", "", "two", '"""'),
        (
            '"""a',
            'b"""  ',
        ),
        ('"""alone"""',),
    )
    assert talk(engine, *quoted[0], "/reset", *quoted[1], "/reset", *quoted[2]) == 0
    texts = [engine.prompt_text(i) for i in range(3)]
    assert texts == [chatml("/help\n\ntwo"), chatml("a\nb"), chatml("alone")]
    assert talk(engine, '"""a', KeyboardInterrupt(), '"""b') == 0  # dropped, then the file ends
    assert len(engine.prompts) == 3
    assert "dropped" in capsys.readouterr().err


# Another model


def test_model_goes_on_with_the_conversation(tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    other.touch()
    engines = [FakeEngine("One.", "Two."), FakeEngine("Three.", context=1000)]
    assert talk(engines, "a", "b", f"/model {other}", "c", system="S") == 0
    assert engines[1].prompt_text() == chatml("a", "One.", "b", "Two.", "c", system="S")
    assert f"{other} goes on with the conversation" in capsys.readouterr().err


def test_a_model_that_cannot_be_had_leaves_the_old_one(tmp_path, capsys):
    engine = FakeEngine("One.", "Two.")
    talk(engine, "a", f"/model {tmp_path}/none", "b")
    assert engine.prompt_text() == chatml("a", "One.", "b")
    assert "none: no such file" in capsys.readouterr().err


def test_a_model_that_does_not_open_makes_way_for_the_old_one(tmp_path, capsys):
    broken = tmp_path / "broken.safetensors"
    broken.touch()
    first, again = FakeEngine("One."), FakeEngine("Two.")
    chat = start(first)
    opened = []

    def open_engine(name):
        opened.append(name)
        if name == str(broken):
            raise EngineError("broken.safetensors: no room")
        return again

    chat.open = open_engine
    chat.ask("a")
    carry_out(chat, f"/model {broken}")
    chat.ask("b")
    assert opened == [str(broken), "fake"] and chat.name == "fake"
    assert again.prompt_text() == chatml("a", "One.", "b")
    err = capsys.readouterr().err
    assert "fake stays" in err and "error: broken.safetensors: no room" in err


def test_model_alone_lists_what_is_in_the_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("weights.models.cache_folder", lambda: tmp_path)
    talk(FakeEngine(), "/model")
    assert "fake; in the cache: nothing" in capsys.readouterr().err


# The clipboard


def copied(err):
    """What the escape sequences in `err` put on the clipboard."""
    return [base64.b64decode(data).decode() for data in re.findall(r"\x1b]52;c;(.*?)\x07", err)]


@pytest.fixture
def xterm(monkeypatch):
    monkeypatch.setattr("engine.chat.terminal.is_plain", lambda: os.environ["TERM"] == "dumb")
    monkeypatch.setenv("TERM", "xterm")
    for name in ("TERM_PROGRAM", "VTE_VERSION", "TMUX"):
        monkeypatch.delenv(name, raising=False)


def test_copy_hands_over_the_answer_without_its_reasoning(xterm, capsys):
    talk(FakeEngine("<think>Hm.\n</think>\n\nB\u00e9 it.\n"), "/copy", "a", "/copy")
    err = capsys.readouterr().err
    assert copied(err) == ["B\u00e9 it."]
    assert "there is no answer to copy" in err
    assert "copied: 6 characters, if your terminal allows it" in err


@pytest.mark.parametrize(
    "variable", [{"TERM": "dumb"}, {"TERM": "linux"}, {"TERM_PROGRAM": "Apple_Terminal"}]
)
def test_copy_says_where_the_terminal_cannot(xterm, monkeypatch, capsys, variable):
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    talk(FakeEngine("One."), "a", "/copy")
    err = capsys.readouterr().err
    assert copied(err) == []
    assert "this terminal cannot copy; /copy FILE writes the answer there" in err


def test_copy_of_too_much_is_refused(xterm, capsys):
    talk(FakeEngine("y" * 80_000, context=10**6), "a", "/copy", max_tokens=10**5)
    err = capsys.readouterr().err
    assert copied(err) == [] and "too long to copy (80000 bytes)" in err


def test_copy_to_a_file(tmp_path, capsys):
    talk(FakeEngine("One."), "a", f"/copy {tmp_path}/said", f"/copy {tmp_path}/no/such")
    assert (tmp_path / "said").read_text() == "One.\n"
    assert "such: cannot be written: No such file" in capsys.readouterr().err


# A device that is lost


def test_a_lost_device_is_opened_again_and_the_answer_begun_anew(capsys):
    lost = DeviceLostError("the device was lost")
    engines = [FakeEngine("One.", [*b"Tw", lost]), FakeEngine("Two.", "Three.")]
    assert talk(engines, "a", "b", "c", system="S") == 0
    assert engines[1].prompt_text(0) == chatml("a", "One.", "b", system="S")
    assert engines[1].prompt_text(1) == chatml("a", "One.", "b", "Two.", "c", system="S")
    out, err = capsys.readouterr()
    assert out == "One.\nTw\nTwo.\nThree.\n"
    assert "error: the device was lost\n" in err and "conversation is kept" in err


def test_a_device_lost_twice_keeps_the_conversation_for_the_next_message():
    engines = [
        FakeEngine("One.", [DeviceLostError("lost")]),
        FakeEngine([DeviceLostError("lost")]),
        FakeEngine("Three."),
    ]
    assert talk(engines, "a", "b", "c") == 0
    assert engines[2].prompt_text() == chatml("a", "One.", "c")


def test_any_other_error_of_an_answer_leaves_the_chat_going(capsys):
    engine = FakeEngine("One.", [*b"Tw", EngineError("out of memory")], "Three.")
    assert talk(engine, "a", "b", "c") == 0
    assert engine.prompt_text() == chatml("a", "One.", "c")
    assert "error: out of memory\n" in capsys.readouterr().err


def test_counter_counts_what_was_said_and_what_is_typed():
    engine = FakeEngine("One.")
    session = start(engine)
    assert session.count("abc") == "3 of 4096 tokens"
    session.answer("a")
    n = len(engine.prompts[0]) + len("One.")
    assert session.count("abc") == f"{n + 3} of 4096 tokens"
    carry_out(session, "/undo")
    assert session.count("") == "0 of 4096 tokens"
