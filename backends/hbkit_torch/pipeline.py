"""Staged training steps: batches are decoded and their rows fetched in the background, the steps taken in order."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple, Self

import numpy as np
from torch import Tensor

import hbkit
from hbkit import errors
from hbkit.embedding import Collection, Staged
from hbkit_torch.data import Array, Dataset, dense_columns, key_columns, tensor

__all__ = ["Pipeline", "Sequence", "Step", "pipeline"]


class Sequence(NamedTuple):
    """A ragged feature without pooling, padded.

    Attributes
    ----------
    values : Tensor float32[B, L, dim]
        Zeros where there is no key. L is the column's padded length, or else the next power of two.
    mask : Tensor bool[B, L]
        True where a key stood.
    """

    values: Tensor
    mask: Tensor


def leaves(outputs: Mapping[str, Any], train: bool) -> dict[str, Any]:
    """The core's outputs as tensors over the same memory, which take gradients when training."""
    out: dict[str, Any] = {}
    for feature, value in outputs.items():
        if isinstance(value, np.ndarray):
            out[feature] = tensor(value).requires_grad_(train)
        else:
            out[feature] = Sequence(tensor(value.values).requires_grad_(train), tensor(value.mask))
    return out


def gradients(embeddings: Mapping[str, Any]) -> dict[str, Array]:
    """Gradient of each leaf over the same memory, without the features that the loss did not use."""
    grads = {}
    for feature, value in embeddings.items():
        leaf = value.values if isinstance(value, Sequence) else value
        if leaf.grad is not None:
            grads[feature] = leaf.grad.numpy()
    if not grads:
        raise errors.Closed("no embedding has a gradient", remedy="call loss.backward() before apply()")
    return grads


class Step:
    """One batch, padded to the batch size, with its rows at hand.

    Attributes
    ----------
    dense : Tensor float32[B, n_dense]
    embeddings : dict of feature to Tensor float32[B, dim]
        Leaves that take gradients when training; a `Sequence` for a ragged feature without pooling. Zeros in padded
        rows.
    label : Tensor float32[B]
        0 in padded rows, and without a label column.
    weight : Tensor float32[B]
        The weight column, or 1; 0 in padded rows.
    n_rows : int
        Rows that are not padding.
    cursor : dict
        Where the dataset continues after this batch. (The dataset's own ``state_dict`` is ahead by the look-ahead.)
    """

    def __init__(
        self, batch: hbkit.data.Batch, ds: hbkit.data.Dataset, size: int, collection: Collection, train: bool
    ) -> None:
        # Runs in the background: everything but the rows, which the step before may still change.
        n = batch.n_rows
        used = {ds.label, ds.weight} | collection.features.keys()
        inputs = {name: column for name, column in batch.items() if name not in used}
        self.n_rows, self.cursor = n, batch.cursor
        self.dense: Tensor = tensor(dense_columns(inputs, n, size))
        self.label: Tensor = _padded(batch, ds.label, 0, n, size)
        self.weight: Tensor = _padded(batch, ds.weight, 1, n, size)
        self.embeddings: dict[str, Any] = {}
        self._train = train
        keys = key_columns(batch, collection.features)
        keys = {feature: hbkit.ragged.slice_rows(column, 0, n) for feature, column in keys.items()}
        self._staged: Staged | None = collection.stage(keys, train=train, size=size)

    def gather(self) -> Step:
        """Fill ``embeddings``, after the step before was applied; gives this step."""
        if self._staged is None:
            raise errors.Closed("this step has gone by", remedy="take the steps in turn")
        self._staged.wait()
        self.embeddings = leaves(self._staged.outputs(), self._train)
        return self

    def apply(self) -> None:
        """Update the tables by the gradients of ``embeddings``, once, after ``backward()``.

        A feature that the loss did not use has no gradient, and its rows stay as they are.

        Raises
        ------
        Closed
            The step was applied already, has gone by, or only reads (``train=False``); or no backward came before.
        """
        if not self._train:
            raise errors.Closed("this step only reads", remedy="make the pipeline with train=True")
        if self._staged is None:
            raise errors.Closed("this step was applied already, or has gone by", remedy="apply each step once, in turn")
        self._staged.apply(gradients(self.embeddings))
        self.close()

    def close(self) -> None:
        """Let go of the rows; without ``apply`` they stay as they are. Idempotent."""
        if self._staged is not None:
            self._staged.close()
        self._staged = None


def _padded(batch: hbkit.data.Batch, name: str | None, otherwise: int, n: int, size: int) -> Tensor:
    """The label or weight column, or ``otherwise`` without one: float32[size], zeros from row ``n`` on."""
    if name is not None and name not in batch:
        raise errors.UnknownColumn(
            "a column is not in the batch", column=name, remedy=f"the batch has {', '.join(batch) or 'nothing'}"
        )
    column = np.full(n, otherwise) if name is None else batch[name]
    padded = dense_columns({str(name): column}, n, size)
    if padded.shape[1] != 1:
        raise errors.InvalidArgument(
            f"{padded.shape[1]} values a row", column=name, remedy="labels and weights are single numbers"
        )
    return tensor(padded[:, 0])


class _End:
    """What the background sends last: the exception it ended with, if any."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def _ahead(make: Callable[[], Generator[Step]], depth: int) -> Generator[Step]:
    """The steps of a generator, made by a thread that is at most ``depth`` steps ahead.

    Closing the generator (as a broken-off loop does), ends the thread before it returns. The thread is a daemon, for
    the case that the interpreter exits while somebody still holds the generator open.
    """
    ready: queue.SimpleQueue[Step | _End] = queue.SimpleQueue()
    room = threading.Semaphore(depth - 1)
    stopped = threading.Event()

    def work() -> None:
        error = None
        try:
            with contextlib.closing(make()) as steps:
                for step in steps:
                    ready.put(step)
                    room.acquire()
                    if stopped.is_set():
                        break
        except BaseException as e:  # whatever it is, the foreground must hear of it
            error = e
        ready.put(_End(error))

    thread = threading.Thread(target=work, name="hbkit-pipeline", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            room.release()
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stopped.set()
        room.release()
        if threading.current_thread() is not thread:  # the garbage collector may close a forgotten generator anywhere
            thread.join()
        while not ready.empty():
            if not isinstance(item := ready.get(), _End):
                item.close()


class Pipeline:
    """Iterator of gathered steps; ends its thread when exhausted, closed or forgotten. Use `pipeline` to make one."""

    def __init__(self, steps: Generator[Step]) -> None:
        self._steps = steps

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Step:
        return next(self._steps)

    def close(self) -> None:
        """Drop the current step and those staged ahead, and end the thread. Idempotent."""
        self._steps.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def pipeline(ds: Dataset | hbkit.data.Dataset, embeddings: Any, lookahead: int = 8, train: bool = True) -> Pipeline:
    """Staged steps over one pass of a dataset, decoded and fetched ``lookahead`` batches ahead.

    A step's rows are gathered when the step is reached, after the update before it, so the results are those of no
    look-ahead, bit for bit. Every step has ``ds.batch_size`` rows, so a compiled model sees one shape::

        for s in hb.pipeline(ds, embeddings):
            loss = loss_fn(model(s.dense, s.embeddings), s.label, s.weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            s.apply()

    Parameters
    ----------
    ds : Dataset or hbkit.data.Dataset
        Batched. Each column that is not the label, the weight or a feature of the collection is a dense input, in
        the dataset's order.
    embeddings : EmbeddingCollection or hbkit.embedding.Collection
    lookahead : int, batches
        0 does everything in the foreground.
    train : bool
        False only reads: no row is created, and there is nothing to apply.

    Returns
    -------
    Pipeline
        Of `Step`. A step is valid until the next one is asked for; one that was not applied by then is dropped. Leaving
        the loop by ``break`` or an exception ends the background thread; whoever keeps the pipeline in a variable and
        leaves early uses it in a ``with``, or calls ``close()``.

    Raises
    ------
    InvalidArgument
        The dataset is not batched, or ``lookahead`` is negative.
    Exception
        Whatever reading or staging raised in the background, as it is, from the step that it would have become.
    """
    source: hbkit.data.Dataset = ds.core if isinstance(ds, Dataset) else ds
    collection: Collection = getattr(embeddings, "collection", embeddings)
    if collection is not embeddings:
        embeddings.drop()  # a forward that was never applied would stand in the way of the first step
    size = source.batch_size
    if size is None:
        raise errors.InvalidArgument("the dataset is not batched", remedy="call .batch(n) on it")
    if lookahead < 0:
        raise errors.InvalidArgument(f"lookahead={lookahead}", remedy="give the batches to stage ahead, 0 or more")

    def staged() -> Generator[Step]:
        for batch in source:
            if batch.n_rows:  # a loss has no mean over no rows
                yield Step(batch, source, size, collection, train)

    def steps() -> Generator[Step]:
        with contextlib.closing(_ahead(staged, lookahead) if lookahead else staged()) as made:
            for step in made:
                with contextlib.closing(step):
                    yield step.gather()

    return Pipeline(steps())
