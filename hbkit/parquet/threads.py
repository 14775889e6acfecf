"""Threads that decode columns: started once, and kept."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["each"]

T = TypeVar("T")
R = TypeVar("R")

_pools: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()


def _pool(n: int) -> ThreadPoolExecutor:
    with _lock:
        if n not in _pools:
            _pools[n] = ThreadPoolExecutor(n, thread_name_prefix="hbkit-decode")
        return _pools[n]


def each(fn: Callable[[T], R], items: Iterable[T], num_threads: int) -> list[R]:
    """``fn`` of every item, in their order; an exception is raised once no thread is at work any more.

    The caller is one of the threads. Each takes the next item when it is done with one, so that a long one holds nobody up.
    """
    work = list(items)
    n_helpers = min(num_threads, len(work)) - 1
    if n_helpers < 1:
        return [fn(item) for item in work]
    results: list[R | None] = [None] * len(work)
    numbers = iter(range(len(work)))

    def take() -> None:
        for i in numbers:  # the GIL hands every number out once
            results[i] = fn(work[i])

    helpers = [_pool(num_threads - 1).submit(take) for _ in range(n_helpers)]
    failure = None
    try:
        take()
    except BaseException as e:
        failure = e
        for _ in numbers:  # leave nothing to the others
            pass
    for helper in helpers:
        error = helper.exception()
        failure = failure or error
    if failure is not None:
        raise failure
    return results  # type: ignore[return-value]  # all were filled
