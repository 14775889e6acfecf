"""Sums over ranks, such as of dense gradients: equal on every rank, and of the same bits on every engine."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hbkit.shuffle.exchange import Transport

Float32s = npt.NDArray[np.float32]


def sum_over(transport: Transport, values: Float32s) -> Float32s:
    """The sum of float32[n] over all ranks, added in rank order: float32[n] on each of them.

    Each rank sums a part of it and sends the sum to the others: ``8 * n * (size - 1) / size`` bytes sent a rank. All
    ranks give the same n.

    Raises
    ------
    TransportError
        See `Transport.all_to_all`.
    """
    values, size = np.ascontiguousarray(values, np.float32), transport.size
    if size == 1:
        return values.copy()
    counts = np.diff(np.arange(size + 1) * len(values) // size) * values.itemsize
    own = np.full(size, counts[transport.rank])
    parts, _ = transport.all_to_all(values.view(np.uint8), counts, own)
    first, *others = parts.view(np.float32).reshape(size, -1)
    total = first.copy()
    for part in others:
        total += part
    sums, _ = transport.all_to_all(np.tile(total.view(np.uint8), size), own, counts)
    return sums.view(np.float32)
