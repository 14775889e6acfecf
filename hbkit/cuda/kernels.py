"""All kernels and the types of their arguments.

Each is a plain function; `Device.launch` compiles it. All are grid-stride loops, and the last argument is the error
word. What keeps their threads apart is said where they are. SIGNATURES is what the tests compile without a device.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hbkit.cuda import buckets, dedupe, finite, lists, order, rows, rules, sums, wire
from hbkit.cuda.arith import cuda

MODULES = (buckets, dedupe, finite, lists, order, rows, rules, sums, wire)
SIGNATURES: dict[Any, str] = {kernel: text for module in MODULES for kernel, text in module.SIGNATURES.items()}


def ptx(kernel: Any, cc: tuple[int, int]) -> str:
    """What a kernel compiles to for a compute capability, such as (9, 0); needs no device."""
    dispatcher = cuda.dispatcher
    of_device = dispatcher.get_current_device
    # Functions that a kernel calls are compiled for the device at hand, even where only PTX is asked for.
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=cc)
    try:
        text: str = cuda.compile_ptx(kernel, SIGNATURES[kernel], cc=cc)[0]
    finally:
        dispatcher.get_current_device = of_device
    return text
