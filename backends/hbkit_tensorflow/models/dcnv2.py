"""DCNv2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hbkit_tensorflow.layers import MLP, CrossNetwork
from hbkit_tensorflow.models.common import ClickModel

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
        super().__init__(features, dim, n_dense, "dcnv2")
        self.cross = CrossNetwork(len(self.features) * dim + n_dense, n_cross, name="cross")
        self.deep = MLP([*hidden, 1], name="deep")
        self._make_weights()

    def call(self, dense: Any, embeddings: Mapping[str, Any]) -> Any:
        """Logits float32[B] from dense float32[B, n_dense] and embeddings of float32[B, dim]."""
        return self.deep(self.cross(self.flat(dense, self.rows(embeddings))))[:, 0]
