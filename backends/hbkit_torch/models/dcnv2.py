"""DCNv2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hbkit_torch.layers import MLP, CrossNetwork
from hbkit_torch.models.common import ClickModel

__all__ = ["DCNv2"]


class DCNv2(ClickModel):
    """A cross network over all inputs, and an MLP on top of it (the paper's stacked structure).

    Parameters
    ----------
    features : list of str
        Features of the collection, in the order of the cross network's input.
    dim : int
        Width of the vectors; tables have ``row_dim(dim)`` columns.
    n_dense : int
        Dense inputs.
    n_cross : int
        Layers of the cross network.
    hidden : widths of the MLP's hidden layers

    Source: Wang et al., DCN V2: Improved Deep & Cross Network, WWW 2021.
    """

    def __init__(
        self,
        features: Sequence[str],
        dim: int,
        n_dense: int = 0,
        n_cross: int = 3,
        hidden: Sequence[int] = (128, 64),
    ) -> None:
        super().__init__(features, dim, n_dense)
        width = len(self.features) * dim + n_dense
        self.cross = CrossNetwork(width, n_cross)
        self.deep = MLP(width, [*hidden, 1])

    def forward(self, dense: Tensor, embeddings: Mapping[str, Any]) -> Tensor:
        """Logits float32[B] from dense float32[B, n_dense] and embeddings of float32[B, dim]."""
        return self.deep(self.cross(self.flat(dense, self.rows(embeddings)))).squeeze(1)
