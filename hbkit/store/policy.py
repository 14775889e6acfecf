"""Policies: which line of a full cache makes way, and whether a newcomer is worth it.

A policy is two small acts, *on access* and *victim*; admission stands apart. It sees metas only, never rows, and never
decides a result: whatever it picks, a store gives the same rows, only sooner or later.

A cache offers a few lines at a time (a *bucket* of ways) and the policy names the one to go. Sampled this way, the
choice comes close to that of an exact priority queue and needs no links between lines (Psounis and Prabhakar,
"Efficient randomized web-cache replacement schemes using samples from past eviction times", ToN 2002; Blankstein et
al., "Hyperbolic caching", ATC 2017).

- `LRU` evicts the longest unused.
- `LFU` evicts the least often used, and must age: without ageing yesterday's favourites never leave (Arlitt et al.,
  "Evaluating content management techniques for Web proxy caches", 2000). Counts halve once in `HALF_LIFE` accesses a
  line. Nothing sweeps over the lines for it: a count is as old as its `used`, so the halvings due since are applied
  where it is read.
- `TinyLFU` evicts like `LRU`, but a newcomer enters only if a frequency sketch has seen it more often than its victim
  (Einziger, Friedman and Manes, "TinyLFU: a highly efficient cache admission policy", ToS 2017). The sketch counts
  keys that are not in the cache too, and halves like `LFU`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from hbkit._ext.hash import hash_ints
from hbkit.errors import InvalidArgument
from hbkit.store.base import Int64s

__all__ = ["LFU", "LRU", "META", "Policy", "TinyLFU", "make_policy"]

META = np.dtype(
    [
        ("key", np.int64),
        ("used", np.int64),  # the clock at the last access
        ("count", np.int32),  # for the policy's use
        ("pinned", np.bool_),  # may not be the victim; true only in what `victim` is given
    ],
    align=True,
)
Metas: TypeAlias = npt.NDArray[Any]  # of dtype META
HALF_LIFE = 10  # accesses a line after which counts halve; the sample size of the TinyLFU paper
_NEVER = np.iinfo(np.int64).max


class Policy(ABC):
    """Base of the policies; one object serves one cache.

    Attributes
    ----------
    nbytes : int
        Memory held beside the metas, at most 16 bytes a line.
    """

    nbytes: int = 0

    @abstractmethod
    def on_access(self, meta: Metas, now: int) -> None:
        """Note in ``meta[n]``, in place, that these keys were asked for at clock `now`; newcomers come with count 0."""

    @abstractmethod
    def victim(self, metas: Metas) -> Int64s:
        """Way of the line to go in each bucket of ``metas[n, ways]``: int64[n]; not one that is pinned."""

    def admit(self, newcomers: Metas, victims: Metas) -> npt.NDArray[np.bool_]:
        """Whether each newcomer may take its victim's place: bool[n]."""
        return np.ones(len(newcomers), np.bool_)


class LRU(Policy):
    """Least recently used goes first."""

    def __init__(self, n_lines: int) -> None:
        pass

    def on_access(self, meta: Metas, now: int) -> None:
        """See `Policy.on_access`."""
        meta["used"] = now

    def victim(self, metas: Metas) -> Int64s:
        """See `Policy.victim`."""
        return np.argmin(np.where(metas["pinned"], _NEVER, metas["used"]), axis=1)


class LFU(Policy):
    """Least frequently used goes first, by counts that halve with age; ties go to the longest unused."""

    def __init__(self, n_lines: int) -> None:
        self._period = HALF_LIFE * n_lines
        self._now = 0

    def _aged(self, meta: Metas) -> Int64s:
        halvings = self._now // self._period - meta["used"] // self._period
        return meta["count"] >> np.minimum(halvings, 31)

    def on_access(self, meta: Metas, now: int) -> None:
        """See `Policy.on_access`."""
        self._now = now
        meta["count"] = np.minimum(self._aged(meta) + 1, 2**21)
        meta["used"] = now

    def victim(self, metas: Metas) -> Int64s:
        """See `Policy.victim`."""
        score = (self._aged(metas).astype(np.int64) << 41) + np.minimum(metas["used"], 2**41 - 1)
        return np.argmin(np.where(metas["pinned"], _NEVER, score), axis=1)


class TinyLFU(LRU):
    """Least recently used goes first, if the newcomer was seen more often than it."""

    def __init__(self, n_lines: int) -> None:
        self._counts = np.zeros((4, 2 << n_lines.bit_length()), np.uint8)
        self._sample, self._n_added = HALF_LIFE * n_lines, 0
        self.nbytes = self._counts.nbytes

    def _cells(self, keys: Int64s) -> list[Int64s]:
        h = hash_ints(np.ascontiguousarray(keys)).view(np.uint64)
        low, high = h & np.uint64(0xFFFFFFFF), (h >> np.uint64(32)) | np.uint64(1)
        mask = np.uint64(self._counts.shape[1] - 1)
        return [((low + np.uint64(i) * high) & mask).astype(np.int64) for i in range(4)]

    def on_access(self, meta: Metas, now: int) -> None:
        """See `Policy.on_access`."""
        super().on_access(meta, now)
        cells = self._cells(meta["key"])
        least = np.minimum.reduce([row[cell] for row, cell in zip(self._counts, cells, strict=True)])
        more = np.minimum(least, 254) + 1
        for row, cell in zip(self._counts, cells, strict=True):
            np.maximum.at(row, cell, more)  # conservative update: no counter grows beyond what it must
        self._n_added += len(meta)
        if self._n_added >= self._sample:
            self._counts >>= 1
            self._n_added //= 2

    def _estimate(self, keys: Int64s) -> npt.NDArray[Any]:
        return np.minimum.reduce([row[cell] for row, cell in zip(self._counts, self._cells(keys), strict=True)])

    def admit(self, newcomers: Metas, victims: Metas) -> npt.NDArray[np.bool_]:
        """See `Policy.admit`."""
        admitted: npt.NDArray[np.bool_] = self._estimate(newcomers["key"]) > self._estimate(victims["key"])
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
