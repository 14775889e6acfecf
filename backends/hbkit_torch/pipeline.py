"""Staged training steps: batches are decoded and their rows fetched in the background, the steps taken in order."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

import hbkit
from hbkit import errors
from hbkit.embedding import Collection, Pipeline, Staged
from hbkit_torch.data import Array, tensor

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
    label : Tensor float32[B], or float32[B, n_labels] where the dataset names a sequence of labels
        0 in padded rows, and without a label column.
    weight : Tensor float32[B]
        The weight column, or 1; 0 in padded rows.
    n_rows : int
        Rows that are not padding.
    cursor : dict
        Where the dataset continues after this batch. (The dataset's own ``state_dict`` is ahead by the look-ahead.)
    """

    def __init__(self, inputs: hbkit.data.Inputs, staged: Staged, train: bool) -> None:
        self.dense, self.label, self.weight = tensor(inputs.dense), tensor(inputs.label), tensor(inputs.weight)
        self.n_rows, self.cursor = inputs.n_rows, inputs.cursor
        self._train, self._staged = train, staged
        self.embeddings = leaves(staged.outputs(), train)

    def apply(self) -> None:
        """Update the tables by the gradients of ``embeddings``, once, after ``backward()``.

        A feature that the loss did not use has no gradient, and its rows stay as they are.

        Raises
        ------
        Closed
            The step was applied already, has gone by, or only reads (``train=False``); or no backward came before.
        """
        self._staged.apply(gradients(self.embeddings) if self._train else {})

    def close(self) -> None:
        """Let go of the rows; without ``apply`` they stay as they are. Idempotent."""
        self._staged.close()


def pipeline(ds: hbkit.data.Dataset, embeddings: Any, lookahead: int = 8, train: bool = True) -> Pipeline[Step]:
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
    ds : Dataset
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
    collection: Collection = getattr(embeddings, "collection", embeddings)
    if collection is not embeddings:
        embeddings.drop()  # a forward that was never applied would stand in the way of the first step
    if ds.batch_size is None:
        raise errors.InvalidArgument("the dataset is not batched", remedy="call .batch(n) on it")
    ahead = hbkit.embedding.lookahead(
        ds.batches(), collection, lookahead, train, ds.batch_size, lambda batch: ds.inputs(batch, collection.features)
    )

    def steps() -> Generator[Step]:
        with ahead:
            for inputs, staged in ahead:
                with closing(Step(inputs, staged, train)) as step:
                    yield step

    return Pipeline(steps(), ahead)
