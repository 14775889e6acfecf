"""`attach`: one module from raw batch to output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

import hbkit
from hbkit_torch.data import tensor, to_column

__all__ = ["attach"]


class _Attached(torch.nn.Module):
    def __init__(self, model: torch.nn.Module, embeddings: Any, ignore: frozenset[str]) -> None:
        super().__init__()
        self.model = model
        self.embeddings = embeddings
        self.ignore = ignore

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        skipped = self.ignore | self.embeddings.collection.features.keys()
        columns = {name: to_column(column, name) for name, column in batch.items() if name not in skipped}
        embeddings = self.embeddings(batch)
        rows = next(value if isinstance(value, Tensor) else value.values for value in embeddings.values())
        dense = tensor(hbkit.data.dense_inputs(columns, len(rows), len(rows)))
        return self.model(dense.to(rows.device), embeddings)


def attach(model: torch.nn.Module, embeddings: Any, ignore: Iterable[str] = ()) -> torch.nn.Module:
    """One module from raw batch to output: ``forward(batch)`` is ``model(dense, embeddings(batch))``.

    Parameters
    ----------
    model : Module
        Called with dense float32[n, n_dense], on the device of the first feature's rows, and the dict of embeddings.
    embeddings : EmbeddingCollection
        After ``backward()``, call its ``apply()``.
    ignore : names of columns that are no input, such as the label
        Each other column that is not a feature is a dense input, in the batch's order.
    """
    return _Attached(model, embeddings, frozenset(ignore))
