"""xDeepFM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hbkit_torch.layers import MLP, CompressedInteraction, linear
from hbkit_torch.models.common import ClickModel

__all__ = ["XDeepFM"]


class XDeepFM(ClickModel):
    """A linear model, crosses of whole vectors and an MLP over the same rows, summed.

    Column 0 of a row is the key's linear weight and the rest its vector, as in `DeepFM`.

    Parameters
    ----------
    features : list of str
        Features of the collection, in the order of the MLP's input.
    dim : int
        Width of the vectors; tables have ``row_dim(dim)`` columns.
    n_dense : int
        Dense inputs, which the linear part and the MLP see.
    cross : widths of the layers of `CompressedInteraction`
    hidden : widths of the MLP's hidden layers

    Source: Lian et al., xDeepFM: Combining Explicit and Implicit Feature Interactions, KDD 2018.
    """

    def __init__(
        self,
        features: Sequence[str],
        dim: int,
        n_dense: int = 0,
        cross: Sequence[int] = (32, 32),
        hidden: Sequence[int] = (128, 64),
    ) -> None:
        super().__init__(features, dim, n_dense)
        self.linear = linear(n_dense, 1, bias=False) if n_dense else None  # the MLP has one
        self.cross = CompressedInteraction(len(self.features), cross)
        self.crossed = linear(sum(cross), 1, bias=False)
        self.deep = MLP(len(self.features) * dim + n_dense, [*hidden, 1])

    @staticmethod
    def row_dim(dim: int) -> int:
        """Columns a table needs: ``dim + 1``."""
        return dim + 1

    def forward(self, dense: Tensor, embeddings: Mapping[str, Any]) -> Tensor:
        """Logits float32[B] from dense float32[B, n_dense] and embeddings of float32[B, dim + 1]."""
        rows = self.rows(embeddings)
        weights, vectors = rows[:, :, 0], rows[:, :, 1:]
        crossed, deep = self.crossed(self.cross(vectors)), self.deep(self.flat(dense, vectors))
        logits = weights.sum(1) + (crossed + deep).squeeze(1)
        return logits if self.linear is None else logits + self.linear(self.signed_log(dense)).squeeze(1)
