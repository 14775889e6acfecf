"""Threads that share a pass over many lines: one core alone does not move what memory could."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

from hbkit.parquet.threads import Threads

MOST_THREADS = 8
LEAST_NBYTES = 2**20  # of a part: waking a thread costs as much as moving some hundred KiB


_threads = Threads()


def _start() -> None:
    global _threads
    has = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    _threads = Threads(min(len(has), MOST_THREADS), "hbkit-store")


_start()
os.register_at_fork(after_in_child=_start)  # a child has none of its parent's threads


def shared(call: Callable[[slice], None], n: int, item_nbytes: int) -> None:
    """``call`` of parts that make up ``range(n)``, in several threads where there is much; raises what one raised."""
    n_parts = max(1, min(n * item_nbytes // LEAST_NBYTES, 2 * _threads.n))  # twice: no thread waits long for another
    ends = [n * i // n_parts for i in range(n_parts + 1)]
    _threads.each(call, [slice(*some) for some in itertools.pairwise(ends)])
