"""What the device tier is made of, on a CUDA device or in host memory.

Nothing here imports Numba: `open_parts("cpu")` works without Numba CUDA and without a driver.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

from hbkit.errors import DeviceUnavailable


class Parts(NamedTuple):
    """An opened device, and the classes of what is made on it: the same constructors and methods on every device."""

    device: Any
    index: Any
    lines: Any
    dedupe: Any
    order: Any


def open_parts(name: str, allocate: Callable[[int], Any] | None = None) -> Parts:
    """The parts of a device tier on "cuda", "cuda:N" or "cpu" (host memory).

    Parameters
    ----------
    name : str
    allocate : callable, optional
        See `hbkit.cuda.device.Device`; host memory has no use for it.

    Raises
    ------
    DeviceUnavailable
        Numba is not installed, or there is no such device or driver.
    """
    if name == "cpu":
        if importlib.util.find_spec("numba") is None:
            raise DeviceUnavailable("Numba is not installed", device=name, remedy="pip install 'hbkit[cuda]'")
        from hbkit.cuda import twin

        return Parts(twin.HostDevice(), twin.HostIndex, twin.HostLines, twin.HostDedupe, twin.HostOrder)
    from hbkit.cuda.device import Device

    device = Device(name, allocate)  # without one, what follows cannot be imported
    from hbkit.cuda.dedupe import Dedupe
    from hbkit.cuda.index import DeviceIndex
    from hbkit.cuda.lines import DeviceLines
    from hbkit.cuda.order import Order

    return Parts(device, DeviceIndex, DeviceLines, Dedupe, Order)
