"""Locks: one that many readers may hold at once, or one writer; and one that is given in turn."""

from __future__ import annotations

import threading
from collections import deque


class SharedLock:
    """``with lock.shared:`` for readers, ``with lock.exclusive:`` for a writer; a waiting writer goes first.

    Not reentrant: who holds it must not take it again.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._changed = threading.Condition(self._mutex)  # whose own `with` calls Python functions
        self._n_readers = self._n_waiting = 0
        self._writing = False
        self.shared, self.exclusive = _Shared(self), _Exclusive(self)


class _Shared:
    def __init__(self, lock: SharedLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        lock = self._lock
        with lock._mutex:
            while lock._writing or lock._n_waiting:
                lock._changed.wait()
            lock._n_readers += 1

    def __exit__(self, *exception: object) -> None:
        lock = self._lock
        with lock._mutex:
            lock._n_readers -= 1
            if lock._n_readers == 0 and lock._n_waiting:
                lock._changed.notify_all()


class _Exclusive:
    def __init__(self, lock: SharedLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        lock = self._lock
        with lock._mutex:
            lock._n_waiting += 1
            try:
                while lock._writing or lock._n_readers:
                    lock._changed.wait()
                lock._writing = True
            finally:
                lock._n_waiting -= 1

    def __exit__(self, *exception: object) -> None:
        lock = self._lock
        with lock._mutex:
            lock._writing = False
            lock._changed.notify_all()


class Turns:
    """A lock that is given to those who wait for it in the order in which they came. Not reentrant.

    One who takes it again and again does not keep the others waiting for more than one of its turns.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()  # the first of them has it

    def __enter__(self) -> None:
        mine = object()
        with self._changed:
            self._waiting.append(mine)
            try:
                while self._waiting[0] is not mine:
                    self._changed.wait()
            except BaseException:
                self._waiting.remove(mine)
                self._changed.notify_all()
                raise

    def __exit__(self, *exception: object) -> None:
        with self._changed:
            self._waiting.popleft()
            self._changed.notify_all()
