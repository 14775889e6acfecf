"""Updates in backward, and the refusal of what needs the gradients after it, or scales them unseen.

A scaled loss gives gradients like any other. So Keras's LossScaleOptimizer counts its losses here, and while updates in
backward go on, Keras's optimizers ask here before they apply theirs.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf

from hbkit import errors
from hbkit_tensorflow.update import leaves

__all__ = ["Watch", "refused"]

_watches: weakref.WeakSet[Watch] = weakref.WeakSet()
_scaled = [0]  # losses so far


def refused(what: str) -> errors.Unsupported:
    """The error for what does not go with updates in backward."""
    return errors.Unsupported(
        f"{what} with update='backward': the tables have their update before",
        remedy="make the EmbeddingCollection with update='apply'",
    )


def n_scaled() -> int:
    """Losses that a LossScaleOptimizer scaled so far, from the first call on."""
    _guard()
    return _scaled[0]


def refuse_scaled(before: int) -> None:
    """Raise where a loss was scaled since `n_scaled` gave `before`: its factor is not known, nor stays what it was."""
    if _scaled[0] != before:
        raise errors.Unsupported(
            "gradients of a loss that LossScaleOptimizer scaled",
            remedy="attach the model and call fit, which unscales them; or train in bfloat16, without that optimizer",
        )


class Watch:
    """What one collection's updates in backward have come to since an optimizer applied gradients.

    Attributes
    ----------
    waiting : bool
        A call has not had its backward.
    n_updates : int
    """

    def __init__(self) -> None:
        self.end()
        self._anchor = tf.Variable(0.0, name="anchor")  # every tape watches it, and so what depends on it
        _guard()
        _watches.add(self)

    def end(self) -> None:
        """Nothing comes any more: refuse nothing."""
        self.waiting, self.n_updates = False, 0

    def update_in_backward(
        self, embeddings: Mapping[str, Any], update: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        """Embeddings of the same values, such that a gradient through them calls ``update`` with theirs."""
        rows = leaves(embeddings)
        self.waiting = True

        @tf.custom_gradient
        def passed(anchor: Any, *values: Any) -> Any:
            def grad(*upstream: Any) -> Any:
                self.waiting, self.n_updates = False, self.n_updates + 1
                update(dict(zip(rows, upstream, strict=True)))
                return tf.zeros_like(anchor), *map(tf.zeros_like, values)

            return [tf.identity(value) for value in values], grad

        found = dict(zip(rows, passed(self._anchor.read_value(), *rows.values()), strict=True))
        return {
            feature: found[feature] if tf.is_tensor(value) else value._replace(values=found[feature])
            for feature, value in embeddings.items()
        }


@functools.cache
def _guard() -> None:
    """Count scaled losses, and ask the watches where gradients are applied, from now on."""
    scale_loss, apply = keras.optimizers.LossScaleOptimizer.scale_loss, keras.optimizers.Optimizer.apply

    @functools.wraps(scale_loss)
    def asked_scale_loss(self: Any, loss: Any) -> Any:
        _scaled[0] += 1
        if any(watch.waiting for watch in _watches):
            raise refused("LossScaleOptimizer")
        return scale_loss(self, loss)

    @functools.wraps(apply)
    def asked_apply(self: Any, grads: Any, trainable_variables: Any = None) -> Any:
        counts = [watch.n_updates for watch in _watches]
        for watch in _watches:
            watch.n_updates = 0
        if any(counts) and self.global_clipnorm:
            raise refused("Clipping by a global norm")
        if max(counts, default=0) > 1 or (any(counts) and self.gradient_accumulation_steps):
            raise refused("Accumulation of gradients over several backwards")
        return apply(self, grads, trainable_variables)

    keras.optimizers.LossScaleOptimizer.scale_loss = asked_scale_loss
    keras.optimizers.Optimizer.apply = asked_apply
