"""MMoE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hbkit_torch.layers import MLP, MixtureOfExperts
from hbkit_torch.models.common import ClickModel

__all__ = ["MMoE"]


class MMoE(ClickModel):
    """Several labels at once: shared experts, and for each label a gate over them and a tower on top.

    Parameters
    ----------
    features : list of str
        Features of the collection, in the order of the experts' input.
    dim : int
        Width of the vectors; tables have ``row_dim(dim)`` columns.
    n_dense : int
        Dense inputs.
    n_tasks : int
        Labels.
    n_experts : int
    expert, tower : widths of an expert's layers, and of a tower's hidden layers

    Source: Ma et al., Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts, KDD 2018.
    """

    def __init__(
        self,
        features: Sequence[str],
        dim: int,
        n_dense: int = 0,
        n_tasks: int = 1,
        n_experts: int = 4,
        expert: Sequence[int] = (128, 64),
        tower: Sequence[int] = (32,),
    ) -> None:
        super().__init__(features, dim, n_dense)
        self.experts = MixtureOfExperts(len(self.features) * dim + n_dense, n_tasks, n_experts, expert)
        self.towers = torch.nn.ModuleList(MLP(expert[-1], [*tower, 1]) for _ in range(n_tasks))

    def forward(self, dense: Tensor, embeddings: Mapping[str, Any]) -> Tensor:
        """Logits float32[B, n_tasks], or [B] of one task, from dense float32[B, n_dense] and embeddings [B, dim]."""
        mixed = self.experts(self.flat(dense, self.rows(embeddings)))
        logits = torch.cat([tower(mixed[:, i]) for i, tower in enumerate(self.towers)], dim=1)
        return logits if len(self.towers) > 1 else logits.squeeze(1)
