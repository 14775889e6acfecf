"""What a user asks of one column, and what a column is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hbkit import errors

__all__ = ["ColumnType", "Field"]

_DTYPES = ["bool", *(f"{u}int{bits}" for u in ("", "u") for bits in (8, 16, 32, 64)), "float16", "float32", "float64"]
_DTYPES += ["string"]


@dataclass(frozen=True)
class ColumnType:
    """The type of one column.

    Attributes
    ----------
    dtype : str
        A NumPy dtype's name, or ``"string"`` for strings and binary (they become ``Strings``).
    ragged_rank : int
        How many lists deep: 0 for one value a row.
    nullable : bool
        Whether the column may hold nulls.
    logical : str
        The stored type where values are integers that stand for something else (``"timestamp[us]"``,
        ``"date32[day]"``, ``"decimal(scale=2)"``), else empty. A decimal's integer is its unscaled value.
    pad_to : int or None
        Width of a padded, dense column ``[rows, pad_to]``.
    unsupported : str
        Why the column cannot be read, else empty.
    """

    dtype: str
    ragged_rank: int = 0
    nullable: bool = False
    logical: str = ""
    pad_to: int | None = None
    unsupported: str = ""


@dataclass(frozen=True)
class Field:
    """One column to read, and how.

    Parameters
    ----------
    name : str
        The column's name in the file, letter by letter unless the file is read with ``ignore_case``. Members of
        structures and maps are named by their path: ``user.age``, ``attributes.key``.
    dtype : str or numpy.dtype, optional
        Cast to this. Values that do not fit raise; a decimal becomes its true value as a float.
    ragged_rank : int, optional
        Lists a row nests; None takes the file's. A list column asked for as 0 must hold at most one value a row (an
        empty list counts as null); a plain column asked for as 1 becomes lists of one value.
    pad_to : int, optional
        Make a list column dense, ``[rows, pad_to]``, short rows filled with zeros.
    truncate : "tail" or "head"
        Which end ``pad_to`` cuts off a row that is too long.
    default : scalar, str or bytes, optional
        What stands for a null under ``null="default"``, and for every value of a column that a file lacks. With
        ``hash_to`` it is hashed like any other value.
    null : "error", "default" or "empty"
        "error" raises NullFound on any null. Otherwise a null list is an empty list, and under "default" a null value
        is ``default``; under "empty" a null element leaves its list, a null string is the empty string, and any other
        null value makes an empty row: such a column is ``Ragged`` of rank 1. A null structure is a null of each of its
        members.
    hash_to : "int64", optional
        Turn strings, binary or integers into 64-bit keys: XXH64 of a string's bytes, or of the eight little-endian
        bytes of an integer whatever its width in the file; read as a signed number.
    hash_seed : int
        Seed of that hash.

    Raises
    ------
    InvalidArgument
        The arguments contradict each other.
    """

    name: str
    dtype: str | np.dtype[Any] | type | None = None
    ragged_rank: int | None = None
    pad_to: int | None = None
    truncate: Literal["head", "tail"] = "tail"
    default: Any = None
    null: Literal["error", "default", "empty"] = "error"
    hash_to: Literal["int64"] | None = None
    hash_seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype is not None:
            try:
                text = "string" if self.dtype in ("string", "bytes", str, bytes) else np.dtype(self.dtype).name
            except TypeError:
                text = str(self.dtype)
            object.__setattr__(self, "dtype", text)
            self._require(text in _DTYPES, f"dtype {text!r} is not supported", f"use one of {', '.join(_DTYPES)}")
        self._require(isinstance(self.name, str), f"name is {self.name!r}", "give the column's name")
        self._require(self.truncate in ("head", "tail"), f"truncate is {self.truncate!r}", "use 'head' or 'tail'")
        self._require(
            self.null in ("error", "default", "empty"), f"null is {self.null!r}", "use 'error', 'default' or 'empty'"
        )
        self._require(np.ndim(self.default) == 0, "default is no scalar", "a null list is an empty list anyway")
        self._require(
            self.null != "default" or self.default is not None, "null='default' has no default", "give default="
        )
        self._require(self.hash_to in (None, "int64"), f"hash_to is {self.hash_to!r}", "use 'int64'")
        self._require(self.hash_to is None or self.dtype in (None, "int64"), "hash_to gives int64", "leave dtype out")
        self._require(
            isinstance(self.hash_seed, int) and 0 <= self.hash_seed < 2**64,
            f"hash_seed is {self.hash_seed!r}",
            "use an integer of 0 to 2**64 - 1",
        )
        self._require(
            self.pad_to is None or (isinstance(self.pad_to, int) and self.pad_to > 0),
            f"pad_to is {self.pad_to!r}",
            "use a positive number of values",
        )
        self._require(
            self.ragged_rank is None or (isinstance(self.ragged_rank, int) and self.ragged_rank >= 0),
            f"ragged_rank is {self.ragged_rank!r}",
            "use 0, 1, ... or leave it out",
        )

    def _require(self, ok: bool, problem: str, remedy: str) -> None:
        if not ok:
            raise errors.InvalidArgument(problem, remedy=remedy, column=self.name)

    def output(self, stored: ColumnType, file: str | None = None) -> ColumnType:
        """The type that this field gives for a stored column.

        Raises
        ------
        Unsupported
            The stored column cannot be read.
        SchemaMismatch
            The request does not suit the stored type.
        """

        def require(ok: bool, problem: str, remedy: str) -> None:
            if not ok:
                raise errors.SchemaMismatch(problem, remedy=remedy, file=file, column=self.name)

        if stored.unsupported:
            raise errors.Unsupported(
                stored.unsupported, remedy="leave the column out of fields", file=file, column=self.name
            )
        string = stored.dtype == "string"
        kind = "" if string else np.dtype(stored.dtype).kind
        if self.hash_to:
            require(string or kind in "iu", f"{stored.dtype} cannot be hashed", "hash strings, binary or integers")
            dtype = str(self.hash_to)
        else:
            dtype = str(self.dtype) if self.dtype is not None else stored.dtype
            require(
                string == (dtype == "string"),
                f"{stored.dtype} cannot be read as {dtype}",
                "use hash_to='int64' for strings, or leave dtype out",
            )
        rank = stored.ragged_rank
        if self.ragged_rank is not None and self.ragged_rank != rank:
            require(
                {rank, self.ragged_rank} == {0, 1},
                f"the column has ragged rank {rank}, asked for {self.ragged_rank}",
                "leave ragged_rank out",
            )
            rank = self.ragged_rank
        if rank == 0 and self.null == "empty" and not string:
            require(
                self.ragged_rank is None,
                "null='empty' makes a plain column ragged",
                "use null='default' or ragged_rank=1",
            )
            rank = 1
        if self.pad_to is not None:
            require(rank == 1, f"pad_to needs ragged rank 1, the column has {rank}", "leave pad_to out")
            require(dtype != "string", "strings cannot be padded", "use hash_to='int64' or leave pad_to out")
            rank = 0
        logical = "" if self.hash_to or dtype != stored.dtype else stored.logical
        return ColumnType(dtype, rank, logical=logical, pad_to=self.pad_to)

    def of_missing(self) -> ColumnType:
        """The type of a column that a file lacks: what the field says, else what its default is."""
        if self.hash_to or isinstance(self.default, (str, bytes)):
            dtype = "string"
        elif self.dtype is not None:
            dtype = str(self.dtype)
        else:
            dtype = np.asarray(0.0 if self.default is None else self.default).dtype.name
        return self.output(ColumnType(dtype, self.ragged_rank or (self.pad_to is not None) + 0))
