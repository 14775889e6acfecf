"""Which rank owns a key: keys belong to 1,024 virtual shards, and contiguous runs of those to ranks.

What is counted per virtual shard (quotas, filters) does not change with the number of ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hbkit._ext import index as _ext
from hbkit.errors import InvalidArgument

Int64s = npt.NDArray[np.int64]

N_VSHARDS = 1024


def vshard(keys: Int64s) -> Int64s:
    """Virtual shard of each key, the top ten bits of its mix: int64[n] in [0, 1024)."""
    shards: Int64s = _ext.vshard(np.ascontiguousarray(keys, np.int64))
    return shards


def owner(keys: Int64s, n_ranks: int) -> Int64s:
    """Rank that owns each key, of at most 1,024: int64[n] in [0, n_ranks)."""
    if not 1 <= n_ranks <= N_VSHARDS:
        raise InvalidArgument(f"{n_ranks} ranks", remedy=f"use 1 to {N_VSHARDS}")
    return vshard(keys) * n_ranks >> 10


class Partitioned(NamedTuple):
    """Keys grouped by the rank that owns them.

    Attributes
    ----------
    order : int64[n]
        Positions of the keys, rank by rank, in their order within a rank.
    place : int64[n]
        Where each key went: ``place[order] == arange(n)``.
    counts : int64[n_ranks]
        Keys of each rank.
    """

    order: Int64s
    place: Int64s
    counts: Int64s


def partition(keys: Int64s, n_ranks: int) -> Partitioned:
    """Group int64[n] keys by owner: ``keys[order]`` is rank 0's keys, then rank 1's, and so on. O(n)."""
    return Partitioned(*_ext.partition(np.ascontiguousarray(keys, np.int64), n_ranks))
