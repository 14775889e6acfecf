"""Numba's simulator in the place of CUDA's driver: as `hbkit.cuda.driver`. All is done when a call returns."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import cuda as numba_cuda

cuda: Any = numba_cuda  # its annotations are partial
Array: Any = type(cuda.device_array(0))


class Stream:
    """As `hbkit._ext.driver.Stream`."""

    empty = staticmethod(cuda.device_array)
    event = staticmethod(cuda.event)

    def pinned(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Memory of the host's: uint8[nbytes]."""
        return np.empty(nbytes, np.uint8)

    def copy(self, to: Any, source: Any) -> None:
        """Copy arrays of the same shape and dtype."""
        if to.size == 0:  # whose strides may differ
            return
        if isinstance(to, Array):
            to.copy_to_device(source)
        else:
            source.copy_to_host(to)

    def fetch(self, array: Any, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """A copy in the host's memory."""
        copy: npt.NDArray[Any] = array.copy_to_host(out)
        return copy

    def synchronize(self) -> None:
        """Nothing is under way."""


def open_stream(name: str, number: int) -> Stream:
    """A stream."""
    return Stream()


def error_word(stream: Stream) -> tuple[Any, Any]:
    """An int32 that is 0, as the host sees it and as kernels do."""
    word = cuda.to_device(np.zeros(1, np.int32))
    return word, word


@functools.cache
def compiled(kernel: Any, number: int) -> Callable[..., None]:
    """A kernel as `hbkit._ext.driver.Kernel`."""
    runs = cuda.jit(kernel.signature)(kernel)

    def launch(stream: Stream, grid: int, block: int, args: tuple[Any, ...], error: Any) -> None:
        runs[grid, block](*args, error)

    return launch
