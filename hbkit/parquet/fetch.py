"""Requests to a service that fails now and then: side by side, tried again, and never waited for without end.

Every request is a call that blocks a thread of a shared pool: pyarrow and fsspec offer nothing better to both, and no
way to stop a call. So the threads only make calls; whoever wants the answers waits for all of its requests in one
place, ``run``, which sees failures, silence and the clock alike, and makes the next attempt of each request. A call
that stays silent is given up: its thread cannot be stopped, so the pool grows by one until the call returns, and its
answer, should it still come in time, is as good as any. The threads are daemons and end when nothing waits, so there
is nothing to close, and a stuck call does not keep the process from ending.

The constants below are read at every request; set them to change them.

Source: exponential backoff with jitter, https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter
"""

from __future__ import annotations

import errno
import os
import queue
import random
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from hbkit import errors

__all__ = ["ATTEMPTS", "DEADLINE", "HOLE", "LARGEST", "TIMEOUT", "Job", "coalesce", "run"]

ATTEMPTS = 6  # of one request, the first included
DEADLINE = 60.0  # seconds from the first attempt of a request to giving up
TIMEOUT = 10.0  # seconds without an answer after which an attempt counts as failed, beside the time for its bytes
SLOWEST = 2**20  # bytes per second that a request may count on
BACKOFF, LONGEST = 0.25, 8.0  # seconds before the second attempt, doubled with each one after, and their limit
WORKERS = 16  # requests at once, of all files together
STUCK = 64  # threads beyond these, in place of such as do not return
HOLE = 64 * 1024  # bytes worth reading to save a request
LARGEST = 8 * 2**20  # bytes of one request

T = TypeVar("T")
_random = random.SystemRandom()  # the user's seeded generator stays as it is

# What pyarrow says in its message alone, for want of a better place.
_FINAL = re.compile(
    r"ACCESS_DENIED|NOT_FOUND|NO_SUCH_|INVALID_|MALFORMED_|MISSING_|SIGNATURE|UNRECOGNIZED_CLIENT|VALIDATION"
    r"|PERMISSION_DENIED|UNAUTHENTICATED|AWS Error \[code \d+\]"
)
_STATUS = re.compile(r"(?:HTTP status |Azure Error: \[\w*\] )(\d{3})")
_FINAL_ERRNO = {
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.EINVAL,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENOSYS,
    errno.ENAMETOOLONG,
}
_FINAL_TYPES = (
    errors.HbkitError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    # not the service's doing
    ImportError,
    LookupError,
    MemoryError,
    NotImplementedError,
    TypeError,
    ValueError,
)


def _is_final(e: BaseException) -> bool:
    """Whether another attempt would fail as well; what is not known may pass."""
    if isinstance(e, _FINAL_TYPES) or not isinstance(e, Exception):
        return True
    if isinstance(e, OSError) and e.errno in _FINAL_ERRNO:
        return True
    text = str(e)
    found = _STATUS.search(text)
    status = int(found[1]) if found else getattr(e, "status", None)  # aiohttp's errors have the attribute
    if isinstance(status, int) and status > 0:
        return 300 <= status < 500 and status not in (408, 409, 425, 429)
    return _FINAL.search(text) is not None


class _Attempt:
    """One call of a job."""

    def __init__(self, job: Job[Any], report: queue.SimpleQueue[_Attempt]) -> None:
        self.job, self.report = job, report
        self.begun: float | None = None
        self.cancelled = self.over = False
        self.answer: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        if self.cancelled:
            return
        self.begun = time.monotonic()
        try:
            self.answer = self.job.call()
        except BaseException as e:
            self.error = e
        self.report.put(self)


class _Pool:
    """Threads for attempts, first come, first served."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[_Attempt] = deque()
        self._stuck: set[_Attempt] = set()
        self._n_threads = 0

    def submit(self, attempt: _Attempt) -> None:
        with self._lock:
            self._waiting.append(attempt)
            self._grow()

    def give_up(self, attempt: _Attempt) -> None:
        """Forget an attempt: never begin it, or let another thread take the place of its own."""
        attempt.cancelled = True
        with self._lock:
            if attempt.begun is not None and not attempt.over:
                self._stuck.add(attempt)
                self._grow()

    def _room(self) -> int:
        return WORKERS + min(len(self._stuck), STUCK)

    def _grow(self) -> None:
        if self._waiting and self._n_threads < self._room():
            threading.Thread(target=self._work, name="hbkit-remote", daemon=True).start()
            self._n_threads += 1

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting or self._n_threads > self._room():
                    self._n_threads -= 1
                    return
                attempt = self._waiting.popleft()
            attempt.run()
            with self._lock:
                attempt.over = True
                self._stuck.discard(attempt)


_pool = _Pool()


def _new_pool() -> None:
    global _pool
    _pool = _Pool()


os.register_at_fork(after_in_child=_new_pool)  # a fork takes no thread along


class Job(Generic[T]):
    """A request: what to call, and what to say of it when it fails.

    Parameters
    ----------
    call : callable
        May run several times, in several threads at once, also after ``run`` has returned.
    nbytes : int
        Bytes that the answer will have; more may take longer.
    **place
        Where, for errors.

    Attributes
    ----------
    n_attempts : int
        Attempts made so far.
    """

    def __init__(self, call: Callable[[], T], nbytes: int = 0, **place: object) -> None:
        self.call, self.nbytes, self.place = call, nbytes, place
        self.n_attempts = 0
        self.answer: Any = None
        self._first: _Attempt | None = None
        self._attempt: _Attempt | None = None  # the one that counts
        self._due = 0.0
        self._cause: BaseException = TimeoutError("no answer")

    def step(self, now: float, heard: float, file: str, report: queue.SimpleQueue[_Attempt]) -> float:
        """Do what is due, and say when to look again; raises StorageError where nothing is left to do."""
        allowed = TIMEOUT + self.nbytes / SLOWEST
        attempt = self._attempt
        if attempt and attempt.begun is not None and now >= attempt.begun + allowed:
            _pool.give_up(attempt)
            self.failed(attempt, TimeoutError(f"no answer within {allowed:.3g} s"), now)
        # one that still waits for a thread is in time for as long as those before it get their answers
        begun = self._first.begun if self._first else None
        limit = (begun or heard) + DEADLINE
        if now >= limit or (not self._attempt and (self.n_attempts >= ATTEMPTS or self._due >= limit)):
            raise errors.StorageError(
                f"the service failed to answer; last cause: {str(self._cause) or type(self._cause).__name__}",
                remedy="check the service and the connection, and try again",
                file=file,
                **self.place,
                attempts=self.n_attempts,
            ) from self._cause
        if self._attempt is None and now >= self._due:
            self._attempt = _Attempt(self, report)
            self._first = self._first or self._attempt
            self.n_attempts += 1
            _pool.submit(self._attempt)
        if self._attempt is None:
            return self._due
        return min(limit, (self._attempt.begun or now) + allowed)

    def failed(self, attempt: _Attempt, cause: BaseException, now: float) -> None:
        """Plan the next attempt, unless this one was given up before."""
        if attempt is self._attempt:
            self._attempt, self._cause = None, cause
            self._due = now + min(BACKOFF * 2 ** (self.n_attempts - 1), LONGEST) * _random.uniform(0.5, 1)

    def forget(self) -> None:
        if self._attempt:
            _pool.give_up(self._attempt)


def run(jobs: Sequence[Job[T]], file: str) -> list[T]:
    """The answers of all jobs, in order.

    Parameters
    ----------
    jobs : sequence of Job
        Each for one use.
    file : str
        The file that errors name.

    Raises
    ------
    StorageError
        A job failed ``ATTEMPTS`` times or for ``DEADLINE`` seconds.
    Exception
        What a job raised, where another attempt would be in vain.
    """
    report: queue.SimpleQueue[_Attempt] = queue.SimpleQueue()
    left = dict.fromkeys(jobs)
    heard = time.monotonic()
    try:
        while left:
            now = time.monotonic()
            wake = min([job.step(now, heard, file, report) for job in left])
            try:
                attempt = report.get(timeout=max(wake - now, 0))
            except queue.Empty:
                continue
            job, now = attempt.job, time.monotonic()
            if job not in left:
                continue
            if attempt.error is None:
                heard = now
                job.answer = attempt.answer
                del left[job]
            elif _is_final(attempt.error):
                raise attempt.error
            else:
                job.failed(attempt, attempt.error, now)
    finally:
        for job in left:
            job.forget()
    return [job.answer for job in jobs]


def coalesce(ranges: Sequence[tuple[int, int]]) -> tuple[list[tuple[int, int]], list[int]]:
    """Fewer ranges that hold all of the given ones, and which of them holds each.

    Parameters
    ----------
    ranges : sequence of (offset, nbytes)

    Returns
    -------
    blocks : list of (offset, nbytes)
        In file order. Ranges share one where at most ``HOLE`` bytes lie between them and it stays within ``LARGEST``.
    where : list of int
        For each range, the index of its block.
    """
    ends: list[list[int]] = []
    where = [0] * len(ranges)
    for i in sorted(range(len(ranges)), key=lambda i: ranges[i]):
        begin, end = ranges[i][0], sum(ranges[i])
        if ends and begin <= ends[-1][1] + HOLE and end <= max(ends[-1][1], ends[-1][0] + LARGEST):
            ends[-1][1] = max(ends[-1][1], end)
        else:
            ends.append([begin, end])
        where[i] = len(ends) - 1
    return [(begin, end - begin) for begin, end in ends], where
