"""Click models: ``model(dense, embeddings)`` gives logits, from dense inputs and one row for each feature.

Dense inputs pass `SignedLog` first. Linear layers start with Glorot-uniform weights and zero bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hbkit import errors
from hbkit_torch.nn import MLP, DotInteraction, FactorizationMachine, SignedLog, linear

__all__ = ["DLRM", "MODELS", "DeepFM"]


def stack(embeddings: Mapping[str, Tensor], features: Sequence[str], width: int) -> Tensor:
    """The features' rows in the model's order: [B, F, width]."""
    for feature in features:
        if feature not in embeddings:
            raise errors.UnknownColumn(
                "the model's feature has no table", feature=feature, remedy="name it in the collection's features"
            )
        rows = embeddings[feature]
        if not isinstance(rows, Tensor) or rows.ndim != 2:
            raise errors.InvalidArgument(
                "the model needs one row a feature, not a sequence", feature=feature, remedy="pool the feature"
            )
        if rows.shape[1] != width:
            raise errors.InvalidArgument(
                f"rows of width {rows.shape[1]} where the model needs {width}",
                feature=feature,
                remedy="give the table the model's row_dim(dim)",
            )
    return torch.stack([embeddings[feature] for feature in features], dim=1)


class DLRM(torch.nn.Module):
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
        super().__init__()
        self.features, self.dim, self.n_dense = list(features), dim, n_dense
        n_vectors = len(self.features) + (n_dense > 0)
        self.signed_log = SignedLog()
        self.bottom = MLP(n_dense, [*bottom, dim], last_relu=True) if n_dense else None
        self.interaction = DotInteraction()
        self.top = MLP(n_vectors * (n_vectors - 1) // 2 + dim * (n_dense > 0), [*top, 1])

    @staticmethod
    def row_dim(dim: int) -> int:
        """Columns a table needs: ``dim``."""
        return dim

    def forward(self, dense: Tensor, embeddings: Mapping[str, Tensor]) -> Tensor:
        """Logits float32[B] from dense float32[B, n_dense] and embeddings of float32[B, dim]."""
        x = stack(embeddings, self.features, self.dim)
        if self.bottom is None:
            return self.top(self.interaction(x)).squeeze(1)
        bottom = self.bottom(self.signed_log(dense))
        pairs = self.interaction(torch.cat([bottom.unsqueeze(1), x], dim=1))
        return self.top(torch.cat([bottom, pairs], dim=1)).squeeze(1)


class DeepFM(torch.nn.Module):
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
        super().__init__()
        self.features, self.dim, self.n_dense = list(features), dim, n_dense
        self.signed_log = SignedLog()
        self.linear = linear(n_dense, 1, bias=False) if n_dense else None  # the MLP has one
        self.machine = FactorizationMachine()
        self.deep = MLP(len(self.features) * dim + n_dense, [*hidden, 1])

    @staticmethod
    def row_dim(dim: int) -> int:
        """Columns a table needs: ``dim + 1``."""
        return dim + 1

    def forward(self, dense: Tensor, embeddings: Mapping[str, Tensor]) -> Tensor:
        """Logits float32[B] from dense float32[B, n_dense] and embeddings of float32[B, dim + 1]."""
        rows = stack(embeddings, self.features, self.dim + 1)
        weights, vectors = rows[:, :, 0], rows[:, :, 1:]
        logits = weights.sum(1) + self.machine(vectors)
        if self.linear is None:
            return logits + self.deep(vectors.flatten(1)).squeeze(1)
        x = self.signed_log(dense)
        deep = self.deep(torch.cat([x, vectors.flatten(1)], dim=1))
        return logits + self.linear(x).squeeze(1) + deep.squeeze(1)


MODELS: dict[str, type[DLRM] | type[DeepFM]] = {"dlrm": DLRM, "deepfm": DeepFM}
