"""Policies: which near lines make way, and whether a newcomer is worth more than whom it drives out.

A policy is two small acts, *on access* and *victims*; admission stands apart. It sees keys and lines only, never rows,
and never decides a result: whatever it picks, a store gives the same rows, only sooner or later.

Mostly a policy just keeps a number for each line, its *worth*, and the lines of least worth go. No links, no order: the
cache sweeps over the numbers and takes the least ones of a region at a time (see `hbkit.store.cache`).

- `LRU`: worth is the time of the last use.
- `LFU`: worth is the number of uses, which must age: without ageing yesterday's favourites never leave (Arlitt et al.,
  "Evaluating content management techniques for Web proxy caches", 2000). A use counts half after a while that is found
  out as the cache goes (see `hbkit._ext.cache.Tuner`): the shorter, the more like `LRU`. Keys that are not near are
  remembered too, so that one that returns has its history: else every key that comes in with a count of one is the
  next to go, and nothing new ever gets in (see `hbkit._ext.cache.History`).
- `TinyLFU`: like `LRU`, but a newcomer stays only if a frequency sketch has seen it more often than whom it would drive
  out (Einziger, Friedman and Manes, "TinyLFU: a highly efficient cache admission policy", ToS 2017).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from hbkit._ext.cache import History, Sketch, Tuner
from hbkit.errors import InvalidArgument
from hbkit.store.line import Int64s

__all__ = ["LFU", "LRU", "Policy", "TinyLFU", "make_policy"]

Float64s = npt.NDArray[np.float64]
HALF_LIVES = np.array([0.15, 0.5, 1.5, 4, 10, 25, 60, 150])  # candidates, in accesses a line
GHOSTS = 4  # keys remembered, a line
SKETCHED, SAMPLED = 4, 10  # keys the sketch is made for, a line, and accesses a line after which its counts halve
POLICY_NBYTES, FIXED_NBYTES = 24, 2**17  # the most a policy may hold: a line, and beside


class Policy(ABC):
    """Base of the policies. A cache makes one for itself, by calling the class with the number of its lines.

    Attributes
    ----------
    worth : float64[n_lines]
        What each line is worth; those of the least go first. Of lines that hold no key it may be anything.
    nbytes : int
        Memory held, at most `POLICY_NBYTES` a line and `FIXED_NBYTES`.

    Notes
    -----
    A policy may hold any arrays and may compile its loops with Numba. Arrays that it is given are its own to keep. What
    it raises, and answers of the wrong kind, end the call as `hbkit.errors.InvalidArgument`; the cache stays as it was.

    Examples
    --------
    Lines whose keys are used for the first time go first, then the longest unused:

    >>> import numba
    >>> @numba.njit
    ... def note(worth, lines, now):
    ...     for line in lines:
    ...         if line >= 0:
    ...             worth[line] = now
    >>> class Returning(Policy):
    ...     def __init__(self, n_lines):
    ...         self.worth, self.now = np.zeros(n_lines), 0.0
    ...     def on_access(self, keys, lines):
    ...         self.now += 1
    ...         note(self.worth, lines, self.now)
    ...     def on_insert(self, keys, lines):
    ...         self.worth[lines] = 0
    >>> place = hbkit.store.cached_ssd("rows", policy=Returning)
    """

    worth: Float64s

    @property
    def nbytes(self) -> int:
        """See the class; a policy that holds more than `worth` says how much."""
        return self.worth.nbytes

    @abstractmethod
    def on_access(self, keys: Int64s, lines: Int64s) -> None:
        """Note that a batch asks for the distinct ``keys[n]``, which are in ``lines[n]``; -1 is not near."""

    @abstractmethod
    def on_insert(self, keys: Int64s, lines: Int64s) -> None:
        """Note that ``keys[n]`` got ``lines[n]``."""

    def on_remove(self, keys: Int64s, lines: Int64s) -> None:  # noqa: B027  # most policies need not know
        """Note that ``keys[n]`` leave ``lines[n]``."""

    def victims(self, lines: Int64s, n: int) -> Int64s:
        """The n of ``lines[m]`` to go first: int64[n], distinct; the least of `worth`, if this is not overridden."""
        return lines[np.argsort(self.worth[lines], kind="stable")[:n]]

    admit: Callable[[Int64s, Int64s, Int64s, Int64s], npt.NDArray[np.bool_]] | None = None
    """``admit(keys, lines, others, their_lines) -> bool[n]``: whether each newcomer in ``lines[n]`` is worth more than
    the key that would go for it; if not, the newcomer goes. None admits all, and spares the question."""


class LRU(Policy):
    """Least recently used goes first."""

    def __init__(self, n_lines: int) -> None:
        self.worth = np.zeros(n_lines)
        self._now = 0

    def on_access(self, keys: Int64s, lines: Int64s) -> None:
        """See `Policy.on_access`."""
        self._now += 1
        self.worth[lines[lines >= 0]] = self._now

    def on_insert(self, keys: Int64s, lines: Int64s) -> None:
        """See `Policy.on_insert`."""
        self.worth[lines] = self._now


class LFU(Policy):
    """Least frequently used goes first; the longer ago a use, the less it counts."""

    def __init__(self, n_lines: int) -> None:
        self.worth = np.zeros(n_lines)
        self._history = History(GHOSTS * n_lines)
        self._tuner = Tuner(n_lines, HALF_LIVES, len(HALF_LIVES) // 2)
        self._now, self._n_lines, self._n_used = 0.0, n_lines, 0

    @property
    def nbytes(self) -> int:
        """See `Policy.nbytes`."""
        return self.worth.nbytes + int(self._history.nbytes + self._tuner.nbytes)

    def on_access(self, keys: Int64s, lines: Int64s) -> None:
        """See `Policy.on_access`."""
        self._now += len(keys) / (self._n_lines * self._tuner.access(keys, self._n_used))
        self._history.access(keys, lines, self.worth, self._now)

    def on_insert(self, keys: Int64s, lines: Int64s) -> None:
        """See `Policy.on_insert`."""
        self._n_used += len(keys)
        self._history.take(keys, lines, self.worth, self._now)

    def on_remove(self, keys: Int64s, lines: Int64s) -> None:
        """See `Policy.on_remove`."""
        self._n_used -= len(keys)
        self._history.put(keys, lines, self.worth, self._now)


class TinyLFU(LRU):
    """Least recently used goes first, if the newcomer was seen more often than it; else the newcomer."""

    def __init__(self, n_lines: int) -> None:
        super().__init__(n_lines)
        self._sketch = Sketch(SKETCHED * n_lines, SAMPLED * n_lines)

    @property
    def nbytes(self) -> int:
        """See `Policy.nbytes`."""
        return self.worth.nbytes + int(self._sketch.nbytes)

    def on_access(self, keys: Int64s, lines: Int64s) -> None:
        """See `Policy.on_access`."""
        super().on_access(keys, lines)
        self._sketch.add(keys)

    def admit(self, keys: Int64s, lines: Int64s, others: Int64s, their_lines: Int64s) -> npt.NDArray[np.bool_]:
        """See `Policy.admit`. A key that stays is not asked to prove itself again at once: it counts as used."""
        admitted: npt.NDArray[np.bool_] = self._sketch.estimate(keys) > self._sketch.estimate(others)
        self.worth[their_lines[~admitted]] = self._now
        return admitted


POLICIES: dict[str, Callable[[int], Policy]] = {"lfu": LFU, "lru": LRU, "tinylfu": TinyLFU}


def make_policy(policy: str | Callable[[int], Policy]) -> Callable[[int], Policy]:
    """What makes a `Policy` for a cache of so many lines, by its name or itself.

    Raises
    ------
    InvalidArgument
        No policy has this name.
    """
    if callable(policy):
        return policy
    if policy not in POLICIES:
        raise InvalidArgument(f"policy {policy!r}", remedy=f"use one of {', '.join(POLICIES)}, or a Policy class")
    return POLICIES[policy]
