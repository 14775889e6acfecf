"""Lines in device memory, and sums over segments: the kernels as the rooms above call them, NumPy in, NumPy out."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hbkit.cuda.device import Device
from hbkit.errors import InvalidArgument, Unsupported

Float32s = npt.NDArray[np.float32]
Int64s = npt.NDArray[np.int64]

# Codes of the optimizers, as in _ext/kernels.h, and how many floats of state a row of `dim` needs.
SGD, ADAGRAD, ROWWISE_ADAGRAD = 0, 1, 2
RULES = {
    0: "SGD",
    1: "Adagrad",
    2: "RowWiseAdagrad",
    3: "Adam",
    4: "RowWiseAdam",
    5: "Ftrl",
    6: "AdagradDecay",
    7: "Adam",
}


class DeviceLines:
    """float32[n_lines, width] in device memory, addressed by slot; as `hbkit._ext.slabs.Slabs`.

    Parameters
    ----------
    device : Device
    n_lines, width : int
    batch_lines : int
        Lines that a launch moves at the most, which bounds the device memory beside the lines.
    """

    def __init__(self, device: Device, n_lines: int, width: int, batch_lines: int) -> None:
        self._device, self._width, self._batch = device, width, batch_lines
        self._lines = device.empty((n_lines, width), np.float32)
        self.nbytes = n_lines * width * 4

    def reserve(self, n_lines: int) -> None:
        """All lines are there from the beginning."""

    def trim(self, n_lines: int) -> None:
        """No memory is given back."""

    def pack(self, slots: Int64s) -> npt.NDArray[np.uint8]:
        """Lines as bytes: uint8[n, 4 * width]."""
        lines = np.empty((len(slots), self._width), np.float32)
        self.gather(slots, lines)
        return lines.view(np.uint8)

    def unpack(self, slots: Int64s, lines: npt.NDArray[np.uint8]) -> None:
        """Write lines that `pack` gave."""
        self.scatter(slots, np.ascontiguousarray(lines).view(np.float32))

    def gather(self, slots: Int64s, out: Float32s, index: Int64s | None = None) -> None:
        """``out[i]`` = the first ``out.shape[1]`` floats of line ``slots[i]``; zeros where the slot is -1.

        With `index`, of line ``slots[index[i]]``.
        """
        from hbkit.cuda import kernels

        slots = slots if index is None else slots[index]
        for first in range(0, len(slots), self._batch):
            some = slots[first : first + self._batch]
            rows = self._device.empty((len(some), out.shape[1]), np.float32)
            self._device.launch(kernels.gather, rows.size, self._lines, self._device.send(some), rows)
            out[first : first + len(some)] = self._device.fetch(rows)

    def scatter(self, slots: Int64s, lines: Float32s) -> None:
        """Write whole lines into distinct slots."""
        from hbkit.cuda import kernels

        for first in range(0, len(slots), self._batch):
            some, values = slots[first : first + self._batch], lines[first : first + self._batch]
            self._device.launch(
                kernels.scatter, values.size, self._lines, self._device.send(some), self._device.send(values)
            )
            self._device.sync()

    def apply(
        self,
        rule: Any,
        slots: Int64s,
        grads: Any,
        hyper: Float32s,
        keys: Int64s | None = None,
        seed: int = 0,
        step: int = 0,
        bad: str = "apply",
    ) -> int:
        """One optimizer step on distinct slots; -1 is skipped. As `hbkit._ext.slabs.Slabs.apply`, in float32.

        Raises
        ------
        Unsupported
            There is no kernel for this optimizer, or the row is divided into columns that have one each.
        """
        from hbkit.cuda import kernels

        if not isinstance(grads, np.ndarray):
            grads = grads.sum()
        left_out = 0
        if bad == "skip":
            skipped = (slots >= 0) & ~np.isfinite(grads).all(axis=1)
            slots, left_out = np.where(skipped, -1, slots), int(np.count_nonzero(skipped))
        dim = grads.shape[1]
        if not isinstance(rule, int):
            raise Unsupported(
                f"no CUDA kernel for named columns, here {len(rule)}",
                device=self._device.name,
                remedy="give the table one optimizer and no columns, or keep it in host_memory() or cached_ssd()",
            )
        if rule == SGD:
            kernel, n_state = (kernels.momentum, dim) if hyper[1] != 0 else (kernels.sgd, 0)
        elif rule == ADAGRAD:
            kernel, n_state = kernels.adagrad, dim
        elif rule == ROWWISE_ADAGRAD:
            kernel, n_state = kernels.rowwise_adagrad, 1
        else:
            raise Unsupported(
                f"no CUDA kernel for the optimizer {RULES.get(rule, rule)}",
                device=self._device.name,
                remedy="use SGD, Adagrad or RowWiseAdagrad, or another store",
            )
        if grads.shape[0] != len(slots) or dim + n_state > self._width:
            raise InvalidArgument(
                f"grads of shape {grads.shape} do not fit {len(slots)} slots or a line of {self._width}",
                remedy="the rule needs its state beside the row",
            )
        if np.any(hyper[2:]):
            raise Unsupported(
                f"no CUDA kernel for these options of {RULES[rule]}",
                device=self._device.name,
                remedy="leave clipping, weight decay, Nesterov's momentum and Keras' eps out, or use another store",
            )
        packed = self._device.send(hyper)
        for first in range(0, len(slots), self._batch):
            some, part = slots[first : first + self._batch], grads[first : first + self._batch]
            n = len(some) if kernel is kernels.rowwise_adagrad else part.size
            self._device.launch(kernel, n, self._lines, self._device.send(some), self._device.send(part), packed)
            self._device.sync()
        return left_out


def segment_sum(
    device: Device,
    values: Float32s,
    segment: Int64s,
    n_segments: int,
    rows: Int64s | None = None,
    scale: Float32s | None = None,
) -> Float32s:
    """Sum per segment on the device: float32[n_segments, dim], bit for bit `hbkit._ext.segment.segment_sum`.

    Parameters
    ----------
    device : Device
    values : float32[m, dim]
    segment : int64[n], in [0, n_segments)
    rows : int64[n], in [0, m), or None (position p takes values[p])
    scale : float32[n] or None (all 1)
    """
    from hbkit.cuda import kernels

    n = len(segment)
    rows = np.arange(n) if rows is None else rows
    scale = np.ones(n, np.float32) if scale is None else scale
    if len(rows) != n or len(scale) != n or (n and (segment.min() < 0 or segment.max() >= n_segments)):
        raise InvalidArgument("segments, rows or scales do not fit", remedy="this is a precondition of the sums")
    order = np.argsort(segment, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(segment, minlength=n_segments))]).astype(np.int64)
    out = device.empty((n_segments, values.shape[1]), np.float32)
    arrays = [device.send(a) for a in (values, rows, scale, order, starts)]
    device.launch(kernels.segment_sum, n_segments * values.shape[1], *arrays, out)
    return device.fetch(out)
