"""Distinct keys of a batch."""

from __future__ import annotations

from typing import Literal, NamedTuple

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
    inverse : int64[n], or int32[n] where that was asked for
        ``unique[inverse] == keys``.
    counts : int64[u]
        Occurrences of each.
    """

    unique: Int64s
    inverse: npt.NDArray[np.int64] | npt.NDArray[np.int32]
    counts: Int64s


def dedupe(keys: Int64s, inverse: Literal["int64", "int32"] = "int64") -> Deduped:
    """Distinct keys of int64[n], in the order of their first appearance.

    Parameters
    ----------
    keys : int64[n], n < 2**31
    inverse : str
        Type of the inverse: "int32" moves half the bytes.

    Notes
    -----
    O(n); releases the GIL. The arrays lie in the shared pool.
    """
    return Deduped(*_ext.dedupe(np.ascontiguousarray(keys, np.int64), inverse))
