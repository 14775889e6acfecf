"""Cache: which near line holds which key, what is dirty and pinned, and who makes way.

All near lines are one pool: any key may take any free line, the lowest first, so a cache that is not full touches only
the memory it needs, and no bucket overflows while others stand empty. Nothing is ordered or linked. When lines are
needed, a hand comes to the next region of up to `REGION` lines and the `1/SHARE` of it that is worth least is queued;
victims are taken from the queue, unless somebody asked for them meanwhile. What a line is worth has nothing to do with
its place, so the least of a region are nearly the least of all, and a cache of one region is exact at the moment it is
swept. A victim costs looking at `SHARE` numbers that lie side by side (docs/adr/0009).

Lines whose next use is known are worth more than any other: they go only when nothing else is left, the farthest first
(Belady, "A study of replacement algorithms for a virtual-storage computer", 1966).

Choosing (`victims`) and removing (`remove`) are two acts, because between them dirty lines are written back; if that
fails, the cache is as it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from hbkit._ext.cache import FREE, NEVER, QUEUED, USED, Lines, Window
from hbkit._ext.index import Index
from hbkit.errors import InvalidArgument
from hbkit.store.line import Int64s
from hbkit.store.policy import FIXED_NBYTES, POLICY_NBYTES, Policy

__all__ = ["LINE_NBYTES", "NEVER", "Cache", "Window", "as_nbytes"]

REGION, SHARE = 1 << 16, 64
# key, next use, pins, dirty, state, newcomer; the index; the policy; a slab's pointer.
LINE_NBYTES = 8 + 8 + 4 + 1 + 1 + 1 + 24 + POLICY_NBYTES + 8
_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def as_nbytes(budget: int | str) -> int:
    """Bytes of a budget given as a number or as text such as "2GiB".

    Raises
    ------
    InvalidArgument
        It is neither, or not above 0.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(budget))
    if found is None or found[2] not in _UNITS or float(found[1]) <= 0:
        raise InvalidArgument(f"budget {budget!r}", remedy=f"give bytes, or a number with {', '.join(_UNITS)[2:]}")
    return int(float(found[1]) * _UNITS[found[2]])


class Cache:
    """Bookkeeping of `n_lines` near lines. It keeps no rows and does no I/O; callers order their calls.

    Parameters
    ----------
    n_lines : int
    policy : callable
        Makes the `Policy` of a cache of so many lines.

    Attributes
    ----------
    key : int64[n_lines]
        Key that each line holds, of those that hold one.
    dirty : bool[n_lines]
        Whether the line is newer than what lies below. The caller's to write, as the next two are.
    pins : int32[n_lines]
        How often the line is pinned; one that is pinned is no victim.
    next_use : int64[n_lines]
        Number of the next batch known to use the line, `NEVER` where none is known.

    Raises
    ------
    InvalidArgument
        There are no lines; or, in any method, a policy of the user's own raised or answered with something wrong.
    """

    policy: Policy

    def __init__(self, n_lines: int, policy: Callable[[int], Policy]) -> None:
        if n_lines < 1:
            raise InvalidArgument(f"a cache of {n_lines} lines", remedy="give it at least one")
        self._index = Index()
        self.key = np.zeros(0, np.int64)
        self.dirty = np.zeros(0, np.bool_)
        self.pins = np.zeros(0, np.int32)
        self.next_use = np.zeros(0, np.int64)
        self._state = np.zeros(0, np.uint8)
        self._make_policy = policy
        self._name = getattr(policy, "__name__", type(policy).__name__)
        self._ours = getattr(policy, "__module__", "") == Policy.__module__
        self.resize(n_lines)

    def resize(self, n_lines: int) -> None:
        """Have `n_lines`, none of those beyond being in use. The policy begins anew, with the keys that are near."""
        if n_lines < 1 or len(self.held(n_lines)):
            raise InvalidArgument(f"{n_lines} lines, and one beyond is in use", remedy="remove it before")
        self.n_lines = n_lines
        for name, rest in (("key", 0), ("dirty", 0), ("pins", 0), ("next_use", NEVER), ("_state", FREE)):
            old = getattr(self, name)
            new = np.full(n_lines, rest, old.dtype) if rest else np.zeros(n_lines, old.dtype)
            new[: len(old)] = old[:n_lines]
            setattr(self, name, new)
        self._state[self._state == QUEUED] = USED
        self._lines = Lines(self._state, self.pins, self.next_use)
        self._queue, self._hand = np.zeros(0, np.int64), 0
        if self._ours and hasattr(self, "policy"):
            del self.policy  # that there are not two at once
        self.policy = self._ask("", self._make_policy, n_lines)
        if not isinstance(self.policy, Policy):
            raise InvalidArgument(f"{self._name} made no Policy", remedy="give a class derived from hbkit.store.Policy")
        self._newcomer = np.zeros(n_lines if self.policy.admit else 0, np.bool_)
        if self.policy.nbytes > POLICY_NBYTES * n_lines + FIXED_NBYTES:
            raise InvalidArgument(
                f"{self._name} holds {self.policy.nbytes} bytes for {n_lines} lines",
                remedy=f"let it hold at most {POLICY_NBYTES} a line",
            )
        for first in range(0, n_lines, REGION):
            lines = first + np.flatnonzero(self._state[first : first + REGION] != FREE)
            self._tell("on_insert", self.key[lines], lines)

    def held(self, first: int = 0) -> Int64s:
        """Lines from `first` on that hold a key: int64[m], ascending."""
        return first + np.flatnonzero(self._state[first:] != FREE)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes, at most `LINE_NBYTES` a line and `FIXED_NBYTES`; of lines not the rows."""
        arrays = (self.key, self.dirty, self.pins, self.next_use, self._state, self._newcomer, self._queue)
        return sum(a.nbytes for a in arrays) + int(self._index.nbytes) + self.policy.nbytes

    def find(self, keys: Int64s) -> Int64s:
        """Line of each key, -1 where it is not near: int64[n]."""
        lines: Int64s = self._index.find(keys)
        return lines

    def access(self, keys: Int64s, lines: Int64s) -> None:
        """Note that a batch asks for distinct ``keys[n]``, found in ``lines[n]``; to be called once a batch."""
        self._tell("on_access", keys, lines)
        self._lines.mark(lines, USED)

    def insert(self, keys: Int64s) -> Int64s:
        """Lines for distinct keys that are not near: int64[n], clean, unpinned, of no known use.

        Raises
        ------
        InvalidArgument
            There are not so many free lines; or a key is near, or repeated.
        """
        if len(keys) > self.n_lines - len(self):
            raise InvalidArgument(
                f"{len(keys)} keys for {self.n_lines - len(self)} free lines", remedy="remove victims before"
            )
        lines, is_new = self._index.find_or_insert(keys)
        try:
            if not is_new.all():
                raise InvalidArgument("a key is near already", remedy="insert the keys that find does not find, once")
            self._tell("on_insert", keys, lines)
        except InvalidArgument:
            self._index.erase(keys[is_new])
            raise
        self.key[lines], self.next_use[lines] = keys, NEVER
        self.dirty[lines], self.pins[lines] = False, 0
        self._lines.mark(lines, USED)
        if self.policy.admit:
            self._newcomer[lines] = True
        return lines

    def victims(self, n: int) -> Int64s:
        """Unpinned lines of least worth, to be removed next: int64[<=n], fewer only where all others are pinned."""
        try:
            found = self._least(n)
            if self.policy.admit:
                found = self._contest(found)
        except InvalidArgument:
            self._state[self._state == QUEUED] = USED
            self._queue = self._queue[:0]
            raise
        if len(found) < n:
            self._lines.mark(found, QUEUED)  # none twice
            found = np.concatenate([found, self._lines.farthest(n - len(found))])
        self._lines.mark(found, USED)
        return found

    def _least(self, n: int) -> Int64s:
        """Up to n lines whose next use is unknown, in state QUEUED."""
        found: list[Int64s] = [np.zeros(0, np.int64)]
        n_regions, idle = -(-self.n_lines // REGION), 0
        while n and idle < n_regions:
            if len(self._queue) == 0:
                first, last = (hand * self.n_lines // n_regions for hand in (self._hand, self._hand + 1))
                self._fill_queue(first, last, n)
                self._hand = (self._hand + 1) % n_regions
                idle = 0 if len(self._queue) else idle + 1
            found.append(self._lines.claim(self._queue[:n]))
            self._queue = self._queue[n:]
            n -= len(found[-1])
        return np.concatenate(found)

    def _fill_queue(self, first: int, last: int, n: int) -> None:
        """Queue the lines of least worth in ``[first, last)``: its part of the n needed, or many more."""
        share = max((last - first) // SHARE, -(-n * (last - first) // self.n_lines), 1)
        if type(self.policy).victims is Policy.victims:
            worth = self.policy.worth
            if not (isinstance(worth, np.ndarray) and worth.dtype == np.float64 and worth.shape == (self.n_lines,)):
                raise self._wrong("worth", f"is not float64[{self.n_lines}]")
            self._queue = self._ask("worth", self._lines.least, np.ascontiguousarray(worth), first, last, share)
        else:
            lines = self._lines.candidates(first, last)
            n_asked = min(share, len(lines))
            chosen = self._ask("victims", self.policy.victims, lines.copy(), n_asked) if n_asked else lines
            if not (isinstance(chosen, np.ndarray) and chosen.dtype == np.int64 and chosen.shape == (n_asked,)):
                raise self._wrong("victims", f"gave no int64[{n_asked}]")
            if len(np.intersect1d(chosen, lines)) < n_asked:
                raise self._wrong("victims", "chose a line that it was not offered, perhaps a pinned one, or one twice")
            self._queue = chosen.copy()
        self._lines.mark(self._queue, QUEUED)

    def _contest(self, found: Int64s) -> Int64s:
        """Set a newcomer against each victim, and let go whichever of the two the policy does not admit."""
        assert self.policy.admit is not None
        new = np.flatnonzero(self._newcomer)
        new = new[(self._state[new] == USED) & (self.pins[new] == 0) & (self.next_use[new] == NEVER)][: len(found)]
        old, rest = found[: len(new)], found[len(new) :]
        wins = self._ask("admit", self.policy.admit, self.key[new], new.copy(), self.key[old], old.copy())
        if not (isinstance(wins, np.ndarray) and wins.dtype == np.bool_ and wins.shape == new.shape):
            raise self._wrong("admit", f"gave no bool[{len(new)}]")
        self._newcomer[new[wins]] = False
        self._lines.mark(old[~wins], USED)
        return np.concatenate([old[wins], rest, new[~wins]])

    def remove(self, lines: Int64s) -> None:
        """Let distinct lines go free; what they held is gone.

        Raises
        ------
        InvalidArgument
            A line is free.
        """
        if (self._state[lines] == FREE).any():
            raise InvalidArgument("a line is free already", remedy="remove lines that hold a key, once")
        self._tell("on_remove", self.key[lines], lines)
        self._index.erase(self.key[lines])
        self.dirty[lines], self.next_use[lines] = False, NEVER
        self._lines.mark(lines, FREE)
        if self.policy.admit:
            self._newcomer[lines] = False

    def _tell(self, what: str, keys: Int64s, lines: Int64s) -> None:
        """Tell the policy; one that we did not write gets arrays of its own."""
        if not self._ours:
            keys, lines = keys.copy(), lines.copy()
        self._ask(what, getattr(self.policy, what), keys, lines)

    def _ask(self, what: str, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(*args)
        except Exception as e:
            raise self._wrong(what, f"raised {type(e).__name__}: {e}") from e

    def _wrong(self, what: str, how: str) -> InvalidArgument:
        return InvalidArgument(
            f"the policy {self._name}{'.' if what else ''}{what} {how}",
            remedy="see hbkit.store.Policy for what it is to do",
        )

    def validate(self) -> None:
        """Recount everything; AssertionError where the cache contradicts itself. For tests."""
        self._index.validate()
        keys, lines = self._index.items()
        held = np.flatnonzero(self._state != FREE)
        assert np.array_equal(lines, held), "the states of lines are wrong"
        assert np.array_equal(self.key[lines], keys), "a line has another key"
        free = self._state == FREE
        assert not self.dirty[free].any(), "a free line is dirty"
        assert (self.next_use[free] == NEVER).all(), "a free line is used next"
        assert np.isin(np.flatnonzero(self._state == QUEUED), self._queue).all(), (
            "a line is queued but not in the queue"
        )
        queued = self._queue[self._state[self._queue] == QUEUED]
        assert len(np.unique(queued)) == len(queued), "a line is queued twice"
