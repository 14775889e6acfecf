"""What kernels are made of: floats that round after every operation, bits, and four columns at a time.

The compiler would fuse ``a * b + c`` into one rounding; libdevice's ``_rn`` functions forbid it, and they keep
denormals. So the kernels give the bits that the C kernels give, which are built without contraction.

Each function is there twice, for the device and for Numba's simulator. Whole numbers are int64 in both: where C has
uint32 they are masked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda as _cuda
from numba.cuda import libdevice as _libdevice

from hbkit.cuda.device import simulated

__all__ = [
    "add",
    "as_float",
    "as_int",
    "cuda",
    "device",
    "div",
    "div64",
    "fours",
    "load4",
    "mul",
    "mul64",
    "rint",
    "shift_of",
    "sign",
    "sqrt",
    "sqrt64",
    "store4",
    "sub",
    "sub64",
]

cuda: Any = _cuda  # Numba's annotations know nothing of kernels
libdevice: Any = _libdevice


def device(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that kernels call."""
    compiled: Callable[..., Any] = cuda.jit(function, device=True)
    return compiled


def sign(signatures: dict[Any, str]) -> None:
    """Let each kernel have its signature, which `hbkit.cuda.device.Device.launch` compiles it with."""
    for kernel, signature in signatures.items():
        kernel.signature = signature


def shift_of(width: int) -> int:
    """log2 of how many threads share a row, four columns each."""
    most = 3 if simulated() else 5
    return min(most, max(0, (-(-width // 4) - 1).bit_length()))


def fours(*multiples: int, arrays: tuple[Any, ...] = ()) -> bool:
    """Whether rows may be read and written four columns at a time: widths, strides and places are multiples of four."""
    if any(m % 4 for m in multiples):
        return False
    return all(simulated() or a.size == 0 or a.ptr % 16 == 0 for a in arrays)


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
        with np.errstate(invalid="ignore", divide="ignore"):  # columns beyond a row's end are computed, not stored
            return np.float32(a) / np.float32(b)

    def sqrt(a: Any) -> Any:
        """Square root, correctly rounded."""
        return np.sqrt(np.float32(a))

    def sub64(a: Any, b: Any) -> Any:
        """a - b of float64."""
        return np.float64(a) - np.float64(b)

    def mul64(a: Any, b: Any) -> Any:
        """a * b of float64."""
        return np.float64(a) * np.float64(b)

    def div64(a: Any, b: Any) -> Any:
        """a / b of float64, correctly rounded."""
        return np.float64(a) / np.float64(b)

    def sqrt64(a: Any) -> Any:
        """Square root of float64, correctly rounded."""
        return np.sqrt(np.float64(a))

    def rint(a: Any) -> Any:
        """The nearest whole number, ties to even."""
        return np.rint(np.float32(a))

    def as_int(x: Any) -> Any:
        """The bits of a float32, as a number >= 0."""
        return int(np.float32(x).view(np.uint32))

    def as_float(b: Any) -> Any:
        """The float32 of some bits."""
        return np.uint32(int(b) & 0xFFFFFFFF).view(np.float32)

    def load4(array: Any, i: Any, j: Any) -> Any:
        """``array[i, j:j + 4]``, at a multiple of their size."""
        return array[i, j], array[i, j + 1], array[i, j + 2], array[i, j + 3]

    def store4(array: Any, i: Any, j: Any, a: Any, b: Any, c: Any, d: Any) -> None:
        """``array[i, j:j + 4] = a, b, c, d``, at a multiple of their size."""
        array[i, j], array[i, j + 1], array[i, j + 2], array[i, j + 3] = a, b, c, d

else:
    from llvmlite import ir  # type: ignore[import-untyped] # it has no annotations

    cgutils, types, intrinsic = cuda.cgutils, cuda.types, cuda.extending.intrinsic

    add, sub, mul, div, sqrt, rint = (
        libdevice.fadd_rn,
        libdevice.fsub_rn,
        libdevice.fmul_rn,
        libdevice.fdiv_rn,
        libdevice.fsqrt_rn,
        libdevice.rintf,
    )
    mul64, div64, sqrt64 = libdevice.dmul_rn, libdevice.ddiv_rn, libdevice.dsqrt_rn

    @device
    def sub64(a: Any, b: Any) -> Any:  # type: ignore[misc] # as the simulator's, but compiled
        """a - b of float64."""
        return libdevice.dadd_rn(a, -b)

    @device
    def as_int(x: Any) -> Any:  # type: ignore[misc] # as the simulator's, but compiled
        """The bits of a float32, as a number >= 0."""
        return np.int64(libdevice.float_as_int(x)) & 0xFFFFFFFF

    @device
    def as_float(b: Any) -> Any:  # type: ignore[misc] # as the simulator's, but compiled
        """The float32 of some bits."""
        return libdevice.int_as_float(np.int32(b))

    def _four(context: Any, builder: Any, kind: Any, args: Any) -> Any:
        """Pointer to four elements of a contiguous array, as one vector, and its alignment."""
        array = context.make_array(kind)(context, builder, args[0])
        pointer = cgutils.get_item_pointer(context, builder, kind, array, args[1:3])
        element = context.get_data_type(kind.dtype)
        vector = ir.VectorType(element, 4)
        return builder.bitcast(pointer, vector.as_pointer()), 4 * context.get_abi_sizeof(element)

    @intrinsic  # type: ignore[untyped-decorator] # Numba's, which has no annotations
    def load4(typingctx: Any, array: Any, i: Any, j: Any) -> Any:
        """``array[i, j:j + 4]``, at a multiple of their size."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer, nbytes = _four(context, builder, array, args)
            vector = builder.load(pointer, align=nbytes)
            items = [builder.extract_element(vector, ir.Constant(ir.IntType(32), k)) for k in range(4)]
            return context.make_tuple(builder, signature.return_type, items)

        return types.UniTuple(array.dtype, 4)(array, types.int64, types.int64), codegen

    @intrinsic  # type: ignore[untyped-decorator] # Numba's, which has no annotations
    def store4(typingctx: Any, array: Any, i: Any, j: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        """``array[i, j:j + 4] = a, b, c, d``, at a multiple of their size."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer, nbytes = _four(context, builder, array, args)
            vector = ir.Constant(ir.VectorType(context.get_data_type(array.dtype), 4), ir.Undefined)
            for k in range(4):
                vector = builder.insert_element(vector, args[3 + k], ir.Constant(ir.IntType(32), k))
            builder.store(vector, pointer, align=nbytes)
            return context.get_dummy_value()

        return types.void(array, types.int64, types.int64, *[array.dtype] * 4), codegen
