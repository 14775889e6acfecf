"""Error feedback: what rounding left out of a key's gradients is added to its next one, so that no error adds up."""

from __future__ import annotations

import numpy as np

from hbkit._ext.index import Index
from hbkit.shuffle.exchange import Int64s
from hbkit.shuffle.quantize import Float32s


class Residuals:
    """What was left out, for the keys that came first.

    Parameters
    ----------
    n_rows : int
        Keys that there is memory for, ``n_rows * dim`` floats; others have no feedback.
    dim : int
    """

    def __init__(self, n_rows: int, dim: int) -> None:
        self._index = Index()
        self._rows = np.zeros((n_rows, dim), np.float32)

    def take(self, keys: Int64s) -> tuple[Int64s, Float32s]:
        """Where distinct keys are held, -1 where they are not, and what was left out: (int64[n], float32[n, dim])."""
        slots: Int64s = self._index.find(keys)
        missing = np.flatnonzero(slots < 0)[: len(self._rows) - len(self._index)]
        if len(missing):
            slots[missing], _ = self._index.find_or_insert(keys[missing])
        rows = self._rows[slots]  # of none, the last one's
        rows[slots < 0] = 0
        return slots, rows

    def put(self, slots: Int64s, rows: Float32s) -> None:
        """What is left out now, of keys that `take` gave the slots of."""
        held = slots >= 0
        self._rows[slots[held]] = rows[held]

    def __len__(self) -> int:
        return len(self._index)
