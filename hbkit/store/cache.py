"""Cache: which line of a near tier holds which row, what is dirty, and who makes way.

Lines are handed out one after the other until all are taken; then a hand sweeps over the buckets of `WAYS` lines, and
in each bucket it comes to, the policy picks the victim. So a batch's newcomers always meet different buckets, a whole
batch is one vector operation, no bucket overflows while others stand empty, and a cache that is not full touches only
the memory it needs.

Choosing (`plan`) and installing (`take`) are two acts, because between them the victims' dirty lines are written back
and the newcomers' lines are read; if that fails, the cache is as it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from hbkit.errors import InvalidArgument
from hbkit.store.base import Int64s
from hbkit.store.policy import META, Metas, Policy

WAYS = 16
LINE_NBYTES = META.itemsize + 8 + 8 + 1 + 1 + 16 + 8  # meta, owner, free, dirty, pinned, the policy's, a slab's pointer
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
    """Bookkeeping of `n_lines` lines; rows are named by the store's own numbers.

    Attributes
    ----------
    owner : int64[n_lines]
        Row that each line holds, -1 where it is free.
    dirty : bool[n_lines]
        Whether the line is newer than what lies below.
    metas : META[n_lines]
    """

    def __init__(self, n_lines: int, policy: Callable[[int], Policy]) -> None:
        self._ways = min(WAYS, n_lines)
        self.n_lines = n_lines // self._ways * self._ways
        self.policy = policy(self.n_lines)
        self.metas = np.zeros(self.n_lines, META)
        self.owner = np.full(self.n_lines, -1, np.int64)
        self.dirty = np.zeros(self.n_lines, np.bool_)
        self._free = np.arange(self.n_lines)[::-1].copy()  # a stack: the lowest line is on top
        self._n_free = self.n_lines
        self._hand = 0
        self._now = 0

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes; the lines themselves not counted."""
        arrays = (self.metas, self.owner, self.dirty, self._free)
        return sum(a.nbytes for a in arrays) + self.n_lines + self.policy.nbytes  # n_lines: the pinned mask

    def touch(self, slots: Int64s) -> None:
        """Note that lines were asked for."""
        metas = self.metas[slots]
        self._now += len(slots)
        self.policy.on_access(metas, self._now)
        self.metas[slots] = metas

    def newcomers(self, keys: Int64s) -> Metas:
        """Metas of keys that were asked for and are not here: META[n]."""
        metas = np.zeros(len(keys), META)
        metas["key"], metas["used"] = keys, self._now
        self._now += len(keys)
        self.policy.on_access(metas, self._now)
        return metas

    def plan(self, newcomers: Metas, pinned: npt.NDArray[np.bool_]) -> Int64s:
        """A distinct line for each newcomer, -1 where it finds none: int64[n].

        Parameters
        ----------
        newcomers : META[n]
        pinned : bool[n_lines]
            Lines that must stay; changed.
        """
        slots = np.full(len(newcomers), -1, np.int64)
        n_free = min(len(newcomers), self._n_free)
        slots[:n_free] = self._free[self._n_free - n_free : self._n_free][::-1]
        pinned[slots[:n_free]] = True
        n_buckets = self.n_lines // self._ways
        metas, held = self.metas.reshape(n_buckets, self._ways), pinned.reshape(n_buckets, self._ways)
        first, idle = n_free, 0  # newcomers before `first` are served; buckets in a row that had no line to give
        while first < len(newcomers) and idle < n_buckets:
            n = min(len(newcomers) - first, n_buckets)
            buckets = (self._hand + np.arange(n)) % n_buckets
            self._hand = (self._hand + n) % n_buckets
            buckets = buckets[~held[buckets].all(axis=1)]
            idle = idle + n if len(buckets) == 0 else 0
            if len(buckets) == 0:
                continue
            offered = metas[buckets]
            offered["pinned"] = held[buckets]
            victims = buckets * self._ways + self.policy.victim(offered)
            if pinned[victims].any():
                raise InvalidArgument(
                    f"{type(self.policy).__name__}.victim chose a pinned line", remedy="leave out metas['pinned']"
                )
            asking = np.arange(first, first + len(buckets))
            admitted = self.policy.admit(newcomers[asking], self.metas[victims])
            slots[asking[admitted]] = victims[admitted]
            pinned[victims[admitted]] = True
            first += len(buckets)
        return slots

    def take(self, slots: Int64s, newcomers: Metas, owners: Int64s, dirty: bool) -> None:
        """Give lines that `plan` has just chosen to their new owners."""
        self._n_free -= int(np.count_nonzero(self.owner[slots] < 0))
        self.metas[slots], self.owner[slots], self.dirty[slots] = newcomers, owners, dirty

    def drop(self, slots: Int64s) -> None:
        """Let lines go free; what they held is gone."""
        self.owner[slots], self.dirty[slots] = -1, False
        self._free[self._n_free : self._n_free + len(slots)] = slots
        self._n_free += len(slots)

    def validate(self) -> None:
        """Recount everything; AssertionError where the cache contradicts itself. For tests."""
        free = self._free[: self._n_free]
        assert len(np.unique(free)) == len(free), "a line is free twice"
        assert sorted(free) == np.flatnonzero(self.owner < 0).tolist(), "the free list is wrong"
        assert not self.dirty[self.owner < 0].any(), "a free line is dirty"
        owners = self.owner[self.owner >= 0]
        assert len(np.unique(owners)) == len(owners), "a row is in two lines"
class Window: pass
