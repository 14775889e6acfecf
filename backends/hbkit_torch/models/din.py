"""DIN."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hbkit_torch.layers import MLP, TargetAttention
from hbkit_torch.models.common import ClickModel, embedding

__all__ = ["DIN"]


class DIN(ClickModel):
    """An MLP over the rows, and over sequences of past behaviour, pooled by their attention to a target.

    Parameters
    ----------
    features : list of str
        Features of the collection with one row each, the targets among them, in the order of the MLP's input.
    dim : int
        Width of the vectors; tables have ``row_dim(dim)`` columns.
    n_dense : int
        Dense inputs.
    sequences : mapping of str to str
        Feature without pooling (the items that a user clicked) to the feature that it is weighed by (the item on
        offer). They may share a table.
    attention, hidden : widths of the hidden layers of each attention, and of the MLP

    Source: Zhou et al., Deep Interest Network for Click-Through Rate Prediction, KDD 2018.
    """

    def __init__(
        self,
        features: Sequence[str],
        dim: int,
        n_dense: int = 0,
        sequences: Mapping[str, str] = {},  # never changed
        attention: Sequence[int] = (36,),
        hidden: Sequence[int] = (128, 64),
    ) -> None:
        super().__init__(features, dim, n_dense)
        self.sequences = dict(sequences or {})
        self.attention = torch.nn.ModuleList(TargetAttention(dim, attention) for _ in self.sequences)
        self.deep = MLP((len(self.features) + len(self.sequences)) * dim + n_dense, [*hidden, 1], dice=True)

    @staticmethod
    def stack(features: Sequence[str]) -> dict[str, list[str]]:
        """None: targets are read by themselves."""
        return {}

    def forward(self, dense: Tensor, embeddings: Mapping[str, Any]) -> Tensor:
        """Logits float32[B] from dense float32[B, n_dense], embeddings [B, dim], and of sequences [B, L, dim]."""
        pooled = []
        for (feature, target), attention in zip(self.sequences.items(), self.attention, strict=True):
            values, mask = embedding(embeddings, feature, self.dim, sequence=True)
            pooled.append(attention(embedding(embeddings, target, self.dim), values, mask))
        x = self.flat(dense, self.rows(embeddings), *pooled)
        return self.deep(x, x.any(1)).squeeze(1)  # rows of zeros fill up a batch: they do not count
