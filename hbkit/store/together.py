"""One batch of several tables in host memory: each pass over it is one call for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hbkit._ext.together import Together as Batch
from hbkit.store.base import Filter, Float32s, Int64s, Lease, Rule
from hbkit.store.host import HostStore

__all__ = ["Together"]


class Together:
    """What `Lease`, ``create``, ``gather`` and ``apply`` are to one table, for the same batch of several.

    The results are those of the stores one by one, bit for bit.

    Parameters
    ----------
    stores : sequence of HostStore
    keys : list of int64[k * n_rows]
        For each store the keys of its k features, feature after feature.
    places : list of (group, column)
        For each feature, in the order of stores: in which of the arrays that ``gather`` and ``sum`` are given its rows
        stand, and from which column on.
    n_rows : int, at least 1
    """

    def __init__(
        self,
        stores: Sequence[HostStore],
        keys: list[Int64s],
        places: list[tuple[int, int]],
        n_rows: int,
    ) -> None:
        self._stores = stores
        versions = [store.version for store in stores]  # before the keys are looked for
        self._batch = Batch([store.parts for store in stores], keys, places, n_rows)
        columns = zip(self._batch.keys, self._batch.slots, self._batch.counts, versions, strict=True)
        self._leases = [Lease(key, slots, counts, -1, version) for key, slots, counts, version in columns]
        self._each = list(zip(stores, self._leases, self._batch.slots, strict=True))
        # Whoever takes several locks takes them in this order, so that none waits for another in a circle.
        self._ordered = sorted(stores, key=id)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """No key comes or goes, and slots are up to date."""
        held = []
        try:
            for store in self._ordered:
                store.lock.shared.__enter__()
                held.append(store)
            for store, lease, slots in self._each:
                if lease.version != store.version:
                    store.refresh(lease)
                if lease.slots is not slots:  # they were found anew
                    slots[:] = lease.slots
                    lease.slots = slots
            yield
        finally:
            for store in held:
                store.lock.shared.__exit__()

    @contextmanager
    def _updating(self) -> Iterator[None]:
        """No other thread updates rows or metadata."""
        held = []
        try:
            for store in self._ordered:
                store.updating.acquire()
                held.append(store)
            yield
        finally:
            for store in held:
                store.updating.release()

    def create(self, step: int, admissions: Sequence[Filter | None], outs: list[Float32s]) -> None:
        """Make the absent rows that are admitted, count the keys, stamp them with `step`; then `gather`."""
        lacking = set(self._batch.absent())
        lacking |= {i for i, (store, lease, _) in enumerate(self._each) if lease.version[0] != store.version[0]}
        for i in lacking:  # or their keys were erased
            self._stores[i].create(self._leases[i], step, admissions[i])
        others = [i for i in range(len(self._stores)) if i not in lacking]
        with self._reading():
            with self._updating():
                for i in others:
                    self._stores[i].about_to_change(self._leases[i], step)
                self._batch.stamp(others, step)
                for i in others:
                    self._leases[i].stamped = step, self._leases[i].version
            self._batch.gather(outs)

    def gather(self, outs: list[Float32s]) -> None:
        """Rows into float32[n_rows, width] arrays, as `places` says; zeros where a key is absent."""
        with self._reading():
            self._batch.gather(outs)

    def sum(self, grads: list[Float32s]) -> bool:
        """Sum gradients, which lie as rows do in ``gather``, for each key; whether all of them are finite."""
        finite: bool = self._batch.sum(grads)
        return finite

    def apply(self, rules: Sequence[Rule], hypers: list[Float32s], step: int) -> None:
        """One optimizer step in place by what was summed; absent keys are ignored and counted."""
        with self._reading(), self._updating():
            for store, lease, _ in self._each:
                store.about_to_change(lease, step)
            codes, seeds = [rule.code for rule in rules], [store.layout.seed for store in self._stores]
            ignored = self._batch.apply(codes, hypers, seeds, step)
            for (store, lease, _), n in zip(self._each, ignored, strict=True):
                store.updated(lease, step, n)
