"""What is drafted, and when a check of it pays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from engine.speculate import LOOKUP, MODEL, Draft, Lookup, Policy


def lookup_after(text: str) -> Lookup:
    lookup = Lookup()
    lookup.begin([ord(c) for c in text])
    return lookup


def drafted(lookup: Lookup, n: int) -> str:
    return "".join(map(chr, lookup.draft(n)))


@pytest.mark.parametrize(
    ("text", "n", "draft"),
    [
        ("the cat sat. the c", 6, "at sat"),
        ("xab1 yab2 zab3 yab", 3, "2 z"),  # the longest match, not the latest
        ("ab1 ab2 ab", 2, "2 "),  # of equally long ones the latest
        ("-abcabcabc", 7, "abcabca"),  # a loop goes on into the draft itself
        ("aaa", 4, "aaaa"),
    ],
)
def test_a_draft_is_what_followed_the_longest_match(text: str, n: int, draft: str) -> None:
    assert drafted(lookup_after(text), n) == draft
    grown = lookup_after(text[:1])  # token by token, as an answer grows
    for c in text[1:]:
        grown.add(ord(c))
    assert grown.shares(1) and drafted(grown, n) == draft


@pytest.mark.parametrize("text", ["", "a", "ab", "ab cd", "abc bca xb"])
def test_without_a_match_of_two_tokens_there_is_no_draft(text: str) -> None:
    assert lookup_after(text).shares(7) == []


@pytest.mark.parametrize(
    ("answer", "rest"),
    [
        ("the quick Q", "rown fox"),  # one token for another
        ("the quick Qr", "own fox"),
        ("the quick browXYn", " fox jumps"),  # two put in
        ("the quick bn", " fox jumps"),  # three left out
        ("the quick bREDDISHn", " fox jumps"),
    ],
)
def test_a_changed_copy_goes_on_behind_the_change(answer: str, rest: str) -> None:
    lookup = lookup_after("the quick brown fox jumps over a lazy dog. -")
    for c in answer:
        lookup.add(ord(c))
    assert drafted(lookup, len(rest)) == rest
    assert lookup.shares(1)[0] > 0.3


def test_a_copy_that_ends_is_given_up() -> None:
    lookup = lookup_after("the quick brown fox jumps over a lazy dog. -")
    for c in "the quick 0123456789":
        lookup.add(ord(c))
    assert lookup.shares(7) == []


def test_chances_follow_the_text() -> None:
    """In a copy every draft is right; where the copied words always go on otherwise, none is."""
    block = "".join(map(chr, range(100, 400)))
    lookup = lookup_after(block + block[:3])
    before = lookup.shares(7)
    assert before == sorted(before)  # a longer match is the surer one
    for c in block[3:]:
        lookup.add(ord(c))
    assert lookup.shares(1)[0] > 0.99

    lookup = lookup_after("ab")
    for i in range(40):
        for token in (1000 + i, ord("a"), ord("b")):
            lookup.add(token)
    assert lookup.shares(1)[0] < 0.1


# When it pays


def simulate(policy: Policy, n_tokens: int, cost: Callable[[Draft], float], right: float) -> float:
    """Single steps' time over the time that `n_tokens` took; each draft is right with `right`."""
    rng, lookup_shares, seconds, n = np.random.default_rng(1), [0.9] * 7, 0.0, 0
    while n < n_tokens:
        draft = policy.choose({LOOKUP: lookup_shares}, n_tokens - n)
        if draft is None:
            policy.stepped(1, 1.0)
            seconds, n = seconds + 1, n + 1
        else:
            n_right = next((i for i in range(draft.n_tokens - 1) if rng.random() >= right), 7)
            n_right = min(n_right, draft.n_tokens - 1)
            policy.checked(draft, n_right + 1, cost(draft))
            seconds, n = seconds + cost(draft), n + n_right + 1
    return n_tokens / seconds


def test_checks_that_pay_are_made() -> None:
    speed = simulate(Policy((4, 8)), 400, lambda draft: 1 + draft.n_tokens / 8, right=1.0)
    assert speed > 3.5  # of 4: the first step, and the sizes that were tried


@pytest.mark.parametrize("cost", [1.5, 2.5, 6.0, 8.0])
def test_little_is_lost_though_every_estimate_is_wrong(cost: float) -> None:
    """The shares promise nine of ten, and none is right."""
    assert simulate(Policy((4, 8)), 1000, lambda draft: cost, right=0.0) > 0.97


def test_dear_checks_are_not_made() -> None:
    policy = Policy((4, 8))
    simulate(policy, 100, lambda draft: 9.0, right=1.0)  # nine steps' time for eight tokens
    assert policy.choose({LOOKUP: [0.99] * 7}, 100) is None


def test_a_draft_model_as_slow_as_the_model_is_given_up() -> None:
    """Though all that it drafts is right."""
    policy, n_tried = Policy((4, 8)), 0
    policy.stepped(1, 1.0)
    for _ in range(200):
        draft = policy.choose({MODEL: [0.99] * 7}, 100)
        if draft is None:
            policy.stepped(1, 1.0)
        else:
            n_tried += 1
            policy.checked(draft, draft.n_tokens, 1.3 * draft.n_tokens)
    assert n_tried <= 6


def test_one_slow_check_does_not_end_speculation() -> None:
    policy = Policy((4, 8))
    policy.stepped(1, 1.0)
    policy.checked(Draft(LOOKUP, 8), 8, 100.0)
    assert policy.choose({LOOKUP: [0.99] * 7}, 100) == Draft(LOOKUP, 8)


def test_a_submit_that_the_host_saw_late_does_not_discredit_checks() -> None:
    policy = Policy((4, 8))
    for seconds in (4.0, 4.0, 7.9, 0.1, 4.0):  # the fourth was at work while the third was late
        policy.stepped(4, seconds)
    for _ in range(2):
        policy.checked(Draft(LOOKUP, 8), 8, 1.6)
    assert policy.choose({LOOKUP: [0.95] * 7}, 100) == Draft(LOOKUP, 8)


def test_a_draft_fits_what_is_wanted_and_what_there_is() -> None:
    policy = Policy((4, 8))
    assert policy.choose({LOOKUP: [0.99] * 7}, 100) is None  # no step has been timed
    policy.stepped(1, 1.0)
    assert policy.choose({LOOKUP: []}, 100) is None
    sizes = [policy.choose({LOOKUP: [0.99] * 7}, most) for most in (3, 4, 7, 8)]
    assert sizes == [None, Draft(LOOKUP, 4), Draft(LOOKUP, 4), Draft(LOOKUP, 8)]


def test_a_draft_model_found_wanting_is_tried_again() -> None:
    policy = Policy((4, 8))
    policy.stepped(1, 1.0)
    tries = 0
    for _ in range(1000):
        draft = policy.choose({MODEL: [0.01] * 7}, 100)
        if draft is None:
            policy.stepped(1, 1.0)
        else:
            tries += 1
            policy.checked(draft, 1, 3.0)
    assert 3 <= tries <= 1 + 1000 * 0.015 / 1.0


def test_what_checks_have_won_may_be_lost_again() -> None:
    """Within an answer; the next one begins with little."""
    policy = Policy((4, 8))
    policy.stepped(1, 1.0)
    first = policy.credit
    for _ in range(8):
        policy.checked(Draft(LOOKUP, 8), 8, 2.0)
    assert policy.credit > first + 8
    policy.begin()
    assert policy.credit == 3
    policy.credit = -2.0
    policy.begin()
    assert policy.credit == 2
    policy.credit = 0.9  # a check of 8 may lose 1
    assert policy.choose({LOOKUP: [0.99] * 7}, 100) == Draft(LOOKUP, 4)


def test_slow_submits_after_a_check_are_its_cost() -> None:
    """Eight steps a submit take 8, the one that begins anew after a check takes 3."""
    policy = Policy((4, 8))
    policy.stepped(8, 8.0)
    policy.stepped(1, 3.0)  # no check was before it
    full = policy.credit
    policy.checked(Draft(LOOKUP, 8), 2, 2.0)  # as much as single steps
    policy.stepped(1, 3.0)
    assert policy.credit == pytest.approx(full - 2, abs=0.06)
    policy.stepped(8, 8.0)
    before = policy.credit
    policy.stepped(1, 3.0)
    assert policy.credit > before
