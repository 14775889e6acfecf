"""Device: one CUDA device, the launch of kernels on it, and the error word that they report into.

A kernel cannot raise. Its last argument is an error word in device memory; a thread that meets something impossible
writes a code there and goes on without touching memory it does not own, and `Device.sync` raises what the code means.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from hbkit.errors import BudgetExceeded, DeviceUnavailable, HbkitError, InvalidArgument

BLOCK = 128  # threads a block
MAX_BLOCKS = 65_536
COOPERATING = 16  # threads that share a row where they need each other's sums
SIMULATED_THREADS = COOPERATING  # the simulator runs each thread as one of Python's
SIMULATED_BLOCKS = 3

BAD_SLOT, BAD_SEGMENT, BAD_INDEX, BAD_HOLD, BAD_RELEASE = range(1, 6)
ERRORS = {
    BAD_SLOT: "a slot is outside the lines in device memory",
    BAD_SEGMENT: "a segment reaches outside its values",
    BAD_INDEX: "an index reaches outside its slots",
    BAD_HOLD: "a key was to be held once more than an index counts (32,767 times)",
    BAD_RELEASE: "a slot that nobody holds was to be released",
}


@functools.cache
def simulated() -> bool:
    """Whether kernels run in Numba's simulator."""
    return os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")


class Device:
    """A CUDA device by its name, ready for launches.

    Parameters
    ----------
    name : str
        "cuda" (the first) or "cuda:N".
    allocate : callable, optional
        ``allocate(nbytes)`` gives device memory as an object with ``__cuda_array_interface__``, kept as long as it is
        used: so that memory comes from the framework's own pool. When left out, from the driver.

    Raises
    ------
    DeviceUnavailable
        Numba CUDA is not installed, there is no driver, or no such device.

    Notes
    -----
    Arrays are contiguous: `hbkit._ext.driver.Array`, in the simulator Numba's. Kernels run on a stream of their own and
    copies on another; both are ordered with the legacy default stream, where frameworks work unless they are told
    otherwise. May be used from several threads; whoever waits lets others launch meanwhile. What a kernel reports is
    raised by the next wait, whoever's it is.
    """

    def __init__(self, name: str = "cuda:0", allocate: Callable[[int], Any] | None = None) -> None:
        found = re.fullmatch(r"cuda(?::(\d+))?", name)
        if found is None:
            raise InvalidArgument(f"device {name!r}", remedy="use 'cuda' or 'cuda:N'")
        self.name, self._number, self._allocate = name, int(found[1] or 0), allocate
        if importlib.util.find_spec("numba") is None or not (simulated() or importlib.util.find_spec("numba_cuda")):
            raise DeviceUnavailable(
                "Numba CUDA is not installed", device=name, remedy="pip install 'hbkit[cuda]', or use another store"
            )
        with self._named():
            from numba import cuda as numba_cuda

            cuda: Any = numba_cuda  # its annotations are partial
            if not cuda.is_available():
                raise DeviceUnavailable(
                    "no CUDA device or driver was found",
                    device=name,
                    remedy="install an NVIDIA driver (and hbkit[cuda]), or use another store",
                )
            if self._number >= len(cuda.gpus):
                raise DeviceUnavailable(
                    f"there are {len(cuda.gpus)} CUDA devices", device=name, remedy="name one of them, from cuda:0"
                )
            self._driver = importlib.import_module(f"hbkit.cuda.{'simulator' if simulated() else 'driver'}")
            self._stream, self._copies = (self._driver.open_stream(name, self._number) for _ in range(2))
            self._word, self._error = self._driver.error_word(self._stream)
        self._block, self._most_blocks = (SIMULATED_THREADS, SIMULATED_BLOCKS) if simulated() else (BLOCK, MAX_BLOCKS)
        self._compiled: dict[Any, Callable[..., None]] = {}
        self._none = {dtype: self.empty((0,), dtype) for dtype in (np.int64, np.float32)}
        self._none_by_two = self.empty((0, 0), np.float32)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Turn Numba's errors into ours."""
        try:
            yield
        except HbkitError:
            raise
        except Exception as e:
            if not type(e).__module__.startswith(("numba", "cuda")):
                raise
            raise DeviceUnavailable(
                f"the device failed: {e}", device=self.name, remedy="check nvidia-smi, or use another store"
            ) from e

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        """An uninitialised array in device memory.

        Raises
        ------
        BudgetExceeded
            The device has not so much memory left.
        """
        if self._allocate is None or 0 in shape or simulated():
            return self._stream.empty(shape, dtype)
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        try:
            return self._stream.of(self._allocate(nbytes)).view(dtype).reshape(shape)
        except Exception as e:
            if not (isinstance(e, MemoryError) or re.search("OUT_OF_MEMORY|out of memory", str(e))):
                raise
            raise BudgetExceeded(
                f"no {nbytes} bytes are left in device memory",
                device=self.name,
                remedy="give a smaller cache_budget, or free what else is there (nvidia-smi shows it)",
            ) from e

    def pinned(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Uninitialised host memory that the device reads and writes by itself: uint8[nbytes].

        Raises
        ------
        BudgetExceeded
            The host has not so much memory left that can be pinned.
        """
        memory: npt.NDArray[np.uint8] = self._stream.pinned(nbytes)
        return memory

    def event(self) -> Any:
        """Something that streams record and wait for."""
        return self._stream.event()

    def copy_in(self, pairs: list[tuple[Any, npt.NDArray[Any]]], moved: Any) -> None:
        """Begin to copy pinned arrays into device memory; what is launched from now on comes after it."""
        for far, near in pairs:
            self._copies.copy(far, near)
        moved.record(self._copies)
        moved.wait(self._stream)

    def copy_out(self, near: npt.NDArray[Any], far: Any, moved: Any, used: Any) -> None:
        """Begin to copy what was launched for into a pinned array; `used` is when it is there."""
        moved.record(self._stream)
        moved.wait(self._copies)
        self._copies.copy(near, far)
        used.record(self._copies)

    def record(self, event: Any) -> None:
        """`event` is when all that was launched is done."""
        event.record(self._stream)

    def send(self, array: npt.NDArray[Any]) -> Any:
        """A copy of an array in device memory."""
        far = self.empty(array.shape, array.dtype)
        self._stream.copy(far, np.ascontiguousarray(array))
        return far

    def array(self, array: Any, dtype: Any = None) -> Any:
        """An array in device memory: a copy of what NumPy has, or what is there already, without a copy.

        Raises
        ------
        InvalidArgument
            It is not of `dtype`, or is there and not contiguous.
        """
        if isinstance(array, self._driver.Array):
            far = array
        elif isinstance(array, np.ndarray):
            far = self.send(array)
        else:
            far = self._stream.of(array)
        if dtype is not None and far.dtype != dtype:
            raise InvalidArgument(
                f"an array of {far.dtype}{far.shape}", device=self.name, remedy=f"give one of {np.dtype(dtype)}"
            )
        return far

    def join(self, arrays: Sequence[Any], out: Any = None) -> Any:
        """Arrays end to end in device memory, in `out` if it is given; NumPy's are copied there."""
        arrays = [a if isinstance(a, np.ndarray) else self.array(a) for a in arrays]
        n, one = sum(len(a) for a in arrays), arrays[0]
        to = self.empty((n, *one.shape[1:]), one.dtype) if out is None else self.array(out)
        end = 0
        for a in arrays:
            begin, end = end, end + len(a)
            if end > begin:
                self._stream.copy(to[begin:end], a)
        return to

    def write(self, far: Any, array: npt.NDArray[Any]) -> None:
        """Copy a small contiguous array into device memory, after what was launched and before what will be."""
        self._stream.copy(far, array)

    def none(self, dtype: Any, n_dim: int = 1) -> Any:
        """An argument that is left out: an array without elements."""
        return self._none[dtype] if n_dim == 1 else self._none_by_two

    def fetch(self, array: Any, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """Wait for what was launched, raise what it reported, and copy an array from device memory, into `out`."""
        copy: npt.NDArray[Any] = self._stream.fetch(array, out)
        if self._word[0]:
            self._raise()
        return copy

    def launch(self, kernel: Callable[..., None], n: int, *args: Any) -> None:
        """Run a kernel of grid-stride loops over `n` items; the error word goes last. Does not wait.

        Raises
        ------
        InvalidArgument
            An argument is not what the kernel's signature says.
        """
        if n == 0:
            return
        compiled = self._compiled.get(kernel)
        if compiled is None:
            with self._named():
                compiled = self._compiled[kernel] = self._driver.compiled(kernel, self._number)
        compiled(self._stream, min(-(-n // self._block), self._most_blocks), self._block, args, self._error)

    def sync(self) -> None:
        """Wait for all that was launched.

        Raises
        ------
        InvalidArgument
            A kernel met an error; the word is cleared.
        DeviceUnavailable
            The device was lost.
        """
        self._stream.synchronize()
        if self._word[0]:
            self._raise()

    def _raise(self) -> None:
        word, self._word[0] = int(self._word[0]), 0
        raise InvalidArgument(
            ERRORS.get(word, f"kernel error {word}"), device=self.name, remedy="this is a precondition"
        )
