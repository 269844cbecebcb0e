"""The state machine of a name's life, under every order of events that can happen."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hearth.serving.gateway.lives import Action, Life, Refused, ended, failed, load, ready, unload


class Lives(RuleBasedStateMachine):
    """Carries out the actions on workers that are only sets of numbers, and compares."""

    def __init__(self) -> None:
        super().__init__()
        self.life = Life()
        self.count = 0
        self.running: set[int] = set()  # processes
        self.loaded: set[int] = set()
        self.told_to_end: set[int] = set()
        self.routed: int | None = None

    def apply(self, step) -> None:
        self.life = step.life
        for action, number in step.actions:
            match action:
                case Action.START:
                    assert number not in self.running
                    self.running.add(number)
                case Action.ROUTE:
                    assert number in self.loaded - self.told_to_end  # only what has loaded and stays
                    self.routed = number
                case Action.UNROUTE:
                    assert self.routed == number
                    self.routed = None
                case Action.DRAIN:
                    assert number != self.routed  # no request may come while it drains
                    assert number in self.loaded
                    self.told_to_end.add(number)
                case Action.STOP:
                    assert number not in self.loaded
                    self.told_to_end.add(number)

    @rule()
    def load(self) -> None:
        self.count += 1
        try:
            self.apply(load(self.life, self.count))
        except Refused:
            assert self.life.coming is not None
        else:
            assert self.life.coming == self.count

    @rule()
    def unload(self) -> None:
        before = self.life
        try:
            self.apply(unload(self.life))
        except Refused:
            assert not before.is_served
        else:
            assert self.routed is None
            assert self.running == self.told_to_end

    @precondition(lambda self: self.running - self.loaded)
    @rule(data=st.data())
    def becomes_ready(self, data) -> None:
        """Also one that was told to end: the news may already be on its way."""
        number = data.draw(st.sampled_from(sorted(self.running - self.loaded)))
        if number not in self.told_to_end:
            self.loaded.add(number)
        before = self.routed
        self.apply(ready(self.life, number))
        assert self.routed == (before if number in self.told_to_end else number)

    @precondition(lambda self: self.running - self.loaded)
    @rule(data=st.data())
    def fails(self, data) -> None:
        number = data.draw(st.sampled_from(sorted(self.running - self.loaded)))
        self.running.discard(number)
        before = self.life
        self.apply(failed(self.life, number, "why"))
        assert (self.life.current, self.routed) == (before.current, before.current)
        if number not in self.told_to_end:
            assert self.life.problem == "why"
        self.told_to_end.discard(number)

    @precondition(lambda self: self.told_to_end)
    @rule(data=st.data())
    def ends(self, data) -> None:
        number = data.draw(st.sampled_from(sorted(self.told_to_end)))
        self.told_to_end.discard(number)
        self.running.discard(number)
        self.apply(ended(self.life, number))

    @invariant()
    def no_worker_is_lost_or_in_two_places(self) -> None:
        places = [*self.life.leaving, *(n for n in (self.life.current, self.life.coming) if n is not None)]
        assert sorted(places) == sorted(self.running)
        assert self.life.leaving == self.told_to_end

    @invariant()
    def requests_go_where_the_life_says(self) -> None:
        assert self.routed == self.life.current

    @invariant()
    def it_is_over_when_nothing_is_left(self) -> None:
        assert self.life.is_over == (not self.running and self.life.problem is None)


Lives.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestLives = Lives.TestCase


def test_a_replacement_leaves_no_gap() -> None:
    life = ready(load(Life(), 1).life, 1).life
    loading = load(life, 2).life
    assert loading.current == 1
    step = ready(loading, 2)
    assert step.actions == ((Action.ROUTE, 2), (Action.DRAIN, 1))
    assert step.life == Life(current=2, leaving=frozenset({1}))


def test_a_failed_load_is_remembered_until_it_is_unloaded_or_loaded_again() -> None:
    life = failed(load(Life(), 1).life, 1, "no such file").life
    assert (life.problem, life.is_over, life.is_served) == ("no such file", False, False)
    assert unload(life).life.is_over
    assert load(life, 2).life.problem is None


def test_what_is_refused_names_its_reason() -> None:
    with pytest.raises(Refused, match="not loaded") as caught:
        unload(Life())
    assert caught.value.code == "model_not_found"
    with pytest.raises(Refused, match="unloaded already"):
        unload(Life(leaving=frozenset({1})))
    with pytest.raises(Refused, match="loaded already"):
        load(Life(current=1, coming=2), 3)
