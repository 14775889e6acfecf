"""Device: one CUDA device, the launch of kernels on it, and the error word that they report into.

A kernel cannot raise. Its last argument is an error word in device memory; a thread that meets something impossible
writes a code there and goes on without touching memory it does not own, and `Device.sync` raises what the code means.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from hbkit.errors import DeviceUnavailable, HbkitError, InvalidArgument

BLOCK = 128  # threads a block
MAX_BLOCKS = 65_536
SIMULATED_THREADS = 16  # the simulator runs each thread as one of Python's; two words of digests a bucket
SIMULATED_BLOCKS = 3

ERRORS = {
    1: "a slot is outside the lines in device memory",
    2: "a segment reaches outside its values",
    3: "a key that is pinned was to be erased",
}


def simulated() -> bool:
    """Whether kernels run in Numba's simulator."""
    return os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")


class Device:
    """A CUDA device by its name, ready for launches.

    Parameters
    ----------
    name : str
        "cuda" (the first) or "cuda:N".

    Raises
    ------
    DeviceUnavailable
        Numba CUDA is not installed, there is no driver, or no such device.

    Notes
    -----
    May be used from several threads, one at a time.
    """

    def __init__(self, name: str = "cuda:0") -> None:
        found = re.fullmatch(r"cuda(?::(\d+))?", name)
        if found is None:
            raise InvalidArgument(f"device {name!r}", remedy="use 'cuda' or 'cuda:N'")
        self.name, self._number = name, int(found[1] or 0)
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
            self._cuda = cuda
            self._compiled: dict[Any, Any] = {}
            with cuda.gpus[self._number]:
                self._stream = cuda.stream()
                self._error = cuda.to_device(np.zeros(1, np.int32))

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Turn the driver's errors into ours."""
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

    @contextmanager
    def _current(self) -> Iterator[None]:
        with self._named(), self._cuda.gpus[self._number]:
            yield

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        """An uninitialised array in device memory."""
        with self._current():
            return self._cuda.device_array(shape, dtype)

    def send(self, array: npt.NDArray[Any]) -> Any:
        """A copy of a contiguous array in device memory."""
        with self._current():
            return self._cuda.to_device(np.ascontiguousarray(array), stream=self._stream)

    def fetch(self, array: Any, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """Wait for what was launched, raise what it reported, and copy an array from device memory, into `out`."""
        self.sync()
        with self._current():
            copy: npt.NDArray[Any] = array.copy_to_host(out, stream=self._stream)
            self._stream.synchronize()
            return copy

    def launch(self, kernel: Callable[..., None], n: int, *args: Any) -> None:
        """Run a kernel of grid-stride loops over `n` items; the error word goes last. Does not wait."""
        if n == 0:
            return
        with self._current():
            if kernel not in self._compiled:
                self._compiled[kernel] = self._cuda.jit(kernel)
            block, most = (SIMULATED_THREADS, SIMULATED_BLOCKS) if simulated() else (BLOCK, MAX_BLOCKS)
            grid = (min(-(-n // block), most), block)
            self._compiled[kernel][(*grid, self._stream)](*args, self._error)

    def sync(self) -> None:
        """Wait for all that was launched.

        Raises
        ------
        InvalidArgument
            A kernel met an error; the word is cleared.
        DeviceUnavailable
            The device was lost.
        """
        with self._current():
            word = int(self._error.copy_to_host(stream=self._stream)[0])
            self._stream.synchronize()
            if word:
                self._error.copy_to_device(np.zeros(1, np.int32))
                raise InvalidArgument(
                    ERRORS.get(word, f"kernel error {word}"), device=self.name, remedy="this is a precondition"
                )
