"""The life of one name of a server, as a pure state machine: what is loaded, loading and leaving under it.

Workers are numbers here. ``current`` takes the requests, ``coming`` loads beside it, and those in ``leaving``
finish what they have. A worker is in exactly one of the three from its start to its end, so that whoever
carries out the actions can lose none. Every function returns the new life and what is to be done, in order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple


class Action(StrEnum):
    """What is to be done with a worker."""

    START = "start"
    ROUTE = "route"  # it takes the requests from now on, instead of any other
    UNROUTE = "unroute"  # it takes no new requests
    DRAIN = "drain"  # let it finish its open requests, then end it
    STOP = "stop"  # end it now; it has no requests


@dataclass(frozen=True)
class Life:
    """Everything that is known under one name; ``problem`` is why the last load failed, until the next."""

    current: int | None = None
    coming: int | None = None
    leaving: frozenset[int] = frozenset()
    problem: str | None = None

    @property
    def is_over(self) -> bool:
        """Nothing is left of it, and nobody has to be told anything about it."""
        return self == Life()

    @property
    def is_served(self) -> bool:
        """Whether the name is in use, now or soon."""
        return self.current is not None or self.coming is not None


class Step(NamedTuple):
    """A new life, and what makes it true."""

    life: Life
    actions: tuple[tuple[Action, int], ...] = ()


class Refused(Exception):
    """An event that makes no sense in this state; the life is as it was. ``code`` says why in one word."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def load(life: Life, number: int) -> Step:
    """Load a worker beside what is there. One at a time: of two, nobody knew which is to answer."""
    if life.coming is not None:
        raise Refused("already_loading", "it is being loaded already")
    return Step(replace(life, coming=number, problem=None), ((Action.START, number),))


def ready(life: Life, number: int) -> Step:
    """A worker has loaded: it takes over. One that was given up meanwhile stays so."""
    if life.coming != number:
        return Step(life)
    taken_over = replace(life, current=number, coming=None)
    if life.current is None:
        return Step(taken_over, ((Action.ROUTE, number),))
    taken_over = replace(taken_over, leaving=life.leaving | {life.current})
    return Step(taken_over, ((Action.ROUTE, number), (Action.DRAIN, life.current)))


def failed(life: Life, number: int, problem: str) -> Step:
    """A worker has ended before it had loaded; what answers goes on answering."""
    if life.coming != number:
        return ended(life, number)
    return Step(replace(life, coming=None, problem=problem))


def unload(life: Life) -> Step:
    """Take the name out of use: the one that answers drains, the one that loads is given up."""
    if not life.is_served and life.problem is None:
        if life.leaving:
            raise Refused("already_unloading", "it is being unloaded already")
        raise Refused("model_not_found", "it is not loaded")
    actions: list[tuple[Action, int]] = []
    if life.coming is not None:
        actions.append((Action.STOP, life.coming))
    if life.current is not None:
        actions += [(Action.UNROUTE, life.current), (Action.DRAIN, life.current)]
    going = {number for number in (life.coming, life.current) if number is not None}
    return Step(Life(leaving=life.leaving | going), tuple(actions))


def ended(life: Life, number: int) -> Step:
    """A worker that was leaving has gone, with its memory."""
    return Step(replace(life, leaving=life.leaving - {number}))
