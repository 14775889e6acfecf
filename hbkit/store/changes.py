"""Which rows changed since some instant: their stamps tell, and a journal of keys where stamps do not.

An instant is marked with the largest stamp that any row has had. Whatever is stamped higher later has changed since.
That leaves what the stamps cannot tell: rows that were erased, rows that were put with a stamp of their own, and rows
stamped no higher than the newest mark (a step that the mark fell into, steps that began anew). Their keys are noted
with the newest mark. So what changed since a mark is what is stamped higher, and what was noted with it or a later one.

Training that goes on from the newest mark notes nothing, and a table that was never saved has no marks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from hbkit.store.line import Int64s

MOST_STAMP = 2**32 - 1  # larger steps are stamped with it
MOST_MARKS = 1000
LEAST_KEYS, KEYS = 2**20, 8  # keys noted at the most: so many, or an eighth of the rows where that is more


@dataclass
class Mark:
    """An instant, and the keys noted from it to the next one.

    Attributes
    ----------
    step : int
        Largest stamp then.
    names : set of str
        What goes by them is the rows as they were then.
    keys : list of int64[n]
    n_keys : int
    """

    step: int
    names: set[str] = field(default_factory=set)
    keys: list[Int64s] = field(default_factory=list)
    n_keys: int = 0


class Since(NamedTuple):
    """What changed: rows stamped after `step`, and those of `keys` (distinct, ascending), which may be no more."""

    step: int
    keys: Int64s


class Changes:
    """The marks of one store, oldest first. Its calls are ordered by the store's lock, but for `name`.

    Parameters
    ----------
    stamps : bool
        Whether rows are stamped at all: else nothing is known of any mark.

    Notes
    -----
    Memory: 8 bytes a key noted, and there are at most 2**20 of them, or an eighth of the rows where that is more. Then,
    and beyond a thousand marks, the oldest are forgotten.
    """

    def __init__(self, stamps: bool) -> None:
        self._stamps = stamps
        self._marks: list[Mark] = []
        self._n_keys = 0
        self._newest = -1  # step of the newest mark

    def mark(self, step: int) -> Mark:
        """Mark this instant, `step` being the largest stamp so far; it has no name yet."""
        if self._stamps:
            if not self._marks or self._marks[-1].n_keys or step > self._newest:
                self._marks.append(Mark(step))
                self._newest = step
                if len(self._marks) > MOST_MARKS:
                    self._forget_oldest()
            return self._marks[-1]
        return Mark(step)

    def name(self, mark: Mark, name: str) -> None:
        """Let what `mark` marks go by `name`, too."""
        mark.names.add(name)

    def since(self, name: str) -> Since | None:
        """What changed since the newest mark of that name; None where it is not known, or no more."""
        keys: list[Int64s] = []
        for mark in reversed(self._marks):
            keys += mark.keys
            if name in mark.names:
                return Since(mark.step, np.unique(np.concatenate([_NONE, *keys])))
        return None

    @property
    def any(self) -> bool:
        """Whether there are marks, so that keys need be noted."""
        return bool(self._marks)

    def knows(self, name: str) -> bool:
        """Whether there is a mark of that name."""
        return any(name in mark.names for mark in self._marks)

    def tells(self, step: int) -> bool:
        """Whether rows that are stamped with `step` now are seen to have changed since every mark."""
        return min(step, MOST_STAMP) > self._newest

    def note(self, keys: Int64s, n_rows: int, slots: Int64s | None = None) -> None:
        """Note keys of rows that change without being stamped so, in a store of so many rows. Never fails.

        With `slots`, those whose slot is not below 0.
        """
        if not self._marks:
            return
        try:
            keys = keys.copy() if slots is None else keys[slots >= 0]
            if not len(keys):
                return
            self._marks[-1].keys.append(keys)
        except MemoryError:
            self.forget()
            return
        self._marks[-1].n_keys += len(keys)
        self._n_keys += len(keys)
        while self._n_keys > max(LEAST_KEYS, n_rows // KEYS):
            self._forget_oldest()

    def note_stamped(self, keys: Int64s, n_rows: int, last_step: Int64s, slots: Int64s | None = None) -> None:
        """`note` those keys whose rows, stamped with ``last_step[n]`` by a tier above, do not show it. Never fails."""
        if not self._marks:
            return
        try:
            untold = np.minimum(last_step, MOST_STAMP) <= self._newest
            if slots is not None:
                untold &= slots >= 0
            keys = keys[untold]
        except MemoryError:
            self.forget()
            return
        self.note(keys, n_rows)

    def forget(self) -> None:
        """Forget all marks: the rows are to be replaced."""
        self._marks.clear()
        self._n_keys, self._newest = 0, -1

    def _forget_oldest(self) -> None:
        self._n_keys -= self._marks.pop(0).n_keys
        if not self._marks:
            self._newest = -1


_NONE = np.zeros(0, np.int64)
