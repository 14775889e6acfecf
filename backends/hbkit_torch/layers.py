"""Layers that the models are written from.

Every linear layer starts with Glorot-uniform weights, drawn from torch's generator, and zero bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

__all__ = [
    "MLP",
    "CompressedInteraction",
    "CrossNetwork",
    "Dice",
    "DotInteraction",
    "FactorizationMachine",
    "MixtureOfExperts",
    "ProductLayer",
    "SignedLog",
    "TargetAttention",
]

MOMENTUM = 0.1  # of the last batch, among the moments that `Dice` keeps


def linear(n_in: int, n_out: int, bias: bool = True) -> torch.nn.Linear:
    """A linear layer with Glorot-uniform weights and zero bias."""
    layer = torch.nn.Linear(n_in, n_out, bias=bias)
    torch.nn.init.xavier_uniform_(layer.weight)
    if bias:
        torch.nn.init.zeros_(layer.bias)
    return layer


class Dice(torch.nn.Module):
    """x by its gate p, else slope * x by 1 - p: p is the sigmoid of x as it stands among its column's values.

    p = sigmoid((x - mean) / sqrt(var + 1e-8)); the slopes are learned, 0 at first. When training, mean and variance are
    those of the batch's valid elements; else those of the last batches, an element's output depends on nothing but it.

    Parameters
    ----------
    width : int
        Columns of the last axis.

    Source: Zhou et al., Deep Interest Network for Click-Through Rate Prediction, KDD 2018.
    """

    moments: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.slope = torch.nn.Parameter(torch.zeros(width))
        self.register_buffer("moments", torch.zeros(3, width))  # mean, variance, and their weight: 1 in the end

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """float32[..., width] to the same shape; `valid`, bool[...], says what counts."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # under autocast too: sums
        if self.training:
            weight = torch.ones_like(x[..., :1]) if valid is None else valid.unsqueeze(-1).to(x.dtype)
            axes, n = tuple(range(x.ndim - 1)), weight.sum()
            mean = (x * weight).sum(axes) / n.clamp_min(1)
            var = ((x - mean).square() * weight).sum(axes) / n.clamp_min(1)
            with torch.no_grad():
                last = torch.stack([mean, var, torch.ones_like(mean)]).to(self.moments.dtype)
                self.moments.lerp_(last, MOMENTUM * (n > 0))
        else:
            mean, var = self.moments[:2] / self.moments[2].clamp_min(torch.finfo(torch.float32).tiny)
        p = torch.sigmoid((x - mean) * torch.rsqrt(var + 1e-8))
        return x * (p + (1 - p) * self.slope)


class MLP(torch.nn.Sequential):
    """Linear layers with ReLU between them: [..., n_in] to [..., widths[-1]].

    Parameters
    ----------
    n_in : int
    widths : sequence of int
        Outputs of each layer.
    last_relu : bool
        Whether a ReLU follows the last layer too.
    dice : bool
        Whether `Dice` takes the place of each ReLU.
    """

    def __init__(self, n_in: int, widths: Sequence[int], last_relu: bool = False, dice: bool = False) -> None:
        layers: list[torch.nn.Module] = []
        for width in widths:
            layers += [linear(n_in, width), Dice(width) if dice else torch.nn.ReLU()]
            n_in = width
        super().__init__(*(layers if last_relu else layers[:-1]))

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """float32[..., n_in] to float32[..., widths[-1]]; `valid`, bool[...], for `Dice`."""
        for layer in self:
            x = layer(x, valid) if isinstance(layer, Dice) else layer(x)
        return x


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


class ProductLayer(torch.nn.Module):
    """The vectors side by side, then the inner product of each pair: [B, F, D] to [B, F D + F (F - 1) / 2].

    The weights that the paper gives these two signals, and its bias, are those of the linear layer that follows. Pairs
    of a vector with itself are left out.

    Source: Qu et al., Product-based Neural Networks for User Response Prediction, ICDM 2016 (its inner product).
    """

    def __init__(self) -> None:
        super().__init__()
        self.interaction = DotInteraction()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.flatten(1), self.interaction(x)], dim=1)


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


class CompressedInteraction(torch.nn.Module):
    """xDeepFM's CIN, crosses of whole vectors: [B, F, D] to [B, sum(widths)].

    Layer l mixes the elementwise products of each of its input's vectors with each of the F vectors into ``widths[l]``
    vectors, x[l][h] = sum over i, j of W[l][h, i, j] x[l-1][i] * x[0][j], linearly; their sums over D are the output.

    Notes
    -----
    A step holds B * D * F * widths[l - 1] floats for each layer.

    Source: Lian et al., xDeepFM: Combining Explicit and Implicit Feature Interactions, KDD 2018.
    """

    def __init__(self, n_features: int, widths: Sequence[int]) -> None:
        super().__init__()
        sizes = pairwise([n_features, *widths])
        self.layers = torch.nn.ModuleList(linear(n_in * n_features, n_out, bias=False) for n_in, n_out in sizes)

    def forward(self, x: Tensor) -> Tensor:
        first = crossed = x.transpose(1, 2)  # [B, D, F]: the layers mix the last axis
        sums = []
        for layer in self.layers:
            crossed = layer((crossed.unsqueeze(3) * first.unsqueeze(2)).flatten(2))
            sums.append(crossed.sum(1))
        return torch.cat(sums, dim=1)


class MixtureOfExperts(torch.nn.Module):
    """Experts that all tasks share, mixed by a gate for each task: [B, n_in] to [B, n_tasks, widths[-1]].

    An expert is an `MLP` of these widths with a last ReLU; a gate is the softmax of a linear layer without bias.

    Source: Ma et al., Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts, KDD 2018.
    """

    def __init__(self, n_in: int, n_tasks: int, n_experts: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(MLP(n_in, widths, last_relu=True) for _ in range(n_experts))
        self.gates = torch.nn.ModuleList(linear(n_in, n_experts, bias=False) for _ in range(n_tasks))

    def forward(self, x: Tensor) -> Tensor:
        experts = torch.stack([expert(x) for expert in self.experts], dim=1)  # [B, n_experts, width]
        gates = torch.stack([gate(x).softmax(1) for gate in self.gates], dim=1)  # [B, n_tasks, n_experts]
        return torch.bmm(gates, experts)


class TargetAttention(torch.nn.Module):
    """DIN's pooling: a sum of the sequence's vectors, each weighed by how it goes with the target.

    target [B, D], values [B, L, D] and mask bool[B, L] to [B, D]. The weight is an `MLP` with `Dice` of target, value,
    their difference and their product; as in the paper, the weights of a row need not sum to 1, and a row without keys
    gives zeros.

    Source: Zhou et al., Deep Interest Network for Click-Through Rate Prediction, KDD 2018.
    """

    def __init__(self, dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.score = MLP(4 * dim, [*hidden, 1], dice=True)

    def forward(self, target: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        target = target.unsqueeze(1).expand_as(values)
        score = self.score(torch.cat([target, values, target - values, target * values], dim=2), mask)
        return torch.where(mask.unsqueeze(2), score * values, 0.0).sum(1)
