"""MMoE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from hbkit_tensorflow.layers import MLP, MixtureOfExperts
from hbkit_tensorflow.models.common import ClickModel

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
        super().__init__(features, dim, n_dense, "mmoe")
        self.experts = MixtureOfExperts(n_tasks, n_experts, expert, name="experts")
        self.towers = [MLP([*tower, 1], name=f"tower_{i}") for i in range(n_tasks)]
        self._make_weights()

    def call(self, dense: Any, embeddings: Mapping[str, Any]) -> Any:
        """Logits float32[B, n_tasks], or [B] of one task, from dense float32[B, n_dense] and embeddings [B, dim]."""
        mixed = self.experts(self.flat(dense, self.rows(embeddings)))
        logits = keras.ops.concatenate([tower(mixed[:, i]) for i, tower in enumerate(self.towers)], axis=1)
        return logits if len(self.towers) > 1 else logits[:, 0]
