"""Staged training steps: batches are decoded and their rows fetched in the background, the steps taken in order."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import hbkit
from hbkit import errors
from hbkit.embedding import Collection, Pipeline, SequenceOutput, Staged
from hbkit_torch.data import Array, tensor
from hbkit_torch.transfer import empty_on, in_order, target, to_device
from hbkit_torch.update import Forward, Updating

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


Make = Callable[[Array], Tensor]


def leaves(outputs: Mapping[str, Any], train: bool, make: Make = tensor) -> dict[str, Any]:
    """The core's outputs as tensors, by default over the same memory, which take gradients when training."""

    def leaf(rows: Array | Tensor) -> Tensor:
        return (make(rows) if isinstance(rows, np.ndarray) else rows).requires_grad_(train)

    out: dict[str, Any] = {}
    for feature, value in outputs.items():
        if isinstance(value, SequenceOutput):
            values = leaf(value.values)
            out[feature] = Sequence(values, make(value.mask).to(values.device))
        else:
            out[feature] = leaf(value)
    return out


def in_one_copy(inputs: hbkit.data.Inputs, outputs: Mapping[str, Any], device: torch.device) -> Make:
    """What gives tensors on the device for the arrays of a batch, asked for in the order in which they stand there."""
    rows = [a for value in outputs.values() for a in (value if isinstance(value, SequenceOutput) else [value])]
    arrays = [inputs.dense, inputs.label, inputs.weight, *(a for a in rows if isinstance(a, np.ndarray))]
    copies = iter(to_device([tensor(a) for a in arrays], device))
    return lambda _: next(copies)


class Step(Updating):
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
    share : float
        This rank's part of the global batch's weight; 1 where the tables are not shared between ranks.
    transport : hbkit.shuffle.Transport or None
        What connects the ranks; None where the tables are not shared between them.
    """

    def __init__(
        self, inputs: hbkit.data.Inputs, staged: Staged, train: bool, held: list[Forward], device: torch.device | None
    ) -> None:
        self.n_rows, self.cursor = inputs.n_rows, inputs.cursor
        self._staged = staged
        with in_order(staged.collection) as streams:
            outputs = staged.outputs(empty_on(streams, device or torch.device("cpu")))
        self.share, self.transport = getattr(staged, "share", 1.0), getattr(staged, "transport", None)
        make = tensor if device is None else in_one_copy(inputs, outputs, device)
        self.dense, self.label, self.weight = make(inputs.dense), make(inputs.label), make(inputs.weight)
        self.embeddings = leaves(outputs, train, make)
        self._forwards = [*held, Forward(staged, self.embeddings if train else {})]

    def apply(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """Update the tables by the gradients of ``embeddings``, once, after ``backward()``.

        A feature that the loss did not use has no gradient, and its rows stay as they are.

        Parameters
        ----------
        scaler : torch.amp.GradScaler, optional
            That scaled the loss; call its ``update()`` afterwards. Gradients are unscaled, unless
            ``scaler.unscale_(step)`` did so already, and where one is not finite no row changes.

        Raises
        ------
        Closed
            The step was applied already, has gone by, or only reads (``train=False``); or no backward came before.
        """
        self.update(scaler)
        self._forwards = self._forwards[-1:]

    def accumulate(self) -> None:
        """Keep the gradients for the ``apply`` of a later step, which makes one update of both batches.

        Raises
        ------
        Closed
            As ``apply`` raises.
        """
        self._forwards[-1].check()
        self._staged.hold()

    def close(self) -> None:
        """Let go of the rows; without ``apply`` they stay as they are. Idempotent."""
        self._staged.close()


def pipeline(
    ds: hbkit.data.Dataset,
    embeddings: Any,
    lookahead: int = 8,
    train: bool = True,
    device: torch.device | str | int | None = None,
) -> Pipeline[Step]:
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
    device : optional
        Where the tensors of a step are to be: all of them come in one copy, from pinned memory and without blocking
        where that is a GPU; the gradients go back in one. Rows of tables that are on that device are written and
        updated there, and are part of neither.

    Returns
    -------
    Pipeline
        Of `Step`. A step is valid until the next one is asked for; one that was not applied by then is dropped. Leaving
        the loop by ``break`` or an exception ends the background thread; whoever keeps the pipeline in a variable and
        leaves early uses it in a ``with``, or calls ``close()``.

    Raises
    ------
    InvalidArgument
        The dataset is not batched, ``lookahead`` is negative, or PyTorch knows no such device.
    DeviceUnavailable
        The device cannot be used here.
    Exception
        Whatever reading or staging raised in the background, as it is, from the step that it would have become.
    """
    collection: Collection = embeddings.lend() if hasattr(embeddings, "lend") else embeddings
    if ds.batch_size is None:
        raise errors.InvalidArgument("the dataset is not batched", remedy="call .batch(n) on it")
    place = target(device)
    ahead = hbkit.embedding.lookahead(
        ds.batches(),
        collection,
        lookahead,
        train,
        ds.batch_size,
        lambda batch: ds.inputs(batch, collection.features),
        ds.no_rows,
    )

    def steps() -> Generator[Step]:
        held: list[Forward] = []
        with ahead:
            for inputs, staged in ahead:
                with closing(staged):
                    yield (step := Step(inputs, staged, train, held, place))
                held = [forward for forward in step._forwards if forward.staged.state == "held"]

    return Pipeline(steps(), ahead)
