"""One column as a field asks for it: what the native decoder is told, and what is left to do with what it gives.

The decoder makes row splits, deals with nulls and hashes; casts, padding, and lists read as plain values come after it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hbkit import errors
from hbkit._ext import chunk as _chunk
from hbkit.parquet.field import Field
from hbkit.parquet.schema import Leaf
from hbkit.parquet.values import Place, cast, null_text, null_value, one_a_row, refuse_nulls, shaped
from hbkit.ragged import Dictionary, Ragged, Strings

__all__ = ["Decoding"]


class Decoding:
    """How the native decoder reads a leaf for a field: one for a field and a file.

    Attributes
    ----------
    form : hbkit._ext.chunk.Form
    dtype : numpy.dtype or None
        Of the decoder's values; None for strings.
    rank : int
        Lists a row nests in what the decoder gives.
    may_misfit : bool
        Whether a value may not fit what the field asks for.
    with_mask : bool
        Whether the output's mask says which values were not null; ``keep_mask`` asks for that.
    """

    def __init__(self, leaf: Leaf, field: Field, place: Place, keep_mask: bool = False) -> None:
        stored = leaf.kind
        self.field, self.stored, self.place = field, stored, place
        self.out = field.output(stored, place.get("file"))
        text = stored.dtype == "string"
        # an empty list read as a plain value is a null, which the decoder cannot know
        self._squeezes = field.ragged_rank == 0 and stored.ragged_rank == 1
        null: str = field.null
        if self._squeezes or (null == "empty" and text and not stored.ragged_rank):
            null = "default"
        self._casts = self.out.dtype != stored.dtype and not field.hash_to
        self._scale = leaf.scale if self.out.dtype.startswith("float") else 0
        self.may_misfit = self._casts or self._squeezes
        self.with_mask = keep_mask or self._squeezes or (self._casts and null == "default")
        self.rank = stored.ragged_rank or int(null == "empty")
        self.dtype = None if text and not field.hash_to else np.dtype("int64" if field.hash_to else stored.dtype)
        fill = b""
        if self.dtype is not None:
            fill = bytes(self.dtype.itemsize)
        if null == "default" and not self.with_mask:
            fill = null_text(field, place) if self.dtype is None else self.dtype.type(self._default()).tobytes()
        self.form = _chunk.Form(
            leaf.physical,
            leaf.type_length,
            leaf.max_def,
            leaf.thresholds,
            leaf.is_null,
            _conversion(leaf, field),
            leaf.bits,
            leaf.is_signed,
            1 if self.dtype is None else self.dtype.itemsize,
            null,
            fill,
            field.hash_seed,
        )
        self._null, self._fill = null, fill

    def _default(self) -> Any:
        return null_value(self.field, self.out.dtype, self.place)

    def output(self, limit_nbytes: int, past_cache: bool = False, dictionary: bool = False) -> Any:
        """An empty `hbkit._ext.chunk.Output` for the decoder: of values, or of codes and their dictionary."""
        if not dictionary:
            return _chunk.Output(self.dtype, self.rank, limit_nbytes, self.with_mask, past_cache)
        if self.may_misfit or self.out.pad_to is not None or self.out.ragged_rank != self.rank:
            raise errors.Unsupported(
                "a dictionary is read as it is stored",
                remedy="leave dtype, ragged_rank and pad_to out, or dictionary=True",
                **self.place,
            )
        entries = _chunk.Output(self.dtype, 0, limit_nbytes)
        if self._null == "default":
            entries.append(self._fill)  # code 0 stands for nulls
        return _chunk.Output(np.dtype(np.uint32), self.rank, limit_nbytes, False, past_cache, entries)

    def goes_on(self, other: Decoding) -> bool:
        """Whether rows that another decoding began may be continued by this one."""
        mine, theirs = ((d.out, d.dtype, d.rank, d.with_mask, d._casts, d._scale, d.field) for d in (self, other))
        return self is other or mine == theirs

    def finish(self, output: Any, place: Place) -> Any:
        """The column that the field asks for, or a Dictionary, of what was decoded.

        Raises
        ------
        NullFound, SchemaMismatch
        """
        field, n_rows, n_nulls = self.field, output.n_rows, output.n_nulls
        values, splits, mask = output.finish()
        if output.dictionary is not None:
            refuse_nulls(n_nulls, n_rows, field, place)
            entries, _, _ = output.dictionary.finish()
            codes = Ragged._trusted(values, splits) if splits else values
            return Dictionary(Strings._trusted(*entries) if self.dtype is None else entries, codes)
        if self._squeezes:
            values, mask, n_nulls = self._squeeze(values, splits[0], mask, place)
            splits = ()
        refuse_nulls(n_nulls, n_rows, field, place)
        if self.dtype is None:
            values = Strings._trusted(*values)
        elif self._casts:
            values = cast(values, np.dtype(self.out.dtype), self._scale, place)
        if mask is not None and not mask.all():
            values[~mask] = self._default()
        return shaped(Ragged._trusted(values, splits) if splits else values, field, self.out)

    def _squeeze(self, values: Any, splits: Any, mask: Any, place: Place) -> tuple[Any, Any, int]:
        """Lists of at most one value as one value a row; an empty list is a null."""
        valid = one_a_row(splits, place)
        valid[valid] = mask
        n_nulls = len(valid) - int(np.count_nonzero(valid))
        if self.dtype is None:
            strings = Strings(*values)
            text = null_text(self.field, place) if n_nulls and self.field.null != "error" else b""
            sizes = np.full(len(valid), len(text))
            sizes[valid] = strings.lengths()[mask]
            ends = np.append(0, np.cumsum(sizes))
            out = np.empty(ends[-1], np.uint8)
            inside = np.repeat(valid, sizes)
            out[inside] = strings.data
            out[~inside] = np.tile(np.frombuffer(text, np.uint8), n_nulls)
            return (out, ends), None, n_nulls
        dense = np.zeros(len(valid), values.dtype)
        dense[valid] = values[mask]
        if self.field.null == "empty":  # of a hashed string
            dense[~valid] = self._default()
            return dense, None, n_nulls
        return dense, valid if self.field.null == "default" else None, n_nulls


def _conversion(leaf: Leaf, field: Field) -> str:
    """A key of `hbkit._ext.chunk.CONVERSIONS`."""
    if leaf.kind.dtype == "string":
        return "hash_bytes" if field.hash_to else "strings"
    if field.hash_to:
        return "hash_int"
    if leaf.kind.logical.startswith("decimal"):
        return {1: "resize", 2: "copy"}.get(leaf.physical, "decimal")
    return "resize" if leaf.physical == 1 and leaf.kind.dtype not in ("int32", "uint32") else "copy"
