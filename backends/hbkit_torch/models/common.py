"""What the click models share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hbkit import errors
from hbkit_torch.layers import SignedLog

__all__ = ["ClickModel"]

SIDE_BY_SIDE = "*"  # name of a collection's output


class ClickModel(torch.nn.Module):
    """A model called with dense inputs and embeddings: what it takes of both.

    Parameters
    ----------
    features : list of str
        Features of the collection with one row each, in the model's order.
    dim : int
        Width of the vectors; tables have ``row_dim(dim)`` columns.
    n_dense : int
        Dense inputs, which pass `SignedLog` first.
    """

    def __init__(self, features: Sequence[str], dim: int, n_dense: int) -> None:
        super().__init__()
        self.features, self.dim, self.n_dense = list(features), dim, n_dense
        self.signed_log = SignedLog()

    @staticmethod
    def row_dim(dim: int) -> int:
        """Columns a table needs: ``dim``."""
        return dim

    @staticmethod
    def stack(features: Sequence[str]) -> dict[str, list[str]]:
        """The collection's ``stack`` for a model of these features: it takes their rows as they then come, uncopied."""
        return {SIDE_BY_SIDE: list(features)}

    def rows(self, embeddings: Mapping[str, Any]) -> Tensor:
        """The features' rows in the model's order: [B, F, row_dim]."""
        if SIDE_BY_SIDE in embeddings:
            return self._checked(embeddings[SIDE_BY_SIDE])
        found = [embedding(embeddings, feature, self.row_dim(self.dim)) for feature in self.features]
        return torch.stack(found, dim=1)

    def _checked(self, rows: Tensor) -> Tensor:
        found, need = tuple(rows.shape[1:]), (len(self.features), self.row_dim(self.dim))
        if found != need:
            raise errors.InvalidArgument(
                f"a stack of {found[0]} features of width {found[1]} where the model needs {need[0]} of {need[1]}",
                remedy="give the collection stack=Model.stack(features), and its tables the model's row_dim(dim)",
            )
        return rows

    def flat(self, dense: Tensor, *x: Tensor) -> Tensor:
        """The dense inputs' logarithms and all of x, flattened, side by side: [B, n]."""
        logs = [self.signed_log(dense)] if self.n_dense else []
        return torch.cat([*logs, *(part.flatten(1) for part in x)], dim=1)


def embedding(embeddings: Mapping[str, Any], feature: str, width: int, sequence: bool = False) -> Any:
    """The feature's rows, [B, width], or its `Sequence` of that width.

    Raises
    ------
    UnknownColumn
        It is not there.
    InvalidArgument
        It is of the other kind, or of another width.
    """
    if feature not in embeddings:
        raise errors.UnknownColumn(
            "the model's feature has no table", feature=feature, remedy="name it in the collection's features"
        )
    rows = embeddings[feature]
    if (isinstance(rows, tuple) or rows.ndim != 2) != sequence:
        raise errors.InvalidArgument(
            "the model needs a sequence, not one row"
            if sequence
            else "the model needs one row a feature, not a sequence",
            feature=feature,
            remedy="leave the feature unpooled" if sequence else "pool the feature",
        )
    found = (rows.values if sequence else rows).shape[-1]
    if found != width:
        raise errors.InvalidArgument(
            f"rows of width {found} where the model needs {width}",
            feature=feature,
            remedy="give the table the model's row_dim(dim)",
        )
    return rows
