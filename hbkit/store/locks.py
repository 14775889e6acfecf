"""A lock that many readers may hold at once, or one writer."""

from __future__ import annotations

import threading


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
