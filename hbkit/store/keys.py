"""Keys as stores hold them: the bits of 64-bit integers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hbkit.errors import InvalidArgument
from hbkit.store.line import Int64s

__all__ = ["KEY_DTYPES", "as_keys"]

KEY_DTYPES = ("int64", "uint64", "int32")


def as_keys(keys: npt.ArrayLike, key_dtype: str, table: str) -> Int64s:
    """A vector of integers as contiguous int64[n], unsigned ones by their bits; shared where it is that already.

    Raises
    ------
    InvalidArgument
        They are no vector of integers, or do not fit `key_dtype`; the error names `table`.
    """
    k = np.asarray(keys)
    if k.size == 0 and k.dtype == np.float64:  # an empty list
        k = k.astype(np.int64)
    if k.dtype.kind not in "iu" or k.ndim != 1:
        raise InvalidArgument(
            f"keys are {k.dtype} of {k.ndim} dimensions",
            table=table,
            remedy="give a vector of integers; turn strings into keys with Field(hash_to='int64')",
        )
    if key_dtype == "int32" and k.size and (k.min() < -(2**31) or k.max() >= 2**31):
        raise InvalidArgument("a key does not fit int32", table=table, remedy="use key_dtype='int64'")
    return np.ascontiguousarray(k).astype(np.int64, copy=False)
