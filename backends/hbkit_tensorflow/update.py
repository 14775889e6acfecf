"""From the gradients of batches to one update of the tables."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from hbkit import errors
from hbkit.embedding import Staged
from hbkit_tensorflow.data import Array, array
from hbkit_tensorflow.transfer import to_host

__all__ = ["Forward", "Updating"]


class Forward(NamedTuple):
    """A batch that was read, and the gradients of what the model saw of it.

    Attributes
    ----------
    staged : Staged
    grads : dict of feature to float32 array
    """

    staged: Staged
    grads: Mapping[str, Array]


def leaves(embeddings: Mapping[str, Any]) -> dict[str, Any]:
    """What takes gradients: the tensor of each feature, the values of a sequence."""
    # a `Sequence` has a mask; the gradient of a gather has `values` too, which are not all that there is
    return {feature: value.values if hasattr(value, "mask") else value for feature, value in embeddings.items()}


def gradients(grads: Mapping[str, Any]) -> dict[str, Array]:
    """Gradients as the core takes them, float32, without the features that the loss did not use.

    Over the same memory where they are in the host's; of a device in one copy.
    """
    found = {feature: grad for feature, grad in leaves(grads).items() if grad is not None}
    if not found:
        raise errors.Closed(
            "no embedding has a gradient",
            feature=", ".join(grads),
            remedy="watch the embeddings with the tape before the loss",
        )
    found = {feature: grad if isinstance(grad, np.ndarray) else _floats(grad) for feature, grad in found.items()}
    elsewhere = {f: g for f, g in found.items() if isinstance(g, tf.Tensor) and not g.device.endswith("CPU:0")}
    found |= zip(elsewhere, to_host(list(elsewhere.values())), strict=True)
    return {feature: array(grad) for feature, grad in found.items()}


def _floats(grad: Any) -> tf.Tensor:
    dense = tf.convert_to_tensor(grad)
    return tf.cast(dense, tf.float32) if dense.dtype in (tf.float16, tf.bfloat16) else dense


class Updating:
    """Batches that wait with their gradients, until one update takes them all."""

    _held: deque[Forward]  # Keras would make a list of its own of a list

    def hold(self, staged: Staged, grads: Mapping[str, Array]) -> None:
        """Keep the gradients of a batch, and let go of its rows."""
        staged.hold()
        self._held.append(Forward(staged, grads))

    def update(self, staged: Staged, grads: Mapping[str, Array]) -> None:
        """One update by the gradients of a batch and of those that wait."""
        staged.apply(grads, list(self._held))
        self._held.clear()
