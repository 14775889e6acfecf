"""Modules: embeddings over the core's tables, and the layers that the models are written from.

Every linear layer starts with Glorot-uniform weights, drawn from torch's generator, and zero bias.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hbkit import errors
from hbkit.embedding import Collection
from hbkit_torch.attach import attach
from hbkit_torch.data import to_column
from hbkit_torch.pipeline import gradients, leaves

__all__ = [
    "MLP",
    "CrossNetwork",
    "DotInteraction",
    "EmbeddingCollection",
    "FactorizationMachine",
    "SignedLog",
    "attach",
]


class EmbeddingCollection(torch.nn.Module):
    """A module over `hbkit.embedding.Collection`: a batch of keys in, one tensor of rows for each feature out.

    In training (train mode, gradients on) a forward creates the rows of new keys and gives leaf tensors; after
    ``loss.backward()``, ``apply()`` makes one fused update of every table. In eval mode or under ``torch.no_grad`` it
    only reads, and a key without a row gives zeros. The module has no parameters: the rows
    live in the tables, which `hbkit.snapshot` saves.

    Parameters
    ----------
    collection : hbkit.embedding.Collection
        Borrowed: closing the module leaves the tables open.

    Notes
    -----
    Not thread-safe. One forward is pending at a time: a forward whose ``apply`` did not come is dropped by the next
    one, without an update. The forward itself is no part of a compiled graph; the model behind it is.
    """

    def __init__(self, collection: Collection) -> None:
        super().__init__()
        self._collection = collection
        self._staged: Any = None
        self._embeddings: dict[str, Any] = {}
        self._closed = False

    @property
    def collection(self) -> Collection:
        """The core's collection.

        Raises
        ------
        Closed
            The module was closed.
        """
        if self._closed:
            raise errors.Closed(
                "the embedding collection is closed",
                feature=", ".join(self._collection.features),
                remedy="make a new EmbeddingCollection over the same tables",
            )
        return self._collection

    @torch.compiler.disable
    def forward(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Rows of a batch.

        Parameters
        ----------
        batch : dict
            A key column for each feature: integer Tensor or ndarray [n], `Jagged`, ``(values, row_splits)`` or
            `hbkit.Ragged`; other columns are ignored.

        Returns
        -------
        dict of feature to Tensor float32[n, dim]
            A ragged feature without pooling gives a `Sequence`.

        Raises
        ------
        UnknownColumn
            A feature is not in the batch.
        InvalidArgument
            A feature's keys are not integers, or not in host memory.
        Closed
            The module was closed.
        """
        self.drop()
        train = self.training and torch.is_grad_enabled()
        collection = self.collection
        columns = {f: to_column(batch[f], f) for f in collection.features if f in batch}
        staged = collection.stage(columns, train=train)
        try:
            staged.wait()
            embeddings = leaves(staged.outputs(), train)
        except BaseException:
            staged.close()
            raise
        if train:
            self._staged, self._embeddings = staged, embeddings
        else:
            staged.close()
        return embeddings

    def apply(self, fn: Callable[[torch.nn.Module], None] | None = None) -> EmbeddingCollection:
        """Update the tables by the gradients of the last forward; with ``fn``, `torch.nn.Module.apply`.

        A feature that the loss did not use has no gradient, and its rows stay as they are.

        Raises
        ------
        Closed
            There is no forward in train mode to apply, or no backward came after it.
        """
        if fn is not None:
            return super().apply(fn)
        if self._staged is None:
            raise errors.Closed(
                "there is no forward to apply",
                remedy="call the module in train mode, then backward(), then apply() once",
            )
        self._staged.apply(gradients(self._embeddings))
        self.drop()
        return self

    def drop(self) -> None:
        """Forget the pending forward, if any, without an update."""
        if self._staged is not None:
            self._staged.close()
        self._staged, self._embeddings = None, {}

    def close(self) -> None:
        """Drop the pending forward and refuse further ones; the tables stay open. Idempotent."""
        self.drop()
        self._closed = True


def linear(n_in: int, n_out: int, bias: bool = True) -> torch.nn.Linear:
    """A linear layer with Glorot-uniform weights and zero bias."""
    layer = torch.nn.Linear(n_in, n_out, bias=bias)
    torch.nn.init.xavier_uniform_(layer.weight)
    if bias:
        torch.nn.init.zeros_(layer.bias)
    return layer


class MLP(torch.nn.Sequential):
    """Linear layers with ReLU between them: [B, n_in] to [B, widths[-1]].

    Parameters
    ----------
    n_in : int
    widths : sequence of int
        Outputs of each layer.
    last_relu : bool
        Whether a ReLU follows the last layer too.
    """

    def __init__(self, n_in: int, widths: Sequence[int], last_relu: bool = False) -> None:
        layers: list[torch.nn.Module] = []
        for width in widths:
            layers += [linear(n_in, width), torch.nn.ReLU()]
            n_in = width
        super().__init__(*(layers if last_relu else layers[:-1]))


class SignedLog(torch.nn.Module):
    """sign(x) * log(1 + abs(x)): brings counts and amounts of any sign to a scale that a linear layer can use."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sign(x) * torch.log1p(torch.abs(x))


class DotInteraction(torch.nn.Module):
    """Dot product of each pair of features: [B, F, D] to [B, F (F - 1) / 2], pairs (1, 0), (2, 0), (2, 1), (3, 0), ...

    Source: Naumov et al., Deep Learning Recommendation Model for Personalization and Recommendation Systems, 2019.
    """

    def forward(self, x: Tensor) -> Tensor:
        n_features = x.shape[1]
        row, column = torch.tril_indices(n_features, n_features, -1, device=x.device)
        products = torch.bmm(x, x.transpose(1, 2)).flatten(1)
        return products.index_select(1, row * n_features + column)


class FactorizationMachine(torch.nn.Module):
    """Sum over all pairs of features of their dot product, in linear time: [B, F, D] to [B].

    Source: Rendle, Factorization Machines, ICDM 2010.
    """

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (x.sum(1).square() - x.square().sum(1)).sum(1)


class CrossNetwork(torch.nn.Module):
    """Explicit feature crosses of bounded degree, x[l+1] = x[0] * (W[l] x[l] + b[l]) + x[l]: [B, width] to [B, width].

    Source: Wang et al., DCN V2: Improved Deep & Cross Network, WWW 2021.
    """

    def __init__(self, width: int, n_layers: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(linear(width, width) for _ in range(n_layers))

    def forward(self, x: Tensor) -> Tensor:
        crossed = x
        for layer in self.layers:
            crossed = x * layer(crossed) + crossed
        return crossed
