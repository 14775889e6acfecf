"""Look-ahead: batches are decoded and their rows made resident in the background, while the steps run in order."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Generic, Self, TypeVar

from hbkit.data.ahead import in_order, prefetch
from hbkit.embedding.collection import Collection, Staged, Stages
from hbkit.errors import InvalidArgument
from hbkit.store.host import HostStore

__all__ = ["Lookahead", "Pipeline", "lookahead"]


class Lookahead:
    """Iterator of (batch, `Staged`), staged in the background; see `lookahead`.

    Attributes
    ----------
    waited : float, seconds
        For which the steps so far waited for their batch and its rows.

    Whoever takes a pair applies or closes its `Staged`; `close` lets go of those that nobody took. Both may be called
    from any thread.
    """

    def __init__(
        self,
        collection: Collection,
        stages: Stages,
        pairs: Callable[[set[Staged]], Generator[tuple[Any, Staged]]],
        depth: int,
    ) -> None:
        self._lock = threading.Lock()
        self.waited = 0.0
        self._waiting: set[Staged] = set()  # staged, and not yet taken
        self._collection, self._stages = collection, stages
        self._pairs = prefetch(pairs(self._waiting), depth) if depth else pairs(self._waiting)

    def __iter__(self) -> Iterator[tuple[Any, Staged]]:
        return self

    def __next__(self) -> tuple[Any, Staged]:
        asked = time.monotonic()
        with self._lock:
            prepared, staged = next(self._pairs)
            self._waiting.discard(staged)
        try:
            staged.wait(asked)
        except BaseException:
            staged.close()
            raise
        self.waited += time.monotonic() - asked
        return prepared, staged

    def close(self) -> None:
        """End the thread and let go of the batches that wait. Idempotent."""
        with self._lock:
            self._pairs.close()
            self._stages.close()
            while self._waiting:
                self._waiting.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, exception: BaseException | None, trace: object) -> None:
        try:
            if exception is not None and not isinstance(exception, GeneratorExit):
                self._collection.abort(exception)
        finally:
            self.close()

    def __del__(self) -> None:
        self.close()


Step = TypeVar("Step")
T = TypeVar("T")
FETCHERS = 4  # batches whose rows are on their way at once: while the last rows of one come, the disk has others to do


class Pipeline(Generic[Step]):
    """Iterator over the steps of a generator; closed when exhausted, closed or forgotten, and in a ``with``."""

    def __init__(self, steps: Generator[Step], ahead: Lookahead | None = None) -> None:
        self._steps, self._ahead = steps, ahead

    @property
    def waited(self) -> float:
        """Seconds for which the steps so far waited for their batch and its rows."""
        return 0.0 if self._ahead is None else self._ahead.waited

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Step:
        return next(self._steps)

    def close(self) -> None:
        """Drop the current step and those staged ahead, and end the thread. Idempotent."""
        self._steps.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, exception: BaseException | None, trace: object) -> None:
        if exception is not None and not isinstance(exception, GeneratorExit):
            with suppress(BaseException):  # so that what the steps hold learns of it, too
                self._steps.throw(exception)
        self.close()


def lookahead(
    dataset: Iterable[Mapping[str, Any]],
    collection: Collection,
    lookahead: int = 8,
    train: bool = True,
    size: int | None = None,
    prepare: Callable[[Any], Any] | None = None,
    empty: Callable[[], Mapping[str, Any]] | None = None,
) -> Lookahead:
    """Pairs (batch, `Staged`) in order, staged up to `lookahead` batches before their step.

    The keys of all of them are known to the tables' stores, which keep near what is used soonest; the rows of the next
    five are fetched in the background. Rows are read at the step, after the previous update, so every value of
    `lookahead` gives the same results.

    >>> for batch, staged in lookahead(dataset, collection):
    ...     outputs = staged.outputs()
    ...     staged.apply(gradients(batch, outputs))

    Parameters
    ----------
    dataset : iterable of batches
        Those without rows are passed over.
    collection : Collection
        Of a `Sharded`, every rank must call this, in the same order as all else that its ranks do together. A rank that
        runs out of batches gets empty ones until all have run out; what one raises for a batch, all raise there.
    lookahead : int
        Batches ahead of the step; 0 stages each one when it is asked for.
    train, size
        As in `Collection.stage`.
    prepare : callable, optional
        ``prepare(batch)`` runs in the background too; its result is given instead of the batch.
        The sum of its attribute ``weight``, where it has one, is what the batch counts for among those of other ranks;
        else its rows are.
    empty : callable, optional
        A batch of no rows, where other ranks have more of them; one of the features alone when left out.

    Raises
    ------
    InvalidArgument
        `lookahead` is negative.
    Exception
        When iterated: what reading, staging or preparing a batch raised, where the batch would have come.
    """
    if lookahead < 0:
        raise InvalidArgument(f"lookahead={lookahead}", remedy="give 0 or more batches")

    near = all(isinstance(table.store, HostStore) for table in collection.tables.values())  # there is nothing to fetch
    fetchers = 0 if near else min(FETCHERS, max(0, lookahead - 1))

    stages = collection.stage_each(dataset, train, size, lookahead > 0, prepare, empty)

    def announced(waiting: set[Staged]) -> Generator[tuple[Any, Staged]]:
        for prepared, staged in stages:
            waiting.add(staged)
            yield prepared, staged

    def pairs(waiting: set[Staged]) -> Generator[tuple[Any, Staged]]:
        if near:
            return announced(waiting)
        jobs = (partial(fetched, item) for item in behind(announced(waiting), lookahead - 1 - fetchers))
        return in_order(jobs, fetchers)

    def fetched(item: tuple[Any, Staged] | Exception) -> tuple[Any, Staged]:
        if isinstance(item, Exception):
            raise item
        if lookahead:
            item[1].fetch()
        return item

    # Where rows come from afar, each batch that is asked for has one more announced, and only one waits to be taken.
    return Lookahead(collection, stages, pairs, lookahead if near else min(lookahead, 1))


def behind(source: Iterator[T], n: int) -> Iterator[T | Exception]:
    """The items of `source`, each given when `n` more were seen; and what it raises, where its next item would be."""
    held: deque[T | Exception] = deque()
    try:
        for item in source:
            held.append(item)
            if len(held) > n:
                yield held.popleft()
    except Exception as e:
        held.append(e)
    yield from held
