"""The device tier: a cache of rows in GPU memory over any other store.

Gathers and updates of resident rows run on the device; other rows are read from the store below, updated by the CPU's
kernels and put back, with the same bits. The store below sees a row only when it is evicted or committed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hbkit._ext.batch import mixed
from hbkit._ext.index import Index
from hbkit.errors import BudgetExceeded, Unsupported
from hbkit.store.base import Chunk, Int64s, Layout, Part, Store, StoreSpec
from hbkit.store.cache import as_nbytes
from hbkit.store.policy import Policy, make_policy
from hbkit.store.tier import Bytes, Lines, TieredStore

if TYPE_CHECKING:
    from hbkit.cuda.device import Device

STAGING_NBYTES = 2**25


@dataclass(frozen=True)
class DeviceCached:
    """Rows in device memory above another store; see `device_cached`."""

    below: StoreSpec
    cache_budget: int
    device: str
    policy: Callable[[int], Policy]

    def open(self, layout: Layout) -> DeviceStore:
        """A store for one table of this layout."""
        from hbkit.cuda.device import Device

        device = Device(self.device)  # before the store below: where there is no device, nothing was touched
        return DeviceStore(layout, self.below, self.cache_budget, device, self.policy)


def device_cached(
    below: StoreSpec,
    cache_budget: int | str = "8GiB",
    device: str = "cuda:0",
    policy: str | Callable[[int], Policy] = "lfu",
) -> DeviceCached:
    """A place for tables in GPU memory, over host memory or SSD.

    Parameters
    ----------
    below : StoreSpec
        Where rows live that are not resident, such as `host_memory()` or `cached_ssd(path)`.
    cache_budget : int or str
        Bytes of device memory ("8GiB") for each table.
    device : str
        "cuda" or "cuda:N".
    policy : "lfu", "lru" or "tinylfu", or a `Policy` class
        Which rows the cache keeps. No result depends on it.

    Raises
    ------
    DeviceUnavailable
        On opening: Numba CUDA is not installed, or there is no such device or driver.
    Unsupported
        On updating: the optimizer has no CUDA kernel, or the table has named columns.

    Examples
    --------
    >>> Table("user", dim=16, store=device_cached(host_memory(), cache_budget="4GiB"))
    """
    return DeviceCached(below, as_nbytes(cache_budget), device, make_policy(policy))


class DeviceStore(TieredStore):
    """One table in device memory over another store.

    Parameters
    ----------
    layout : Layout
    below : StoreSpec
    cache_budget : int
        Bytes of device memory.
    device : Device
    policy : callable
    """

    tier = "device"

    def __init__(
        self, layout: Layout, below: StoreSpec, cache_budget: int, device: Device, policy: Callable[[int], Policy]
    ) -> None:
        if layout.dtype != "float32":
            raise Unsupported(
                f"rows of {layout.dtype} in the device tier",
                table=layout.table,
                remedy="use another store, or dtype='float32'",
            )
        staging = min(STAGING_NBYTES, cache_budget // 8)
        batch_lines = max(1, staging // (layout.line_nbytes + 8))
        self._device, self._batch_lines = device, batch_lines
        self._n_lines = (cache_budget - batch_lines * (layout.line_nbytes + 8)) // layout.line_nbytes
        if self._n_lines < 1:
            raise BudgetExceeded(
                f"cache_budget of {cache_budget} bytes does not hold two lines of {layout.line_nbytes}",
                table=layout.table,
                remedy=f"give at least {16 * layout.line_nbytes + 64} bytes",
            )
        home = Below(below.open(layout))
        try:
            super().__init__(layout, home, policy, batch_lines)
        except BaseException:
            home.close()
            raise

    def _capacity(self, n_rows: int) -> int:
        return self._n_lines

    def _new_lines(self) -> Lines:
        from hbkit.cuda.lines import DeviceLines

        return DeviceLines(self._device, self._n_lines, self.layout.width, self._batch_lines)

    def stats(self) -> dict[str, Any]:
        """Those of `TieredStore`, with the device's name and those of the store below."""
        return {**super().stats(), "device": self._device.name}


class Below:
    """Another store as the home of a cache's rows.

    Notes
    -----
    New rows are not in the store until their lines come. Calls may come from several threads.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._unwritten = Index()
        self._lock = threading.Lock()  # lines come and go as two calls below

    def __len__(self) -> int:
        return len(self.store) + len(self._unwritten)

    @property
    def nbytes(self) -> int:
        """Memory held beside the store below, in bytes."""
        return int(self._unwritten.nbytes)

    def find(self, keys: Int64s) -> npt.NDArray[np.bool_]:
        """Whether there is a row of each key: bool[n]."""
        return self.store.has(keys) | (self._unwritten.find(keys) >= 0)

    def add(self, keys: Int64s) -> None:
        """Distinct new rows, whose lines come later."""
        self._unwritten.find_or_insert(keys)

    def erase(self, keys: Int64s) -> int:
        """Forget rows; how many there were."""
        with self._lock:
            return int(np.count_nonzero(self._unwritten.erase(keys) >= 0)) + self.store.erase(keys)

    def drop(self, keys: Int64s) -> int:
        """Forget rows; how many there were."""
        return self.erase(keys)

    def read(self, keys: Int64s) -> tuple[Bytes, Int64s, Int64s]:
        """Lines, frequencies and last steps of rows that were written."""
        lines = np.empty((len(keys), self.store.layout.width), np.float32)
        with self._lock:
            lease = self.store.reserve(keys, np.zeros(len(keys), np.int64))
            try:
                self.store.gather(lease, lines)
            finally:
                self.store.release(lease)
            freq, last_step = self.metadata(keys)
        return lines.view(np.uint8), freq, last_step

    def write(self, keys: Int64s, lines: Bytes, freq: Int64s, last_step: Int64s) -> None:
        """Lines of distinct rows, new or in place of what there was."""
        dim, values = self.store.layout.dim, lines.view(np.float32)
        with self._lock:
            self.store.put(Chunk(keys, freq, last_step, values[:, :dim], values[:, dim:]))
            self._unwritten.erase(keys)

    def metadata(self, keys: Int64s) -> tuple[Int64s, Int64s]:
        """Frequencies and last steps of rows that were written."""
        return self.store.metadata(keys)

    def keys(self, part: Part) -> Int64s:
        """Keys of a part, in the order of their mix."""
        keys = [chunk.key for chunk in self.store.part(part, rows=False)]
        both = np.concatenate([*keys, part.of(self._unwritten)])
        in_order: Int64s = both[np.argsort(mixed(both))]
        return in_order

    def in_order(self) -> Iterator[Int64s]:
        """All keys, ascending."""
        return iter([np.sort(self.keys(Part()))])

    def commit(self, keep: Mapping[str, npt.NDArray[Any]], latest_step: int) -> str:
        """Commit the store below."""
        return self.store.commit(keep)

    def kept(self) -> dict[str, npt.NDArray[Any]]:
        """See `Store.kept`."""
        return self.store.kept()

    def latest_step(self) -> int:
        """See `Store.latest_step`."""
        return self.store.latest_step()

    def stats(self) -> dict[str, Any]:
        """Those of the store below."""
        return {"below": self.store.stats()}

    def validate(self) -> None:
        """Recount everything; AssertionError where it contradicts itself."""
        self._unwritten.validate()

    def close(self) -> None:
        """Close the store below. Idempotent."""
        self.store.close()
