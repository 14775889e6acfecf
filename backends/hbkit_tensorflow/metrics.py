"""The core's streaming metrics, which take tensors on any device as well as arrays."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from hbkit import metrics
from hbkit_tensorflow.data import array

__all__ = ["AUC", "GAUC", "LogLoss"]


def _array(column: Any) -> Any:
    if not tf.is_tensor(column):
        return column
    column = tf.convert_to_tensor(column)
    return array(tf.cast(column, tf.float32) if column.dtype == tf.bfloat16 else column)  # NumPy has no bfloat16


class AUC(metrics.AUC):
    """`hbkit.metrics.AUC` of tensors."""

    def update(self, label: Any, score: Any, weight: Any = None) -> None:
        """Count one batch; as `hbkit.metrics.AUC.update`."""
        super().update(_array(label), _array(score), _array(weight))


class GAUC(metrics.GAUC):
    """`hbkit.metrics.GAUC` of tensors."""

    def update(self, label: Any, score: Any, weight: Any = None, group: Any = None) -> None:
        """Take one batch; as `hbkit.metrics.GAUC.update`."""
        super().update(_array(label), _array(score), _array(weight), _array(group))


class LogLoss(metrics.LogLoss):
    """`hbkit.metrics.LogLoss` of tensors."""

    def update(self, label: Any, score: Any, weight: Any = None) -> None:
        """Count one batch; as `hbkit.metrics.LogLoss.update`."""
        super().update(_array(label), _array(score), _array(weight))
