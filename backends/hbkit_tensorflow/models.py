"""Click models: ``model(dense, embeddings)`` gives logits, from dense inputs and one row for each feature.

Dense inputs pass `SignedLog` first. Dense layers start with Glorot-uniform weights and zero bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from hbkit import errors
from hbkit_tensorflow.nn import MLP, DotInteraction, FactorizationMachine, SignedLog

__all__ = ["DLRM", "MODELS", "DeepFM"]


def stack(embeddings: Mapping[str, Any], features: Sequence[str], width: int) -> Any:
    """The features' rows in the model's order: [B, F, width]."""
    for feature in features:
        if feature not in embeddings:
            raise errors.UnknownColumn(
                "the model's feature has no table", feature=feature, remedy="name it in the collection's features"
            )
        rows = embeddings[feature]
        if isinstance(rows, tuple) or len(rows.shape) != 2:
            raise errors.InvalidArgument(
                "the model needs one row a feature, not a sequence", feature=feature, remedy="pool the feature"
            )
        if rows.shape[1] != width:
            raise errors.InvalidArgument(
                f"rows of width {rows.shape[1]} where the model needs {width}",
                feature=feature,
                remedy="give the table the model's row_dim(dim)",
            )
    return keras.ops.stack([embeddings[feature] for feature in features], axis=1)


class _ClickModel(keras.Model):
    """What the models share: their weights exist once they are made, so that saved ones can be loaded at once."""

    def __init__(self, features: Sequence[str], dim: int, n_dense: int, name: str) -> None:
        super().__init__(name=name)
        self.features, self.dim, self.n_dense = list(features), dim, n_dense
        self.signed_log = SignedLog(name="signed_log") if n_dense else None

    def _make_weights(self, width: int) -> None:
        self(keras.ops.zeros((1, self.n_dense)), {feature: keras.ops.zeros((1, width)) for feature in self.features})


class DLRM(_ClickModel):
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
        self._make_weights(self.row_dim(dim))

    @staticmethod
    def row_dim(dim: int) -> int:
        """Columns a table needs: ``dim``."""
        return dim

    def call(self, dense: Any, embeddings: Mapping[str, Any]) -> Any:
        """Logits float32[B] from dense float32[B, n_dense] and embeddings of float32[B, dim]."""
        x = stack(embeddings, self.features, self.dim)
        if self.bottom is None or self.signed_log is None:
            return self.top(self.interaction(x))[:, 0]
        bottom = self.bottom(self.signed_log(dense))
        pairs = self.interaction(keras.ops.concatenate([bottom[:, None], x], axis=1))
        return self.top(keras.ops.concatenate([bottom, pairs], axis=1))[:, 0]


class DeepFM(_ClickModel):
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
        self.linear = keras.layers.Dense(1, use_bias=False, name="linear") if n_dense else None
        self.machine = FactorizationMachine(name="machine")
        self.deep = MLP([*hidden, 1], name="deep")
        self._make_weights(self.row_dim(dim))

    @staticmethod
    def row_dim(dim: int) -> int:
        """Columns a table needs: ``dim + 1``."""
        return dim + 1

    def call(self, dense: Any, embeddings: Mapping[str, Any]) -> Any:
        """Logits float32[B] from dense float32[B, n_dense] and embeddings of float32[B, dim + 1]."""
        rows = stack(embeddings, self.features, self.dim + 1)
        weights, vectors = rows[:, :, 0], rows[:, :, 1:]
        logits = keras.ops.sum(weights, axis=1) + self.machine(vectors)
        flat = keras.ops.reshape(vectors, (-1, len(self.features) * self.dim))
        if self.linear is None or self.signed_log is None:
            return logits + self.deep(flat)[:, 0]
        x = self.signed_log(dense)
        deep = self.deep(keras.ops.concatenate([x, flat], axis=1))
        return logits + self.linear(x)[:, 0] + deep[:, 0]


MODELS: dict[str, type[DLRM] | type[DeepFM]] = {"dlrm": DLRM, "deepfm": DeepFM}
