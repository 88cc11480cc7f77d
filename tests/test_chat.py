"""chat.py against a fake engine: flags, streams, the conversation, the context, the commands."""

import io
import os
import sys

import pytest
from fake_engine import HE, FakeEngine, FakeSampling, FakeTokenizer, install

import chat
from engine.errors import EngineError, WeightsError

STATS = ("prompt ", "answer ", "context ")  # the parts of a statistics line


@pytest.fixture
def use(monkeypatch):
    return lambda fake: install(fake, monkeypatch.setitem)


def lines(*items):
    """A reader of the given lines, then end of file; exceptions among them are raised."""
    rest = iter(items)

    def read():
        item = next(rest, EOFError())
        if isinstance(item, BaseException):
            raise item
        return item

    return read


def talk(engine, *items, system=None, max_tokens=1024, show_stats=False, sampling=None):
    """A whole interactive chat; returns its exit code."""
    conversation = chat.Conversation(engine.tokenizer, engine.context, max_tokens, system)
    sampling = sampling or FakeSampling(0.0, 0, 1.0, 0.0, 0)
    session = chat.Chat(engine, "fake", sampling, conversation, show_stats)
    session.greet()
    return session.loop(lines(*items))


def chatml(*contents, system=None):
    """The prompt text of alternating messages and answers, ending with a message."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]
    head = [{"role": "system", "content": system}] if system else []
    return FakeTokenizer().chat_prompt(head + messages)


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
    chat.say("no\x1b[1m")
    assert capsys.readouterr() == ("", want)


# The conversation


def test_conversation_grows_turn_by_turn(capsys):
    engine = FakeEngine("one", "two", "three")
    assert talk(engine, "a", "", "  ", "b", "c", system="S") == 0
    assert engine.prompt_text() == chatml("a", "one", "b", "two", "c", system="S")
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


def test_next_prompt_starts_with_the_very_tokens_of_the_last_turn():
    answer = [ord("t"), ord("h"), ord("e")]  # tokenized again this is t, he
    engine = FakeEngine(answer, answer, "end")
    talk(engine, "hey", "she", "go")
    assert engine.tokenizer.encode("the") != answer
    first, second, third = engine.prompts
    assert second[: len(first) + 3] == first + answer
    assert third[: len(second) + 3] == second + answer
    assert engine.prompt_text() == chatml("hey", "the", "she", "the", "go")


def test_text_is_tokenized_afresh_where_a_token_spans_the_joint():
    engine = FakeEngine("oh", "end")
    engine.tokenizer.chat_prompt = lambda messages: "".join(m["content"] for m in messages)
    talk(engine, "ah", "e!")
    assert engine.prompts[1] == [*b"aho", HE, ord("!")]


def test_text_is_tokenized_afresh_where_the_template_rewrites_the_answer():
    engine = FakeEngine("the ", "end")
    plain = engine.tokenizer.chat_prompt
    engine.tokenizer.chat_prompt = lambda messages: plain(
        [{**m, "content": m["content"].strip()} for m in messages]
    )
    talk(engine, "a", "b")
    assert engine.prompts[1] == engine.tokenizer.encode(chatml("a", "the", "b"))


def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(capsys):
    engine = FakeEngine("one", [*b"two", KeyboardInterrupt()], "three")
    assert talk(engine, "a", "b", "c") == 0
    assert engine.prompt_text() == chatml("a", "one", "b", "two", "c")
    out, err = capsys.readouterr()
    assert out == "one\ntwo\nthree\n"
    assert "stopped" in err


def test_ctrl_c_closes_the_generation():
    engine = FakeEngine([*b"two", KeyboardInterrupt()])
    made = []
    generate = engine.generate
    engine.generate = lambda *args, **options: made.append(generate(*args, **options)) or made[-1]
    talk(engine, "a")
    assert [generation.closed for generation in made] == [True]


def test_ctrl_c_before_the_first_word_forgets_the_message(capsys):
    engine = FakeEngine("one", [KeyboardInterrupt()], "three")
    talk(engine, "a", "b", "c")
    assert engine.prompt_text() == chatml("a", "one", "c")
    out, err = capsys.readouterr()
    assert out == "one\nthree\n"
    assert "forgotten" in err


def test_ctrl_c_at_the_prompt_hints_and_the_second_leaves(capsys):
    engine = FakeEngine("one")
    ctrl_c = KeyboardInterrupt()
    assert talk(engine, ctrl_c, "a", ctrl_c, ctrl_c, "b") == 0
    assert len(engine.prompts) == 1  # the line between takes the hint back; "b" is never read
    assert capsys.readouterr().err.count("Ctrl-C once more leaves") == 2


def test_length_limit_is_said(capsys):
    talk(FakeEngine("abcdef"), "a", max_tokens=4)
    out, err = capsys.readouterr()
    assert out == "abcd\n"
    assert "stopped after 4 tokens (-n)" in err


def test_model_without_template_continues_each_message_on_its_own(capsys):
    engine = FakeEngine(" a time", " end")
    engine.tokenizer.chat_template = None
    talk(engine, "Once upon", "The", system="S")
    assert [engine.prompt_text(i) for i in range(2)] == ["Once upon", "The"]
    err = capsys.readouterr().err
    assert "no chat template" in err and "system prompt is not used" in err


# The context

N_FRAME = len(FakeTokenizer().encode(chatml("")))  # tokens of a prompt around an empty message
SMALL = 200


def test_a_full_context_leaves_out_the_oldest_turns_and_goes_on(capsys):
    engine = FakeEngine("1" * 30, "2" * 30, "3" * 30, "4" * 30, context=SMALL)
    talk(engine, "a", "b", "c", "d", system="S", max_tokens=40)
    # A turn takes 30 + 1 + about 24 tokens of frame: four of them do not fit, nor do three.
    kept = engine.prompt_text()
    assert kept == chatml("c", "3" * 30, "d", system="S")
    assert len(engine.prompts[-1]) <= SMALL - 40
    assert "context is full" in capsys.readouterr().err


def test_leaving_out_takes_no_more_than_half_the_turns_at_once():
    conversation = chat.Conversation(FakeTokenizer(), 400, 10)
    conversation.turns = [(f"q{i}", "-" * 50) for i in range(5)]
    n_full = len(FakeTokenizer().encode(conversation._encode(conversation.turns, "new")[0]))
    conversation.context = n_full + 10 - 1  # short of one token
    ids, n_left_out = conversation.prompt("new")
    assert n_left_out == 3
    assert [question for question, _ in conversation.turns] == ["q3", "q4"]
    assert len(ids) <= conversation.context - 10


def test_a_prompt_that_just_fits_leaves_nothing_out():
    conversation = chat.Conversation(FakeTokenizer(), 0, 10)
    conversation.turns = [("q", "a"), ("q", "a")]
    n_full = len(conversation._encode(conversation.turns, "new")[1])
    conversation.context = n_full + 10
    assert conversation.prompt("new") == (conversation._encode(conversation.turns, "new")[1], 0)


def test_a_message_too_long_is_refused_with_both_lengths_and_the_chat_goes_on(capsys):
    engine = FakeEngine("one", "two", context=SMALL)
    talk(engine, "a", "x" * (SMALL - N_FRAME), "b")
    err = capsys.readouterr().err
    assert f"not sent: the message makes {SMALL} tokens, the context holds {SMALL}" in err
    assert engine.prompt_text() == chatml("a", "one", "b")


def test_a_message_that_leaves_room_for_one_token_is_sent(capsys):
    engine = FakeEngine("yes", context=SMALL)
    talk(engine, "x" * (SMALL - N_FRAME - 1), show_stats=True)
    out, err = capsys.readouterr()
    assert out == "ye\n"  # the second one needs no place in the context
    assert f"context {SMALL} of {SMALL}" in err
    assert f"the context of {SMALL} tokens is full: the answer ends here" in err


def test_a_context_that_slid_is_said(capsys):
    engine = FakeEngine("one")
    made = engine.generate

    def generate(*args, **options):
        generation = made(*args, **options)
        generation.stats.slides = 2
        return generation

    engine.generate = generate
    talk(engine, "a")
    assert "the context was full 2 times: its beginning and latest half" in capsys.readouterr().err


def test_a_chat_goes_on_after_an_answer_that_filled_the_context(capsys):
    engine = FakeEngine("y" * SMALL, "two", context=SMALL)
    talk(engine, "a", "b")
    assert engine.prompt_text() == chatml("b")
    assert "the oldest 1 turn left out" in capsys.readouterr().err


def test_a_one_shot_prompt_too_long_is_exit_code_1(use, capsys):
    use(FakeEngine(context=SMALL))
    assert chat.main(["-p", "x" * SMALL, "--no-stats"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1


# Commands


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


def test_help_lists_every_command(capsys):
    talk(FakeEngine(), "/help")
    out, err = capsys.readouterr()
    assert out == ""
    assert all(name in err for name in ("/help", "/reset", "/system", "/stats", "/exit"))


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


# Taking back, and settings


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


def test_counter_counts_what_was_said_and_what_is_typed():
    engine = FakeEngine("One.")
    conversation = chat.Conversation(engine.tokenizer, engine.context, 10)
    session = chat.Chat(engine, "fake", None, conversation, False)
    assert session.count("abc") == "3 of 4096 tokens"
    session.answer("a")
    n = len(engine.prompts[0]) + len("One.")
    assert session.count("abc") == f"{n + 3} of 4096 tokens"
    session.command("/undo")
    assert session.count("") == "0 of 4096 tokens"
