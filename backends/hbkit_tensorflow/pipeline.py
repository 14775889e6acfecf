"""Staged training steps: batches are decoded and their rows fetched in the background, the steps taken in order."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

import hbkit
from hbkit import errors
from hbkit.embedding import Collection, Lookahead, Pipeline, Staged
from hbkit_tensorflow import backward
from hbkit_tensorflow.data import Array, tensor
from hbkit_tensorflow.transfer import target, to_device
from hbkit_tensorflow.update import Forward, Updating, gradients

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


Make = Callable[[Array], tf.Tensor]


def from_outputs(outputs: Mapping[str, Any], make: Make = tensor) -> dict[str, Any]:
    """The core's outputs as tensors, by default over the same memory."""
    return {
        feature: make(value) if isinstance(value, np.ndarray) else Sequence(make(value.values), make(value.mask))
        for feature, value in outputs.items()
    }


def in_one_copy(inputs: hbkit.data.Inputs, outputs: Mapping[str, Any], device: str) -> Make:
    """What gives tensors on the device for the arrays of a batch, asked for in the order in which they stand there."""
    rows = [a for value in outputs.values() for a in ([value] if isinstance(value, np.ndarray) else value)]
    copies = iter(to_device([inputs.dense, inputs.label, inputs.weight, *rows], device))
    return lambda _: next(copies)


class Step(Updating):
    """One batch, padded to the batch size, with its rows at hand.

    Attributes
    ----------
    dense : Tensor float32[B, n_dense]
    embeddings : dict of feature to Tensor float32[B, dim]
        Let the tape watch them; a `Sequence` for a ragged feature without pooling. Zeros in padded rows.
    label : Tensor float32[B], or float32[B, n_labels] where the dataset names a sequence of labels
        0 in padded rows, and without a label column.
    weight : Tensor float32[B]
        The weight column, or 1; 0 in padded rows.
    n_rows : int
        Rows that are not padding.
    cursor : dict
        Where the dataset continues after this batch. (The dataset's own ``state_dict`` is ahead by the look-ahead.)
    share : float
        This rank's part of the global batch's weight; 1 where the tables are not shared between ranks.
    transport : hbkit.shuffle.Transport or None
        What connects the ranks; None where the tables are not shared between them.
    """

    def __init__(
        self,
        inputs: hbkit.data.Inputs,
        staged: Staged,
        train: bool,
        held: deque[Forward],
        device: str | None = None,
    ) -> None:
        self.n_rows, self.cursor = inputs.n_rows, inputs.cursor
        self._train, self._staged, self._held = train, staged, held
        outputs = staged.outputs()
        self.share, self.transport = getattr(staged, "share", 1.0), getattr(staged, "transport", None)
        make = tensor if device is None else in_one_copy(inputs, outputs, device)
        self.dense, self.label, self.weight = make(inputs.dense), make(inputs.label), make(inputs.weight)
        self.embeddings = from_outputs(outputs, make)
        self._n_scaled = backward.n_scaled()

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
        Unsupported
            A `keras.optimizers.LossScaleOptimizer` scaled the loss.
        """
        backward.refuse_scaled(self._n_scaled)
        self.update(self._staged, gradients(grads) if self._train else {})

    def accumulate(self, grads: Mapping[str, Any]) -> None:
        """Keep gradients for the ``apply`` of a later step, which makes one update of both batches.

        Takes and raises what ``apply`` does.
        """
        backward.refuse_scaled(self._n_scaled)
        self.hold(self._staged, gradients(grads) if self._train else {})

    def close(self) -> None:
        """Let go of the rows; without ``apply`` they stay as they are. Idempotent."""
        self._staged.close()


def ahead(ds: hbkit.data.Dataset, embeddings: Any, depth: int, train: bool) -> Lookahead:
    """Pairs of what a model takes and a `Staged`, up to ``depth`` batches ahead."""
    collection: Collection = embeddings.lend() if hasattr(embeddings, "lend") else embeddings
    if ds.batch_size is None:
        raise errors.InvalidArgument("the dataset is not batched", remedy="call .batch(n) on it")
    return hbkit.embedding.lookahead(
        ds.batches(),
        collection,
        depth,
        train,
        ds.batch_size,
        lambda batch: ds.inputs(batch, collection.features),
        ds.no_rows,
    )


def pipeline(
    ds: hbkit.data.Dataset, embeddings: Any, lookahead: int = 8, train: bool = True, device: str | None = None
) -> Pipeline[Step]:
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
    ds : Dataset
        Batched. Each column that is not the label, the weight or a feature of the collection is a dense input, in
        the dataset's order.
    embeddings : EmbeddingCollection or hbkit.embedding.Collection
    lookahead : int, batches
        0 does everything in the foreground.
    train : bool
        False only reads: no row is created, and there is nothing to apply.
    device : optional
        Where the tensors of a step are to be: all of them come in one copy, and the gradients go back in one.
        (TensorFlow can neither use memory that was pinned for it nor say when it has read it: the copy blocks.)

    Returns
    -------
    Pipeline
        Of `Step`. A step is valid until the next one is asked for; one that was not applied by then is dropped. Leaving
        the loop by ``break`` or an exception ends the background thread; whoever keeps the pipeline in a variable and
        leaves early uses it in a ``with``, or calls ``close()``.

    Raises
    ------
    InvalidArgument
        The dataset is not batched, ``lookahead`` is negative, or TensorFlow knows no such device.
    DeviceUnavailable
        There is no such device here.
    Exception
        Whatever reading or staging raised in the background, as it is, from the step that it would have become.
    """
    place = target(device)
    pairs = ahead(ds, embeddings, lookahead, train)

    def steps() -> Generator[Step]:
        held: deque[Forward] = deque()
        with pairs:
            for inputs, staged in pairs:
                with closing(staged):
                    yield Step(inputs, staged, train, held, place)

    return Pipeline(steps(), pairs)


class Feed:
    """The batches of a dataset as a `tf.data.Dataset` of ``({"ticket", "dense"}, label, weight)``, as Keras takes data.

    A ticket names a staged batch that waits here. So Keras may prefetch as far as it likes: rows are gathered when the
    step is taken. A ticket can also name the error that a batch ran into, which TensorFlow would turn into text.
    """

    _tickets = itertools.count()

    def __init__(self, ds: hbkit.data.Dataset, embeddings: Any, train: bool, lookahead: int) -> None:
        self.ds = ds
        self._start = lambda: ahead(self.ds, embeddings, lookahead, train)
        self._start().close()  # to raise here what it has to say of its arguments
        self._train = train
        self._n_labels = len(ds.label) if isinstance(ds.label, tuple) else None
        self.error: BaseException | None = None  # what reading or staging raised,
        self.cause: BaseException | None = None  # and why: Keras cuts causes off when it shortens tracebacks
        self._held: dict[int, tuple[hbkit.data.Inputs, Staged] | Exception] = {}
        self._running: list[Lookahead] = []

    def dataset(self) -> tf.data.Dataset:
        """Elements of one pass; each further iteration in training is the dataset's next epoch."""
        size = self.ds.batch_size
        rows, dense = tf.TensorSpec((size,), tf.float32), tf.TensorSpec((size, None), tf.float32)
        label = rows if self._n_labels is None else tf.TensorSpec((size, self._n_labels), tf.float32)
        spec = ({"ticket": tf.TensorSpec((), tf.int64), "dense": dense}, label, rows)
        return tf.data.Dataset.from_generator(self._elements, output_signature=spec)

    def _elements(self) -> Iterator[Any]:
        self._running.append(pairs := self._start())
        inputs = None
        try:
            for inputs, staged in pairs:
                self._held[ticket := next(self._tickets)] = inputs, staged
                yield {"ticket": ticket, "dense": inputs.dense}, inputs.label, inputs.weight
            if self._train and inputs is not None:
                self.ds = self.ds.set_epoch(inputs.cursor["epoch"] + 1)
        except Exception as error:
            self.error, self.cause = error, error.__cause__
            self._held[ticket := next(self._tickets)] = error
            rows = np.zeros(self.ds.batch_size or 1, np.float32)
            label = rows if self._n_labels is None else np.zeros((len(rows), self._n_labels), np.float32)
            yield {"ticket": ticket, "dense": rows[:, None]}, label, rows

    def take(self, ticket: int) -> Step | None:
        """The gathered step that a ticket names, if it is one of this feed's; raises the error that it names."""
        found = self._held.pop(ticket, None)
        if isinstance(found, Exception):
            raise found
        return found and Step(*found, self._train, deque())

    def close(self) -> None:
        """End the threads, and let go of the batches that nobody took."""
        for pairs in self._running:
            pairs.close()
        for held in self._held.values():
            if not isinstance(held, Exception):
                held[1].close()
        self._held, self._running = {}, []
