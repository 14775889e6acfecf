"""Buffers of what is on its way between the host and a device: one is filled while another is copied.

Both have two places for each array, in pinned memory and in the device's, and an event tells when the last use is over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from hbkit.cuda.device import Device
from hbkit.errors import InvalidArgument

Float32s = npt.NDArray[np.float32]


def buffer_nbytes(n_lines: int, width: int) -> int:
    """Bytes of a `Buffer` for so many lines with their slots and keys."""
    return n_lines * (4 * width + 16) + 48


class Buffer:
    """Pinned memory of the host and as much of the device, for what is on its way."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self._device, self._at = device, 0
        self._near, self._far = device.pinned(nbytes), device.empty((nbytes,), np.uint8)
        self._used, self._moved = device.event(), device.event()
        self._asked: list[tuple[Callable[[npt.NDArray[Any]], None], npt.NDArray[Any]]] = []

    def begin(self) -> None:
        """Wait until all is done that the buffer was used for, and hand over what was asked for."""
        self._used.synchronize()
        for take, near in self._asked:
            take(near)
        self._asked, self._at = [], 0

    def place(self, shape: tuple[int, ...], dtype: Any) -> tuple[npt.NDArray[Any], Any]:
        """An array in pinned memory and its twin in the device's."""
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        here = slice(self._at, self._at + nbytes)
        self._at += -(-nbytes // 16) * 16
        return self._near[here].view(dtype).reshape(shape), self._far[here].view(dtype).reshape(shape)

    def send(self, *arrays: npt.NDArray[Any]) -> list[Any]:
        """Arrays in device memory, for kernels launched from now on."""
        pairs = []
        for array in arrays:
            if array.dtype not in (np.int64, np.float32):  # kernels would take it for one of them
                raise InvalidArgument(f"an array of {array.dtype}", remedy="give int64 or float32")
            near, far = self.place(array.shape, array.dtype)
            near[...] = array
            pairs.append((far, near))
        self.copy(pairs)
        return [far for far, _ in pairs]

    def copy(self, pairs: list[tuple[Any, npt.NDArray[Any]]]) -> None:
        """What was written to `place`s, for kernels launched from now on."""
        self._device.copy_in(pairs, self._moved)

    def slots(self, slots: Any) -> Any:
        """Slots in device memory, where they may be already."""
        return self.send(slots)[0] if isinstance(slots, np.ndarray) else self._device.array(slots)

    def ask(self, shape: tuple[int, ...], launch: Callable[[Any], None], take: Callable[[Float32s], None]) -> None:
        """What `launch` writes into float32 in device memory is given to `take`, in pinned memory, by the time the
        buffer is used again."""
        near, far = self.place(shape, np.float32)
        launch(far)
        self._device.copy_out(near, far, self._moved, self._used)
        self._asked.append((take, near))

    def end(self) -> None:
        """The buffer is in use until all that was launched is done."""
        self._device.record(self._used)
