"""Whether numbers in device memory are finite: all of them, or those of each row.

A float32 is NaN or infinite where its bits without the sign are `INFINITE` or more; so numbers are looked at as bits.
Whoever finds one writes the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hbkit.cuda.arith import as_int, cuda, device, fours, shift_of, sign
from hbkit.cuda.device import Device
from hbkit.cuda.narrow import load
from hbkit.cuda.warp import ballot, lane, ones

INFINITE = 0x7F80_0000


@device
def largest(values: Any, i: Any, j: Any, dim: Any, vec: Any) -> Any:
    """The largest bits of columns j..j+3 of row i, without signs."""
    a, b, c, d = load(values, i, j, dim, vec)
    return max(
        max(as_int(a) & 0x7FFF_FFFF, as_int(b) & 0x7FFF_FFFF), max(as_int(c) & 0x7FFF_FFFF, as_int(d) & 0x7FFF_FFFF)
    )


def _look(vec: bool) -> Any:
    def look(values: Any, found: Any, error: Any) -> None:
        """``found[0]`` is 1 where a value is NaN or infinite, else left alone. Four rows are read at once."""
        n, dim = values.shape
        stride = cuda.gridsize(1)
        for i in range(cuda.grid(1), n, 4 * stride):
            p, q, r = min(i + stride, n - 1), min(i + 2 * stride, n - 1), min(i + 3 * stride, n - 1)
            a, b = largest(values, i, 0, dim, vec), largest(values, p, 0, dim, vec)
            c, d = largest(values, q, 0, dim, vec), largest(values, r, 0, dim, vec)
            if max(max(a, b), max(c, d)) >= INFINITE:
                found[0] = 1

    return look


def _leave_out(vec: bool) -> Any:
    def leave_out(slots: Any, sums: Any, out: Any, found: Any, shift: Any, error: Any) -> None:
        """``out[i]`` = ``slots[i]``, or -1 where row i has a NaN or infinity; those that were not -1 are counted."""
        n, dim = sums.shape
        share = (1 << shift) - 1  # so many lanes beside the first one look at a row
        for base in range(cuda.grid(1) - lane(), n << shift, cuda.gridsize(1)):
            i = (base + lane()) >> shift
            worst = np.int64(0)
            if i < n:
                for j in range(4 * (lane() & share), dim, 4 << shift):
                    worst = max(worst, largest(sums, i, j, dim, vec))
            bad = (np.int64(ballot(worst >= INFINITE)) >> (lane() & ~share)) & ((1 << (1 << shift)) - 1)
            left_out = False
            if i < n and lane() & share == 0:
                left_out = bad != 0 and slots[i] >= 0
                out[i] = slots[i] if bad == 0 else -1
            n_left_out = ones(ballot(left_out))
            if n_left_out > 0 and lane() == 0:
                cuda.atomic.add(found, 0, n_left_out)

    return leave_out


LOOK = {vec: _look(vec) for vec in (False, True)}
LEAVE_OUT = {vec: _leave_out(vec) for vec in (False, True)}
LOOK[True].__name__ += "_fours"
LEAVE_OUT[True].__name__ += "_fours"
SIGNATURES = {
    **dict.fromkeys(LOOK.values(), "void(float32[:,::1], int32[::1], int32[::1])"),
    **dict.fromkeys(LEAVE_OUT.values(), "void(int64[::1], float32[:,::1], int64[::1], int32[::1], int64, int32[::1])"),
}

sign(SIGNATURES)


class Finite:
    """What finds NaN and infinities in device memory, with its work space.

    Parameters
    ----------
    device : Device
    """

    def __init__(self, device: Device) -> None:
        self._device, self._found = device, device.send(np.zeros(1, np.int32))
        self._slots: Any = device.none(np.int64)

    def look(self, values: Any, scale: Any = None) -> Any:
        """Look for NaN and infinities in float32 arrays in device memory: int32[1] there, 0 where there is none.

        Does not wait. What is given is the caller's alone, so that several may wait at once.
        """
        found = self._device.send(np.zeros(1, np.int32))
        for array in (values,) if scale is None else (values, scale):
            array = self._device.array(array)
            if array.size == 0:
                continue
            some = array.reshape(array.size)
            vec = fours(array.size, arrays=(some,))
            some = some.reshape(array.size // 4, 4) if vec else some.reshape(array.size, 1)
            self._device.launch(LOOK[vec], -(-some.shape[0] // 4), some, found)
        return found

    def skip_bad(self, slots: Any, sums: Any) -> tuple[Any, int]:
        """Slots in device memory with -1 where a row of sums is not finite, and how many were not -1; one wait.

        Parameters
        ----------
        slots : int64[n]
        sums : float32[n, dim]

        Returns
        -------
        tuple of int64[n], until the next call, and int
        """
        n, dim = sums.shape
        if n == 0:
            return slots, 0
        if self._slots.shape[0] < n:
            self._slots = self._device.empty((n,), np.int64)
        slots, sums = self._device.array(slots), self._device.array(sums)
        shift, vec = shift_of(dim), fours(dim, arrays=(sums,))
        self._device.launch(LEAVE_OUT[vec], n << shift, slots, sums, self._slots, self._found, shift)
        return self._slots[:n], self._count()

    def _count(self) -> int:
        """What was counted, which begins anew."""
        found = int(self._device.fetch(self._found)[0])
        if found:
            self._found = self._device.send(np.zeros(1, np.int32))
        return found
