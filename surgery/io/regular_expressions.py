"""Match regular expressions in time that grows with the lengths of expression and text alone.

Python's `re` tries one way after another, and `(a+)+$` has 2ⁿ of them. Here an expression becomes a nondeterministic
automaton, and all its states are followed at once (Thompson, "Regular expression search algorithm", CACM 1968).

The syntax is that of `re` without what needs memory of the text or looks around: no references, no looking ahead or
behind, no word boundaries, no flags, no possessive repetition. What is left gives the answers of `re`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NoReturn

from surgery.errors import SurgeryError

MAX_STATES = 5_000  # of one expression, its counted repetitions written out
MAX_STEPS = 10_000_000  # about a second: a look at a transition that is known is one, any other _NEW for each state
_NEW = 5
MAX_DEPTH = 50  # of groups in groups
_MAX_KNOWN = 10_000  # transitions that are kept to be looked up again

_HINT = "Write it as plain names."
_COUNT = re.compile(r"\{(\d*)(,?)(\d*)\}")
_SET = re.compile(r"\[\^?\]?(?:[^\]\\]|\\.)*\]", re.DOTALL)
_GROUP = re.compile(r"\((?:\?:|\?P<[A-Za-z_]\w*>|(?!\?))")
_ONE_CHARACTER = "dDwWsSnrtfva"  # letters that stand for one character after a backslash

Test = str | re.Pattern[str]  # of one character
Place = Literal["", "start", "end"]
Build = Callable[[int], int]  # adds a part of the expression after a first state, and returns its last


@dataclass
class _State:
    """A state: `test` leads to `next` by one character, `free` lists states that take none; `place` bars others."""

    test: Test | None = None
    next: int = -1
    free: list[int] = field(default_factory=list)
    place: Place = ""


class StepCounter:
    """Counts the steps of all expressions of the file `where`. Raises SurgeryError from `add` above `most`."""

    def __init__(self, where: object, most: int = MAX_STEPS) -> None:
        self.where, self._left = where, most

    def add(self, steps: int) -> None:
        """Count `steps` more."""
        self._left -= steps
        if self._left < 0:
            raise SurgeryError("its patterns take too long to match", where=self.where, hint=_HINT)


class _Automaton:
    """The states of an expression, and the parts that it is built from: each from a first state to its last."""

    def __init__(self, refuse: Callable[[str], NoReturn]) -> None:
        self.states: list[_State] = []
        self._refuse = refuse

    def add(self, state: _State) -> int:
        if len(self.states) == MAX_STATES:
            self._refuse(f"has more than {MAX_STATES:,} states")
        self.states.append(state)
        return len(self.states) - 1

    def one(self, test: Test) -> Build:
        def build(first: int) -> int:
            last = self.add(_State())
            self.states[first].free.append(self.add(_State(test, last)))
            return last

        return build

    def place(self, place: Place) -> Build:
        return lambda first: self._follow(first, _State(place=place))

    def sequence(self, parts: list[Build]) -> Build:
        def build(first: int) -> int:
            # A state of its own even where there are no parts: so a million repetitions of nothing are too many states.
            last = self._follow(first, _State())
            for part in parts:
                last = part(last)
            return last

        return build

    def either(self, parts: list[Build]) -> Build:
        def build(first: int) -> int:
            last = self.add(_State())
            for part in parts:
                self.states[part(first)].free.append(last)
            return last

        return parts[0] if len(parts) == 1 else build

    def repeated(self, part: Build, least: int, most: int | None) -> Build:
        def build(first: int) -> int:
            for _ in range(least):
                first = part(first)
            if most is None:
                again = self._follow(first, _State())
                self.states[part(again)].free.append(again)
                return self._follow(again, _State())
            last = self._follow(first, _State())
            for _ in range(most - least):
                first = part(first)
                self.states[first].free.append(last)
            return last

        return build

    def _follow(self, first: int, state: _State) -> int:
        number = self.add(state)
        self.states[first].free.append(number)
        return number


class _Parser:
    """Reads a pattern from left to right."""

    def __init__(self, pattern: str, automaton: _Automaton, refuse: Callable[[str], NoReturn]) -> None:
        self._text, self._at = pattern, 0
        self._automaton, self._refuse = automaton, refuse

    def whole(self) -> Build:
        build = self._alternatives(0)
        if self._at < len(self._text):
            self._refuse("closes a group that is not open")
        return build

    def _alternatives(self, depth: int) -> Build:
        if depth > MAX_DEPTH:
            self._refuse(f"has more than {MAX_DEPTH} groups in each other")
        parts = [self._sequence(depth)]
        while self._text.startswith("|", self._at):
            self._at += 1
            parts.append(self._sequence(depth))
        return self._automaton.either(parts)

    def _sequence(self, depth: int) -> Build:
        parts: list[Build] = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            may_repeat = self._text[self._at] not in "^$" and not self._text.startswith("\\A", self._at)
            part = self._one(depth)
            if (count := self._count()) is not None:
                if not may_repeat:
                    self._refuse("repeats a place")
                part = self._automaton.repeated(part, *count)
                if self._count() is not None or self._text.startswith("+", self._at):
                    self._refuse("repeats a repetition, or forbids it to give back")
            parts.append(part)
        return self._automaton.sequence(parts)

    def _count(self) -> tuple[int, int | None] | None:
        """Read how often the part before is repeated; None where nothing says so."""
        found = _COUNT.match(self._text, self._at)
        if found and found[0] != "{}":
            least = int(found[1] or 0)
            most = (int(found[3]) if found[3] else None) if found[2] else least
            if least > MAX_STATES or (most or 0) > MAX_STATES or (most is not None and most < least):
                self._refuse(f"repeats {found[0]} times")
            self._at = found.end()
        elif self._text[self._at : self._at + 1] in ("*", "+", "?"):
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[self._text[self._at]]
            self._at += 1
        else:
            return None
        # Whether as few as possible are taken first makes no difference to whether the whole text matches.
        self._at += self._text.startswith("?", self._at)
        return least, most

    def _one(self, depth: int) -> Build:
        """Read a character, a set of characters, a place or a group."""
        character = self._text[self._at]
        if character == "(":
            return self._group(depth)
        if character in "*+?" or ((found := _COUNT.match(self._text, self._at)) and found[0] != "{}"):
            self._refuse("repeats nothing")
        if character == "[":
            return self._set()
        if character == "\\":
            return self._escaped()
        self._at += 1
        if character == "^":
            return self._automaton.place("start")
        if character == "$":
            return self._automaton.place("end")
        return self._automaton.one(re.compile(".") if character == "." else character)

    def _group(self, depth: int) -> Build:
        opening = _GROUP.match(self._text, self._at)
        if opening is None:
            self._refuse(f"uses {self._text[self._at : self._at + 3]!r}, which is not supported")
        self._at = opening.end()
        inside = self._alternatives(depth + 1)
        if not self._text.startswith(")", self._at):
            self._refuse("does not close a group")
        self._at += 1
        return inside

    def _set(self) -> Build:
        found = _SET.match(self._text, self._at)
        if found is None:
            self._refuse("does not close a set")
        self._at = found.end()
        return self._automaton.one(self._compiled(found[0]))

    def _escaped(self) -> Build:
        escape = self._text[self._at : self._at + 2]
        self._at += 2
        if escape == "\\A":
            return self._automaton.place("start")
        letter = escape[1:]
        if not letter or (letter.isalnum() and letter not in _ONE_CHARACTER):
            self._refuse(f"uses {escape!r}, which is not supported")
        return self._automaton.one(self._compiled(escape) if letter.isalnum() else letter)

    def _compiled(self, text: str) -> re.Pattern[str]:
        """Return the expression for one character: it has nothing to repeat, so that `re` takes no time for it."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a FutureWarning of sets in sets, which Python may have one day
                return re.compile(text)
        except re.error as error:
            self._refuse(f"is no regular expression ({error.msg})")


class Expression:
    """A regular expression that matches the whole of a text, as `re.match(f"(?:{pattern})$", text)` does.

    Args:
        counter: counts its steps, and raises where they and those of other expressions are too many.

    Raises:
        SurgeryError: the pattern is no regular expression, uses syntax that is not supported, or is too large.
    """

    def __init__(self, pattern: str, counter: StepCounter) -> None:
        def refuse(why: str) -> NoReturn:
            raise SurgeryError(f"the pattern {pattern!r} {why}", where=counter.where, hint=_HINT)

        automaton = _Automaton(refuse)
        build = _Parser(pattern, automaton, refuse).whole()
        self._first = automaton.add(_State())
        self._last = automaton.sequence([build, automaton.place("end")])(self._first)
        self._states = automaton.states
        self._known: dict[tuple[frozenset[int], str, bool], frozenset[int]] = {}
        self._counter = counter

    def matches(self, text: str) -> bool:
        """Return whether the expression matches the whole of `text`, or all but a line break at its end.

        Raises:
            SurgeryError: the counter has reached its limit.
        """
        end = len(text) - text.endswith("\n")
        current = self._reachable([self._first], at_start=True, at_end=end == 0)
        for at, character in enumerate(text):
            if self._last in current or not current:
                break
            self._counter.add(1)
            key = current, character, at + 1 >= end
            found = self._known.get(key)
            if found is None:
                if len(self._known) >= _MAX_KNOWN:
                    self._known.clear()
                found = self._known[key] = self._step(*key)
            current = found
        return self._last in current

    def _step(self, current: frozenset[int], character: str, at_end: bool) -> frozenset[int]:
        states = [self._states[number] for number in current]
        self._counter.add(_NEW * len(states))
        passed = [state.next for state in states if state.test is not None and _passes(state.test, character)]
        return self._reachable(passed, at_start=False, at_end=at_end)

    def _reachable(self, numbers: list[int], *, at_start: bool, at_end: bool) -> frozenset[int]:
        """Return `numbers` and all states that can be reached from them without a character."""
        reached, waiting = set(numbers), list(numbers)
        while waiting:
            number = waiting.pop()
            state = self._states[number]
            self._counter.add(_NEW * (1 + len(state.free)))
            if (state.place == "start" and not at_start) or (state.place == "end" and not at_end):
                reached.discard(number)
                continue
            new = [each for each in state.free if each not in reached]
            reached.update(new)
            waiting += new
        return frozenset(reached)


def _passes(test: Test, character: str) -> bool:
    return test == character if isinstance(test, str) else test.match(character) is not None
