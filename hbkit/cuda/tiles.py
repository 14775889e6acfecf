"""Tiles: how warps share a pass over an array whose results come in order.

Each of `TILES` warps has one tile of the array. It counts what it will list and writes the total; a second launch sums
the totals before its tile for itself, and lists from there on.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hbkit.cuda.device import simulated
from hbkit.cuda.warp import WARP, inline, lane, xor

TILES = 8 if simulated() else 4096  # warps that share a pass


@inline
def tile_length(n: Any) -> Any:
    """Items a tile: n over the tiles, a multiple of the warp."""
    return (n + TILES * WARP - 1) // (TILES * WARP) * WARP


@inline
def sum_before(totals: Any, tile: Any) -> Any:
    """Sum of ``totals[:tile]``, in every lane; four reads at a time are on their way."""
    total = np.int64(0)
    for i in range(lane(), tile, 4 * WARP):
        total += totals[i]
        for j in range(1, 4):
            total += totals[min(i + j * WARP, TILES - 1)] * (i + j * WARP < tile)
    step = WARP // 2
    while step > 0:
        total += xor(total, step)
        step //= 2
    return total
