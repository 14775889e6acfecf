"""Table: rows by 64-bit key, made when first trained on, updated by a fused optimizer, in any store."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from hbkit._ext.segment import segment_sum
from hbkit.embedding.admission import Admission
from hbkit.embedding.eviction import Eviction
from hbkit.embedding.initializers import Initializer, Normal
from hbkit.embedding.optimizers import Adagrad, Optimizer
from hbkit.errors import Closed, InvalidArgument, Unsupported
from hbkit.shuffle.dedupe import dedupe
from hbkit.store.base import Float32s, Int64s, Layout, StoreSpec
from hbkit.store.host import host_memory
from hbkit.store.keys import KEY_DTYPES, as_keys

__all__ = ["Request", "Table"]


class Table:
    """An embedding table without a vocabulary: any 64-bit key has a row as soon as it is trained on.

    Parameters
    ----------
    name : str
        Unique among the tables of a collection; also seeds the initial rows.
    dim : int
        Floats of a row.
    dtype : "float32"
        Type of the rows.
    key_dtype : "int64", "uint64" or "int32"
        How keys are given and shown. There is no reserved key.
    initializer : Initializer
        First value of a row, a pure function of (its seed, `name`, key, column).
    optimizer : Optimizer
        Runs in `update`.
    store : StoreSpec
        Where the rows live; `hbkit.store.host_memory()` when left out.
    admission : Admission, optional
        Which new keys earn a row; all when left out.
    eviction : sequence of Eviction
        Rules that `evict` applies.
    padding_key : int, optional
        A key that reads zeros, takes no gradient and is never stored.

    Notes
    -----
    Safe to use from several threads in the sense that nothing is corrupted: reads and updates of a batch are ordered
    one after the other by the store.
    """

    def __init__(
        self,
        name: str,
        dim: int,
        dtype: str = "float32",
        key_dtype: str = "int64",
        initializer: Initializer | None = None,
        optimizer: Optimizer | None = None,
        store: StoreSpec | None = None,
        admission: Admission | None = None,
        eviction: Sequence[Eviction] = (),
        padding_key: int | None = None,
    ) -> None:
        if not name or "/" in name or name.startswith("."):
            raise InvalidArgument(f"table name {name!r}", remedy="give a name that can be a file name")
        if not isinstance(dim, (int, np.integer)) or dim < 1:
            raise InvalidArgument(f"dim={dim!r}", table=name, remedy="give a dim of at least 1")
        if dtype != "float32":
            raise Unsupported(f"rows of dtype {dtype!r}", table=name, remedy="use dtype='float32'")
        if key_dtype not in KEY_DTYPES:
            raise InvalidArgument(f"key_dtype {key_dtype!r}", table=name, remedy=f"use one of {', '.join(KEY_DTYPES)}")
        self.name, self.dim, self.dtype, self.key_dtype = name, int(dim), dtype, key_dtype
        self.initializer = initializer or Normal()
        self.optimizer = optimizer or Adagrad(lr=0.05)
        self.eviction = tuple(eviction)
        self.padding_key = padding_key
        self.admission = admission.open() if admission is not None else None
        initialize = partial(self.initializer, name, dim=self.dim)
        self.store = (store or host_memory()).open(
            Layout(name, self.dim, self.optimizer.initial_state(self.dim), initialize)
        )
        self.step = self.store.latest_step()

    def keys(self, keys: npt.ArrayLike) -> Int64s:
        """Keys as the table holds them: contiguous int64[n], unsigned ones by their bits."""
        return as_keys(keys, self.key_dtype, self.name)

    def request(self, keys: npt.ArrayLike) -> Request:
        """Begin a batch: dedupe its keys and reserve their rows. Creates nothing; may run ahead of the step."""
        return Request(self, self.keys(keys))

    def lookup(self, keys: npt.ArrayLike, train: bool = False) -> Float32s:
        """Rows of keys: float32[n, dim], the caller's own.

        With ``train=True`` absent keys are counted and (once admitted) created; else they read zeros and nothing
        changes.
        """
        request = self.request(keys)
        try:
            return np.take(request.rows(train, self.step + 1), request.inverse, axis=0)
        finally:
            request.close()

    def update(self, keys: npt.ArrayLike, grads: npt.ArrayLike) -> None:
        """One optimizer step with ``grads[n, dim]``, one row a key; duplicates are summed, absent keys ignored.

        Raises
        ------
        InvalidArgument
            `grads` has another shape than [n, dim].
        """
        g = np.ascontiguousarray(grads, np.float32)
        request = self.request(keys)
        try:
            if g.shape != (len(request.inverse), self.dim):
                raise InvalidArgument(
                    f"grads of shape {g.shape} for {len(request.inverse)} keys",
                    table=self.name,
                    remedy=f"give [{len(request.inverse)}, {self.dim}]",
                )
            request.update(g, None, None, self.step + 1)
            self.step += 1
        finally:
            request.close()

    def evict(self, step: int | None = None) -> int:
        """Apply the eviction rules as of `step` (the table's own when left out); how many rows went."""
        at, n = self.step if step is None else step, 0
        if self.eviction:
            for chunk in self.store.scan():
                victims = np.logical_or.reduce([rule.victims(chunk, at) for rule in self.eviction])
                n += self.store.erase(chunk.key[victims])
        return n

    def commit(self) -> str:
        """Make all rows durable where the store can; its id."""
        return self.store.commit()

    def close(self) -> None:
        """Let go of the store's memory, files and locks; what was not committed is lost. Idempotent."""
        self.store.close()

    def stats(self) -> dict[str, Any]:
        """What the store counts, with the table's name, dim and step."""
        return {"name": self.name, "dim": self.dim, "step": self.step, **self.store.stats()}

    def __len__(self) -> int:
        return len(self.store)

    def __repr__(self) -> str:
        return f"Table({self.name!r}, dim={self.dim}, rows={len(self)})"


class Request:
    """One table's part of a batch, between look-ahead and update.

    Attributes
    ----------
    inverse : int64[n]
        Row of `rows()` that each key reads.
    """

    def __init__(self, table: Table, keys: Int64s) -> None:
        self.table = table
        unique, self.inverse, counts = dedupe(keys)
        # The padding key keeps its place among the distinct keys, so that `inverse` needs no second numbering.
        self._padding = np.flatnonzero(unique == table.padding_key) if table.padding_key is not None else _NONE
        stored = np.delete(unique, self._padding) if len(self._padding) else unique
        self._n_unique = len(unique)
        self._lease = table.store.reserve(stored, np.delete(counts, self._padding) if len(self._padding) else counts)
        self._open = True

    def rows(self, train: bool, step: int) -> Float32s:
        """Rows of the distinct keys: float32[u, dim]; in training, counts, admits and creates first."""
        lease, table = self._use(), self.table
        if train:
            if table.admission is not None:
                now = table.store.reserve(lease.keys, lease.counts)  # earlier steps may have created some since
                missing = now.slots < 0
                table.store.release(now)
                lease.admitted = np.zeros(len(missing), np.bool_)
                lease.admitted[missing] = table.admission.admit(lease.keys[missing], lease.counts[missing])
            table.store.create(lease, step)
        out = np.empty((len(lease.keys), table.dim), np.float32)
        table.store.gather(lease, out)
        return np.insert(out, self._padding, 0, axis=0) if len(self._padding) else out

    def update(self, values: Float32s, rows: Int64s | None, scale: Float32s | None, step: int) -> None:
        """Sum gradients per key in batch order and run the optimizer.

        Position p of the batch contributes ``scale[p] * values[rows[p]]``; see `hbkit._ext.segment.segment_sum`.
        """
        lease, table = self._use(), self.table
        grads = segment_sum(values, self.inverse, self._n_unique, rows, scale)
        if len(self._padding):
            grads = np.delete(grads, self._padding, axis=0)
        table.store.apply(lease, grads, table.optimizer, table.optimizer.hyper(step), step)

    def _use(self) -> Any:
        if not self._open:
            raise Closed("the batch was closed", table=self.table.name, remedy="stage it again")
        return self._lease

    def close(self) -> None:
        """Let go of the rows. Idempotent."""
        if self._open:
            self._open = False
            self.table.store.release(self._lease)


_NONE = np.zeros(0, np.int64)
