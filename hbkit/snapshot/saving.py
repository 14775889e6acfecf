"""A save that may go on in the background, and whoever waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

REST = 3.0  # times as long as it works, a save in the background rests, unless somebody waits for it

_T = TypeVar("_T")


class Saving:
    """A save under way, as ``save(..., background=True)`` returns it.

    Attributes
    ----------
    notes : list of str
        Which tables are written in full although a base was named, and why: a line each.

    Notes
    -----
    What makes it fail is raised by every `wait`, and once by whatever comes first: the next step of one of the tables
    (which then has not begun), the next save of one, or its `Table.close`.
    """

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes
        self._commit = ""
        self._failure: BaseException | None = None
        self._told = threading.Lock()
        self._over = threading.Event()
        self._awaited = threading.Event()

    @property
    def done(self) -> bool:
        """Whether it is over, well or not."""
        return self._over.is_set()

    def wait(self) -> str:
        """The commit's id, once it is durable and complete. Raises what made the save fail."""
        self._awaited.set()
        self._over.wait()
        if self._failure is not None:
            self._told.acquire(blocking=False)
            raise self._failure
        return self._commit

    def check(self) -> None:
        """Raise what made the save fail, if it has and nobody was told yet."""
        if self._failure is not None and self._told.acquire(blocking=False):
            raise self._failure

    def settle(self) -> None:
        """Return once it is over; raises as `check`."""
        self._awaited.set()
        self._over.wait()
        self.check()

    def paced(self, pieces: Iterable[_T]) -> Iterator[_T]:
        """The same pieces, with rests in between: what is saved passes through the caches that the training uses."""
        since = time.monotonic()
        for piece in pieces:
            yield piece
            self._awaited.wait(REST * (time.monotonic() - since))
            since = time.monotonic()

    def begin(self, work: Callable[[], str]) -> None:
        """Do the work, which returns the commit's id, in a thread of its own. The process does not end before it."""
        try:
            threading.Thread(target=self._run, args=(work,), name="hbkit-save").start()
        except RuntimeError:  # there can be no more threads
            self._run(work)

    def _run(self, work: Callable[[], str]) -> None:
        try:
            self._commit = work()
        except BaseException as e:  # whoever waits raises it
            self._failure = e
        finally:
            self._over.set()
