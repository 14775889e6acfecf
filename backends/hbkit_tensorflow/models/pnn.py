"""PNN."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hbkit_tensorflow.layers import MLP, ProductLayer
from hbkit_tensorflow.models.common import ClickModel

__all__ = ["PNN"]


class PNN(ClickModel):
    """An MLP over the dense inputs, the vectors and the inner products of their pairs.

    Parameters
    ----------
    features : list of str
        Features of the collection, in the order of the product layer.
    dim : int
        Width of the vectors; tables have ``row_dim(dim)`` columns.
    n_dense : int
        Dense inputs.
    hidden : widths of the MLP's hidden layers

    Source: Qu et al., Product-based Neural Networks for User Response Prediction, ICDM 2016 (its IPNN).
    """

    def __init__(self, features: Sequence[str], dim: int, n_dense: int = 0, hidden: Sequence[int] = (128, 64)) -> None:
        super().__init__(features, dim, n_dense, "pnn")
        self.product = ProductLayer(name="product")
        self.deep = MLP([*hidden, 1], name="deep")
        self._make_weights()

    def call(self, dense: Any, embeddings: Mapping[str, Any]) -> Any:
        """Logits float32[B] from dense float32[B, n_dense] and embeddings of float32[B, dim]."""
        return self.deep(self.flat(dense, self.product(self.rows(embeddings))))[:, 0]
