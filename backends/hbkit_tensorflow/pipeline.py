"""Staged training steps: batches are decoded and their rows fetched in the background, the steps taken in order."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from typing import Any, NamedTuple, Self

import numpy as np
import tensorflow as tf

import hbkit
from hbkit import errors
from hbkit.data.ahead import prefetch
from hbkit.embedding import Collection, Staged
from hbkit_tensorflow.data import Array, Dataset, array, dense_columns, key_columns, tensor, zeros

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

    values: tf.Tensor
    mask: tf.Tensor


def _padded(batch: hbkit.data.Batch, name: str | None, otherwise: int, n: int, size: int) -> tf.Tensor:
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


def leaves(embeddings: Mapping[str, Any]) -> dict[str, tf.Tensor]:
    """What takes gradients: the tensor of each feature, the values of a sequence."""
    return {feature: value.values if isinstance(value, Sequence) else value for feature, value in embeddings.items()}


def from_outputs(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """The core's outputs as tensors over the same memory."""
    return {
        feature: tensor(value) if isinstance(value, np.ndarray) else Sequence(tensor(value.values), tensor(value.mask))
        for feature, value in outputs.items()
    }


def gradients(grads: Mapping[str, Any]) -> dict[str, Array]:
    """Gradients as the core takes them, without the features that the loss did not use."""
    found = {feature: grad for feature, grad in leaves(grads).items() if grad is not None}
    if not found:
        raise errors.Closed("no embedding has a gradient", remedy="watch s.embeddings with the tape before the loss")
    return {
        feature: grad if isinstance(grad, np.ndarray) else array(tf.convert_to_tensor(grad))
        for feature, grad in found.items()
    }


class Step:
    """One batch, padded to the batch size, with its rows at hand.

    Attributes
    ----------
    dense : Tensor float32[B, n_dense]
    embeddings : dict of feature to Tensor float32[B, dim]
        Let the tape watch them; a `Sequence` for a ragged feature without pooling. Zeros in padded rows.
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
        keys = key_columns(batch, collection.features)
        keys = {feature: hbkit.ragged.slice_rows(column, 0, n) for feature, column in keys.items()}
        used = {ds.label, ds.weight} | collection.features.keys()
        inputs = {name: column for name, column in batch.items() if name not in used}
        self.n_rows, self.cursor = n, batch.cursor
        self.dense = tensor(dense_columns(inputs, n, size))
        self.label = _padded(batch, ds.label, 0, n, size)
        self.weight = _padded(batch, ds.weight, 1, n, size)
        self.embeddings: dict[str, Any] = {}
        self._train = train
        self._staged: Staged | None = collection.stage(keys, train=train, size=size)

    def gather(self) -> Step:
        """Fill ``embeddings``, after the step before was applied; gives this step."""
        if self._staged is None:
            raise errors.Closed("this step has gone by", remedy="take the steps in turn")
        self._staged.wait()
        self.embeddings = from_outputs(self._staged.outputs())
        return self

    def apply(self, grads: Mapping[str, Any]) -> None:
        """Update the tables, once.

        Parameters
        ----------
        grads : dict of feature to Tensor shaped as its embedding, or None
            As ``tape.gradient(loss, s.embeddings)`` gives them; None is for a feature that the loss did not use, whose
            rows stay as they are.

        Raises
        ------
        Closed
            The step was applied already, has gone by, or only reads (``train=False``); or no feature has a gradient.
        """
        if not self._train:
            raise errors.Closed("this step only reads", remedy="make the pipeline with train=True")
        if self._staged is None:
            raise errors.Closed("this step was applied already, or has gone by", remedy="apply each step once, in turn")
        self._staged.apply(gradients(grads))
        self.close()

    def close(self) -> None:
        """Let go of the rows; without ``apply`` the step leaves no trace. Idempotent."""
        if self._staged is not None:
            self._staged.close()
        self._staged = None


class Steps:
    """Iterator of the steps of one pass over a dataset, staged in the background up to ``depth`` ahead, not gathered.

    Whoever takes a step closes it; ``close`` is for the rest. Both may be called from any thread.
    """

    def __init__(self, ds: Any, embeddings: Any, train: bool, depth: int) -> None:
        self._ds: hbkit.data.Dataset = ds.core if isinstance(ds, Dataset) else ds
        self._collection: Collection = getattr(embeddings, "collection", embeddings)
        self._train = train
        if self._ds.batch_size is None:
            raise errors.InvalidArgument("the dataset is not batched", remedy="call .batch(n) on it")
        self._size = self._ds.batch_size
        if depth < 0:
            raise errors.InvalidArgument(f"lookahead={depth}", remedy="give the batches to stage ahead, 0 or more")
        if embeddings is not self._collection:
            embeddings.drop()
        self._lock = threading.Lock()
        self._waiting: set[Step] = set()  # staged, and not yet taken
        self._steps = prefetch(self._made(), depth) if depth else self._made()

    def _made(self) -> Generator[Step]:
        for batch in self._ds:
            if batch.n_rows:
                self._waiting.add(step := Step(batch, self._ds, self._size, self._collection, self._train))
                yield step

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        with self._lock:
            step = next(self._steps)
            self._waiting.discard(step)
            return step

    def close(self) -> None:
        """End the thread and let go of the steps that wait. Idempotent."""
        with self._lock:
            self._steps.close()
            while self._waiting:
                self._waiting.pop().close()


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


def pipeline(ds: Any, embeddings: Any, lookahead: int = 8, train: bool = True) -> Pipeline:
    """Staged steps over one pass of a dataset, decoded and fetched ``lookahead`` batches ahead.

    A step's rows are gathered when the step is reached, after the update before it, so the results are those of no
    look-ahead, bit for bit. Every step has ``ds.batch_size`` rows, so a compiled model sees one shape::

        for s in hb.pipeline(ds, embeddings):
            with tf.GradientTape() as tape:
                tape.watch(s.embeddings)
                loss = loss_fn(s.label, model(s.dense, s.embeddings), s.weight)
            rows, weights = tape.gradient(loss, (s.embeddings, model.trainable_variables))
            optimizer.apply(weights, model.trainable_variables)
            s.apply(rows)

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
    made = Steps(ds, embeddings, train, lookahead)

    def steps() -> Generator[Step]:
        with closing(made):
            for step in made:
                with closing(step):
                    yield step.gather()

    return Pipeline(steps())


class Feed:
    """The steps of a dataset as a `tf.data.Dataset` of ``({"ticket", "dense"}, label, weight)``, as Keras takes data.

    A ticket names a step that waits here. So Keras may prefetch as far as it likes: rows are gathered when the step is
    taken. A ticket can also name the error that its step ran into, which TensorFlow would turn into text.
    """

    _tickets = itertools.count()

    def __init__(self, ds: Any, embeddings: Any, train: bool, lookahead: int) -> None:
        self.ds: hbkit.data.Dataset = ds.core if isinstance(ds, Dataset) else ds
        self._start = lambda: Steps(self.ds, embeddings, train, lookahead)
        self._start().close()  # to raise here what it has to say of its arguments
        self._train = train
        self.error: BaseException | None = None  # what reading or staging raised,
        self.cause: BaseException | None = None  # and why: Keras cuts causes off when it shortens tracebacks
        self._held: dict[int, Step | Exception] = {}
        self._running: list[Steps] = []

    def dataset(self) -> tf.data.Dataset:
        """Elements of one pass; each further iteration in training is the dataset's next epoch."""
        size = self.ds.batch_size
        rows, dense = tf.TensorSpec((size,), tf.float32), tf.TensorSpec((size, None), tf.float32)
        spec = ({"ticket": tf.TensorSpec((), tf.int64), "dense": dense}, rows, rows)
        return tf.data.Dataset.from_generator(self._elements, output_signature=spec)

    def _elements(self) -> Iterator[Any]:
        self._running.append(steps := self._start())
        step = None
        try:
            for step in steps:
                self._held[ticket := next(self._tickets)] = step
                yield {"ticket": ticket, "dense": step.dense}, step.label, step.weight
            if self._train and step is not None:
                self.ds = self.ds.set_epoch(step.cursor["epoch"] + 1)
        except Exception as error:
            self.error, self.cause = error, error.__cause__
            self._held[ticket := next(self._tickets)] = error
            rows = zeros((self.ds.batch_size or 1,))
            yield {"ticket": ticket, "dense": rows[:, None]}, rows, rows

    def take(self, ticket: int) -> Step | None:
        """The gathered step that a ticket names, if it is one of this feed's; raises the error that it names."""
        found = self._held.pop(ticket, None)
        if isinstance(found, Exception):
            raise found
        return found and found.gather()

    def close(self) -> None:
        """End the threads, and let go of the steps that nobody took."""
        for steps in self._running:
            steps.close()
        for step in self._held.values():
            if isinstance(step, Step):
                step.close()
        self._held, self._running = {}, []
