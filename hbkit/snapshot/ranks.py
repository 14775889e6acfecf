"""Ranks that save one commit together: each does its part, and all learn of what any of them failed at."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Protocol

from hbkit import errors
from hbkit.errors import HbkitError, TransportError
from hbkit.store.line import Part

__all__ = ["Group", "Ranks"]


class Group(Protocol):
    """The processes, or threads, that save together.

    Attributes
    ----------
    rank, size : int
        Which of how many.
    """

    rank: int
    size: int

    def all_gather(self, data: bytes) -> list[bytes]:
        """What each rank gave, in their order; waits for all of them, and raises where one is gone."""
        ...


class Ranks:
    """A group whose ranks raise what any of them raised; None stands for one rank."""

    def __init__(self, group: Group | None) -> None:
        self._group = group
        self.rank, self.size = (0, 1) if group is None else (group.rank, group.size)
        self.part = Part.share(self.rank, self.size, bits=10)

    def gather(self, act: Callable[[], Any]) -> list[Any]:
        """What `act` returns to each rank, as JSON has it. Where it raises, all ranks raise once all have acted."""
        if self._group is None:
            return [act()]
        failure: BaseException | None = None
        try:
            message = {"value": act()}
        except BaseException as e:
            failure, message = e, _described(e)
        answers = [json.loads(answer) for answer in self._group.all_gather(json.dumps(message).encode())]
        if failure is not None:
            raise failure
        for rank, answer in enumerate(answers):
            if "value" not in answer:
                raise _raised(rank, answer)
        return [answer["value"] for answer in answers]


def _described(e: BaseException) -> dict[str, Any]:
    if isinstance(e, HbkitError):
        place = {name: str(value) for name, value in e.place.items()}
        return {"error": type(e).__name__, "problem": e.problem, "remedy": e.remedy, "place": place}
    return {"error": "TransportError", "problem": f"{type(e).__name__}: {e}", "remedy": "see the error there"}


def _raised(rank: int, answer: dict[str, Any]) -> HbkitError:
    kind = getattr(errors, answer["error"]) if answer["error"] in errors.__all__ else TransportError
    error: HbkitError = kind(answer["problem"], remedy=answer["remedy"], **{**answer.get("place", {}), "rank": rank})
    return error
