"""Updates in backward, and the refusal of what needs the gradients after it.

A scaled loss gives gradients like any other, and nobody asks a table before its gradients are clipped. So while an
update in backward may come, GradScaler, `torch.nn.utils.clip_grad_norm_` and optimizers ask here first.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hbkit import errors
from hbkit_torch.transfer import in_order
from hbkit_torch.update import Forward, as_core

__all__ = ["Watch", "refused"]

_watches: weakref.WeakSet[Watch] = weakref.WeakSet()


def refused(what: str) -> errors.Unsupported:
    """The error for what does not go with updates in backward."""
    return errors.Unsupported(
        f"{what} with update='backward': the tables have their update before",
        remedy="make the EmbeddingCollection with update='apply'",
    )


class Watch:
    """What one collection's updates in backward have come to since the last step of an optimizer.

    Attributes
    ----------
    waiting : bool
        A forward has not had its backward.
    n_updates : int
    """

    def __init__(self) -> None:
        self.end()
        _guard()
        _watches.add(self)

    def end(self) -> None:
        """Nothing comes any more: refuse nothing."""
        self.waiting, self.n_updates = False, 0

    def update_in_backward(self, forward: Forward) -> dict[str, Any]:
        """The forward's embeddings, such that a backward through them updates the tables.

        They are no leaves: a gradient that nobody would heed is not to be had.
        """
        leaves = forward.leaves
        self.waiting = True

        def update(grads: Sequence[Tensor | None]) -> None:
            if forward.staged.state != "read":
                raise refused("Accumulation of several forwards or backwards")
            self.waiting, self.n_updates = False, self.n_updates + 1
            given = {f: grad for f, grad in zip(leaves, grads, strict=True) if grad is not None}
            gradients = as_core(forward.staged, given)
            with in_order(forward.staged.collection):
                forward.staged.apply(gradients)

        torch.autograd.graph.register_multi_grad_hook(list(leaves.values()), update)
        return {
            feature: value.view_as(value)
            if isinstance(value, Tensor)
            else value._replace(values=value.values.view_as(value.values))
            for feature, value in forward.embeddings.items()
        }


@functools.cache
def _guard() -> None:
    """Ask the watches, from now on, where gradients are scaled, clipped by a global norm, or stepped by."""

    def asking(function: Callable[..., Any], check: Callable[..., None]) -> Any:
        @functools.wraps(function)
        def asked(*args: Any, **kwargs: Any) -> Any:
            check(*args)
            return function(*args, **kwargs)

        return asked

    def check_scaler(scaler: Any, *args: Any) -> None:
        if scaler.is_enabled() and any(watch.waiting for watch in _watches):
            raise refused("GradScaler")

    def check_clipping(*args: Any) -> None:
        if any(watch.n_updates for watch in _watches):
            raise refused("Clipping by a global norm")

    def check_step(*args: Any) -> None:
        many = any(watch.n_updates > 1 for watch in _watches)
        for watch in _watches:
            watch.n_updates = 0
        if many:
            raise refused("Accumulation of gradients over several backwards")

    torch.amp.GradScaler.scale = asking(torch.amp.GradScaler.scale, check_scaler)  # type: ignore[method-assign]  # a guard around it
    clip = asking(torch.nn.utils.clip_grad_norm_, check_clipping)
    torch.nn.utils.clip_grad_norm_ = torch.nn.utils.clip_grad.clip_grad_norm_ = clip
    register_optimizer_step_pre_hook(check_step)
