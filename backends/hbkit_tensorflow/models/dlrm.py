"""DLRM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from hbkit_tensorflow.layers import MLP, DotInteraction
from hbkit_tensorflow.models.common import ClickModel

__all__ = ["DLRM"]


class DLRM(ClickModel):
    """Dot products of all pairs of features, and of a bottom MLP's view of the dense inputs, under a top MLP.

    Parameters
    ----------
    features : list of str
        Features of the collection, in the order of the interaction.
    dim : int
        Width of the interaction; tables have ``row_dim(dim)`` columns.
    n_dense : int
        Dense inputs; 0 leaves the bottom MLP out.
    bottom, top : widths of the hidden layers

    Source: Naumov et al., Deep Learning Recommendation Model for Personalization and Recommendation Systems, 2019.
    """

    def __init__(
        self,
        features: Sequence[str],
        dim: int,
        n_dense: int = 0,
        bottom: Sequence[int] = (64,),
        top: Sequence[int] = (128, 64),
    ) -> None:
        super().__init__(features, dim, n_dense, "dlrm")
        self.bottom = MLP([*bottom, dim], last_relu=True, name="bottom") if n_dense else None
        self.interaction = DotInteraction(name="interaction")
        self.top = MLP([*top, 1], name="top")
        self._make_weights()

    def call(self, dense: Any, embeddings: Mapping[str, Any]) -> Any:
        """Logits float32[B] from dense float32[B, n_dense] and embeddings of float32[B, dim]."""
        x = self.rows(embeddings)
        if self.bottom is None:
            return self.top(self.interaction(x))[:, 0]
        bottom = self.bottom(self.signed_log(dense))
        pairs = self.interaction(keras.ops.concatenate([bottom[:, None], x], axis=1))
        return self.top(keras.ops.concatenate([bottom, pairs], axis=1))[:, 0]
