"""Table: rows by 64-bit key, made when first trained on, updated by a fused optimizer, in any store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from hbkit._ext import batch as _ext
from hbkit._ext.segment import Gradients, Segments, expand, pool, retained
from hbkit._ext.slabs import ROW_DTYPES
from hbkit.embedding.admission import Admission
from hbkit.embedding.columns import Column, ColumnOptimizer, divide, draws
from hbkit.embedding.eviction import Eviction
from hbkit.embedding.initializers import Default, Initializer, Normal, default_rows, stream
from hbkit.embedding.optimizers import Adagrad, Optimizer
from hbkit.errors import Closed, InvalidArgument, Unsupported
from hbkit.ragged import Dictionary, Ragged
from hbkit.shuffle.dedupe import dedupe
from hbkit.store.base import Lease, Pending, StoreSpec
from hbkit.store.device import DeviceStore, Summands
from hbkit.store.host import HostStore, host_memory
from hbkit.store.keys import KEY_DTYPES, as_keys
from hbkit.store.line import Chunk, Float32s, Int64s, Layout, Part

__all__ = ["Request", "Table"]


class Table:
    """An embedding table without a vocabulary: any 64-bit key has a row as soon as it is trained on.

    Parameters
    ----------
    name : str
        Unique among the tables of a collection; also seeds the initial rows.
    dim : int
        Floats of a row; may be left out where `columns` say it.
    dtype : "float32", "float16" or "bfloat16"
        Type in which rows are held; lookups give float32. Updates are computed in float32 and rounded stochastically,
        as a function of table, key, step and column; optimizer state is float32. Not on a device yet.
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
        Rules that `evict` applies, one after the other: each sees the rows that those before it left.
    padding_key : int, optional
        A key that reads zeros, takes no gradient and is never stored.
    default : float, float32[dim] or Initializer
        What a key without a row reads: one that is absent, or not yet admitted. It takes no memory and no gradient.
    nonfinite : "raise" or "skip"
        What an update does where the gradient of a key is NaN or infinite: raise and change nothing, or leave that
        key's row as it is and count it in ``stats()["skipped_updates"]``.
    evict_every : int, optional
        Look at every row once in so many steps, an equal part of them after each; only on demand when left out.
    on_evict : callable, optional
        ``on_evict(chunk: hbkit.store.line.Chunk)`` gets the rows that are about to go, with state, frequency and last
        step. What it raises leaves them in the table.
    metadata : bool
        Keep frequency and last step, 8 bytes a row (unsigned 32-bit each; larger numbers stay at 2**32 - 1), which
        `IdleSteps` and `MaxRows` need. Without them a snapshot shows frequency 0, and a delta holds all rows.
    columns : mapping of name to Column, optional
        Divides a row into named slices, in this order, each with its own initializer and optimizer: a DeepFM's linear
        weight beside its embedding, say. `split` names the slices of what was looked up.

    Attributes
    ----------
    device : str or None
        "cuda:N" where rows are used in that device's memory, or "cpu" where host memory plays its part
        (`hbkit.store.device_cached`); None where they are in the host's.

    Notes
    -----
    Any number of threads may look up while one updates, on every tier. A lookup sees each row as it was before or after
    an update that runs meanwhile; over host memory, where lookups do not wait for updates of existing rows, it may see
    one in between: some floats old, some new, none torn. Which of several updating threads comes first is not defined.
    A batch of keys is admitted and created as a whole. `evict` may erase what another thread trains on: the key begins
    anew.
    """

    def __init__(
        self,
        name: str,
        dim: int | None = None,
        dtype: str = "float32",
        key_dtype: str = "int64",
        initializer: Initializer | None = None,
        optimizer: Optimizer | None = None,
        store: StoreSpec | None = None,
        admission: Admission | None = None,
        eviction: Sequence[Eviction] = (),
        padding_key: int | None = None,
        default: float | npt.ArrayLike | Initializer = 0.0,
        nonfinite: str = "raise",
        evict_every: int | None = None,
        on_evict: Callable[[Chunk], object] | None = None,
        metadata: bool = True,
        columns: Mapping[str, Column] | None = None,
    ) -> None:
        if not name or "/" in name or name.startswith("."):
            raise InvalidArgument(f"table name {name!r}", remedy="give a name that can be a file name")
        self.initializer = initializer or Normal()
        self.optimizer: Optimizer | ColumnOptimizer = optimizer or Adagrad(lr=0.05)
        self._columns: dict[str, slice] = {}
        if columns is not None:
            self._columns, self.initializer, self.optimizer = divide(columns, self.initializer, self.optimizer, name)
            total = sum(c.dim for c in columns.values())
            if dim not in (None, total):
                raise InvalidArgument(f"dim={dim} and columns of {total}", table=name, remedy="leave dim out")
            dim = total
        if not isinstance(dim, (int, np.integer)) or dim < 1:
            raise InvalidArgument(f"dim={dim!r}", table=name, remedy="give a dim of at least 1")
        if dtype not in ROW_DTYPES:
            raise Unsupported(f"rows of dtype {dtype!r}", table=name, remedy=f"use one of {', '.join(ROW_DTYPES)}")
        if key_dtype not in KEY_DTYPES:
            raise InvalidArgument(f"key_dtype {key_dtype!r}", table=name, remedy=f"use one of {', '.join(KEY_DTYPES)}")
        if nonfinite not in ("raise", "skip"):
            raise InvalidArgument(f"nonfinite={nonfinite!r}", table=name, remedy="use 'raise' or 'skip'")
        if evict_every is not None and (evict_every < 1 or not eviction):
            raise InvalidArgument(
                f"evict_every={evict_every} with {len(eviction)} rules",
                table=name,
                remedy="give at least 1 step, and eviction=[...]",
            )
        for rule in eviction:
            if rule.reads_metadata and not metadata:
                raise InvalidArgument(
                    f"{rule} reads what metadata=False leaves out", table=name, remedy="keep the metadata"
                )
        self.name, self.dim, self.dtype, self.key_dtype = name, int(dim), dtype, key_dtype
        self.eviction = tuple(eviction)
        self.placement: Any = None  # where a `Sharded` has its rows, which saves and loads go by
        self.padding_key = padding_key
        self._padding = None if padding_key is None else int(as_keys([padding_key], key_dtype, name)[0])
        self.default = _checked(default, name, self.dim)
        self._default = None if self.default is None else partial(default_rows, self.default, name, dim=self.dim)
        self.nonfinite, self.evict_every, self.on_evict = nonfinite, evict_every, on_evict
        self.admission = admission.open() if admission is not None else None
        self._admission_rule = admission
        self._n_evicted = 0
        initialize = partial(self.initializer, name, dim=self.dim)
        state, fill = self.optimizer.initial_state(self.dim), draws(self.initializer, name, self.dim)
        layout = Layout(name, self.dim, state, initialize, metadata, fill, dtype, stream(0, name))
        self.store = (store or host_memory()).open(layout)
        self.device = self.store.device if isinstance(self.store, DeviceStore) else None
        self._reads_keys = isinstance(self.store, HostStore) and self._default is None and self._padding is None
        # Whether a batch of single keys may go through several tables at once.
        plain = dtype == "float32" and nonfinite == "raise" and isinstance(self.optimizer, Optimizer)
        self.joinable = self._reads_keys and plain
        self.step = self.store.latest_step()
        self.pending: Pending | None = None  # what goes on with the table in the background
        if self.admission is not None and (kept := self.store.kept()):
            try:
                self.admission.load_state(kept)
            except BaseException:
                self.store.close()
                raise

    def keys(self, keys: npt.ArrayLike) -> Int64s:
        """Keys as the table holds them: contiguous int64[n], unsigned ones by their bits; on its device if they are."""
        return self._keys_there(keys) if self.is_there(keys) else as_keys(keys, self.key_dtype, self.name)

    def is_there(self, array: Any) -> bool:
        """Whether an array is in the memory of the table's device, and no NumPy array."""
        if self.device is None or isinstance(array, np.ndarray):
            return False
        if hasattr(array, "copy_to_host"):  # Numba's
            return True
        if not hasattr(array, "__dlpack__"):
            return False
        return self.device == "cpu" or tuple(array.__dlpack_device__()) == (_CUDA, int(self.device[5:]))

    def _keys_there(self, keys: Any) -> Any:
        """`keys` of arrays on the device."""
        if len(keys) == 0:
            return _NONE
        found = self.memory.array(keys)
        if found.dtype not in (np.int64, np.uint64) or found.ndim != 1:
            raise InvalidArgument(
                f"keys are {found.dtype} of {found.ndim} dimensions on {self.device}",
                table=self.name,
                remedy="give a vector of int64 or uint64 there, or integers of NumPy",
            )
        if self.key_dtype == "int32":  # whose range the host looks at
            return as_keys(self.memory.fetch(found), self.key_dtype, self.name)
        return keys if found.dtype == np.int64 else found.view(np.int64)

    @property
    def _there(self) -> DeviceStore:
        """The store of a table that is on a device."""
        assert isinstance(self.store, DeviceStore), "the table is in host memory"
        return self.store

    @property
    def memory(self) -> Any:
        """The opened device of a table that is on one (`hbkit.cuda.device.Device`)."""
        return self._there.memory

    def near(self, array: Any) -> npt.NDArray[Any]:
        """An array as NumPy's: what is on the table's device is waited for and copied."""
        return self.memory.fetch(self.memory.array(array)) if self.is_there(array) else np.asarray(array)

    def request(self, *parts: npt.ArrayLike | Dictionary) -> Request:
        """Begin a batch: dedupe its keys and reserve their rows. Creates nothing; may run ahead of the step.

        Parameters
        ----------
        *parts : integers [n], or Dictionary of integers with codes uint32[n]
            Parts of the batch, in this order. Of a dictionary, only the entries are looked at that the codes use.
        """
        return Request(self, [self.part(part) for part in parts])

    def part(self, keys: npt.ArrayLike | Dictionary) -> Int64s | Dictionary:
        """Part of a batch as `Request` takes it: `keys`, also of a dictionary that is no longer than its codes."""
        if not isinstance(keys, Dictionary):
            return self.keys(keys)
        if isinstance(keys.codes, Ragged) or isinstance(keys.dictionary, Ragged):
            raise InvalidArgument("keys are lists", table=self.name, remedy="give them to a Collection")
        codes = np.ascontiguousarray(keys.codes, np.uint32)
        entries: Any = keys.dictionary  # of strings, `self.keys` refuses
        # A large dictionary of which a small batch uses little; and a device dedupes keys sooner than they are sent.
        if len(entries) > len(codes) or self.device is not None:
            values: Any = Dictionary(entries, codes).decode()
            return self.keys(values)
        return Dictionary(self.keys(entries), codes)

    def lookup(self, keys: npt.ArrayLike | Dictionary, train: bool = False) -> Float32s:
        """Rows of keys: float32[n, dim], the caller's own.

        With ``train=True`` absent keys are counted and (once admitted) created; else they read the default and nothing
        changes.

        Parameters
        ----------
        keys : integers [n], or Dictionary of integers with codes uint32[n]
            Any of them may repeat; not contiguous ones are copied.

        Raises
        ------
        InvalidArgument
            The keys are no vector of integers, do not fit `key_dtype`, or a code is outside its dictionary.
        MemoryError
            A new row does not fit; then nothing was counted or made.
        """
        if train:
            self.check()
        request = self.request(keys)
        try:
            out: Float32s = retained((len(request), self.dim))
            request.create(train, self.step + 1)
            request.take(slice(None), out)
            return out
        finally:
            request.close()

    def split(self, rows: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """The named columns of rows[..., dim], as views."""
        return {name: rows[..., place] for name, place in self._columns.items()}

    def join(self, grads: Mapping[str, npt.ArrayLike]) -> Float32s:
        """Gradients of all columns, each [..., column's dim], as those of whole rows: float32[..., dim]."""
        if set(grads) != set(self._columns):
            raise InvalidArgument(
                f"gradients of {', '.join(grads) or 'no columns'}",
                table=self.name,
                remedy=f"give those of {', '.join(self._columns) or 'whole rows'}",
            )
        parts = [np.asarray(self.near(grads[name]), np.float32) for name in self._columns]
        shapes = [
            (*part.shape[:-1], place.stop - place.start)
            for part, place in zip(parts, self._columns.values(), strict=True)
        ]
        if [p.shape for p in parts] != shapes or len({s[:-1] for s in shapes}) != 1:
            raise InvalidArgument(
                f"gradients of shapes {[p.shape for p in parts]}", table=self.name, remedy=f"give {shapes}"
            )
        return np.concatenate(parts, axis=-1)

    def update(self, keys: npt.ArrayLike | Dictionary, grads: npt.ArrayLike | Mapping[str, npt.ArrayLike]) -> None:
        """One optimizer step with ``grads[n, dim]``, one row a key; duplicates are summed, absent keys ignored.

        Parameters
        ----------
        keys : as `lookup` takes them
        grads : float32[n, dim], or a mapping of all columns' names to float32[n, column's dim]

        Raises
        ------
        InvalidArgument
            `grads` has another shape than [n, dim], or holds NaN or infinities and the table's policy is to raise.
        MemoryError
            Nothing was updated. But if it comes from the sweep of `evict_every`, the update is done and counted in
            `step`, and that part of the keys waits for its next turn.
        """
        self.check()
        g = np.ascontiguousarray(self.join(grads) if isinstance(grads, Mapping) else grads, np.float32)
        request = self.request(keys)
        try:
            if g.shape != (len(request), self.dim):
                raise InvalidArgument(
                    f"grads of shape {g.shape} for {len(request)} keys",
                    table=self.name,
                    remedy=f"give [{len(request)}, {self.dim}]",
                )
            request.update(g, None, None, self.step + 1)
            self.advance(self.step + 1)
        finally:
            request.close()

    def check(self) -> None:
        """Before a step: raise, once, what went wrong with the table in the background, such as a save."""
        if self.pending is not None:
            self.pending.check()

    def advance(self, step: int) -> None:
        """Update number `step` is done: evict the part of the rows that is due then."""
        self.step = step
        if self.evict_every is not None:
            self.evict(step, (step % self.evict_every, self.evict_every))

    def evict(self, step: int | None = None, part: tuple[int, int] = (0, 1)) -> int:
        """Apply the eviction rules; how many rows went.

        Parameters
        ----------
        step : int, optional
            As of which step; the table's own when left out.
        part : (i, n)
            Look only at the i-th of n equal parts of all keys, 0 <= i < n.

        Notes
        -----
        Rows go in chunks of at most 65,536, each whole or not at all: where this raises, later chunks are still there.
        """
        at, n = self.step if step is None else step, 0
        if not 0 <= part[0] < part[1]:
            raise InvalidArgument(f"part {part}", table=self.name, remedy="give (i, n) with 0 <= i < n")
        if self.eviction:
            bits = min(rule.group_bits for rule in self.eviction)
            rows = self.on_evict is not None or any(rule.reads_rows for rule in self.eviction)
            for chunk in _whole_groups(self.store.part(Part.share(*part, bits), rows), bits):
                gone = np.zeros(len(chunk.key), np.bool_)
                for rule in self.eviction:
                    left = np.flatnonzero(~gone)
                    gone[left] = rule.victims(Chunk._make(column[left] for column in chunk), at)
                if gone.any():
                    if self.on_evict is not None:
                        self.on_evict(Chunk._make(column[gone] for column in chunk))
                    went = self.store.erase(chunk.key[gone])
                    self._n_evicted += went
                    n += went
        return n

    def commit(self) -> str:
        """Make all rows, and the counts of admission, durable where the store can; its id."""
        return self.store.commit(None if self.admission is None else self.admission.state())

    def close(self) -> None:
        """Let go of the store's memory, files and locks; what was not committed is lost. Idempotent.

        Waits for a save in the background, and raises what made it fail if nothing else has.
        """
        try:
            if self.pending is not None:
                self.pending.settle()
        finally:
            self.store.close()

    def stats(self) -> dict[str, Any]:
        """What the store counts, with the table's name, dim and step.

        Memory is counted to the byte: ``index_nbytes``, ``lines_nbytes`` (rows with optimizer state),
        ``metadata_nbytes`` (frequency and last step, 0 with ``metadata=False``) and ``admission_nbytes``.
        """
        return {
            "name": self.name,
            "dim": self.dim,
            "step": self.step,
            **self.store.stats(),
            "admission_nbytes": 0 if self.admission is None else self.admission.nbytes,
            "evicted_rows": self._n_evicted,
        }

    def all_finite(self, values: Any, scale: Any) -> bool:
        """Whether gradients and what scales them hold no NaN or infinities; both may be on the table's device."""
        if isinstance(values, np.ndarray) and (scale is None or isinstance(scale, np.ndarray)):
            return all_finite(values, scale)
        return self._there.all_finite(values, scale)

    def settings(self) -> dict[str, object]:
        """What makes the table's rows what they are, besides its data: equal on all ranks that share it."""
        return {
            "dim": self.dim,
            "dtype": self.dtype,
            "key_dtype": self.key_dtype,
            "initializer": self.initializer,
            "optimizer": self.optimizer,
            "admission": self._admission_rule,
            "eviction": self.eviction,
            "padding_key": self.padding_key,
            "default": self.default,
            "nonfinite": self.nonfinite,
            "evict_every": self.evict_every,
            "metadata": self.store.layout.metadata,
            "step": self.step,
        }

    def __len__(self) -> int:
        return len(self.store)

    def __repr__(self) -> str:
        return f"Table({self.name!r}, dim={self.dim}, rows={len(self)})"


def _checked(default: float | npt.ArrayLike | Initializer, table: str, dim: int) -> Default | None:
    """What keys without a row read, None for zeros."""
    if isinstance(default, Initializer):
        return default
    row = np.asarray(default)
    if row.dtype.kind not in "iuf" or row.shape not in ((), (dim,)) or not np.isfinite(row).all():
        raise InvalidArgument(
            f"default {default!r:.80}", table=table, remedy=f"give a finite number, {dim} of them, or an Initializer"
        )
    row = np.broadcast_to(row.astype(np.float32), dim)
    return row if row.any() else None


def _whole_groups(chunks: Iterable[Chunk], bits: int) -> Iterator[Chunk]:
    """The same rows, no two chunks sharing keys whose mixes agree in their leading `bits`."""
    held: Chunk | None = None
    for chunk in chunks:
        if bits == 64:
            yield chunk
            continue
        if held is not None:
            both: list[Chunk] = [held, chunk]
            chunk = Chunk._make(np.concatenate(columns) for columns in zip(*both, strict=True))
        cut = 0
        if bits and len(chunk.key):
            group = _ext.mixed(chunk.key) >> np.uint64(64 - bits)
            cut = int(np.searchsorted(group, group[-1]))
        if cut:
            yield Chunk._make(column[:cut] for column in chunk)
        held = Chunk._make(column[cut:] for column in chunk)
    if held is not None:
        yield held


def _end_to_end(parts: Sequence[Any]) -> Int64s:
    whole: Int64s = np.concatenate(parts) if len(parts) > 1 else parts[0]
    return whole


def distinct(parts: Sequence[Int64s | Dictionary]) -> tuple[Int64s, Int64s, Int64s]:
    """As `dedupe` of all keys end to end; a dictionary's entries stand for their values, so each is hashed once."""
    arrays = [part for part in parts if not isinstance(part, Dictionary)]
    if len(arrays) == len(parts):
        whole: Any = dedupe(_end_to_end(arrays))
        return tuple(whole)
    keys, counts, used = [], [], []
    for part in parts:
        if isinstance(part, Dictionary):
            n = _ext.code_counts(part.codes, len(part.dictionary))
            some = np.flatnonzero(n)
            keys.append(np.asarray(part.dictionary)[some])
            counts.append(n[some])
            used.append(some)
        else:
            keys.append(part)
            counts.append(np.ones(len(part), np.int64))
            used.append(_NONE)
    unique, entry, _ = dedupe(np.concatenate(keys))
    inverse, end = [], 0
    for part, some, held in zip(parts, used, keys, strict=True):
        start, end = end, end + len(held)
        if isinstance(part, Dictionary):
            of_code = np.empty(len(part.dictionary), np.int64)
            of_code[some] = entry[start:end]
            inverse.append(_ext.decode(part.codes, of_code))
        else:
            inverse.append(entry[start:end])
    total = _ext.sum_counts(entry, np.concatenate(counts), len(unique))
    return unique, inverse[0] if len(inverse) == 1 else np.concatenate(inverse), total


class Request:
    """One table's part of a batch, between look-ahead and update.

    Host memory finds every key sooner than it could dedupe them all. So what only reads there, and is not staged ahead,
    goes from keys to rows; a lease is taken out when the batch turns out to need one.

    Of a table on a device, keys are deduped there, and `inverse` is there. What `take`, `pool` and `update` are given
    may be there too, and is then used there.
    """

    def __init__(
        self,
        table: Table,
        parts: Sequence[Int64s | Dictionary],
        ahead: bool = False,
        counts: Int64s | None = None,
    ) -> None:
        self.table = table
        self._counts = counts  # occurrences that each key stands for; 1 when left out
        self._parts: Sequence[Int64s | Dictionary] = parts or [_NONE]
        self._keys: Int64s | None = None
        self._lease: Lease | None = None
        self._open = True
        self._room: tuple[Float32s, Float32s, npt.NDArray[np.bool_]] | None = None
        self._whole = table._default is None  # whether a key without a row reads zeros, or none is without
        self._deduped_there = table.device is not None and counts is None
        if (
            table._reads_keys
            and not ahead
            and counts is None
            and not any(isinstance(part, Dictionary) for part in self._parts)
        ):
            self._keys = _end_to_end(self._parts)
            self._parts = [self._keys]
        else:
            self._reserve(ahead)

    def _reserve(self, ahead: bool = False) -> Lease:
        table = self.table
        if self._deduped_there:
            return self._reserve_there(ahead)
        unique, self._inverse, counts = distinct(self._parts)
        if self._counts is not None:
            counts = _ext.sum_counts(self._inverse, self._counts, len(unique))
        padding = -1 if table._padding is None else _ext.find_key(unique, table._padding)
        self._lease = lease = table.store.reserve(unique, counts, padding, ahead)
        self._keys = None
        return lease

    def _reserve_there(self, ahead: bool) -> Lease:
        table, store = self.table, self.table._there
        parts = [part for part in self._parts if len(part)]
        join = table.memory.join if len(parts) > 1 and any(map(table.is_there, parts)) else _end_to_end
        lease: Any = store.reserve_batch(join(parts or [_NONE]), table._padding, ahead)
        self._lease, self._inverse = lease, lease.inverse
        return self._lease

    def __len__(self) -> int:
        return len(self.inverse if self._keys is None else self._keys)

    @property
    def inverse(self) -> Any:
        """Row of `rows()` that each key reads: int64[n], of a table on a device in its memory."""
        if self._lease is None:
            self._reserve()
        return self._inverse

    def fetch(self) -> None:
        """Bring the rows near. May run ahead of the step, in another thread."""
        if self._lease is not None:
            self.table.store.fetch(self._use())

    def wait(self, since: float | None = None) -> None:
        """Begin the step: return once the rows are near. `since` as in `hbkit.store.base.Store.wait`."""
        if self._lease is not None:
            self.table.store.wait(self._use(), since)

    def create(self, train: bool, step: int) -> None:
        """In training, count the keys, admit and create rows; first of what the step does."""
        if train:
            lease = self._use()
            self._whole |= self._deduped_there and self.table.admission is None
            if not self._whole:  # first: to read what was made must need no memory
                self._room = self._make_room()
            self.table.store.create(lease, step, self.table.admission)

    def _make_room(self) -> tuple[Float32s, Float32s, npt.NDArray[np.bool_]]:
        """For rows of the distinct keys; what each reads where it has none; and for which have none."""
        keys, table = self._use().keys, self.table
        default = np.zeros((1, table.dim), np.float32) if table._default is None else table._default(keys)
        return retained((len(keys), table.dim)), default, np.empty((len(keys), 1), np.bool_)

    def rows(self) -> Float32s:
        """Rows of the distinct keys: float32[u, dim]."""
        lease = self._use()
        out, default, absent = self._room or self._make_room()
        self.table.store.gather(lease, out)
        np.less(lease.slots[:, None], _ZERO, out=absent)
        if lease.padding >= 0:
            absent[lease.padding] = False
        np.copyto(out, default, where=absent)
        return out

    def take(self, part: slice, out: Any) -> None:
        """Rows of a part of the keys, into ``out[n, dim]``."""
        store = self.table.store
        if self._keys is not None and self._open and isinstance(store, HostStore):
            store.lookup(self._keys[part], out)
        elif self._whole:
            store.gather(self._use(), out, self._of(part))
        else:
            self._from_rows(out, lambda to: expand(self.rows(), self._near(self._of(part)), to))

    def pool(self, part: slice, splits: Int64s, out: Any, weight: Float32s | None, row_scale: Float32s | None) -> None:
        """Weighted sums of the rows of a part of the keys; see `hbkit._ext.segment.pool`."""
        store = self.table.store
        if self._keys is not None and self._open and isinstance(store, HostStore):
            store.lookup_pooled(self._keys[part], splits, out, weight, row_scale)
        elif self._whole:
            store.pool(self._use(), self._of(part), splits, out, weight, row_scale)
        else:
            inverse = self._near(self._of(part))
            self._from_rows(out, lambda to: pool(self.rows(), inverse, splits, to, weight, row_scale))

    def _of(self, part: slice) -> Any:
        """`inverse` of a part of the keys. A device's is sliced where it must be: that costs, or fails if empty."""
        inverse = self.inverse
        whole = part.indices(len(inverse))[:2] == (0, len(inverse))
        return inverse if whole else inverse[part]

    def _from_rows(self, out: Any, make: Callable[[Float32s], object]) -> None:
        """Let `make` write what is read of `rows()`; into host memory first where `out` is elsewhere."""
        if isinstance(out, np.ndarray):
            make(out)
        else:
            to: Float32s = retained((len(out), self.table.dim))
            make(to)
            self.table.memory.join([to], out)

    def _near(self, array: Any) -> Any:
        """An array that may be on the table's device, or None, in the host's memory."""
        return array if array is None or isinstance(array, np.ndarray) else self.table.memory.fetch(array)

    def update(self, values: Any, rows: Any, scale: Any, step: int, finite: bool = False) -> None:
        """Sum gradients per key in batch order and run the optimizer.

        Position p of the batch contributes ``scale[p] * values[rows[p]]``; see `hbkit._ext.segment.segment_sum`.
        `finite` says that all of them are known to be finite.
        """
        lease, table = self._use(), self.table
        grads = Summands(values, rows, scale) if self._deduped_there else self._segments(values, rows, scale)
        if table.nonfinite == "raise" and not finite and not table.all_finite(values, scale):
            self._refuse_nonfinite(self._segments(values, rows, scale).sum())
        hyper = table.optimizer.hyper(step)
        table.store.apply(lease, grads, table.optimizer, hyper, step, skip=table.nonfinite == "skip")

    def _segments(self, *gradient: Any) -> Gradients:
        values, rows, scale = map(self._near, gradient)
        return Segments(self._near(self.inverse), len(self._use().keys)).of(values, rows, scale)

    def _refuse_nonfinite(self, sums: Float32s) -> None:
        bad, lease = ~_ext.finite_rows(sums), self._use()
        if lease.padding >= 0:
            bad[lease.padding] = False
        if bad.any():
            raise nonfinite_gradient(
                f"{np.count_nonzero(bad)} of {len(bad)} keys", table=self.table.name, key=lease.keys[bad][0]
            )

    def _use(self) -> Lease:
        if not self._open:
            raise Closed("the batch was closed", table=self.table.name, remedy="stage it again")
        return self._lease or self._reserve()

    def close(self) -> None:
        """Let go of the rows. Idempotent."""
        if self._open:
            self._open = False
            if self._lease is not None:
                self.table.store.release(self._lease)


def all_finite(values: Float32s, scale: Float32s | None) -> bool:
    """Whether neither gradients nor what scales them hold NaN or infinities."""
    return bool(_ext.all_finite(values) and (scale is None or _ext.all_finite(scale.reshape(-1, 1))))


def nonfinite_gradient(of: str, **place: object) -> InvalidArgument:
    """The error for a gradient that is not finite."""
    return InvalidArgument(
        f"training diverged: NaN or infinity in the gradient of {of}",
        **place,
        remedy="nothing was updated; lower the learning rates, look for extreme inputs, or give nonfinite='skip'",
    )


_NONE, _ZERO = np.zeros(0, np.int64), np.zeros((), np.int64)
_CUDA = 2  # as DLPack numbers devices
