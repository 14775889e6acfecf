"""Look-ahead: batches are decoded and their rows made resident in the background, while the steps run in order."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, TypeVar

from hbkit.embedding.collection import Collection, Staged
from hbkit.errors import InvalidArgument

__all__ = ["lookahead"]

Item = TypeVar("Item", bound=tuple[Any, Staged])


def lookahead(
    dataset: Iterable[Mapping[str, Any]],
    collection: Collection,
    lookahead: int = 8,
    train: bool = True,
    size: int | None = None,
    prepare: Callable[[Mapping[str, Any]], Any] | None = None,
) -> Generator[tuple[Any, Staged]]:
    """Pairs (batch, `Staged`) in order, staged up to `lookahead` batches before their step.

    Rows are read at the step, after the previous update, so every value of `lookahead` gives the same results.

    Parameters
    ----------
    dataset : iterable of batches
    collection : Collection
    lookahead : int
        Batches ahead of the step; 0 stages each one when it is asked for.
    train, size
        As in `Collection.stage`.
    prepare : callable, optional
        ``prepare(batch)`` runs in the background too; its result is given instead of the batch.

    Raises
    ------
    Exception
        What reading or staging a batch raised, where the batch would have come.
    """
    from hbkit.data.ahead import prefetch

    if lookahead < 0:
        raise InvalidArgument(f"lookahead={lookahead}", remedy="give 0 or more batches")
    alive: dict[int, Staged] = {}  # staged and not yet gone by: to be let go if the loop breaks off

    def stage() -> Generator[tuple[Any, Staged]]:
        for batch in dataset:
            staged = collection.stage(batch, train, size)
            alive[id(staged)] = staged
            yield (batch if prepare is None else prepare(batch)), staged

    steps: Generator[tuple[Any, Staged]] | Any = stage() if lookahead == 0 else prefetch(stage(), lookahead)
    try:
        for batch, staged in steps:
            staged.wait()
            yield batch, staged
            staged.close()
            del alive[id(staged)]
    finally:
        steps.close()
        for staged in alive.values():
            staged.close()
