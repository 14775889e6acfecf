"""Admission: which new keys earn a row. A key that is not admitted reads zeros and takes no row memory.

A filter counts the occurrences of keys that have no row yet; a key is admitted in the batch that brings it to the named
count, and leaves the filter's memory then where that is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hbkit._ext.hash import hash_ints
from hbkit._ext.index import Index
from hbkit.errors import InvalidArgument, SchemaMismatch
from hbkit.store.base import Int64s

__all__ = ["Admission", "BloomAdmission", "CountAdmission", "Filter"]


class Filter(Protocol):
    """One table's admission at work."""

    def admit(self, keys: Int64s, counts: Int64s) -> npt.NDArray[np.bool_]:
        """Add `counts` to absent, distinct `keys`; which of them are admitted now: bool[n]."""
        ...

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Columns of equal length that `load_state` takes back: what a snapshot keeps."""
        ...

    def load_state(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Replace the counts by those of `state`."""
        ...


class Admission(Protocol):
    """A rule of admission, as given to a table."""

    def open(self) -> Filter:
        """A filter of its own for one table."""
        ...


@dataclass(frozen=True)
class CountAdmission:
    """Admit a key at its `min_count`-th occurrence, counted exactly (about 32 bytes a waiting key)."""

    min_count: int

    def __post_init__(self) -> None:
        if self.min_count < 1:
            raise InvalidArgument(f"min_count={self.min_count}", remedy="give a count of at least 1")

    def open(self) -> CountFilter:
        """A filter of its own for one table."""
        return CountFilter(self.min_count)


class CountFilter:
    """Exact counts of the keys that wait."""

    def __init__(self, min_count: int) -> None:
        self._min_count = min_count
        self._index = Index()
        self._counts = np.zeros(0, np.int64)

    def admit(self, keys: Int64s, counts: Int64s) -> npt.NDArray[np.bool_]:
        """See `Filter.admit`."""
        slots, is_new = self._index.find_or_insert(keys)
        if self._index.n_slots > len(self._counts):
            grown = np.zeros(2 * self._index.n_slots, np.int64)
            grown[: len(self._counts)] = self._counts
            self._counts = grown
        self._counts[slots[is_new]] = 0
        self._counts[slots] += counts
        admitted: npt.NDArray[np.bool_] = self._counts[slots] >= self._min_count
        self._index.erase(keys[admitted])
        return admitted

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Waiting keys and their counts."""
        keys, slots = self._index.items()
        order = np.argsort(keys)
        return {"key": keys[order], "count": self._counts[slots[order]]}

    def load_state(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """See `Filter.load_state`."""
        if set(state) != {"key", "count"}:
            raise SchemaMismatch(f"admission state {sorted(state)}", remedy="it was not saved by CountAdmission")
        self._index = Index()
        slots, _ = self._index.find_or_insert(np.ascontiguousarray(state["key"], np.int64))
        self._counts = np.zeros(len(slots), np.int64)
        self._counts[slots] = state["count"]


@dataclass(frozen=True)
class BloomAdmission:
    """Admit a key at about its `min_count`-th occurrence, counted in a counting Bloom filter of fixed size.

    Parameters
    ----------
    min_count : int
        At most 65,535.
    expected_keys : int
        Distinct keys that the filter is sized for.
    false_positive_rate : float
        Share of keys admitted too early once `expected_keys` distinct keys have been seen.
    """

    min_count: int
    expected_keys: int
    false_positive_rate: float = 0.01

    def __post_init__(self) -> None:
        if not (1 <= self.min_count <= 65_535 and self.expected_keys >= 1 and 0 < self.false_positive_rate < 1):
            raise InvalidArgument(
                f"{self}", remedy="give 1 <= min_count <= 65535, expected_keys >= 1, 0 < false_positive_rate < 1"
            )

    def open(self) -> BloomFilter:
        """A filter of its own for one table."""
        return BloomFilter(self)


class BloomFilter:
    """Counting Bloom filter (Fan et al., 2000) without conservative update: the order of keys does not matter."""

    def __init__(self, rule: BloomAdmission) -> None:
        per_key = -math.log(rule.false_positive_rate) / math.log(2) ** 2
        self._n_hashes = max(1, round(per_key * math.log(2)))
        self._counters = np.zeros(max(64, math.ceil(per_key * rule.expected_keys)), np.uint16)
        self._min_count = rule.min_count

    def admit(self, keys: Int64s, counts: Int64s) -> npt.NDArray[np.bool_]:
        """See `Filter.admit`."""
        size = np.uint64(len(self._counters))
        estimate = np.full(len(keys), np.iinfo(np.int64).max)
        cells = [(hash_ints(keys, k).view(np.uint64) % size).astype(np.int64) for k in range(self._n_hashes)]
        for cell in cells:
            touched, inverse = np.unique(cell, return_inverse=True)
            sums = self._counters[touched].astype(np.int64)
            np.add.at(sums, inverse, counts)
            self._counters[touched] = np.minimum(sums, 65_535)
        for cell in cells:
            estimate = np.minimum(estimate, self._counters[cell])
        return estimate >= self._min_count

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """The counters."""
        return {"counter": self._counters}

    def load_state(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """See `Filter.load_state`."""
        counters = state.get("counter")
        if counters is None or counters.shape != self._counters.shape:
            raise SchemaMismatch(
                f"admission state {sorted(state)}", remedy="it was not saved by a BloomAdmission of these parameters"
            )
        self._counters = counters.astype(np.uint16)
