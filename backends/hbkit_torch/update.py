"""From the gradients of forwards to one update of the tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hbkit import errors
from hbkit.embedding import Staged
from hbkit_torch.data import Array
from hbkit_torch.transfer import in_order, place_of, to_host

__all__ = ["Forward", "Updating"]


class Forward(NamedTuple):
    """A batch that was read, and the tensors that the model saw of it.

    Attributes
    ----------
    staged : Staged
    embeddings : dict of feature to leaf Tensor or `Sequence`
    """

    staged: Staged
    embeddings: Mapping[str, Any]

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What takes gradients: the tensor of each feature, the values of a sequence."""
        return {f: value if isinstance(value, Tensor) else value.values for f, value in self.embeddings.items()}

    def check(self) -> None:
        """Raise Closed where something takes gradients and nothing has one."""
        if self.embeddings and all(leaf.grad is None for leaf in self.leaves.values()):
            raise errors.Closed(
                "no embedding has a gradient", feature=", ".join(self.embeddings), remedy="call loss.backward() first"
            )

    def gradients(self) -> dict[str, Array | Tensor]:
        """Gradients of the leaves that have one, as `as_core` gives them."""
        return as_core(self.staged, {f: leaf.grad for f, leaf in self.leaves.items() if leaf.grad is not None})


def as_core(staged: Staged, grads: Mapping[str, Tensor]) -> dict[str, Array | Tensor]:
    """Gradients as a batch takes them, float32: those on the device of their tables stay there; others as NumPy's.

    The latter are over the same memory, or come from a device in one copy.
    """
    places = {f: place_of(staged.collection.device(f)) for f in grads}
    there = {f: grad.detach().float().contiguous() for f, grad in grads.items() if grad.device == places[f]}
    rest = {f: grad for f, grad in grads.items() if f not in there}
    if any(grad.device.type != "cpu" for grad in rest.values()):
        rest = dict(zip(rest, to_host(list(rest.values())), strict=True))
    return {**there, **{f: grad.float().numpy() for f, grad in rest.items()}}


class Updating:
    """What `torch.amp.GradScaler` takes for an optimizer, and `clip_grad_norm_` for parameters.

    ``scaler.unscale_(this)``, ``clip_grad_norm_([*model.parameters(), *this.leaves], max_norm)``.
    """

    _forwards: list[Forward]

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors whose gradients the next update takes: after ``backward()``, ``clip_grad_norm_`` may clip them.

        A key's gradients in several rows count one by one in the norm: they are summed at the update.
        """
        return [leaf for forward in self._forwards for leaf in forward.leaves.values() if leaf.requires_grad]

    @property
    def param_groups(self) -> list[dict[str, list[Tensor]]]:
        """The leaves, as an optimizer has its parameters."""
        return [{"params": self.leaves}]

    def step(self) -> None:
        """One update by the gradients that are there, of all forwards: what ``scaler.step`` calls."""
        grads = [forward.gradients() for forward in self._forwards]
        *held, last = self._forwards
        with in_order(last.staged.collection):
            last.staged.apply(grads.pop(), [(f.staged, g) for f, g in zip(held, grads, strict=True) if g])

    def update(self, scaler: torch.amp.GradScaler | None) -> None:
        """``step``, by way of the scaler if there is one."""
        if not any(leaf.grad is not None for leaf in self.leaves):
            self._forwards[-1].check()
        if scaler is None:
            self.step()
        elif getattr(self._forwards[-1].staged, "transport", None) is not None:
            # A rank that skips the update would leave the others waiting in it.
            raise errors.Unsupported(
                "GradScaler over tables shared between ranks", remedy="train in bfloat16, which needs none"
            )
        else:
            scaler.step(self)  # type: ignore[arg-type]  # of an optimizer it uses what this has
