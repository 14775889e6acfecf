"""Dedupe: the distinct keys of a batch in the order of first occurrence, by a hash table of positions.

A cell of the table holds a position, -1 where it is free. A thread claims a free cell for its key with its position, by
compare-and-swap. From then on the cell belongs to that key: other positions may only lower it, by an atomic minimum,
to another position of the same key. So whatever the order of threads, a key ends in one cell, and the cell in the key's
first position. Which cell that is depends on the race, and nothing else does: the keys are numbered by a scan over
positions. A cell that was read before it changed costs an atomic operation more, or none less.

`claim` and `first_of` read and settle the cells, `number` frees them again and numbers the first positions, `spread`
gives every position its number and counts. Equal keys of a warp are counted by one addition.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hbkit.cuda.arith import cuda, sign
from hbkit.cuda.batch import N_KEYS, N_MISSING, N_SKIPPED, Distinct, Room
from hbkit.cuda.buckets import mix
from hbkit.cuda.device import Device
from hbkit.cuda.tiles import TILES, sum_before, tile_length
from hbkit.cuda.warp import WARP, ballot, first, inline, lane, matching, ones, shared, word, word_of
from hbkit.errors import InvalidArgument

FREE = -1
HOT = 512
SPREADERS = 1 << 17  # threads of `spread` at the most, since each of their blocks adds up what it counted
S16 = word_of(16)


@inline
def cell_of(key: Any, n_cells: Any) -> Any:
    """Where the search for a key begins; the number of cells is a power of two."""
    return np.int64((mix(key) >> S16) & word(n_cells - 1))


def claim(keys: Any, table: Any, cells: Any, error: Any) -> None:
    """``cells[i]`` = the cell of ``keys[i]``. The table is free but for what this launch writes."""
    n_cells = table.shape[0]
    for i in range(cuda.grid(1), keys.shape[0], cuda.gridsize(1)):
        key = keys[i]
        cell = cell_of(key, n_cells)
        held = table[cell]
        while True:
            if held == FREE:
                held = cuda.atomic.cas(table, cell, FREE, i)
                if held == FREE:
                    break
            if keys[held] == key:
                if i < held:
                    cuda.atomic.min(table, cell, i)
                break
            cell = (cell + 1) & (n_cells - 1)
            held = table[cell]
        cells[i] = cell


def first_of(n: Any, table: Any, cells: Any, firsts: Any, counts: Any, totals: Any, error: Any) -> None:
    """``firsts[i]`` = the first position of the key at i of n; a tile's total is how many first ones it has."""
    length = tile_length(n)
    for tile in range(cuda.grid(1) // WARP, TILES, cuda.gridsize(1) // WARP):
        total = np.int64(0)
        for base in range(tile * length, min((tile + 1) * length, n), WARP):
            i = base + lane()
            begins = False
            if i < n:
                found = table[cells[i]]
                firsts[i] = found
                counts[i] = 0
                begins = found == i
            total += ones(ballot(begins))
        if lane() == 0:
            totals[tile] = total


def number(
    keys: Any, table: Any, cells: Any, firsts: Any, totals: Any, numbers: Any, distinct: Any, found: Any, error: Any
) -> None:
    """Number the first positions in order, list their keys, and free their cells; say in `found` how many there are."""
    n = keys.shape[0]
    length = tile_length(n)
    for tile in range(cuda.grid(1) // WARP, TILES, cuda.gridsize(1) // WARP):
        at = sum_before(totals, tile)
        for base in range(tile * length, min((tile + 1) * length, n), WARP):
            i = base + lane()
            here = min(i, n - 1)
            key = keys[here]  # read with the first position, not after it
            cell = cells[here]
            begins = firsts[here] == i
            beginners = ballot(begins)
            if begins:
                mine = at + ones(beginners & ((1 << lane()) - 1))
                numbers[i] = mine
                distinct[mine] = key
                table[cell] = FREE
            at += ones(beginners)
        if tile == TILES - 1 and lane() == 0:
            found[N_KEYS] = at
            found[N_MISSING] = 0
            found[N_SKIPPED] = 0


def spread(n: Any, firsts: Any, numbers: Any, inverse: Any, counts: Any, error: Any) -> None:
    """``inverse[i]`` = the number of the key at i of n, and each key's count.

    Frequent keys come early, so they have small numbers: a block counts the first `HOT` in memory of its own, since one
    place in device memory takes one addition after the other.
    """
    hot = shared(HOT)
    for j in range(cuda.threadIdx.x, HOT, cuda.blockDim.x):
        hot[j] = 0
    cuda.syncthreads()
    for base in range(cuda.grid(1) - lane(), n, cuda.gridsize(1)):
        i = base + lane()
        mine = np.int64(-1)
        if i < n:
            mine = np.int64(numbers[firsts[i]])
            inverse[i] = mine
        same = matching(mine)
        if i < n and lane() == first(same):
            if mine < HOT:
                cuda.atomic.add(hot, mine, ones(same))
            else:
                cuda.atomic.add(counts, mine, ones(same))
    cuda.syncthreads()
    for j in range(cuda.threadIdx.x, HOT, cuda.blockDim.x):
        if hot[j] > 0:
            cuda.atomic.add(counts, j, hot[j])


_A64, _A32 = "int64[::1]", "int32[::1]"
SIGNATURES = {
    claim: f"void({_A64}, {_A32}, {_A32}, {_A32})",
    first_of: f"void(int64, {_A32}, {_A32}, {_A32}, {_A64}, {_A32}, {_A32})",
    number: f"void({_A64}, {_A32}, {_A32}, {_A32}, {_A32}, {_A32}, {_A64}, {_A32}, {_A32})",
    spread: f"void(int64, {_A32}, {_A32}, {_A64}, {_A64}, {_A32})",
}

sign(SIGNATURES)


class Dedupe:
    """Distinct keys of batches on a device, with its work space.

    Parameters
    ----------
    device : Device
    max_keys : int
        Keys of a batch at the most, below 2**30.

    Notes
    -----
    Device memory: 20 to 28 bytes a key, beside a `Room` of 48 a key for each batch that is at hand.
    """

    def __init__(self, device: Device, max_keys: int) -> None:
        if not 0 < max_keys < 2**30:
            raise InvalidArgument(f"batches of {max_keys} keys", device=device.name, remedy="give from 1 to 2**30 - 1")
        self._device, self.max_keys = device, max_keys
        self._table = device.send(np.full(1 << (2 * max_keys - 1).bit_length(), FREE, np.int32))
        self._cells, self._firsts, self._numbers = (device.empty((max_keys,), np.int32) for _ in range(3))
        self._totals = device.empty((TILES,), np.int32)

    @property
    def nbytes(self) -> int:
        """Device memory held, in bytes."""
        return 4 * int(self._table.size + 3 * self.max_keys + self._totals.size)

    def __call__(self, keys: Any, room: Room) -> Distinct:
        """The distinct keys of int64[n], in host or device memory; one wait, for how many they are."""
        n = self.begin(keys, room)
        return Distinct(room, n, int(self._device.fetch(room.found)[N_KEYS]) if n else 0)

    def begin(self, keys: Any, room: Room) -> int:
        """Find the distinct keys without waiting, and have their number in `room.found`; how many keys were given."""
        device, most = self._device, min(self.max_keys, room.max_ids)
        keys = keys if isinstance(keys, np.ndarray) else device.array(keys)  # then dtypes are NumPy's
        if keys.dtype != np.int64 or keys.ndim != 1 or keys.shape[0] > most:
            raise InvalidArgument(
                f"{keys.dtype}{tuple(keys.shape)} given to a dedupe of {most} keys",
                device=device.name,
                remedy="give int64[n], and fewer of them or a larger one",
            )
        n = int(keys.shape[0])
        if n == 0:
            return 0
        if isinstance(keys, np.ndarray):
            near, keys = np.ascontiguousarray(keys), room.listed[:n]  # which nobody needs until keys are looked for
            device.write(keys, near)
        cells, firsts, numbers, totals = self._cells, self._firsts, self._numbers, self._totals
        device.launch(claim, n, keys, self._table, cells)
        device.launch(first_of, TILES * WARP, n, self._table, cells, firsts, room.counts, totals)
        some = (keys, self._table, cells, firsts, totals, numbers, room.keys, room.found)
        device.launch(number, TILES * WARP, *some)
        device.launch(spread, min(n, SPREADERS), n, firsts, numbers, room.inverse, room.counts)
        return n
