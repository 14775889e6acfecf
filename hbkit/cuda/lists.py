"""Lists of keys whose rows are pooled: which row each key's gradient is, and what it is multiplied by."""

from __future__ import annotations

from typing import Any

import numpy as np

from hbkit.cuda.arith import cuda, mul, sign
from hbkit.cuda.device import BAD_SEGMENT, Device

ONE = np.float32(1)


def spread(splits: Any, row_scale: Any, weight: Any, first: Any, step: Any, rows: Any, scale: Any, error: Any) -> None:
    """``rows[p] = first + step * b`` and ``scale[p] = row_scale[b] * weight[p]`` of the list b that value p is in.

    `row_scale` and `weight` (1) may be empty, and so may `scale`, which then is not asked for.
    """
    for p in range(cuda.grid(1), rows.shape[0], cuda.gridsize(1)):
        b, end = 0, splits.shape[0] - 1  # splits[b] <= p < splits[end]
        while end - b > 1:
            middle = (b + end) // 2
            if splits[middle] <= p:
                b = middle
            else:
                end = middle
        if p < splits[b] or p >= splits[end]:
            error[0] = BAD_SEGMENT
            continue
        rows[p] = first + step * b
        if scale.shape[0] > 0:
            k = row_scale[b] if row_scale.shape[0] > 0 else ONE
            scale[p] = mul(k, weight[p]) if weight.shape[0] > 0 else k


SIGNATURES: dict[Any, str] = {
    spread: "void(int64[::1], float32[::1], float32[::1], int64, int64, int64[::1], float32[::1], int32[::1])"
}
sign(SIGNATURES)


def spread_lists(
    device: Device,
    splits: Any,
    row_scale: Any,
    weight: Any,
    first: int,
    step: int,
    rows: Any,
    scale: Any,
) -> None:
    """Launch `spread`, of arrays of NumPy or the device; None is one that is left out. Does not wait."""

    def there(array: Any) -> Any:
        return device.none(np.float32) if array is None else device.array(array)

    arrays = device.array(splits), there(row_scale), there(weight)
    device.launch(spread, rows.shape[0], *arrays, first, step, rows, there(scale))
