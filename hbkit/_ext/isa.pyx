"""Which instruction set the kernels use: the best this CPU has, or what ``HBKIT_ISA`` names.

The objects of kernels.c and snappy_kernel.c are linked to this module alone; the other extensions cimport `kernels`,
so that there is one table of functions in a process.
"""

import os

from hbkit.errors import InvalidArgument, Unsupported


cdef extern from "kernels.h":
    int hb_supported(const hb_kernels **)

cdef const hb_kernels *_found[4]
cdef const hb_kernels *_chosen
cdef int _n_found = hb_supported(_found)


cdef const hb_kernels *kernels() noexcept nogil:
    return _chosen


def available():
    """Names of the instruction sets that this CPU can run, best last: tuple of str."""
    return tuple(_found[i].name.decode() for i in range(_n_found))


def name():
    """Name of the instruction set in use: str."""
    return _chosen.name.decode()


def use(str isa):
    """Switch all kernels of this process to `isa` (one of `available()`); for tests and benchmarks."""
    global _chosen
    for i in range(_n_found):
        if _found[i].name.decode() == isa:
            _chosen = _found[i]
            return
    known = ("v2", "v3", "v4", "neon")
    raise (Unsupported if isa in known else InvalidArgument)(
        f"instruction set {isa!r} cannot be used", remedy=f"HBKIT_ISA may be one of {', '.join(available())} here")


if _n_found == 0:
    raise ImportError("hbkit needs an x86-64-v2 CPU (SSE4.2, POPCNT) or aarch64")
use(os.environ.get("HBKIT_ISA") or available()[_n_found - 1])
