"""Admission: which new keys earn a row. A key that is not admitted reads the table's default and takes no row memory.

A filter counts the occurrences of keys that have no row yet; a key is admitted in the batch that brings it to the named
count, and leaves the filter's memory then where that is exact. Counting is part of the step, before rows are made, so
it depends neither on the tier nor on how far ahead a batch was staged. Snapshots keep the counts.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hbkit._ext import bloom
from hbkit._ext.index import Index
from hbkit.errors import InvalidArgument, SchemaMismatch
from hbkit.store import base
from hbkit.store.line import Int64s

__all__ = ["Admission", "BloomAdmission", "CountAdmission", "Filter"]


class Filter(base.Filter, Protocol):
    """One table's admission at work."""

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
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
    """Admit a key at its `min_count`-th occurrence, counted exactly.

    Parameters
    ----------
    min_count : int
        1 to 2**32 - 1.

    Notes
    -----
    A waiting key takes an index entry and 4 bytes. A key that was evicted or erased begins at 0 again.
    """

    min_count: int

    def __post_init__(self) -> None:
        if not 1 <= self.min_count < 2**32:
            raise InvalidArgument(f"min_count={self.min_count}", remedy="give a count of at least 1, below 2**32")

    def open(self) -> CountFilter:
        """A filter of its own for one table."""
        return CountFilter(self.min_count)


class CountFilter:
    """Exact counts of the keys that wait.

    A key with count 0 is as good as absent: its entry could not be erased for lack of memory.
    """

    def __init__(self, min_count: int) -> None:
        self._min_count = min_count
        self._index = Index()
        self._counts = np.zeros(0, np.uint32)
        self._pending: Any = None  # what `keep` and `undo` need

    def __len__(self) -> int:
        return int(np.count_nonzero(self._counts))

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return int(self._index.nbytes) + self._counts.nbytes

    def admit(self, keys: Int64s, counts: Int64s) -> npt.NDArray[np.bool_]:
        """See `hbkit.store.base.Filter`."""
        n_slots, table = self._index.n_slots, self._counts
        if (need := n_slots + len(keys)) > len(table):
            table = np.zeros(need + need // 2, np.uint32)
            table[: len(self._counts)] = self._counts
        slots, is_new = self._index.find_or_insert(keys)
        try:
            totals = np.where(is_new, 0, table[slots]) + counts
            admitted: npt.NDArray[np.bool_] = totals >= self._min_count
            totals = np.where(admitted, 0, np.minimum(totals, 2**32 - 1)).astype(np.uint32)
            self._pending = (keys, is_new, n_slots, table, slots, totals, keys[admitted])
        except BaseException:
            self._index.take_back(keys, is_new, n_slots)
            raise
        return admitted

    def keep(self) -> None:
        """See `hbkit.store.base.Filter`."""
        _, _, _, self._counts, slots, totals, admitted = self._pending
        self._pending = None
        self._counts[slots] = totals
        with suppress(MemoryError):
            self._index.erase(admitted)

    def undo(self) -> None:
        """See `hbkit.store.base.Filter`."""
        keys, is_new, n_slots = self._pending[:3]
        self._pending = None
        self._index.take_back(keys, is_new, n_slots)

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Waiting keys, ascending, and their counts."""
        keys, slots = self._index.items()
        counts = self._counts[slots].astype(np.int64)
        order = np.argsort(keys)
        order = order[counts[order] > 0]
        return {"key": keys[order], "count": counts[order]}

    def load_state(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """See `Filter.load_state`."""
        if set(state) != {"key", "count"}:
            raise SchemaMismatch(f"admission state {sorted(state)}", remedy="it was not saved by CountAdmission")
        index = Index()
        slots, _ = index.find_or_insert(np.ascontiguousarray(state["key"], np.int64))
        counts = np.zeros(len(slots), np.uint32)
        counts[slots] = np.clip(state["count"], 0, 2**32 - 1)
        self._index, self._counts = index, counts


@dataclass(frozen=True)
class BloomAdmission:
    """Admit a key at about its `min_count`-th occurrence, counted in a counting Bloom filter of fixed size.

    Never later than `CountAdmission`, and earlier for at most a share `false_positive_rate` of new keys.

    Parameters
    ----------
    min_count : int
        1 to 65,535.
    expected_keys : int
        Distinct keys that the filter is sized for. Beyond them, more keys are admitted early.
    false_positive_rate : float
        Chance that a key seen for the first time meets only counters that others of `expected_keys` have raised, as it
        must to be admitted early.

    Notes
    -----
    About 3 log2(1 / false_positive_rate) bytes for each of `expected_keys`, somewhat more for few keys, since each of
    1,024 virtual shards has counters of its own. Counts never shrink: a key that was evicted is admitted again at once.
    """

    min_count: int
    expected_keys: int
    false_positive_rate: float = 0.01

    def __post_init__(self) -> None:
        if not (1 <= self.min_count <= 65_535 and self.expected_keys >= 1 and 1e-12 < self.false_positive_rate < 1):
            raise InvalidArgument(
                f"{self}", remedy="give 1 <= min_count <= 65535, expected_keys >= 1, 1e-12 < false_positive_rate < 1"
            )

    @property
    def n_hashes(self) -> int:
        """Counters of a key: where about half of all are raised, each is worth a factor of two."""
        return max(1, round(-math.log2(self.false_positive_rate)))

    def shard_counters(self) -> int:
        """The least number of counters for one of 1,024 shards that keeps the rate."""
        keys, chance = _shard_keys(self.expected_keys / 1024)
        k, low, high = self.n_hashes, 0, 1

        def rate(m: int) -> float:
            raised = -np.expm1(k * keys * math.log1p(-1 / m)) if m > 1 else (keys > 0).astype(np.float64)
            return float((chance * raised**k).sum())

        while rate(high) > self.false_positive_rate:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if rate(middle) > self.false_positive_rate else (low, middle)
        return max(high, 8 * k)  # with fewer, a key's own counters coincide, which the rate above leaves out

    def open(self) -> BloomFilter:
        """A filter of its own for one table."""
        return BloomFilter(self)


def _shard_keys(mean: float) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """How many keys fall into a shard, and the chance of each number: a Poisson distribution, thinned where wide."""
    spread = 10 * math.sqrt(mean) + 20
    n = np.unique(np.linspace(max(0, mean - spread), mean + spread, 2000).round())
    log = n * math.log(mean) - mean - np.array([math.lgamma(x + 1) for x in n])
    chance = np.exp(log - log.max())
    return n, chance / chance.sum()


class BloomFilter:
    """Counters that keys share. A key's estimate is its least counter, so it is never too low."""

    def __init__(self, rule: BloomAdmission) -> None:
        self._min_count, self._n_hashes = rule.min_count, rule.n_hashes
        self._counters = np.zeros(1024 * rule.shard_counters(), np.uint16)
        self._pending: Any = None  # what `undo` needs

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return self._counters.nbytes

    def admit(self, keys: Int64s, counts: Int64s) -> npt.NDArray[np.bool_]:
        """See `hbkit.store.base.Filter`."""
        self._pending = keys, np.empty((len(keys), self._n_hashes), np.uint16)
        estimates = bloom.add(self._counters, keys, counts, self._pending[1])
        try:
            admitted: npt.NDArray[np.bool_] = estimates >= self._min_count
        except BaseException:
            self.undo()
            raise
        return admitted

    def keep(self) -> None:
        """See `hbkit.store.base.Filter`. Keys that have rows share their counters with others, which stay."""
        self._pending = None

    def undo(self) -> None:
        """See `hbkit.store.base.Filter`."""
        bloom.take_back(self._counters, *self._pending)
        self._pending = None

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
