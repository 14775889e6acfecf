"""Copies between host and device: everything that a batch needs in one buffer, and so in one copy each way."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from hbkit import errors

__all__ = ["target", "to_device", "to_host"]


def target(device: str | None) -> str | None:
    """The device to copy to, by its full name; None where the host's memory will do.

    Raises
    ------
    InvalidArgument
        It is no name of a device.
    DeviceUnavailable
        There is no such device here.
    """
    if device is None:
        return None
    try:
        asked = tf.DeviceSpec.from_string(device)
    except ValueError as e:
        raise errors.InvalidArgument(f"device={device!r}", remedy="name one as TensorFlow does: CPU, GPU:0") from e
    if asked.device_type is None:
        raise errors.InvalidArgument(f"device={device!r}", remedy="name one as TensorFlow does: CPU, GPU:0")
    name = f"/device:{asked.device_type}:{asked.device_index or 0}"
    if name == "/device:CPU:0":
        return None
    names = [found.name for found in tf.config.list_logical_devices()]
    if name not in names:
        raise errors.DeviceUnavailable(
            f"there is no device {device!r}", remedy=f"leave device out, or use one of {', '.join(names)}"
        )
    return name


def to_device(arrays: Sequence[npt.NDArray[np.float32 | np.bool_]], device: str) -> list[tf.Tensor]:
    """Arrays of float32 or bool as tensors on a device: joined, copied once, and split there.

    Flags travel as floats, since TensorFlow has no views of another dtype.
    """
    joined = tf.constant(np.concatenate([a.reshape(-1).astype(np.float32, copy=False) for a in arrays]))
    with tf.device(device):
        parts = tf.split(tf.identity(joined), [a.size for a in arrays])
        return [tf.cast(tf.reshape(p, a.shape), a.dtype) for p, a in zip(parts, arrays, strict=True)]


def to_host(tensors: Sequence[tf.Tensor]) -> list[npt.NDArray[np.float32]]:
    """Float tensors of one device as float32 in host memory: joined there, and copied once."""
    if not tensors:
        return []
    with tf.device(tensors[0].device):
        joined = tf.concat([tf.reshape(tf.cast(t, tf.float32), [-1]) for t in tensors], 0)
    ends = np.cumsum([int(tf.size(t)) for t in tensors])[:-1]
    return [part.reshape(t.shape) for part, t in zip(np.split(joined.numpy(), ends), tensors, strict=True)]
