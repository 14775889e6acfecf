"""Embeddings over the core's tables, and the layers that the models are written from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from hbkit import errors
from hbkit.embedding import Collection
from hbkit_torch.attach import attach
from hbkit_torch.data import to_column
from hbkit_torch.layers import (
    MLP,
    CompressedInteraction,
    CrossNetwork,
    Dice,
    DotInteraction,
    FactorizationMachine,
    MixtureOfExperts,
    ProductLayer,
    SignedLog,
    TargetAttention,
)
from hbkit_torch.pipeline import gradients, leaves

__all__ = [
    "MLP",
    "CompressedInteraction",
    "CrossNetwork",
    "Dice",
    "DotInteraction",
    "EmbeddingCollection",
    "FactorizationMachine",
    "MixtureOfExperts",
    "ProductLayer",
    "SignedLog",
    "TargetAttention",
    "attach",
]


class EmbeddingCollection(torch.nn.Module):
    """A module over `hbkit.embedding.Collection`: a batch of keys in, one tensor of rows for each feature out.

    In training (train mode, gradients on) a forward creates the rows of new keys and gives leaf tensors; after
    ``loss.backward()``, ``apply()`` makes one fused update of every table. In eval mode or under ``torch.no_grad`` it
    only reads, and a key without a row gives zeros. The module has no parameters: the rows
    live in the tables, which `hbkit.snapshot` saves.

    Parameters
    ----------
    collection : hbkit.embedding.Collection
        Borrowed: closing the module leaves the tables open.

    Notes
    -----
    Not thread-safe. One forward is pending at a time: a forward whose ``apply`` did not come is dropped by the next
    one, without an update. The forward itself is no part of a compiled graph; the model behind it is.
    """

    def __init__(self, collection: Collection) -> None:
        super().__init__()
        self._collection = collection
        self._staged: Any = None
        self._embeddings: dict[str, Any] = {}
        self._closed = False

    @property
    def collection(self) -> Collection:
        """The core's collection.

        Raises
        ------
        Closed
            The module was closed.
        """
        if self._closed:
            raise errors.Closed(
                "the embedding collection is closed",
                feature=", ".join(self._collection.features),
                remedy="make a new EmbeddingCollection over the same tables",
            )
        return self._collection

    @torch.compiler.disable
    def forward(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Rows of a batch.

        Parameters
        ----------
        batch : dict
            A key column for each feature: integer Tensor or ndarray [n], `Jagged`, ``(values, row_splits)`` or
            `hbkit.Ragged`; other columns are ignored.

        Returns
        -------
        dict of feature to Tensor float32[n, dim]
            A ragged feature without pooling gives a `Sequence`.

        Raises
        ------
        UnknownColumn
            A feature is not in the batch.
        InvalidArgument
            A feature's keys are not integers, or not in host memory.
        Closed
            The module was closed.
        """
        self.drop()
        train = self.training and torch.is_grad_enabled()
        collection = self.collection
        columns = {f: to_column(batch[f], f) for f in collection.features if f in batch}
        staged = collection.stage(columns, train=train)
        try:
            staged.wait()
            embeddings = leaves(staged.outputs(), train)
        except BaseException:
            staged.close()
            raise
        if train:
            self._staged, self._embeddings = staged, embeddings
        else:
            staged.close()
        return embeddings

    def apply(self, fn: Callable[[torch.nn.Module], None] | None = None) -> EmbeddingCollection:
        """Update the tables by the gradients of the last forward; with ``fn``, `torch.nn.Module.apply`.

        A feature that the loss did not use has no gradient, and its rows stay as they are.

        Raises
        ------
        Closed
            There is no forward in train mode to apply, or no backward came after it.
        """
        if fn is not None:
            return super().apply(fn)
        if self._staged is None:
            raise errors.Closed(
                "there is no forward to apply",
                remedy="call the module in train mode, then backward(), then apply() once",
            )
        self._staged.apply(gradients(self._embeddings))
        self.drop()
        return self

    def drop(self) -> None:
        """Forget the pending forward, if any, without an update."""
        if self._staged is not None:
            self._staged.close()
        self._staged, self._embeddings = None, {}

    def close(self) -> None:
        """Drop the pending forward and refuse further ones; the tables stay open. Idempotent."""
        self.drop()
        self._closed = True
