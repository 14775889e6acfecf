"""DLRM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hbkit_torch.layers import MLP, DotInteraction
from hbkit_torch.models.common import ClickModel

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
        super().__init__(features, dim, n_dense)
        n_vectors = len(self.features) + (n_dense > 0)
        self.bottom = MLP(n_dense, [*bottom, dim], last_relu=True) if n_dense else None
        self.interaction = DotInteraction()
        self.top = MLP(n_vectors * (n_vectors - 1) // 2 + dim * (n_dense > 0), [*top, 1])

    def forward(self, dense: Tensor, embeddings: Mapping[str, Any]) -> Tensor:
        """Logits float32[B] from dense float32[B, n_dense] and embeddings of float32[B, dim]."""
        x = self.rows(embeddings)
        if self.bottom is None:
            return self.top(self.interaction(x)).squeeze(1)
        bottom = self.bottom(self.signed_log(dense))
        pairs = self.interaction(torch.cat([bottom.unsqueeze(1), x], dim=1))
        return self.top(torch.cat([bottom, pairs], dim=1)).squeeze(1)
