"""CUDA's driver, opened; and kernels compiled by Numba for launches that go past it.

As `hbkit.cuda.simulator` in Numba's simulator.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from hbkit._ext import driver
from hbkit.errors import DeviceUnavailable, InvalidArgument

Array: Any = driver.Array
TYPE = re.compile(r"(\w+)(\[(?::,)*::1\])?")  # of an argument: a number, or a contiguous array


@functools.cache
def addresses() -> list[int | None]:
    """Where the driver's functions are (`hbkit._ext.driver.FUNCTIONS`)."""
    library = ctypes.CDLL("libcuda.so.1")  # which Numba has found
    return [ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in driver.FUNCTIONS]


def open_stream(name: str, number: int) -> Any:
    """A new stream of the device of this number (`hbkit._ext.driver.Stream`), which errors call by its name."""
    driver.bind(addresses())
    return driver.Stream(name, number)


def error_word(stream: Any) -> tuple[Any, Any]:
    """An int32 that is 0, as the host sees it and as kernels do: in pinned memory, so that no wait copies it."""
    near = stream.pinned(4).view(np.int32)
    near[:] = 0
    return near, stream.mapped(near)


def types_of(signature: str) -> tuple[tuple[Any, int], ...]:
    """What a kernel's signature says of its arguments: dtype and dimensions of an array, or (None, 0) of an int64."""
    found = []
    for word, brackets in TYPE.findall(signature.removeprefix("void")):
        if not brackets and word != "int64":
            raise InvalidArgument(f"a kernel's argument is {word}", remedy="give it int64 or an array")
        found.append((np.dtype(word), brackets.count(",") + 1) if brackets else (None, 0))
    return tuple(found)


@functools.cache
def compiled(kernel: Any, number: int) -> Callable[..., None]:
    """A kernel with a signature, on the device of this number: see `hbkit._ext.driver.Kernel`."""
    from numba import cuda as numba_cuda

    cuda: Any = numba_cuda  # its annotations are partial
    with cuda.gpus[number]:
        dispatcher = cuda.jit(kernel.signature)(kernel)
        (overload,) = dispatcher.overloads.values()
        try:
            function = overload._codelibrary.get_cufunc()
            handle = int(function.handle)
        except (AttributeError, TypeError) as e:  # no public name leads there; these have since numba-cuda 0.24
            raise DeviceUnavailable(
                f"Numba CUDA gives no handle of a kernel: {e}", remedy="pip install 'numba-cuda>=0.24,<0.31'"
            ) from e
    return driver.Kernel(kernel.__name__, handle, types_of(kernel.signature), dispatcher)
