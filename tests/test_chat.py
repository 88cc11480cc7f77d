"""chat.py against a fake engine: flags, streams, errors, text on its way to the terminal."""

import io
import os
import sys

import pytest
from fake_engine import FakeEngine, chatml, install, talk

import chat
from engine.chat.terminal import say
from engine.errors import EngineError, WeightsError

STATS = ("prompt ", "answer ", "context ")  # the parts of a statistics line


@pytest.fixture
def use(monkeypatch):
    return lambda fake: install(fake, monkeypatch.setitem)


# One-shot


def test_one_shot_stdout_holds_only_the_answer(use, capsys):
    use(FakeEngine("It is\nblue."))
    assert chat.main(["-p", "Why?"]) == 0
    out, err = capsys.readouterr()
    assert out == "It is\nblue.\n"
    assert "134.5 M parameters" in err and "4.12 bit/weight" in err and "Fake adapter" in err
    assert "91.5 MB" in err and "context 4096" in err
    assert all(part in err.splitlines()[-1] for part in STATS)


def test_an_answer_that_ends_its_line_gets_no_second_newline(use, capsys):
    use(FakeEngine("blue\n"))
    assert chat.main(["-p", "Why?"]) == 0
    assert capsys.readouterr().out == "blue\n"


def test_no_stats_leaves_stderr_empty(use, capsys):
    use(FakeEngine("blue"))
    assert chat.main(["-p", "Why?", "--no-stats"]) == 0
    assert capsys.readouterr() == ("blue\n", "")


def test_stats_line_gives_rates_of_what_was_computed(capsys):
    engine = FakeEngine("abc", "defgh")
    talk(engine, "x", "y", show_stats=True)
    n_first, n_second = (len(prompt) for prompt in engine.prompts)
    n_reused = n_first + len("abc")  # all of the first turn
    last = capsys.readouterr().err.splitlines()[-1]
    n_new = n_second - n_reused
    assert f"prompt {n_second} tokens, {n_new} new at {n_new / 0.5:.1f}/s" in last
    assert f"answer 5 tokens at {5 / 0.25:.1f}/s" in last  # 4 after the first, and the stop token
    assert f"context {n_second + 5} of 4096" in last


def test_stats_line_takes_the_first_token_for_the_prompts(capsys):
    talk(FakeEngine("abcdef"), "x", max_tokens=5, show_stats=True)
    assert f"answer 5 tokens at {4 / 0.25:.1f}/s" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["-p", "-"]])
def test_prompt_comes_from_stdin(use, monkeypatch, capsys, flags):
    engine = FakeEngine("yes")
    use(engine)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo \xff\xe2\x82\xac\n")))
    assert chat.main(flags) == 0
    assert engine.prompt_text() == chatml("one\ntwo \N{REPLACEMENT CHARACTER}\N{EURO SIGN}")
    assert capsys.readouterr().out == "yes\n"


def test_prompt_bytes_that_are_not_utf8_are_replaced(use):
    engine = FakeEngine("yes")
    use(engine)
    assert chat.main(["-p", os.fsdecode(b"caf\xe9")]) == 0
    assert engine.prompt_text() == chatml("caf?")


def test_flags_reach_the_engine(use):
    engine = FakeEngine("abcdef")
    opened = use(engine)
    words = "--model m.safetensors --bits 3.25 --context 512 --adapter H100 --exact -n 3 -t 0.5"
    words += " --draft d.safetensors --overflow slide --cache int8 --top-k 40"
    words += " --top-p 0.9 --min-p 0.05 --seed 7 -s Rhyme -p Hi"
    assert chat.main(words.split()) == 0
    options = {"exact": True, "context": 512, "adapter": "H100", "bits": 3.25}
    options |= {"cache": "int8", "draft": "d.safetensors"}
    assert opened == [("m.safetensors", options)]
    assert engine.sampling == (0.5, 40, 0.9, 0.05, 7)
    assert engine.max_tokens == 3 and engine.slide
    assert engine.prompt_text() == chatml("Hi", system="Rhyme")


def test_defaults_are_the_default_model_and_another_seed_each_time(use):
    seeds = set()
    for _ in range(2):
        engine = FakeEngine("a")
        opened = use(engine)
        assert chat.main(["-p", "Hi"]) == 0
        options = {"exact": False, "context": None, "adapter": None, "bits": None}
        options |= {"cache": "f16", "draft": None}
        assert opened == [("smollm2", options)]
        *sampling, seed = engine.sampling
        assert sampling == [0.5, 0, 1.0, 0.1]
        seeds.add(seed)
    assert len(seeds) == 2  # but for once in 2^32


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["-n", "0"], "expected a whole number from 1 to"),
        (["-n", "1.5"], "found 1.5"),
        (["--context", "-3"], "argument --context"),
        (["--bits", "0.2"], "expected 0.25 to 8, or lossless, found 0.2"),
        (["-t", "-1"], "expected a number from 0 to 100"),
        (["-t", "nan"], "found nan"),
        (["-t", "inf"], "found inf"),
        (["-t", "warm"], "found warm"),
        (["--top-p", "1.01"], "expected a number from 0 to 1"),
        (["--min-p", "-0.1"], "argument --min-p"),
        (["--top-k", "-1"], "argument --top-k"),
        (["--seed", "-1"], "argument --seed"),
        (["-p", " \n"], "the prompt is empty"),
        (["a.safetensors", "b.safetensors"], "unrecognized arguments"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_loaded(use, capsys, flags, complaint):
    opened = use(FakeEngine())
    with pytest.raises(SystemExit) as exit_info:
        chat.main(["-p", "Hi", *flags])
    out, err = capsys.readouterr()
    assert exit_info.value.code == 2
    assert (out, opened) == ("", [])
    assert err.splitlines()[-1].startswith("answer chat: error: ") and complaint in err


# Errors


def test_engine_error_is_one_line_and_exit_code_1(use, capsys):
    use(WeightsError("m.safetensors: no such file"))
    assert chat.main(["-p", "Hi"]) == 1
    assert capsys.readouterr() == ("", "error: m.safetensors: no such file\n")


def test_engine_error_in_an_answer_keeps_what_was_said(use, capsys):
    use(FakeEngine([*b"half", EngineError("the device was lost")]))
    assert chat.main(["-p", "Hi", "--no-stats"]) == 1
    out, err = capsys.readouterr()
    assert out == "half\n"
    assert err == "error: the device was lost\n"


def test_a_programming_mistake_keeps_its_traceback(use):
    use(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        chat.main(["-p", "Hi"])


def test_ctrl_c_while_loading_leaves_quietly(use, capsys):
    use(KeyboardInterrupt())
    assert chat.main(["-p", "Hi"]) == 130
    assert capsys.readouterr() == ("", "")


def test_ctrl_c_in_a_one_shot_answer_is_exit_code_130(use, capsys):
    use(FakeEngine([*b"half", KeyboardInterrupt()]))
    assert chat.main(["-p", "Hi"]) == 130
    assert capsys.readouterr().out == "half\n"


def test_a_one_shot_prompt_too_long_is_exit_code_1(use, capsys):
    use(FakeEngine(context=200))
    assert chat.main(["-p", "x" * 200, "--no-stats"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1


# Text on its way to the terminal


def test_utf8_is_never_torn(use, monkeypatch, capsys):
    text = "h\N{LATIN SMALL LETTER E WITH ACUTE}\N{EURO SIGN}\N{GRINNING FACE}."
    use(FakeEngine(text.encode()))  # a byte a token
    written = []
    write = sys.stdout.write
    monkeypatch.setattr(sys.stdout, "write", lambda s: written.append(s) or write(s))
    assert chat.main(["-p", "Hi"]) == 0
    assert capsys.readouterr().out == text + "\n"
    assert [piece for piece in written if piece] == [*text, "\n"]


def test_half_a_character_at_the_end_is_not_printed(use, capsys):
    use(FakeEngine("ok\N{EURO SIGN}".encode()[:-1]))
    assert chat.main(["-p", "Hi"]) == 0
    assert capsys.readouterr().out == "ok\n"


EVIL = "a\x1b[31mb\x9b2Jc\x07\r\x00\x7fd\te\nf"


def test_escape_sequences_do_not_reach_a_terminal(use, monkeypatch, capsys):
    use(FakeEngine(EVIL))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert chat.main(["-p", "Hi"]) == 0
    assert capsys.readouterr().out == "a[31mb2Jcd\te\nf\n"


def test_a_file_gets_the_answer_unchanged(use, capfdbinary):
    use(FakeEngine(EVIL))
    assert chat.main(["-p", "Hi"]) == 0
    assert capfdbinary.readouterr().out == EVIL.encode() + b"\n"


@pytest.mark.parametrize(
    ("tty", "no_color", "term", "want"),
    [
        (True, None, "xterm", "\x1b[2mno[1m\x1b[0m\n"),
        (True, "", "xterm", "\x1b[2mno[1m\x1b[0m\n"),  # no-color.org: an empty value does not count
        (True, "1", "xterm", "no[1m\n"),
        (True, None, "dumb", "no[1m\n"),
        (False, None, "xterm", "no[1m\n"),
    ],
)
def test_notes_are_dim_on_a_colour_terminal_only(monkeypatch, capsys, tty, no_color, term, want):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: tty)
    monkeypatch.setenv("TERM", term)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    say("no\x1b[1m")
    assert capsys.readouterr() == ("", want)
