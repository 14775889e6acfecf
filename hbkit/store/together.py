"""One batch of several tables in host memory: each pass over it is one call for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from hbkit._ext.together import Together as Batch
from hbkit.store.base import Filter, Lease
from hbkit.store.host import HostStore
from hbkit.store.line import Float32s, Int64s, Rule

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
    n_rows : sequence of int, at least 1
        For each store.
    stands : list of int64[k * n_rows], optional
        How many occurrences each key counts for; 1 when left out.
    """

    def __init__(
        self,
        stores: Sequence[HostStore],
        keys: list[Int64s],
        places: list[tuple[int, int]],
        n_rows: Sequence[int],
        stands: list[Int64s] | None = None,
    ) -> None:
        self._stores = stores
        versions = [store.version for store in stores]  # before the keys are looked for
        self._batch = Batch([store.parts for store in stores], keys, places, list(n_rows), stands)
        columns = zip(self._batch.keys, self._batch.slots, self._batch.counts, versions, strict=True)
        self._leases = [Lease(key, slots, counts, -1, version) for key, slots, counts, version in columns]
        self._each = list(zip(stores, self._leases, self._batch.slots, strict=True))
        # Whoever takes several locks takes them in this order, so that none waits for another in a circle.
        self._order = sorted(range(len(stores)), key=lambda i: id(stores[i]))
        self._read_locks = [stores[i].lock.shared for i in self._order]
        self._update_locks = [stores[i].updating for i in self._order]

    def _refresh(self, tables: Sequence[tuple[HostStore, Lease, Int64s]]) -> None:
        """Bring the slots of these of `each` up to date, their locks being held."""
        for store, lease, slots in tables:
            if lease.version != store.version:
                store.refresh(lease)
            if lease.slots is not slots:  # they were found anew
                slots[:] = lease.slots
                lease.slots = slots

    def create(self, step: int, admissions: Sequence[Filter | None], outs: list[Float32s]) -> None:
        """Make the absent rows that are admitted, count the keys, stamp them with `step`; then `gather`."""
        lacking = {i for i, n in enumerate(self._batch.n_absent()) if n}
        lacking |= {i for i, (store, lease, _) in enumerate(self._each) if lease.version[0] != store.version[0]}
        others = [i for i in range(len(self._stores)) if i not in lacking]
        for i in [i for i in lacking if admissions[i] is not None or self._stores[i].layout.draws is None]:
            self._stores[i].create(self._leases[i], step, admissions[i])
            lacking.remove(i)
        if lacking:
            numbers = [i for i in self._order if i in lacking]
            with _held([self._stores[i].lock.exclusive for i in numbers]):
                self._refresh([self._each[i] for i in numbers])
                self._make(numbers)
                self._count(numbers, step)
        with _held(self._read_locks):
            self._refresh(self._each)
            with _held(self._update_locks):
                self._count(others, step)
            self._batch.gather(outs)

    def _make(self, numbers: Sequence[int]) -> None:
        """Make the absent rows of these tables, or none where there is no memory for all of them."""
        stores = [self._stores[i] for i in numbers]
        rooms = [store.room for store in stores]
        n_absent = self._batch.n_absent()
        try:
            for i, store in zip(numbers, stores, strict=True):
                store.grow(n_absent[i])
            made = self._batch.make(numbers)
        except BaseException:
            for store, room in zip(stores, rooms, strict=True):
                store.shrink(room)
            raise
        for i, store, slots in zip(numbers, stores, made, strict=True):
            store.created(slots)
            self._leases[i].version = store.version

    def _count(self, numbers: list[int], step: int) -> None:
        """Count the keys of these tables and stamp their rows, which no other thread writes to."""
        for i in numbers:
            self._stores[i].about_to_change(self._leases[i], step)
        self._batch.stamp(numbers, step)
        for i in numbers:
            self._leases[i].stamped = step, self._leases[i].version

    def gather(self, outs: list[Float32s]) -> None:
        """Rows into float32[n_rows, width] arrays, as `places` says; zeros where a key is absent."""
        with _held(self._read_locks):
            self._refresh(self._each)
            self._batch.gather(outs)

    def sum(self, grads: list[Float32s]) -> bool:
        """Sum gradients, which lie as rows do in ``gather``, for each key; whether all of them are finite."""
        finite: bool = self._batch.sum(grads)
        return finite

    def apply(self, rules: Sequence[Rule], hypers: list[Float32s], step: int) -> None:
        """One optimizer step in place by what was summed; absent keys are ignored and counted."""
        with _held(self._read_locks):
            self._refresh(self._each)
            with _held(self._update_locks):
                for store, lease, _ in self._each:
                    store.about_to_change(lease, step)
                codes, seeds = [rule.code for rule in rules], [store.layout.seed for store in self._stores]
                ignored = self._batch.apply(codes, hypers, seeds, step)
                for (store, lease, _), n in zip(self._each, ignored, strict=True):
                    store.updated(lease, step, n)


@contextmanager
def _held(locks: Sequence[AbstractContextManager[object]]) -> Iterator[None]:
    """Several locks, taken one after the other."""
    held = []
    try:
        for lock in locks:
            lock.__enter__()
            held.append(lock)
        yield
    finally:
        for lock in held:
            lock.__exit__(None, None, None)
