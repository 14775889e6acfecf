"""Optimizers of embedding rows: which kernel, its hyper-parameters, and the state it keeps beside each row.

Only rows whose keys a batch touched change. Defaults follow PyTorch's optimizers (RowWiseAdagrad follows FBGEMM's,
Ftrl follows Keras'). The order of operations of each rule is in ``_ext/kernels.c``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hbkit.errors import InvalidArgument
from hbkit.store.base import Float32s

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "Ftrl", "Optimizer", "RowWiseAdagrad", "RowWiseAdam"]

N_HYPER = 8


@dataclass(frozen=True)
class Optimizer:
    """Base of the optimizers.

    Parameters
    ----------
    lr : float
        Learning rate, > 0.
    """

    code: ClassVar[int]
    lr: float

    def __post_init__(self) -> None:
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise InvalidArgument(f"lr={self.lr}", remedy="give a positive learning rate")

    def n_state(self, dim: int) -> int:
        """Floats of state beside a row of `dim`."""
        return len(self.initial_state(dim))

    def initial_state(self, dim: int) -> Float32s:
        """float32[n_state] of a new row."""
        return np.zeros(0, np.float32)

    def hyper(self, step: int) -> Float32s:
        """Hyper-parameters of update number `step` (from 1) as the kernel takes them: float32[8]."""
        return _pack(self.lr)


def _pack(*values: float) -> Float32s:
    out = np.zeros(N_HYPER, np.float32)
    out[: len(values)] = values
    return out


@dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent; with momentum, one more float a column."""

    code: ClassVar[int] = 0
    lr: float = 0.01
    momentum: float = 0.0

    def initial_state(self, dim: int) -> Float32s:
        """Momentum, where it is used."""
        return np.zeros(dim if self.momentum else 0, np.float32)

    def hyper(self, step: int) -> Float32s:
        """lr, momentum."""
        return _pack(self.lr, self.momentum)


@dataclass(frozen=True)
class Adagrad(Optimizer):
    """Adagrad: one sum of squared gradients a column (Duchi et al., JMLR 2011)."""

    code: ClassVar[int] = 1
    lr: float = 0.01
    eps: float = 1e-10
    initial_accumulator: float = 0.0

    def initial_state(self, dim: int) -> Float32s:
        """Sum of squares."""
        return np.full(dim, self.initial_accumulator, np.float32)

    def hyper(self, step: int) -> Float32s:
        """lr, eps."""
        return _pack(self.lr, self.eps)


@dataclass(frozen=True)
class RowWiseAdagrad(Adagrad):
    """Adagrad with one sum a row, of the mean squared gradient: as FBGEMM's exact row-wise Adagrad."""

    code: ClassVar[int] = 2
    eps: float = 1e-8

    def initial_state(self, dim: int) -> Float32s:
        """Sum of mean squares, one float."""
        return np.full(1, self.initial_accumulator, np.float32)


@dataclass(frozen=True)
class Adam(Optimizer):
    """Adam on the touched rows, bias-corrected by the table's step as torch.optim.SparseAdam does."""

    code: ClassVar[int] = 3
    lr: float = 0.001
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def initial_state(self, dim: int) -> Float32s:
        """First and second moments."""
        return np.zeros(2 * dim, np.float32)

    def hyper(self, step: int) -> Float32s:
        """lr / (1 - beta1^t), 1 - beta1, beta2, 1 - beta2, sqrt(1 - beta2^t), eps, kept share of the row."""
        b1, b2 = self.betas
        t = max(step, 1)
        return _pack(self.lr / (1 - b1**t), 1 - b1, b2, 1 - b2, math.sqrt(1 - b2**t), self.eps, self._kept())

    def _kept(self) -> float:
        return 1.0


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay on the touched rows (Loshchilov and Hutter, ICLR 2019)."""

    weight_decay: float = 0.01

    def _kept(self) -> float:
        return 1.0 - self.lr * self.weight_decay


@dataclass(frozen=True)
class RowWiseAdam(Adam):
    """Adam whose second moment is one float a row, of the mean squared gradient (FBGEMM's partial row-wise Adam)."""

    code: ClassVar[int] = 4

    def initial_state(self, dim: int) -> Float32s:
        """First moments, and one second moment."""
        return np.zeros(dim + 1, np.float32)


@dataclass(frozen=True)
class Ftrl(Optimizer):
    """Follow the regularised leader with L1 and L2 (McMahan et al., KDD 2013), learning-rate power -1/2."""

    code: ClassVar[int] = 5
    lr: float = 0.001
    l1: float = 0.0
    l2: float = 0.0
    beta: float = 0.0
    initial_accumulator: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.initial_accumulator <= 0 and self.beta <= 0 and self.l2 <= 0:
            raise InvalidArgument(
                "Ftrl would divide by zero at a zero gradient", remedy="give initial_accumulator, beta or l2 above 0"
            )

    def initial_state(self, dim: int) -> Float32s:
        """Linear terms, then sums of squares."""
        return np.concatenate([np.zeros(dim), np.full(dim, self.initial_accumulator)]).astype(np.float32)

    def hyper(self, step: int) -> Float32s:
        """lr, l1, 2 l2 + beta / lr."""
        return _pack(self.lr, self.l1, 2 * self.l2 + self.beta / self.lr)
