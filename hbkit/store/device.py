"""The device tier: a cache of rows in GPU memory over any other store.

Gathers and updates of resident rows run on the device; other rows are read from the store below, updated by the CPU's
kernels and put back, with the same bits. All metadata stays in host memory, so the store below sees a row only when it
is evicted or committed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hbkit.errors import BudgetExceeded
from hbkit.store.base import Chunk, Float32s, Int64s, Layout, StoreSpec
from hbkit.store.cache import as_nbytes
from hbkit.store.policy import Policy, make_policy
from hbkit.store.tier import Lines, TieredStore, grown

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
    row_nbytes = 17

    def __init__(
        self, layout: Layout, below: StoreSpec, cache_budget: int, device: Device, policy: Callable[[int], Policy]
    ) -> None:
        line_nbytes = 4 * layout.width
        staging = min(STAGING_NBYTES, cache_budget // 8)
        batch_lines = max(1, staging // (line_nbytes + 8))
        super().__init__(layout, policy, batch_lines)
        self._device, self._batch_lines = device, batch_lines
        self._n_lines = (cache_budget - batch_lines * (line_nbytes + 8)) // line_nbytes
        if self._n_lines < 1:
            raise BudgetExceeded(
                f"cache_budget of {cache_budget} bytes does not hold two lines of {line_nbytes}",
                table=layout.table,
                remedy=f"give at least {16 * line_nbytes + 64} bytes",
            )
        self._stale = np.zeros(0, np.bool_)  # the metadata below is older than here
        self._below = below.open(layout)
        try:
            self._use()
            for chunk in self._below.scan():
                self._make_room(len(chunk.key))
                rows = self._insert(chunk.key)
                self._metadata.put(rows, chunk.freq, chunk.last_step)
        except BaseException:
            self._below.close()
            raise

    def _grow(self, room: int) -> None:
        super()._grow(room)
        self._stale = grown(self._stale, room)

    def _insert(self, keys: Int64s) -> Int64s:
        rows = super()._insert(keys)
        self._stale[rows] = False
        return rows

    def _metadata_changed(self, rows: Int64s) -> None:
        self._stale[rows[rows >= 0]] = True

    def _capacity(self, n_rows: int) -> int:
        return self._n_lines

    def _new_lines(self, n_lines: int) -> Lines:
        from hbkit.cuda.lines import DeviceLines

        return DeviceLines(self._device, n_lines, self.layout.width, self._batch_lines)

    def _read_home(self, rows: Int64s, keys: Int64s) -> Float32s:
        lines = np.empty((len(keys), self.layout.width), np.float32)
        lease = self._below.reserve(keys, np.zeros(len(keys), np.int64))
        try:
            self._below.gather(lease, lines)
        finally:
            self._below.release(lease)
        return lines

    def _write_home(self, rows: Int64s, keys: Int64s, lines: Float32s) -> None:
        dim = self.layout.dim
        freq, last_step = self._metadata.get(rows)
        self._below.put(Chunk(keys, freq, last_step, lines[:, :dim], lines[:, dim:]))
        self._stale[rows] = False

    def _erase_home(self, rows: Int64s, keys: Int64s) -> None:
        self._below.erase(keys)

    def kept(self) -> dict[str, npt.NDArray[Any]]:
        """See `Store.kept`."""
        return self._below.kept()

    def _commit_home(self, keep: Mapping[str, npt.NDArray[Any]]) -> str:
        keys, rows = self._index.items()
        stale = np.flatnonzero(self._stale[rows])
        for first in range(0, len(stale), self._scratch_lines):
            some = stale[first : first + self._scratch_lines]
            lines = np.empty((len(some), self.layout.width), np.float32)
            self._gather(rows[some], keys[some], lines)
            self._write_home(rows[some], keys[some], lines)
        return self._below.commit(keep)

    def _home_stats(self) -> dict[str, Any]:
        return {"device": self._device.name, "below": self._below.stats()}

    def close(self) -> None:
        """Let go of device memory and close the store below; what was not committed is discarded. Idempotent."""
        with self._lock:
            super().close()
            self._below.close()
