"""Distinct keys of a batch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hbkit._ext import index as _ext

Int64s = npt.NDArray[np.int64]


class Deduped(NamedTuple):
    """Distinct keys and where each key went.

    Attributes
    ----------
    unique : int64[u]
        In the order of their first appearance.
    inverse : int64[n]
        ``unique[inverse] == keys``.
    counts : int64[u]
        Occurrences of each.
    """

    unique: Int64s
    inverse: Int64s
    counts: Int64s


def dedupe(keys: Int64s) -> Deduped:
    """Distinct keys of int64[n], in the order of their first appearance. O(n); releases the GIL."""
    return Deduped(*_ext.dedupe(np.ascontiguousarray(keys, np.int64)))
