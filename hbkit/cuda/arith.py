"""Arithmetic in float32 that rounds after every operation, on the device and in the simulator alike.

The compiler would fuse ``a * b + c`` into one rounding; libdevice's ``_rn`` functions forbid it, and they keep
denormals. So the kernels give the bits that the C kernels give, which are built without contraction.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda as _cuda
from numba.cuda import libdevice

from hbkit.cuda.device import simulated

__all__ = ["add", "cuda", "div", "mul", "sqrt", "sub"]

cuda: Any = _cuda  # Numba's annotations know nothing of kernels

if simulated():

    def add(a: Any, b: Any) -> Any:
        """a + b."""
        return np.float32(a) + np.float32(b)

    def sub(a: Any, b: Any) -> Any:
        """a - b."""
        return np.float32(a) - np.float32(b)

    def mul(a: Any, b: Any) -> Any:
        """a * b."""
        return np.float32(a) * np.float32(b)

    def div(a: Any, b: Any) -> Any:
        """a / b, correctly rounded."""
        return np.float32(a) / np.float32(b)

    def sqrt(a: Any) -> Any:
        """Square root, correctly rounded."""
        return np.sqrt(np.float32(a))

else:
    add, sub, mul, div, sqrt = (
        libdevice.fadd_rn,
        libdevice.fsub_rn,
        libdevice.fmul_rn,
        libdevice.fdiv_rn,
        libdevice.fsqrt_rn,
    )
