"""DeepFM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from hbkit_tensorflow.layers import MLP, FactorizationMachine
from hbkit_tensorflow.models.common import ClickModel

__all__ = ["DeepFM"]


class DeepFM(ClickModel):
    """A linear model, a factorization machine and an MLP over the same rows, summed.

    Column 0 of a row is the key's linear weight and the rest its vector, so one lookup serves all three parts.

    Parameters
    ----------
    features : list of str
        Features of the collection, in the order of the MLP's input.
    dim : int
        Width of the vectors; tables have ``row_dim(dim)`` columns.
    n_dense : int
        Dense inputs, which the linear part and the MLP see.
    hidden : widths of the MLP's hidden layers

    Source: Guo et al., DeepFM: A Factorization-Machine based Neural Network for CTR Prediction, IJCAI 2017.
    """

    def __init__(self, features: Sequence[str], dim: int, n_dense: int = 0, hidden: Sequence[int] = (128, 64)) -> None:
        super().__init__(features, dim, n_dense, "deepfm")
        self.linear = keras.layers.Dense(1, use_bias=False, name="linear") if n_dense else None  # the MLP has one
        self.machine = FactorizationMachine(name="machine")
        self.deep = MLP([*hidden, 1], name="deep")
        self._make_weights()

    @staticmethod
    def row_dim(dim: int) -> int:
        """Columns a table needs: ``dim + 1``."""
        return dim + 1

    def call(self, dense: Any, embeddings: Mapping[str, Any]) -> Any:
        """Logits float32[B] from dense float32[B, n_dense] and embeddings of float32[B, dim + 1]."""
        rows = self.rows(embeddings)
        weights, vectors = rows[:, :, 0], rows[:, :, 1:]
        logits = keras.ops.sum(weights, axis=1) + self.machine(vectors) + self.deep(self.flat(dense, vectors))[:, 0]
        return logits if self.linear is None else logits + self.linear(self.signed_log(dense))[:, 0]
