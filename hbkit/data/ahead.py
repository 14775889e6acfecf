"""Two ways to work ahead of the reader: several jobs at once in order, and one background thread with a bounded queue.

Both end their threads when the iterator is closed, exhausted or abandoned, and both raise a worker's exception, as it
was raised, where its result would have come.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["in_order", "prefetch"]

T = TypeVar("T")


def in_order(jobs: Iterator[Callable[[], T]], n_threads: int) -> Generator[T, None, None]:
    """Results of the jobs in their order; beside the one in use, ``n_threads`` are being made or wait to be taken.

    Without threads each is made when it is asked for.
    """
    if n_threads == 0:
        for job in jobs:
            yield job()
        return
    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="hbkit-read")
    waiting: deque[Future[T]] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(job))
            if len(waiting) > n_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def prefetch(source: Generator[T, None, None], depth: int) -> Generator[T, None, None]:
    """The items of ``source``, made by a background thread up to ``depth`` ahead."""
    ready: deque[T] = deque()
    change = threading.Condition()
    closed = finished = False
    failure: BaseException | None = None

    def work() -> None:
        nonlocal finished, failure
        try:
            while True:
                with change:  # waits before an item is made, so that no more than `depth` exist
                    change.wait_for(lambda: closed or len(ready) < depth)
                    if closed:
                        break
                try:
                    item = next(source)
                except StopIteration:
                    break
                with change:
                    ready.append(item)
                    change.notify_all()
        except BaseException as e:
            failure = e
        with change:
            finished = True
            change.notify_all()

    # daemon: an iterator that nobody closes must not keep the process alive
    worker = threading.Thread(target=work, name="hbkit-prefetch", daemon=True)
    worker.start()
    try:
        while True:
            with change:
                change.wait_for(lambda: ready or finished)
                if not ready:
                    break
                item = ready.popleft()
                change.notify_all()
            yield item
        if failure is not None:
            raise failure
    finally:
        with change:
            closed = True
            change.notify_all()
        if threading.current_thread() is not worker:  # the garbage collector may close a forgotten iterator anywhere
            worker.join()
        source.close()
