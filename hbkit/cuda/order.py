"""Order: the positions of a batch by the number of their key, those of a key in batch order; a radix sort.

A digit of the numbers is sorted after the other, the lowest first, with as few digits as their bits fill (two up to
2^20 keys). The batch is cut into tiles, each owned by one warp in a launch, and of each digit's value and tile there is
a count: value v of tile t at ``v * n_tiles + t``. So an exclusive sum over all counts, in this order, says where each
tile's positions with each value go; within the tile the warp goes through them in order, 32 at a time, and a vote says
which lanes have the same value.

- `count` counts the first digit, a tile a warp.
- `scan` sums a value's counts over the tiles, a value a warp, and leaves the values' totals; and `starts` come of the
  keys' counts.
- `place` sums the totals over the values, which is the rest of the sum, and writes the positions where they go. It
  counts the next digit on the way: it adds one at the tile where the position arrives.

Only those last additions meet, and sums of whole numbers do not depend on their order. All else that a launch writes
has one writer, and what a warp shares it owns.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hbkit.cuda.arith import cuda, sign
from hbkit.cuda.batch import Room
from hbkit.cuda.device import BLOCK, SIMULATED_THREADS, Device, simulated
from hbkit.cuda.tiles import TILES, sum_before, tile_length
from hbkit.cuda.warp import WARP, fence, first, inline, lane, matching, ones, shared, shuffle

MAX_BITS = 2 if simulated() else 10  # of a digit
MAX_TILES = 4 if simulated() else 2048  # of the batch; `TILES` are those of the sums of the keys' counts
WARPS = 1 if simulated() else BLOCK // WARP  # a block has
ROOM = WARPS << MAX_BITS  # of a block, a count for each value and warp
POSITION = 0xFFFF_FFFF
assert WARPS * WARP in (BLOCK, SIMULATED_THREADS)


def plan(n: int, n_distinct: int) -> tuple[int, int, int]:
    """Passes, bits a digit, and log2 of a tile's positions.

    A tile is no shorter than a digit has values, so that there are no more counts than positions.
    """
    n_bits = max(1, (n_distinct - 1).bit_length())
    n_passes = -(-n_bits // MAX_BITS)
    bits = -(-n_bits // n_passes)
    return n_passes, bits, max(bits, WARP.bit_length() - 1, (-(-n // MAX_TILES) - 1).bit_length())


def counts_of(max_ids: int) -> int:
    """Counts that a pass has at the most."""
    return min(max_ids, MAX_TILES << MAX_BITS) + (1 << MAX_BITS)


@inline
def sums_of(x: Any) -> Any:
    """In each lane the sum of what the lanes up to it give: int32."""
    step = 1
    while step < WARP:
        below = shuffle(x, max(lane() - step, 0))
        if lane() >= step:
            x = np.int32(x + below)
        step *= 2
    return x


@inline
def read(array: Any, first_of: Any, i: Any, n: Any) -> Any:
    """Item i of n from `first_of` on, as int32; 0 beyond."""
    return np.int32(array[first_of + min(i, n - 1)] * (i < n))


def count(
    numbers: Any, n: Any, log: Any, bits: Any, counted: Any, counts: Any, n_keys: Any, totals: Any, error: Any
) -> None:
    """Counts of the lowest digit of ``numbers[:n]`` by tile; and sums of the keys' counts by their tiles."""
    held = shared(ROOM)
    mine = cuda.threadIdx.x // WARP << MAX_BITS
    n_tiles = (n + (1 << log) - 1) >> log
    for tile in range(cuda.grid(1) // WARP, n_tiles, cuda.gridsize(1) // WARP):
        for value in range(lane(), 1 << bits, WARP):
            held[mine + value] = 0
        fence()
        for i in range((tile << log) + lane(), min((tile + 1) << log, n), WARP):
            cuda.atomic.add(held, mine + (numbers[i] & ((1 << bits) - 1)), 1)
        fence()
        for value in range(lane(), 1 << bits, WARP):
            counted[value * n_tiles + tile] = held[mine + value]
    wide = tile_length(n_keys)
    for tile in range(cuda.grid(1) // WARP, TILES, cuda.gridsize(1) // WARP):
        begin, end = tile * wide, min((tile + 1) * wide, n_keys)
        total = np.int64(0)
        for i in range(begin + lane(), end, WARP):
            total += counts[i]
        total = shuffle(sums_of(np.int32(total)), WARP - 1)
        if lane() == 0:
            totals[tile] = total


def scan(
    n_tiles: Any, bits: Any, counted: Any, coming: Any, sums: Any, counts: Any, n_keys: Any, totals: Any, starts: Any,
    error: Any,
) -> None:  # fmt: skip
    """Make the counts of each value the sums before each tile, and ``sums[value]`` the sum of all; `coming` is zeroed.

    Where `n_keys` is not 0, ``starts[k]`` is the sum of the counts before key k.
    """
    for value in range(cuda.grid(1) // WARP, 1 << bits, cuda.gridsize(1) // WARP):
        row = value * n_tiles
        total = np.int64(0)
        # Three reads are on their way while the lanes add.
        a = read(counted, row, lane(), n_tiles)
        b = read(counted, row, lane() + WARP, n_tiles)
        c = read(counted, row, lane() + 2 * WARP, n_tiles)
        for tile in range(lane(), n_tiles + lane(), WARP):
            here, a, b, c = a, b, c, read(counted, row, tile + 3 * WARP, n_tiles)
            up_to = sums_of(here)
            if tile < n_tiles:
                counted[row + tile] = total + up_to - here
                if coming.shape[0] > 0:
                    coming[row + tile] = 0
            total += shuffle(up_to, WARP - 1)
        if lane() == 0:
            sums[value] = total
    if n_keys == 0:
        return
    wide = tile_length(n_keys)
    for tile in range(cuda.grid(1) // WARP, TILES, cuda.gridsize(1) // WARP):
        total = sum_before(totals, tile)
        for base in range(tile * wide, min((tile + 1) * wide, n_keys), WARP):
            i = base + lane()
            here = read(counts, 0, i, n_keys)
            up_to = sums_of(here)
            if i < n_keys:
                starts[i] = total + up_to - here
            total += shuffle(up_to, WARP - 1)
        if tile == TILES - 1 and lane() == 0:
            starts[n_keys] = total


def place(
    source: Any, n: Any, log: Any, bits: Any, shift: Any, counted: Any, coming: Any, sums: Any, out: Any, error: Any
) -> None:
    """Sort by the digit of `source` at bit `shift`, and count the next one in `coming`, which the last pass has not.

    The first pass, from bit 0, is given the numbers, and later ones ``number << 32 | position``; the last one writes
    positions alone.
    """
    held = shared(ROOM)
    mine = cuda.threadIdx.x // WARP << MAX_BITS
    n_values, n_tiles = 1 << bits, (n + (1 << log) - 1) >> log
    for tile in range(cuda.grid(1) // WARP, n_tiles, cuda.gridsize(1) // WARP):
        total = np.int64(0)
        a, b = read(sums, 0, lane(), n_values), counted[min(lane(), n_values - 1) * n_tiles + tile]
        for value in range(lane(), n_values + lane(), WARP):
            here, before = a, b  # and the next ones are on their way
            a = read(sums, 0, value + WARP, n_values)
            b = counted[min(value + WARP, n_values - 1) * n_tiles + tile]
            up_to = sums_of(here)
            if value < n_values:
                held[mine + value] = total + up_to - here + before
            total += shuffle(up_to, WARP - 1)
        fence()
        begin, end = tile << log, min((tile + 1) << log, n)
        # Three reads are on their way.
        a = source[min(begin + lane(), n - 1)]
        b = source[min(begin + lane() + WARP, n - 1)]
        c = source[min(begin + lane() + 2 * WARP, n - 1)]
        for i in range(begin + lane(), end + lane(), WARP):
            number, a, b, c = a, b, c, source[min(i + 3 * WARP, n - 1)]
            digit = np.int32(-1)
            if i < end:
                digit = np.int32((number >> shift) & (n_values - 1))
            same = matching(digit)
            at = np.int32(0)
            if i < end:
                at = held[mine + digit]
            fence()  # all have read what one of them writes
            if i < end and lane() == first(same):
                held[mine + digit] = at + ones(same)
            fence()
            if i < end:
                to = np.int64(at) + ones(same & ((1 << lane()) - 1))
                position = i if shift == 0 else number & POSITION
                if coming.shape[0] == 0:
                    out[to] = position
                else:
                    following = (number >> (shift + bits)) & (n_values - 1)
                    cuda.atomic.add(coming, following * n_tiles + (to >> log), 1)
                    out[to] = (number << 32) | i if shift == 0 else number


_A64, _A32 = "int64[::1]", "int32[::1]"
SIGNATURES = {
    count: f"void({_A64}, int64, int64, int64, {_A32}, {_A64}, int64, {_A32}, {_A32})",
    scan: f"void(int64, int64, {_A32}, {_A32}, {_A32}, {_A64}, int64, {_A32}, {_A64}, {_A32})",
    place: f"void({_A64}, int64, int64, int64, int64, {_A32}, {_A32}, {_A32}, {_A64}, {_A32})",
}

sign(SIGNATURES)


class Order:
    """Positions of batches by key number on a device, with its work space.

    Parameters
    ----------
    device : Device
    max_ids : int
        Ids of a batch at the most, below 2**30.

    Notes
    -----
    Device memory: 8 bytes an id, and up to 8 more, which end at 16 MiB. Three launches for each batch of up to 2^10
    distinct keys, five up to 2^20, else seven; none waits.
    """

    def __init__(self, device: Device, max_ids: int) -> None:
        self._device = device
        self._packed = device.empty((max_ids,), np.int64)
        self._counted = [device.empty((counts_of(max_ids),), np.int32) for _ in range(2)]
        self._sums = device.empty((1 << MAX_BITS,), np.int32)
        self._totals = device.empty((TILES,), np.int32)
        self._nothing = device.empty((0,), np.int32)

    @property
    def nbytes(self) -> int:
        """Device memory held, in bytes."""
        return 8 * self._packed.size + 4 * int(2 * self._counted[0].size + self._sums.size + self._totals.size)

    def __call__(self, room: Room, n: int, n_distinct: int) -> None:
        """Fill ``room.order[:n]`` and ``room.starts[: n_distinct + 1]``, from its inverse and counts.

        Positions ``order[starts[k]:starts[k + 1]]`` are those of key number k, ascending.
        """
        if n == 0:
            return
        device, counted = self._device, self._counted[0]
        n_passes, bits, log = plan(n, n_distinct)
        n_tiles = -(-n >> log)
        device.launch(count, TILES * WARP, room.inverse, n, log, bits, counted, room.counts, n_distinct, self._totals)
        source = room.inverse
        for number in range(n_passes):
            left = n_passes - 1 - number
            counted, coming = self._counted[number % 2], self._counted[1 - number % 2] if left else self._nothing
            keys = (room.counts, 0 if number else n_distinct, self._totals, room.starts)
            warps = max(1 << bits, 0 if number else TILES)
            device.launch(scan, warps * WARP, n_tiles, bits, counted, coming, self._sums, *keys)
            out = self._packed if left % 2 else room.order
            shift = number * bits + (32 if number else 0)
            some = (source, n, log, bits, shift, counted, coming, self._sums, out)
            device.launch(place, n_tiles * WARP, *some)
            source = out
