"""Threads that share work, such as the columns of one read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, TypeVar

__all__ = ["Threads"]

T = TypeVar("T")
R = TypeVar("R")


class Threads:
    """The caller's thread and ``n - 1`` helpers.

    Parameters
    ----------
    n : int
        1 makes no helper.
    name : str
        What the helpers' names begin with.

    Notes
    -----
    Used as a context manager: the helpers end with it. Several threads may call `each` at once.
    """

    def __init__(self, n: int = 1, name: str = "hbkit-decode") -> None:
        self.n = n
        self._pool = ThreadPoolExecutor(n - 1, thread_name_prefix=name) if n > 1 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def each(self, fn: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """``fn`` of every item, in their order; an exception is raised once no thread is at work any more.

        Each thread takes the next item when it is done with one, so that a long one holds nobody up.
        """
        work = list(items)
        n_helpers = min(self.n, len(work)) - 1
        if self._pool is None or n_helpers < 1:
            return [fn(item) for item in work]
        results: list[Any] = [None] * len(work)
        numbers = iter(range(len(work)))

        def take() -> None:
            for i in numbers:  # the GIL hands every number out once
                results[i] = fn(work[i])

        helpers = [self._pool.submit(take) for _ in range(n_helpers)]
        failure: BaseException | None = None
        try:
            take()
        except BaseException as e:
            failure = e
            for _ in numbers:  # leave nothing to the others
                pass
        for helper in helpers:
            failure = failure or helper.exception()
        if failure is not None:
            raise failure
        return results


ALONE = Threads()
