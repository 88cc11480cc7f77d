"""The conversation of a chat: what the next prompt is made of, and what a full context forgets."""

from fake_engine import HE, FakeEngine, FakeTokenizer, chatml, talk

from engine.chat.conversation import Conversation


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
    conversation = Conversation(FakeTokenizer(), 400, 10)
    conversation.turns = [(f"q{i}", "-" * 50) for i in range(5)]
    n_full = len(FakeTokenizer().encode(conversation._encode(conversation.turns, "new")[0]))
    conversation.context = n_full + 10 - 1  # short of one token
    ids, n_left_out = conversation.prompt("new")
    assert n_left_out == 3
    assert [question for question, _ in conversation.turns] == ["q3", "q4"]
    assert len(ids) <= conversation.context - 10


def test_a_prompt_that_just_fits_leaves_nothing_out():
    conversation = Conversation(FakeTokenizer(), 0, 10)
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
