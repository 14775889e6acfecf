"""The device tier: a cache of rows in GPU memory over any other store.

Gathers and updates of resident rows run on the device; other rows are read from the store below, updated by the CPU's
kernels and put back, with the same bits. The store below sees a row only when it is evicted or committed.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hbkit._ext.batch import mixed
from hbkit._ext.index import Index
from hbkit._ext.segment import Gradients, retained
from hbkit._ext.slabs import Slabs
from hbkit.errors import BudgetExceeded, DeviceUnavailable
from hbkit.store.base import Chunk, Float32s, Int64s, Layout, Lease, Part, Rule, Store, StoreSpec
from hbkit.store.cache import as_nbytes
from hbkit.store.policy import Policy, make_policy
from hbkit.store.tier import Bytes, Lines, TieredStore

if TYPE_CHECKING:
    from hbkit.cuda.device import Device
    from hbkit.cuda.lines import DeviceLines

STAGING_NBYTES = 2**25
log = logging.getLogger("hbkit.store")


@dataclass(frozen=True)
class DeviceCached:
    """Rows in device memory above another store; see `device_cached`."""

    below: StoreSpec
    cache_budget: int
    device: str
    policy: Callable[[int], Policy]
    allocate: Callable[[int], Any] | None = None

    def open(self, layout: Layout) -> Store:
        """A store for one table of this layout."""
        from hbkit.cuda.device import Device

        name = "cuda:0" if self.device == "auto" else self.device
        try:
            device = Device(name, self.allocate)  # before the store below: without a device nothing is touched
        except DeviceUnavailable as e:
            if self.device != "auto":
                raise
            _say_once(f"rows stay in the store below the device tier: {e}")
            return self.below.open(layout)
        return DeviceStore(layout, self.below, self.cache_budget, device, self.policy)


@functools.cache
def _say_once(message: str) -> None:
    log.warning(message)


def device_cached(
    below: StoreSpec,
    cache_budget: int | str = "8GiB",
    device: str = "cuda:0",
    policy: str | Callable[[int], Policy] = "lfu",
    allocate: Callable[[int], Any] | None = None,
) -> DeviceCached:
    """A place for tables in GPU memory, over host memory or SSD.

    Where a store's `gather` and `apply` are given arrays in device memory (anything with ``__cuda_array_interface__``,
    such as PyTorch's CUDA tensors), rows and gradients stay there.

    Parameters
    ----------
    below : StoreSpec
        Where rows live that are not resident, such as `host_memory()` or `cached_ssd(path)`.
    cache_budget : int or str
        Bytes of device memory ("8GiB") for each table.
    device : str
        "cuda" or "cuda:N"; or "auto": the first one, and where there is none, rows stay in the store below, which is
        logged once.
    policy : "lfu", "lru" or "tinylfu", or a `Policy` class
        Which rows the cache keeps. No result depends on it.
    allocate : callable, optional
        ``allocate(nbytes)`` gives device memory, so that rows come out of a framework's own pool; see the example.

    Raises
    ------
    DeviceUnavailable
        On opening: Numba CUDA is not installed, or there is no such device or driver.
    Unsupported
        On updating: the optimizer has no CUDA kernel, or the table has named columns.

    Examples
    --------
    >>> Table("user", dim=16, store=device_cached(host_memory(), cache_budget="4GiB"))

    In memory of PyTorch's caching allocator:

    >>> device_cached(host_memory(), "4GiB", allocate=lambda n: torch.empty(n, dtype=torch.uint8, device="cuda"))
    """
    return DeviceCached(below, as_nbytes(cache_budget), device, make_policy(policy), allocate)


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
    _lines: DeviceLines

    def __init__(
        self, layout: Layout, below: StoreSpec, cache_budget: int, device: Device, policy: Callable[[int], Policy]
    ) -> None:
        from hbkit.cuda.lines import buffer_nbytes, stride_of

        line_nbytes = 4 * stride_of(layout.dim, layout.width, layout.dtype)
        staging = min(STAGING_NBYTES, cache_budget // 4)
        self._batch_lines = max(
            1, (staging // 2 - 48) // (buffer_nbytes(2, layout.width) - buffer_nbytes(1, layout.width))
        )
        self._device = device
        self._n_lines = (cache_budget - 2 * buffer_nbytes(self._batch_lines, layout.width)) // line_nbytes
        if self._n_lines < 1:
            least = 2 * buffer_nbytes(1, layout.width) + line_nbytes
            raise BudgetExceeded(
                f"cache_budget of {cache_budget} bytes does not hold a line of {line_nbytes} and two on their way",
                table=layout.table,
                remedy=f"give at least {least} bytes",
            )
        home = Below(below.open(layout))
        try:
            super().__init__(layout, home, policy, self._batch_lines)
        except BaseException:
            home.close()
            raise

    def _capacity(self, n_rows: int) -> int:
        return self._n_lines

    def _new_lines(self) -> Lines:
        from hbkit.cuda.lines import DeviceLines

        layout = self.layout
        return DeviceLines(self._device, self._n_lines, layout.width, self._batch_lines, layout.dim, layout.dtype)

    def gather(self, lease: Lease, out: Any, index: Any = None) -> None:
        """As `TieredStore.gather`; an `out` in device memory is written there, by an `index` there or NumPy's.

        Then the call does not wait for the device, whose work is ordered with the legacy default stream.
        """
        if isinstance(out, np.ndarray):
            super().gather(lease, out, index)
            return
        with self._open():
            lines, away = self._ready(lease)
            if len(away) == 0:
                self._lines.gather(lines, out, index)
                return
            rows = np.empty((len(lines), out.shape[1]), np.float32)
            self._gather(lines, away, lease.keys, rows)
            self._lines.spread(rows, out, index)

    def apply(self, lease: Lease, grads: Any, rule: Rule, hyper: Float32s, step: int, skip: bool = False) -> int:
        """As `TieredStore.apply`; gradients in device memory, summed by key, are used there."""
        if not isinstance(grads, (np.ndarray, Gradients)):
            with self._open():
                _, away = self._ready(lease)
            if len(away) or skip:
                grads = self._device.fetch(self._device.array(grads))
        return super().apply(lease, grads, rule, hyper, step, skip)

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
        layout = store.layout
        self._packing = Slabs(layout.width, 4 * layout.width, dim=layout.dim, row_dtype=layout.dtype)
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
        lines = retained((len(keys), self.store.layout.width))
        with self._lock:
            lease = self.store.reserve(keys, np.zeros(len(keys), np.int64))
            try:
                self.store.gather(lease, lines)
            finally:
                self.store.release(lease)
            freq, last_step = self.metadata(keys)
            return self._pack(lines), freq, last_step

    def _pack(self, lines: Float32s) -> Bytes:
        """Lines as bytes: what a narrow row held, it holds again."""
        if self.store.layout.dtype == "float32":
            return lines.view(np.uint8)
        at = np.arange(len(lines))
        self._packing.reserve(len(at))
        self._packing.scatter(at, lines)
        packed: Bytes = self._packing.pack(at)
        return packed

    def _unpack(self, packed: Bytes) -> Float32s:
        if self.store.layout.dtype == "float32":
            return packed.view(np.float32)
        at, lines = np.arange(len(packed)), np.empty((len(packed), self.store.layout.width), np.float32)
        self._packing.reserve(len(at))
        self._packing.unpack(at, packed)
        self._packing.gather(at, lines)
        return lines

    def write(self, keys: Int64s, lines: Bytes, freq: Int64s, last_step: Int64s) -> None:
        """Lines of distinct rows, new or in place of what there was."""
        dim = self.store.layout.dim
        with self._lock:
            values = self._unpack(lines)
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
