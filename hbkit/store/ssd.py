"""The SSD tier: all rows on disk (see `home`), an index of them and a cache of some in memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hbkit._ext.slabs import Slabs
from hbkit.errors import BudgetExceeded, InvalidArgument
from hbkit.store.cache import LINE_NBYTES, as_nbytes
from hbkit.store.disk import Disk
from hbkit.store.home import Home
from hbkit.store.line import Layout
from hbkit.store.log import SEGMENT_NBYTES
from hbkit.store.policy import FIXED_NBYTES, Policy, make_policy
from hbkit.store.tier import TieredStore

BUFFER_NBYTES = 4 * 2**20  # at the most, of what is written; all of the home's buffers are some times as large
SCRATCH_NBYTES = 2**23  # at the most, of lines on their way
BUFFERS, SCRATCH = 64, 8  # they are no larger than such a part of the budget
SLACK = 32  # and such a part of it is left to what passes through, and to the allocator
LEAST_LINES = 16  # a cache has at least so many
FEW_NBYTES = 24_000 + FIXED_NBYTES  # of index, cache and policy, however few rows they hold
INDEX_NBYTES, METADATA_NBYTES = 24, 16  # a row, at the most
SETTLED, SETTLED_NBYTES = 2**21, 19  # rows from which on the index takes fewer: 17 to 19, as it grows
MORE_NBYTES, MORE = 16, 2**21  # and of few rows, so many more each, but no more than these in all


@dataclass(frozen=True)
class CachedSsd:
    """Rows on disk under a cache in memory; see `cached_ssd`."""

    path: Path
    host_budget: int
    policy: Callable[[int], Policy]
    disk_budget: int | None = None

    def open(self, layout: Layout) -> SsdStore:
        """A store for one table of this layout, in a directory named after it."""
        if not layout.table or "/" in layout.table or layout.table.startswith("."):
            raise InvalidArgument(f"table name {layout.table!r}", remedy="give a name that can be a file name")
        return SsdStore(layout, self.path / layout.table, self.host_budget, self.policy, self.disk_budget)


def cached_ssd(
    path: str | os.PathLike[str],
    host_budget: int | str = "2GiB",
    policy: str | Callable[[int], Policy] = "lfu",
    disk_budget: int | str | None = None,
) -> CachedSsd:
    """A place for tables larger than memory: rows on disk, a cache of bounded size above them.

    Parameters
    ----------
    path : path
        Directory, made if need be. Tables found in it go on from their last `commit`; what came after it is gone.
    host_budget : int or str
        Bytes of memory ("2GiB") that each table's index, metadata, cache and buffers may take together.
    policy : "lfu", "lru" or "tinylfu", or a `Policy` class
        Which rows the cache keeps. No result depends on it.
    disk_budget : int or str, optional
        Bytes of disk that each table's rows may take; as many as there are when left out.

    Raises
    ------
    BudgetExceeded
        On opening, or when rows are added: the index leaves no room for a cache.
    Corrupt
        On opening or reading: bytes on disk are not those that were written.
    Locked
        On opening: another store holds the table.
    SchemaMismatch
        On opening: the table there has another dim, dtype or optimizer state.
    StorageError
        The disk, or the disk budget, is full, or fails. The store still reads.

    Examples
    --------
    >>> Table("user", dim=16, store=hbkit.store.cached_ssd("rows", host_budget="1GiB"))
    """
    return CachedSsd(
        Path(path), as_nbytes(host_budget), make_policy(policy), None if disk_budget is None else as_nbytes(disk_budget)
    )


class SsdStore(TieredStore):
    """One table on disk, cached in memory.

    Parameters
    ----------
    layout : Layout
    directory : Path
    host_budget : int
        Bytes.
    policy : callable
    disk_budget : int, optional
        Bytes that the segment files may have together.
    cache_lines : int, optional
        The most lines that the cache may have, where the budget would allow for more.
    segment_nbytes : int
        The most that a segment file may have.
    disk : Disk, optional
    """

    tier = "ssd"

    def __init__(
        self,
        layout: Layout,
        directory: Path,
        host_budget: int,
        policy: Callable[[int], Policy],
        disk_budget: int | None = None,
        cache_lines: int | None = None,
        segment_nbytes: int = SEGMENT_NBYTES,
        disk: Disk | None = None,
    ) -> None:
        self._budget, self._cache_lines = host_budget, cache_lines
        # On their way, lines exist up to four times: packed, as records, in a read's buffer, in the scratch.
        self._scratch_nbytes = min(SCRATCH_NBYTES, host_budget // SCRATCH)
        self._line_nbytes = layout.line_nbytes + LINE_NBYTES + 9  # frequency, last step, whether it is arriving
        home = Home(layout, directory, min(BUFFER_NBYTES, host_budget // BUFFERS), segment_nbytes, disk_budget, disk)
        self._fixed_nbytes = home.buffers_nbytes + self._scratch_nbytes + FEW_NBYTES + host_budget // SLACK
        try:
            super().__init__(layout, home, policy, max(1, self._scratch_nbytes // (4 * (layout.line_nbytes + 16))))
        except BaseException:
            home.close()
            raise

    def _capacity(self, n_rows: int) -> int:
        home: Any = self._home
        per_row = INDEX_NBYTES if len(home) < SETTLED else SETTLED_NBYTES
        rows = (per_row + METADATA_NBYTES * self.layout.metadata) * n_rows + min(MORE_NBYTES * n_rows, MORE)
        n_lines = (self._budget - self._fixed_nbytes - rows) // self._line_nbytes
        if n_lines < 1:
            least = rows + LEAST_LINES * self._line_nbytes + FEW_NBYTES
            # The buffers grow with the budget, up to a size.
            n = home.buffers_nbytes // home.buffer_nbytes
            share = n / BUFFERS + 1 / SCRATCH + 1 / SLACK
            most = int((least + n * BUFFER_NBYTES + SCRATCH_NBYTES) * SLACK / (SLACK - 1))
            least = min(most, int(least / (1 - share)) + home.buffers_nbytes)
            raise BudgetExceeded(
                f"host_budget of {self._budget} bytes has no room for a cache beside an index of {n_rows} rows",
                table=self.layout.table,
                remedy=f"give at least {least} bytes",
            )
        return n_lines if self._cache_lines is None else min(n_lines, self._cache_lines)

    def _first_room(self) -> int:
        # As many rows as would all be near.
        per_row = INDEX_NBYTES + MORE_NBYTES + METADATA_NBYTES * self.layout.metadata + self._line_nbytes
        return max(0, self._budget - self._fixed_nbytes) // per_row

    def _new_lines(self) -> Slabs:
        # A chunk is about a 64th of the budget or 4 MiB, so that rounding up costs little.
        chunk = max(self.layout.line_nbytes, min(self._budget // 64, 2**22))
        return Slabs(self.layout.width, chunk, dim=self.layout.dim, row_dtype=self.layout.dtype)

    def stats(self) -> dict[str, Any]:
        """Those of `TieredStore` and `Home`, and the budget."""
        stats = super().stats()
        held = ("index_nbytes", "metadata_nbytes", "cache_nbytes", "lines_nbytes", "buffer_nbytes", "window_nbytes")
        used = sum(stats[name] for name in held) + self._scratch_nbytes
        return {
            **stats,
            "scratch_nbytes": self._scratch_nbytes,
            "host_budget_nbytes": self._budget,
            "host_nbytes": used,
        }

    def verify(self) -> int:
        """Read every row that lies on disk and check it; how many rows.

        Raises
        ------
        Corrupt
            Names file and offset of the first block that fails.
        """
        home: Any = self._home
        n: int = home.verify()
        return n

    def validate(self) -> None:
        """Recount everything; AssertionError where the store contradicts itself. For tests."""
        super().validate()
        assert self.stats()["host_nbytes"] <= 1.05 * self._budget, "over budget"
