"""Summands: gradients of several features as one array, and of each key which row of it counts, by which factor.

For tables on a device they are put together there. What rows and factors follow from is sent, not what follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from hbkit._ext.segment import row_ids
from hbkit.store.line import Float32s, Int64s


@dataclass(frozen=True)
class Lists:
    """Of pooled lists: the gradient of each key of list b is row ``first + step * b`` times ``scale[b]``."""

    splits: Int64s
    scale: Float32s | None
    step: int
    first: int

    def __len__(self) -> int:
        return int(self.splits[-1])

    def rows(self) -> Int64s:
        """Row of each key: int64[n]."""
        rows: Int64s = row_ids(self.splits)
        return rows if self.step == 1 and self.first == 0 else rows * self.step + self.first

    def scales(self, weight: Float32s | None) -> Float32s | None:
        """Factor of each key, with its weight: float32[n]; None where all are 1."""
        if self.scale is None:
            return weight
        scale = self.scale[row_ids(self.splits)]
        return scale if weight is None else scale * weight


# Values float32[m, dim]; the row of each key as int64[n], as a range or lists, None (key p has row p); its weight.
Gradient: TypeAlias = tuple[Any, "Int64s | range | Lists | None", "Float32s | None"]
Joined: TypeAlias = tuple[Any, Any, Any]  # values, rows int64[n] or None, scale float32[n] or None


def joined(parts: Sequence[Gradient]) -> Joined:
    """Gradients of several features of one table as one."""
    if len(parts) == 1:
        values, at, weight = parts[0]
        return values, None if at is None else _rows(at), at.scales(weight) if isinstance(at, Lists) else weight
    rows, base = [], 0
    for values, at, _ in parts:
        rows.append(_rows(range(len(values)) if at is None else at) + base)
        base += len(values)
    return np.concatenate([values for values, _, _ in parts]), np.concatenate(rows), _scales(parts)


def _rows(at: Int64s | range | Lists) -> Int64s:
    if isinstance(at, Lists):
        return at.rows()
    return np.arange(at.start, at.stop, at.step) if isinstance(at, range) else at


def _scales(parts: Sequence[Gradient]) -> Float32s | None:
    found = [at.scales(weight) if isinstance(at, Lists) else weight for _, at, weight in parts]
    if all(scale is None for scale in found):
        return None
    n = (len(values) if at is None else len(at) for values, at, _ in parts)
    return np.concatenate([np.ones(m, np.float32) if s is None else s for m, s in zip(n, found, strict=True)])


class Joining:
    """What `joined` does, in the memory of one table's device.

    Parameters
    ----------
    memory : hbkit.cuda.device.Device, or its twin in host memory
    """

    def __init__(self, memory: Any) -> None:
        self._memory = memory
        self._kept: tuple[list[Any], Any] | None = None  # rows that follow from the batch's size, of the last update

    def __call__(self, parts: Sequence[Gradient]) -> Joined:
        """Values are joined, each array once, where there are several; then rows and scale are there, too."""
        begins: dict[int, int] = {}
        arrays: list[Any] = []
        rows: list[Any] = []
        n = 0
        for values, at, _ in parts:
            if at is None or id(values) not in begins:
                begins[id(values)] = n
                arrays.append(values)
                n += len(values)
            rows.append(_moved(range(len(values)) if at is None else at, begins[id(values)]))
        values = arrays[0] if len(arrays) == 1 else self._memory.join(arrays)
        if any(isinstance(at, Lists) for at in rows):
            return values, *self._spread(rows, [weight for _, _, weight in parts])
        return values, self._send(rows, n), _scales(parts)

    def _send(self, rows: list[Any], n: int) -> Any:
        """Rows end to end, None where they are 0 to n - 1; those of ranges are sent once."""
        if not all(isinstance(at, range) for at in rows):
            return np.concatenate([_rows(at) for at in rows])
        if all(at.step == 1 for at in rows) and sum(map(len, rows)) == n:
            return None
        if self._kept is None or self._kept[0] != rows:
            self._kept = rows, self._memory.send(np.concatenate([_rows(at) for at in rows]))
        return self._kept[1]

    def _spread(self, rows: list[Any], weights: list[Float32s | None]) -> tuple[Any, Any]:
        """Rows and scale end to end, on the device; those of lists are made there."""
        memory, end = self._memory, 0
        ends = np.cumsum([len(at) for at in rows]).tolist()
        if ends[-1] == 0:  # Numba cannot slice what is empty
            return memory.none(np.int64), None
        scaled = any(
            w is not None or getattr(at, "scale", None) is not None for at, w in zip(rows, weights, strict=True)
        )
        all_rows = memory.empty((ends[-1],), np.int64)
        all_scales = memory.empty((ends[-1],), np.float32) if scaled else memory.none(np.float32)
        for at, weight, last in zip(rows, weights, ends, strict=True):
            begin, end = end, last
            to, scale = all_rows[begin:end], all_scales[begin:end] if scaled else all_scales
            if isinstance(at, Lists) and memory.name != "cpu":
                from hbkit.cuda.lists import spread_lists  # needs a device

                spread_lists(memory, at.splits, at.scale, weight, at.first, at.step, to, scale)
                continue
            memory.join([_rows(at)], to)
            if scaled:
                factor = at.scales(weight) if isinstance(at, Lists) else weight
                memory.join([np.ones(end - begin, np.float32) if factor is None else factor], scale)
        return all_rows, all_scales if scaled else None


def _moved(at: Any, by: int) -> Any:
    """The rows `at`, counted from elsewhere."""
    if isinstance(at, Lists):
        return replace(at, first=at.first + by)
    return range(at.start + by, at.stop + by, at.step) if isinstance(at, range) else at + by if by else at
