"""Votes, shuffles and 64-bit words among the lanes of a warp, on the device and in Numba's simulator alike.

The simulator has no warps. There a warp is a block of `WARP` threads, and what the lanes exchange goes through memory
that the block shares, between two barriers. So all lanes of a warp must come to every vote and shuffle, as on the
device, where each names the full mask; the lanes may part between them.

The simulator's integers are NumPy's, which warn when they wrap; so there a word is one of Python's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import int32

from hbkit.cuda.arith import cuda
from hbkit.cuda.device import SIMULATED_THREADS, simulated

__all__ = [
    "ALL64",
    "WARP",
    "ballot",
    "fence",
    "first",
    "inline",
    "lane",
    "matching",
    "ones",
    "shared",
    "shuffle",
    "up",
    "word",
    "xor",
]

F = TypeVar("F", bound=Callable[..., Any])

if simulated():
    from numba.cuda.simulator import kernel as simulator

    WARP = SIMULATED_THREADS
    word_of: Callable[[Any], Any] = int

    def block() -> Any:
        """What the threads of the running block share."""
        context: Any = simulator._kernel_context  # `cuda`, as kernels see it, is not to be had here
        return context

    def inline(function: F) -> F:
        """A function that kernels call."""
        return function

    def word(value: Any) -> Any:
        """The 64 bits of an integer, unsigned."""
        return int(value) & 0xFFFF_FFFF_FFFF_FFFF

    def lane() -> Any:
        """This thread's place in its warp."""
        return block().threadIdx.x

    def exchanged(value: Any) -> list[Any]:
        """What every lane gives, by lane."""
        shared = block().__dict__.setdefault("hbkit_warp", [0] * WARP)
        shared[lane()] = value
        block().syncthreads()
        values = list(shared)
        block().syncthreads()
        return values

    def ballot(vote: Any) -> Any:
        """A bit for each lane: its vote."""
        return sum(1 << i for i, given in enumerate(exchanged(vote)) if given)

    def matching(value: Any) -> Any:
        """A bit for each lane: whether it gives the same value as this one."""
        values = exchanged(value)
        return sum(1 << i for i, given in enumerate(values) if given == values[lane()])

    def shuffle(value: Any, source: Any) -> Any:
        """What lane `source` gives."""
        return exchanged(value)[source]

    def up(value: Any) -> Any:
        """What the lane below gives; lane 0 keeps its own."""
        return exchanged(value)[max(lane() - 1, 0)]

    def xor(value: Any, mask: Any) -> Any:
        """What the lane whose number differs in `mask` gives."""
        return exchanged(value)[lane() ^ mask]

    def shared(size: Any) -> Any:
        """int32[size] that the block shares; a kernel has one. Numba's own may become two where threads race."""
        return block().__dict__.setdefault("hbkit_shared", np.zeros(size, np.int32))

    def fence() -> None:
        """What lanes of this warp wrote before is seen by all of it after."""
        block().syncthreads()

    def first(bits: Any) -> Any:
        """The lowest bit that is set."""
        return (int(bits) & -int(bits)).bit_length() - 1

    def ones(bits: Any) -> Any:
        """How many bits are set."""
        return int(bits).bit_count()

else:
    WARP = 32
    FULL = 0xFFFF_FFFF
    word_of = np.uint64

    def inline(function: F) -> F:
        """A function that kernels call."""
        compiled: F = cuda.jit(function, device=True, inline="always")
        return compiled

    @inline
    def word(value: Any) -> Any:
        """The 64 bits of an integer, unsigned."""
        return np.uint64(value)

    @inline
    def lane() -> Any:
        """This thread's place in its warp."""
        return cuda.laneid

    @inline
    def ballot(vote: Any) -> Any:
        """A bit for each lane: its vote."""
        return np.uint32(cuda.ballot_sync(FULL, vote))

    @inline
    def matching(value: Any) -> Any:
        """A bit for each lane: whether it gives the same value as this one."""
        return np.uint32(cuda.match_any_sync(FULL, value))

    @inline
    def shuffle(value: Any, source: Any) -> Any:
        """What lane `source` gives."""
        return cuda.shfl_sync(FULL, value, source)

    @inline
    def up(value: Any) -> Any:
        """What the lane below gives; lane 0 keeps its own."""
        return cuda.shfl_up_sync(FULL, value, 1)

    @inline
    def xor(value: Any, mask: Any) -> Any:
        """What the lane whose number differs in `mask` gives."""
        return cuda.shfl_xor_sync(FULL, value, mask)

    @inline
    def shared(size: Any) -> Any:
        """int32[size] that the block shares; a kernel has one."""
        return cuda.shared.array(size, int32)

    @inline
    def fence() -> None:
        """What lanes of this warp wrote before is seen by all of it after."""
        cuda.syncwarp()

    @inline
    def first(bits: Any) -> Any:
        """The lowest bit that is set."""
        return cuda.ffs(bits) - 1

    @inline
    def ones(bits: Any) -> Any:
        """How many bits are set."""
        return cuda.popc(bits)


ALL64 = word_of(0xFFFF_FFFF_FFFF_FFFF)
