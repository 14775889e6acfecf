"""Optimizers of embedding rows: which kernel, its hyper-parameters, and the state it keeps beside each row.

Only rows whose keys a batch touched change. Defaults follow PyTorch's optimizers (RowWiseAdagrad and RowWiseAdam follow
FBGEMM's, Ftrl Keras', AdagradDecay DeepRec's); where Keras does something else, an argument says so. The order of
operations of each rule is in ``_ext/kernels.c``.

Before its rule an update clips the summed gradient by value, then by the norm of the row, then adds the weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

import numpy as np

from hbkit._ext import slabs as _ext
from hbkit.errors import InvalidArgument
from hbkit.store.line import Float32s

__all__ = [
    "SGD",
    "Adagrad",
    "AdagradDecay",
    "Adam",
    "AdamW",
    "Cosine",
    "Exponential",
    "Ftrl",
    "Optimizer",
    "RowWiseAdagrad",
    "RowWiseAdam",
    "Schedule",
    "Warmup",
]

N_OWN = 8  # hyper-parameters of a rule itself, before those that all rules take
N_HYPER = 12

# --- learning rates ------------------------------------------------------------------------------------------

LearningRate: TypeAlias = "float | Callable[[int], float]"


def _rate(lr: LearningRate, step: int) -> float:
    value = float(lr(step)) if callable(lr) else lr
    if not (value >= 0 and math.isfinite(value)):
        raise InvalidArgument(f"learning rate {value} at step {step}", remedy="give a schedule of rates >= 0")
    return value


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise InvalidArgument(f"{name}={value}", remedy=f"give a positive {name}")


@dataclass(frozen=True)
class Schedule:
    """Base of the learning rates that change: call one with the number of an update, from 1.

    An optimizer's `lr` may be any function of that number; these can also be written into a snapshot's manifest.
    """

    def __call__(self, step: int) -> float:
        """The rate of update number `step`."""
        raise InvalidArgument("Schedule is abstract", remedy="use Warmup, Cosine or Exponential")


@dataclass(frozen=True)
class Warmup(Schedule):
    """Rises evenly over the first `steps` updates to what `lr` gives, a rate or a schedule that begins after them."""

    lr: LearningRate
    steps: int

    def __call__(self, step: int) -> float:
        """The rate of update number `step`."""
        if step < self.steps:
            return _rate(self.lr, 1) * step / self.steps
        return _rate(self.lr, max(step - self.steps, 1))


@dataclass(frozen=True)
class Cosine(Schedule):
    """Falls from `lr` to `floor` along half a cosine within `steps` updates, and stays there."""

    lr: float
    steps: int
    floor: float = 0.0

    def __call__(self, step: int) -> float:
        """The rate of update number `step`."""
        done = min((step - 1) / self.steps, 1.0)
        return self.floor + (self.lr - self.floor) * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class Exponential(Schedule):
    """`lr` times `rate` for every `steps` updates gone by; in whole ones only, if `staircase`."""

    lr: float
    rate: float
    steps: int = 1
    staircase: bool = False

    def __call__(self, step: int) -> float:
        """The rate of update number `step`."""
        times = (step - 1) / self.steps
        return float(self.lr * self.rate ** (math.floor(times) if self.staircase else times))


# --- rules ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Optimizer:
    """Base of the optimizers.

    Parameters
    ----------
    lr : float or callable
        Learning rate, > 0; or a function of the update's number (from 1), such as a `Schedule`.
    weight_decay : float
        Added to the gradient, times the row (L2), as in PyTorch. AdamW and RowWiseAdam shrink the row instead.
    clip_value, clip_norm : float, optional
        Most that an element of the summed gradient, or the length of a row of it, may be.
    """

    code: ClassVar[int]
    lr: LearningRate
    weight_decay: float = field(default=0.0, kw_only=True)
    clip_value: float | None = field(default=None, kw_only=True)
    clip_norm: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not callable(self.lr):
            _positive(lr=self.lr)
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise InvalidArgument(f"weight_decay={self.weight_decay}", remedy="give a weight_decay >= 0")
        for name in ("clip_value", "clip_norm"):
            if (value := getattr(self, name)) is not None:
                _positive(**{name: value})

    def n_state(self, dim: int) -> int:
        """Floats of state beside a row of `dim`."""
        return len(self.initial_state(dim))

    def initial_state(self, dim: int) -> Float32s:
        """float32[n_state] of a new row."""
        return np.zeros(_ext.n_state(self.code, dim), np.float32)

    def hyper(self, step: int) -> Float32s:
        """Hyper-parameters of update number `step` (from 1) as the kernel takes them: float32[12]."""
        return self._pack(step)

    def _pack(self, step: int, *own: float, lr: float | None = None, decay: float | None = None) -> Float32s:
        out = np.zeros(N_HYPER, np.float32)
        out[: 1 + len(own)] = _rate(self.lr, step) if lr is None else lr, *own
        out[N_OWN : N_OWN + 3] = (
            self.weight_decay if decay is None else decay,
            self.clip_value or 0.0,
            self.clip_norm or 0.0,
        )
        return out


@dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent; with momentum (Nesterov's, if wanted), one more float a column.

    Momentum sums gradients, as PyTorch's. Keras sums gradients times the rate, which differs when the rate changes.
    """

    code: ClassVar[int] = 0
    lr: LearningRate = 0.01
    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1 or (self.nesterov and not self.momentum):
            raise InvalidArgument(
                f"momentum={self.momentum} with nesterov={self.nesterov}",
                remedy="give a momentum in [0, 1); Nesterov's is above 0",
            )

    def initial_state(self, dim: int) -> Float32s:
        """Momentum, where it is used."""
        return np.zeros(dim if self.momentum else 0, np.float32)

    def hyper(self, step: int) -> Float32s:
        """lr, momentum, 1 for Nesterov's."""
        return self._pack(step, self.momentum, self.nesterov)


@dataclass(frozen=True)
class Adagrad(Optimizer):
    """Adagrad: one sum of squared gradients a column (Duchi et al., JMLR 2011).

    Parameters
    ----------
    lr_decay : float
        The rate is divided by 1 + lr_decay * (updates before this one).
    keras_eps : bool
        Divide by sqrt(sum + eps), as Keras does, not by sqrt(sum) + eps. Keras' defaults are eps=1e-7 and
        initial_accumulator=0.1.
    """

    code: ClassVar[int] = 1
    lr: LearningRate = 0.01
    eps: float = 1e-10
    initial_accumulator: float = 0.0
    lr_decay: float = field(default=0.0, kw_only=True)
    keras_eps: bool = field(default=False, kw_only=True)

    def initial_state(self, dim: int) -> Float32s:
        """Sum of squares."""
        return np.full(dim, self.initial_accumulator, np.float32)

    def hyper(self, step: int) -> Float32s:
        """lr, eps beside the root, eps under it."""
        lr = _rate(self.lr, step) / (1 + (max(step, 1) - 1) * self.lr_decay)
        return self._pack(step, *((0.0, self.eps) if self.keras_eps else (self.eps, 0.0)), lr=lr)


@dataclass(frozen=True)
class RowWiseAdagrad(Adagrad):
    """Adagrad with one sum a row, of the mean squared gradient: as FBGEMM's exact row-wise Adagrad."""

    code: ClassVar[int] = 2
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keras_eps:
            raise InvalidArgument(
                "keras_eps=True", remedy="Keras has no row-wise Adagrad; FBGEMM's eps is beside the root"
            )

    def initial_state(self, dim: int) -> Float32s:
        """Sum of mean squares, one float."""
        return np.full(1, self.initial_accumulator, np.float32)


@dataclass(frozen=True)
class AdagradDecay(Optimizer):
    """Adagrad whose sums are multiplied by `decay_rate` every `decay_steps` updates, as DeepRec's.

    A row makes up for one decay at each of its own updates until it has had as many as are due; a decayed sum is at
    least `initial_accumulator`. There is no eps. One float more than Adagrad a row.
    """

    code: ClassVar[int] = 6
    lr: LearningRate = 0.01
    initial_accumulator: float = 0.1
    decay_steps: int = 100_000
    decay_rate: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(initial_accumulator=self.initial_accumulator, decay_steps=self.decay_steps)
        if not 0 < self.decay_rate < 1:
            raise InvalidArgument(f"decay_rate={self.decay_rate}", remedy="give a decay_rate between 0 and 1")

    def initial_state(self, dim: int) -> Float32s:
        """Sum of squares, and the decays it had."""
        return np.append(np.full(dim, self.initial_accumulator), 0).astype(np.float32)

    def hyper(self, step: int) -> Float32s:
        """lr, decays due, decay_rate, least sum."""
        return self._pack(step, step // self.decay_steps, self.decay_rate, self.initial_accumulator)


@dataclass(frozen=True)
class Adam(Optimizer):
    """Adam on the touched rows.

    Parameters
    ----------
    correction : "table" or "row"
        What the moments' bias correction counts: updates of the table, as torch.optim.SparseAdam and Keras do
        ("table"; a row first touched late is corrected little, so its first updates are small); or updates of the
        row itself ("row", one more float a row), by which a row is treated alike whenever it comes.
    keras_eps : bool
        Add eps to the root before its bias correction, as Keras does. Keras' default is eps=1e-7.
    """

    code: ClassVar[int] = 3
    lr: LearningRate = 0.001
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    correction: str = field(default="table", kw_only=True)
    keras_eps: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 <= b < 1 for b in self.betas) or self.correction not in ("table", "row"):
            raise InvalidArgument(
                f"betas={self.betas}, correction={self.correction!r}",
                remedy="give betas in [0, 1), and 'table' or 'row'",
            )
        if self.correction == "row":
            object.__setattr__(self, "code", 7)

    def hyper(self, step: int) -> Float32s:
        """lr / (1 - beta1^t), 1 - beta1, beta2, 1 - beta2, sqrt(1 - beta2^t), eps, kept share of the row."""
        b1, b2 = self.betas
        t, lr = max(step, 1), _rate(self.lr, step)
        kept = 1.0 - lr * self.weight_decay if self._decoupled else 1.0
        decay = 0.0 if self._decoupled else None
        if self.code == 7:
            return self._pack(step, 1 - b1, b2, 1 - b2, self.keras_eps, self.eps, kept, lr=lr, decay=decay)
        root = math.sqrt(1 - b2**t)
        eps = self.eps / root if self.keras_eps else self.eps
        return self._pack(step, 1 - b1, b2, 1 - b2, root, eps, kept, lr=lr / (1 - b1**t), decay=decay)

    _decoupled: ClassVar[bool] = False


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay on the touched rows (Loshchilov and Hutter, ICLR 2019)."""

    weight_decay: float = field(default=0.01, kw_only=True)
    _decoupled: ClassVar[bool] = True


@dataclass(frozen=True)
class RowWiseAdam(Adam):
    """Adam whose second moment is one float a row, of the mean squared gradient (FBGEMM's partial row-wise Adam).

    Weight decay shrinks the row, as FBGEMM's does.
    """

    code: ClassVar[int] = 4
    _decoupled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.correction != "table":
            raise InvalidArgument(f"correction={self.correction!r}", remedy="RowWiseAdam counts the table's updates")


@dataclass(frozen=True)
class Ftrl(Optimizer):
    """Follow the regularised leader with L1 and L2 (McMahan et al., KDD 2013), learning-rate power -1/2."""

    code: ClassVar[int] = 5
    lr: LearningRate = 0.001
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
        lr = _rate(self.lr, step)
        if lr == 0:
            raise InvalidArgument(f"learning rate 0 at step {step}", remedy="Ftrl divides by it: keep it above 0")
        return self._pack(step, self.l1, 2 * self.l2 + self.beta / lr, lr=lr)
