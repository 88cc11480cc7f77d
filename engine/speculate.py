"""Speculation: drafts of the tokens to come, and when it pays to have one checked. No GPU here.

A pass over n tokens decodes every weight once and takes far less time than n passes (for n = 8, 1.6
to 2.6 times one). So where n - 1 tokens can be guessed, one pass checks them all. shaders/
sample_token.wgsl keeps those that are what would have been drawn anyway, so drafts decide about
speed alone, never about the text. (Leviathan et al. 2023, Chen et al. 2023: their acceptance rule,
with the noise of both draws the same, becomes this comparison.)
"""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul

LOOKUP, MODEL = "lookup", "model"  # what drafts come from

_LONGEST = 32  # tokens that a match is followed back
_CANDIDATES = 16  # latest places where the last two tokens stood that are looked at
_LENGTHS = (2, 3, 4, 6, 8, 12, 16, 24)  # matches from one to the next of these count as alike
_ANCHORED = 3  # tokens that agreed before a copy is held to go on after a change
_REACH = 5  # tokens of the source that a change may leave out
_PATIENCE = 8  # tokens of the answer that it may put in


@dataclass
class Chance:
    """The share of hits among the last twenty or so trials; `hits / trials` at first a guess."""

    hits: float
    trials: float = 2.0

    @property
    def share(self) -> float:
        return self.hits / self.trials

    def add(self, hit: bool) -> None:
        self.hits = 0.95 * self.hits + hit
        self.trials = 0.95 * self.trials + 1


@dataclass(frozen=True)
class _Match:
    """Where the text may be going on: `source` is the place of the next token's twin."""

    source: int
    length: int  # tokens before it that agree
    resumed: bool = False  # the same copy as before a change, which the length does not reach over


class Lookup:
    """Drafts from the text itself: it goes on as it did where its last tokens stood before.

    (Prompt lookup decoding, Saxena 2023.) Where a copy is changed it is held to go on behind the
    change: first as if one token had been put for another, then where a new token stands again
    close behind. Every token of the answer is foretold, whether or not anybody asks for a draft: so
    how often matches of a kind are right is known without a check.
    """

    def __init__(self) -> None:
        self.chances = [Chance(2 * (1 - 2 / (length + 1))) for length in _LENGTHS]
        self.resumed = [Chance(hits) for hits in (0.8, 1.2, 1.6)]  # after 0, 1, 2 tokens that agree
        self.begin([])

    def begin(self, tokens: Sequence[int]) -> None:
        """Forget the text and take `tokens` for its beginning.

        Of the chances their shares stay, and little weight: other texts are copied otherwise.
        """
        for chance in (*self.chances, *self.resumed):
            share = min(max(chance.share, 0.3), 0.9)
            chance.hits, chance.trials = 2 * share, 2.0
        self._tokens: list[int] = []
        self._places: dict[tuple[int, int], list[int]] = {}  # of two tokens: where the next stood
        self._found: _Match | None = None
        self._anchor: int | None = None  # in the source, of the change that is being made
        self._missed = 0  # tokens since then
        for token in tokens:
            self._append(token)
        self._found = self._search()

    def add(self, token: int) -> None:
        """The next token of the answer."""
        was = self._found
        hit = was is not None and self._tokens[was.source] == token
        if was is not None:
            self._chance(was, 0).add(hit)
        self._append(token)
        if was is not None and hit:
            self._found = _Match(was.source + 1, min(was.length + 1, _LONGEST), was.resumed)
            if not was.resumed or was.length + 1 == len(self.resumed):
                self._anchor = None
                self._found = _Match(self._found.source, self._found.length)
            else:
                self._found = self._better(self._found, self._search())
            return
        found = self._search()
        if self._anchor is None and was is not None and was.length >= _ANCHORED:
            self._anchor, self._missed = was.source, 0
        if self._anchor is not None:
            self._missed += 1
            found = self._better(self._resume(token), found)
        self._found = found

    def draft(self, n: int) -> list[int]:
        """The next `n` tokens, if the match holds; it may run into itself, as a loop does."""
        source = self._found.source if self._found else 0
        found = self._tokens[source : source + n]
        period = len(self._tokens) - source
        return [found[i % period] for i in range(n)]

    def shares(self, n: int) -> list[float]:
        """How likely each of `n` drafted tokens is right if those before it are."""
        return [self._chance(self._found, i).share for i in range(n)] if self._found else []

    @property
    def promising(self) -> bool:
        """Whether the next token is more likely foretold than not."""
        return any(share > 0.5 for share in self.shares(1))

    def _chance(self, match: _Match, further: int) -> Chance:
        """That of the token `further` behind the next."""
        length = match.length + further
        if match.resumed and length < len(self.resumed):
            return self.resumed[length]
        return self.chances[bisect_right(_LENGTHS, max(2, length)) - 1]

    def _append(self, token: int) -> None:
        self._tokens.append(token)
        n = len(self._tokens)
        if n > 2:  # where nothing follows yet, nothing can be found
            pair = self._tokens[-3], self._tokens[-2]
            self._places.setdefault(pair, []).append(n - 1)

    def _search(self) -> _Match | None:
        """The longest of the latest places that end like the text does; of equals the latest."""
        tokens, best = self._tokens, None
        places = self._places.get((tokens[-2], tokens[-1]), []) if len(tokens) > 1 else []
        for place in reversed(places[-_CANDIDATES:]):
            n = 2
            while n < min(place, _LONGEST) and tokens[place - 1 - n] == tokens[-1 - n]:
                n += 1
            if best is None or n > best.length:
                best = _Match(place, n)
        return best

    def _resume(self, token: int) -> _Match | None:
        """Where a changed copy goes on, `token` having been the last of the change, or the first
        behind it.
        """
        assert self._anchor is not None
        end = len(self._tokens) - 1  # the token itself is no source
        if self._missed > _PATIENCE or self._anchor + self._missed >= end:
            self._anchor = None
            return None
        aligned = self._anchor + self._missed  # where one token was put for each
        reach = range(self._anchor, min(self._anchor + self._missed + _REACH, end - 1))
        again = [i for i in reach if self._tokens[i] == token]
        if again:
            return _Match(min(again, key=lambda i: abs(i + 1 - aligned)) + 1, 1, resumed=True)
        return _Match(aligned, 0, resumed=True)

    def _better(self, match: _Match | None, other: _Match | None) -> _Match | None:
        """The likelier one; `match`, if they are alike."""
        if match is None or other is None:
            return match or other
        shares = [self._chance(m, 0).share for m in (match, other)]
        return match if shares[0] >= shares[1] else other


@dataclass(frozen=True)
class Draft:
    """A pass of `n_tokens`, the first known, the others from `source`."""

    source: str
    n_tokens: int


@dataclass
class Policy:
    """Which draft pays, from what checks took and from how likely their tokens are right.

    Times are in single steps, as their ratio is a property of the device. Whatever the estimates
    say, `credit` bounds what an answer may lose: a check is made only while there is enough for
    none of its guesses to be right. What it yields beyond the steps of its time is added, what it
    falls short is taken away, and each single step brings back a little.
    """

    sizes: tuple[int, ...]  # tokens of a pass that checks, least first
    credit: float = 2.0
    # What the last checks took; the least of them counts: a machine that was busy once must
    # not discredit checks for ever.
    _costs: dict[Draft, deque[float]] = field(default_factory=dict)
    # Of the last submits: (steps, seconds).
    _steps: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=16))
    _resuming: bool = False  # single steps after a check: not yet so many a submit as there may be

    _FIRST_CREDIT = 2.0
    _SPARE_CREDIT = 3.0  # the most that single steps bring, and that an answer begins with
    _MAX_CREDIT = 16.0
    _CREDIT_PER_STEP = 0.015  # so in the long run 1.5 % are lost at most
    _WORTH = 1.2  # times the speed of single steps: less is within what the estimates are off

    def begin(self) -> None:
        """An answer begins: what others have won or lost counts little."""
        self.credit = min(max(self.credit, self._FIRST_CREDIT), self._SPARE_CREDIT)

    def choose(self, shares: dict[str, list[float]], most: int) -> Draft | None:
        """The best check of at most `most` tokens, None for single steps.

        `shares[source]`: see Lookup.shares. Where only the source itself can tell how good it is
        now, a draft model, it is tried once in a while though it has been found wanting.
        """
        best, best_gain = None, self._WORTH
        if not self._steps:
            return None
        for source, of_tokens in shares.items():
            for n in self.sizes:
                if n > most or len(of_tokens) < n - 1:
                    continue
                draft = Draft(source, n)
                if self._cost(draft) - 1 > self.credit:
                    continue
                right = sum(accumulate(of_tokens[: n - 1], mul))
                gain = (1 + right) / self._cost(draft)
                if source == MODEL and self.credit >= self._SPARE_CREDIT:
                    gain = max(gain, self._WORTH + 1e-9)
                if gain > best_gain:
                    best, best_gain = draft, gain
        return best

    def stepped(self, n_steps: int, seconds: float) -> None:
        """Single steps were taken."""
        self._steps.append((n_steps, seconds))
        if self.credit < self._SPARE_CREDIT:
            brought = self._CREDIT_PER_STEP * n_steps
            self.credit = min(self._SPARE_CREDIT, self.credit + brought)
        most, step_seconds = self._step()
        if n_steps == most:
            self._resuming = False
        elif self._resuming:  # short submits are slow; without the check there would be none
            self.credit -= max(0.0, seconds / step_seconds - n_steps)

    def checked(self, draft: Draft, n_tokens: int, seconds: float) -> None:
        """A check yielded `n_tokens`, at least the one that a step does."""
        costs = self._costs.setdefault(draft, deque(maxlen=8))
        costs.append(seconds / self._step()[1])
        self.credit = min(self._MAX_CREDIT, self.credit + n_tokens - self._cost(draft))
        self._resuming = True

    def _step(self) -> tuple[int, float]:
        """The most steps of a submit, and the seconds that one of so many takes.

        The median: a host that is held up sees one submit late and the next, which has been at work
        meanwhile, after next to no time.
        """
        most = max(n for n, _ in self._steps)
        return most, statistics.median(seconds / n for n, seconds in self._steps if n == most)

    def _cost(self, draft: Draft) -> float:
        costs = self._costs.get(draft, ())
        if len(costs) > 1:
            return min(costs)
        # At first a guess as well, on the low side, so that there are some to measure; and the very
        # first may be held up, by a prompt that the draft model has not read.
        return min([1 + draft.n_tokens * (0.12 if draft.source == LOOKUP else 0.4), *costs])
