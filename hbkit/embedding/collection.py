"""Collection: the features of a model over their tables; a batch goes through it as one `Staged`.

Look-ahead (`Collection.stage`) dedupes and makes rows resident; the step (`Staged.outputs`, `Staged.apply`) counts,
admits, creates, gathers and pools, then sums gradients per key and updates. The framework's graph sees only
``[B, dim]`` per feature, so it never depends on how many distinct keys a batch has.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from hbkit._ext import segment as _ext
from hbkit.embedding import summands
from hbkit.embedding.summands import Gradient, Joining, Lists
from hbkit.embedding.table import Request, Table, all_finite, nonfinite_gradient
from hbkit.errors import Closed, InvalidArgument, UnknownColumn
from hbkit.ragged import Dictionary, Ragged
from hbkit.shuffle.exchange import Transport
from hbkit.store.line import Float32s, Int64s
from hbkit.store.together import Together

__all__ = ["Collection", "SequenceOutput", "Staged"]

POOLINGS = ("sum", "mean", "sqrtn", None)


class SequenceOutput(NamedTuple):
    """Rows of a list that is not pooled.

    Attributes
    ----------
    values : float32[B, L, dim]
        Zeros where the mask is false.
    mask : bool[B, L]
        NumPy's, also where `values` is on a device.
    """

    values: Any
    mask: npt.NDArray[np.bool_]


class _Input(NamedTuple):
    """One feature of a batch: its keys, and how they fall into rows."""

    keys: Any  # NumPy's, or on the device of their table; or the codes of a dictionary's entries
    dictionary: Any  # None: keys are what they are
    splits: Int64s | None  # None: one key a row
    length: int | None  # lists of a dense array all have this length
    weight: Float32s | None  # one a key

    @property
    def plain(self) -> bool:
        """One key a row and nothing beside it."""
        return self.splits is None and self.dictionary is None and self.weight is None


Empty = Callable[[tuple[int, ...], str], Any]  # of a shape and the name of a device, see `Staged.outputs`


class _Side(NamedTuple):
    """A feature's part of the gradient of a stack on a device: every `step`-th row, from the `first`."""

    values: Any  # float32[size * step, dim]
    step: int
    first: int


class Stages(Protocol):
    """What `Collection.stage_each` gives."""

    def __iter__(self) -> Iterator[tuple[Any, Staged]]: ...

    def close(self) -> None: ...


class Collection:
    """Several features looked up in their tables.

    Parameters
    ----------
    tables : sequence of Table
    features : mapping of feature name to table name, optional
        A feature is a column of the batch; each table is its own feature when left out.
    pooling : "sum", "mean", "sqrtn", None, or a mapping of feature name to one of them
        How a list of keys becomes one row; None keeps the sequence. A scalar key is its row.
    stack : mapping of name to sequence of features, optional
        Features of one dim whose rows stand side by side in one output of that name, float32[size, n, dim], and whose
        gradient is one array: a model that takes them so copies nothing.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        features: Mapping[str, str] | None = None,
        pooling: str | Mapping[str, str | None] | None = "sum",
        stack: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.tables = {t.name: t for t in tables}
        if len(self.tables) != len(tables):
            raise InvalidArgument("two tables have one name", remedy="name each table differently")
        self.features = dict(features) if features is not None else {name: name for name in self.tables}
        for feature, table in self.features.items():
            if table not in self.tables:
                raise UnknownColumn(
                    f"no table {table!r}", feature=feature, remedy=f"tables are {', '.join(self.tables) or 'none'}"
                )
        if isinstance(pooling, Mapping):
            for feature in pooling:
                if feature not in self.features:
                    raise UnknownColumn(f"pooling for unknown feature {feature!r}", remedy="name it in features")
            self.pooling: dict[str, str | None] = {f: pooling.get(f, "sum") for f in self.features}
        else:
            self.pooling = dict.fromkeys(self.features, pooling)
        for feature, how in self.pooling.items():
            if how not in POOLINGS:
                raise InvalidArgument(f"pooling {how!r}", feature=feature, remedy="use sum, mean, sqrtn or None")
        self.stack = {name: list(features) for name, features in (stack or {}).items()}
        self._in_stack = {f: (name, i) for name, features in self.stack.items() for i, f in enumerate(features)}
        self._check_stacks()
        # The features of each table that has some, in their declared order.
        by_table = {name: [f for f, t in self.features.items() if t == name] for name in self.tables}
        self._by_table = {name: features for name, features in by_table.items() if features}
        self._optimizers: dict[str, Any] = {}  # equal ones are one
        for one in tables:
            like = (rule for rule in self._optimizers.values() if rule == one.optimizer)
            self._optimizers[one.name] = next(like, one.optimizer)
        self._training: Staged | None = None
        groups = {**{f: [f] for f in self.features}, **self.stack}
        devices = {output: {self.tables[self.features[f]].device for f in group} for output, group in groups.items()}
        self._devices = {output: found.pop() if len(found) == 1 else None for output, found in devices.items()}
        self._joining = {t.name: summands.joined if t.device is None else Joining(t.memory) for t in tables}

    def _check_stacks(self) -> None:
        for name, features in self.stack.items():
            for f in features:
                if f not in self.features:
                    raise UnknownColumn(
                        f"stack {name!r} of an unknown feature", feature=f, remedy="name it in features"
                    )
            if not features or name in self.features or len({self.dim(f) for f in features}) > 1:
                raise InvalidArgument(
                    f"stack {name!r} of {', '.join(features) or 'nothing'}",
                    remedy="give it a name that no feature has, and features of one dim",
                )
        if len(self._in_stack) != sum(map(len, self.stack.values())):
            raise InvalidArgument("a feature is in two stacks, or twice in one", remedy="name it once")

    @property
    def step(self) -> int:
        """Updates so far: the tables' own, so that a loaded snapshot goes on where it stopped."""
        return max((t.step for t in self.tables.values()), default=0)

    def dim(self, feature: str) -> int:
        """Floats of a feature's row."""
        return self.tables[self.features[feature]].dim

    def device(self, output: str) -> str | None:
        """`Table.device` of a feature, or of all features of a stack: where its rows and its gradient may be."""
        return self._devices[output]

    def stage(
        self,
        batch: Mapping[str, Any],
        train: bool = True,
        size: int | None = None,
        weights: Mapping[str, Any] | None = None,
        ahead: bool = False,
    ) -> Staged:
        """Begin a batch: dedupe its keys and make their rows resident. May run ahead, in batch order.

        Parameters
        ----------
        batch : mapping of column name to array[n], array[n, L], Ragged of rank 1, or a Dictionary with such codes
            Integer keys; of a dictionary, each entry is hashed and looked up once, however many values it has. Columns
            that are no feature are left alone. ``batch.n_rows`` where present says how many of the rows are real.
            Where a feature's table is on a device, int64 keys in its memory are taken too, as an array of any library
            or as `Ragged.on_device`; they must stay as they are until the update.
        train : bool
            Whether the step will count, admit, create and update.
        size : int, optional
            Rows of the outputs; those beyond the batch are zeros and take no gradient.
        weights : mapping of feature to one float a key, optional
            Multiplied into each row before pooling.
        ahead : bool
            Whether more batches are staged before this one is read, so that caches keep what is used sooner.
        """
        return Staged(self, batch, train, size, weights or {}, ahead)

    def stage_each(
        self,
        batches: Iterable[Mapping[str, Any]],
        train: bool = True,
        size: int | None = None,
        ahead: bool = False,
        prepare: Callable[[Any], Any] | None = None,
        empty: Callable[[], Mapping[str, Any]] | None = None,
    ) -> Stages:
        """Stage those of the batches that have rows, one after the other; see `hbkit.embedding.lookahead`."""
        for batch in batches:
            if getattr(batch, "n_rows", 1) == 0:
                continue
            prepared = batch if prepare is None else prepare(batch)
            yield prepared, self.stage(batch, train, size, ahead=ahead)

    def lookup(
        self, batch: Mapping[str, Any], weights: Mapping[str, Any] | None = None
    ) -> dict[str, Float32s | SequenceOutput]:
        """Outputs of a batch, read only: absent keys read their table's default and nothing changes."""
        staged = self.stage(batch, train=False, weights=weights)
        try:
            return staged.outputs()
        finally:
            staged.close()

    def abort(self, error: BaseException) -> None:
        """Where the ranks of a `Sharded` wait for this one, tell them that it has failed."""

    def close(self) -> None:
        """`Table.close` each table. Idempotent."""
        with ExitStack() as stack:  # all of them, whatever one raises
            for table in self.tables.values():
                stack.callback(table.close)

    def stats(self) -> dict[str, dict[str, Any]]:
        """`Table.stats` of each table by name."""
        return {name: table.stats() for name, table in self.tables.items()}


class Staged:
    """One batch on its way through a collection: ``wait``, ``outputs``, ``apply``, ``close``.

    Attributes
    ----------
    share : float
        Of all ranks' rows by weight, this rank's: what its gradients of a mean over its own rows count for. 1 where
        there are no others.
    transport : hbkit.shuffle.Transport or None
        Between the ranks of a `hbkit.embedding.Sharded`.

    Notes
    -----
    ``outputs`` belongs after the previous batch's ``apply``: then it reads what that update wrote, however far ahead
    the batch was staged.
    """

    share: float = 1.0
    transport: Transport | None = None

    def __init__(
        self,
        collection: Collection,
        batch: Mapping[str, Any],
        train: bool,
        size: int | None,
        weights: Mapping[str, Any],
        ahead: bool = False,
    ) -> None:
        self._collection, self._train = collection, train
        inputs = {
            f: _input(f, batch, weights.get(f), collection.tables[t] if collection.device(f) else None)
            for f, t in collection.features.items()
        }
        rows = {f: len(i.keys) if i.splits is None else len(i.splits) - 1 for f, i in inputs.items()}
        n = next(iter(rows.values()), 0)
        for feature, have in rows.items():
            if have != n:
                raise InvalidArgument(f"{have} rows where others have {n}", feature=feature, remedy="align the columns")
        n = min(n, int(getattr(batch, "n_rows", n)))
        self.n_rows, self.size = n, n if size is None else size
        if self.size < n:
            raise InvalidArgument(f"size {size} for a batch of {n} rows", remedy="give at least the batch's rows")
        self._inputs = {f: _first_rows(i, n) for f, i in inputs.items()}
        # Tables in host memory go together; of the others, one request a table: the keys of all its features, in their
        # declared order.
        self._requests: dict[str, Request] = {}
        self._spans: dict[str, slice] = {}
        self._joined = self._joinable() if n and (train or ahead) else {}
        self._together: Any = self._join() if self._joined else None
        for name, features in collection._by_table.items():
            if name in self._joined:
                continue
            end = 0
            for feature in features:
                start, end = end, end + len(self._inputs[feature].keys)
                self._spans[feature] = slice(start, end)
            self._requests[name] = self._request(collection.tables[name], features, ahead)
        self._state = "staged"

    def _joinable(self) -> dict[str, list[str]]:
        """Tables that can go together, and their features."""
        tables, inputs = self._collection.tables, self._inputs
        by_table = self._collection._by_table.items()
        return {t: fs for t, fs in by_table if tables[t].joinable and all(inputs[f].plain for f in fs)}

    def _join(self) -> Any:
        c, keys, places = self._collection, [], []
        groups = {output: i for i, output in enumerate(self._outputs_of(self._joined))}
        for name, features in self._joined.items():
            keys.append(_end_to_end([self._keys(c.tables[name], f) for f in features]))
            for f in features:
                output, number = c._in_stack.get(f, (f, 0))
                places.append((groups[output], number * c.dim(f)))
        return self._together_of([c.tables[name] for name in self._joined], keys, places)

    def _together_of(self, tables: list[Table], keys: list[Int64s], places: list[tuple[int, int]]) -> Any:
        stores: list[Any] = [table.store for table in tables]
        return Together(stores, keys, places, [self.n_rows] * len(stores))

    def _keys(self, table: Table, feature: str) -> Any:
        i = self._inputs[feature]
        try:
            return table.part(i.keys if i.dictionary is None else Dictionary(i.dictionary, i.keys))
        except InvalidArgument as e:
            raise InvalidArgument(e.problem, **e.place, feature=feature, remedy=e.remedy) from None

    def _request(self, table: Table, features: Sequence[str], ahead: bool = False) -> Request:
        return Request(table, [self._keys(table, f) for f in features], ahead)

    def fetch(self) -> None:
        """Make the rows of the batch resident in the nearest tier, as far as they have room there. May run ahead."""
        for request in self._requests.values():
            request.fetch()

    def wait(self, since: float | None = None) -> None:
        """Begin the step: return once the rows of the batch are resident, as far as they have room.

        `since` is when the step could have begun (`time.monotonic`), for ``stats``; now when left out.
        """
        if self._state == "staged":
            for request in self._requests.values():
                request.wait(since)

    def outputs(self, empty: Empty | None = None) -> dict[str, Any]:
        """Rows of each feature: float32[size, dim] (scalar or pooled), or a `SequenceOutput`; the caller's own.

        Parameters
        ----------
        empty : callable, optional
            ``empty(shape, device)`` gives an uninitialised float32 array in the memory of that device, contiguous and
            sliced as NumPy's are, or None to have NumPy's. It is called for each output whose tables are all on one
            device, and is the output: rows are written there, without a copy, and what is launched on the device's
            default stream comes after. NumPy's for all when left out.

        Notes
        -----
        Rows written on a device equal those that NumPy gets; a -0 of a sequence, or of a row times its weight, is 0.

        Raises
        ------
        Closed
            This batch was read or closed before, or an earlier training batch was neither applied nor closed.
        MemoryError
            Each table is as it was or has counted the batch and made its rows; which, is not said. Close the batch.
        """
        step = self._begin()
        for request in self._requests.values():
            request.create(self._train, step)
        return self._read(step, empty)

    @property
    def collection(self) -> Collection:
        """What the batch goes through."""
        return self._collection

    def _begin(self) -> int:
        """The step that the batch is read for, once."""
        c = self._collection
        if self._state != "staged":
            raise Closed(f"the batch was {self._state}", remedy="stage it again")
        if self._train:
            if c._training is not None:
                raise Closed(
                    "the previous batch has neither been applied nor closed", remedy="call its apply() or close() first"
                )
            for table in c.tables.values():
                table.check()
            c._training = self
        self._state = "read"
        return c.step + 1

    def _read(self, step: int, empty: Empty | None = None) -> dict[str, Any]:
        """The outputs, once all rows are made but those of the tables that go together."""
        c = self._collection

        def room(output: str, *shape: int) -> Any:
            device = None if empty is None else c.device(output)
            made = None if empty is None or device is None else empty(shape, device)
            return _ext.retained(shape) if made is None else made

        whole: dict[str, Any] = {
            name: room(name, self.size, len(features), c.dim(features[0])) for name, features in c.stack.items()
        }
        rows = {f: whole[name][:, i] for f, (name, i) in c._in_stack.items()}
        joined = [f for features in self._joined.values() for f in features]
        for f in joined:
            if f not in rows:
                whole[f] = rows[f] = _ext.retained((self.size, c.dim(f)))
        if self._together is not None:
            self._rows_together(step, self._flat(whole))
        for f, name in c.features.items():
            if name not in self._joined:
                out = self._output(f, self._requests[name], partial(room, c._in_stack[f][0] if f in rows else f))
                if f in rows and isinstance(out, SequenceOutput):
                    raise InvalidArgument("a list without pooling in a stack", feature=f, remedy="pool it")
                if f in rows:
                    rows[f][:] = out
                else:
                    whole[f] = out
        if self.n_rows < self.size:
            for name in self._outputs_of(self._joined):
                whole[name][self.n_rows :] = 0
        return {name: whole[name] for name in self._outputs_of({"": list(c.features)})}

    def _rows_together(self, step: int, outs: list[Float32s]) -> None:
        """Rows of the tables that go together."""
        if self._train:
            tables = self._collection.tables
            self._together.create(step, [tables[name].admission for name in self._joined], outs)
        else:
            self._together.gather(outs)

    def _output(self, feature: str, request: Request, room: Callable[..., Any]) -> Any:
        c, i = self._collection, self._inputs[feature]
        part, dim = self._spans[feature], request.table.dim
        if i.splits is not None and c.pooling[feature] is None:
            return self._sequence(i, part, request, room)
        out = room(self.size, dim)
        here = _first(out, self.n_rows)
        if i.splits is not None:
            request.pool(part, i.splits, here, i.weight, self._row_scale(feature))
        else:
            _take(request, part, here, i.weight)
        if self.n_rows < self.size:
            out[self.n_rows :] = 0
        return out

    def _sequence(self, i: _Input, part: slice, request: Request, room: Callable[..., Any]) -> SequenceOutput:
        n, dim = self.n_rows, request.table.dim
        if i.length:
            values, mask = room(self.size, i.length, dim), np.zeros((self.size, i.length), np.bool_)
            _take(request, part, _first(values, n).reshape(-1, dim), i.weight)
            mask[:n] = True
            if n < self.size:
                values[n:] = 0
            return SequenceOutput(values, mask)
        at, length = _positions(i)
        values, mask = room(self.size, length, dim), np.zeros((self.size, length), np.bool_)
        mask.reshape(-1)[at] = True
        if isinstance(values, np.ndarray):
            values[:] = 0
            picked = _ext.retained((len(i.keys), dim))
            request.take(part, picked)
            values.reshape(-1, dim)[at] = picked if i.weight is None else picked * i.weight[:, None]
        else:  # on a device: lists of one key, or of none
            splits = np.zeros(mask.size + 1, np.int64)
            np.cumsum(mask.reshape(-1), out=splits[1:])
            request.pool(part, splits, values.reshape(-1, dim), i.weight, None)
        return SequenceOutput(values, mask)

    def _row_scale(self, feature: str) -> Float32s | None:
        how, splits = self._collection.pooling[feature], self._inputs[feature].splits
        if how == "sum" or splits is None:
            return None
        lengths = np.maximum(np.diff(splits), 1).astype(np.float32)
        divisor = lengths if how == "mean" else np.sqrt(lengths)
        return np.divide(np.float32(1), divisor, dtype=np.float32)

    def hold(self) -> None:
        """Let go of the rows, and let the next batch be read before this one's update, which comes with a later one's.

        Raises
        ------
        Closed
            ``outputs`` was not called, or the batch is closed, or was staged with ``train=False``.
        """
        self._check_read("read")
        self.close()
        self._state = "held"

    def apply(self, grads: Mapping[str, Any], held: Sequence[tuple[Staged, Mapping[str, Any]]] = ()) -> None:
        """Sum gradients per key and update every table once; then the batch is closed.

        Parameters
        ----------
        grads : mapping of output to float32 array of its shape (of a sequence's `values`)
            Or, for a table of named columns, a mapping of their names to such arrays. Where
            `Collection.device` names one, a contiguous array in its memory is used there; it must stay as it is until
            the device has come so far.
            An output left out had no part in the loss.
        held : sequence of (Staged, its gradients)
            Earlier batches, which `hold` was called on: one update for all, as if they and this, which may be held too,
            were one batch.

        Raises
        ------
        Closed
            ``outputs`` was not called, or the batch is closed, or was staged with ``train=False``; or one of `held` is
            not held.
        InvalidArgument
            A gradient has another shape than its output; or holds NaN or infinities and its table's policy is to raise:
            then no table was updated.
        """
        c = self._collection
        self._check_read("read", "held")
        for batch, _ in held:
            if batch._state != "held" or batch._collection is not c:
                raise Closed(f"an earlier batch was {batch._state}", remedy="hold() it, and apply it once")
        step, batches = c.step + 1, [*held, (self, grads)]
        self._update(batches, step)
        self.close()
        for batch, _ in batches:
            batch._state = "applied"
        for table in c.tables.values():
            table.advance(step)

    def _update(self, batches: Sequence[tuple[Staged, Mapping[str, Any]]], step: int) -> None:
        c = self._collection
        alone = self._state == "read" and len(batches) == 1
        joined = self._sum_together(batches[0][1]) if alone else {}
        checked = len(c.tables) > 1  # where one table would refuse, none may be updated
        given = [(batch, batch._parts(grads, checked, joined)) for batch, grads in batches]
        for name, features in c._by_table.items():
            used = [(batch, f, parts[f]) for batch, parts in given for f in features if f in parts]
            if used:
                table = c.tables[name]
                # Rows that only left-out features read stay as they are: an optimizer may move a row by no gradient.
                whole = [(self, f) for f in features] == [(batch, f) for batch, f, _ in used]
                touched = (
                    self._requests[name]
                    if whole and alone and name in self._requests
                    else Request(table, [batch._keys(table, f) for batch, f, _ in used])
                )
                touched.update(*c._joining[name]([part for _, _, part in used]), step, finite=checked)
                touched.close()
        if joined:
            self._apply_together(self._together, joined, step)

    def _apply_together(self, together: Together, tables: Iterable[str], step: int) -> None:
        rules = [self._collection._optimizers[name] for name in tables]
        hypers = {id(rule): rule.hyper(step) for rule in {id(r): r for r in rules}.values()}
        together.apply(rules, [hypers[id(rule)] for rule in rules], step)

    def _check_read(self, *states: str) -> None:
        if self._state not in states or not self._train:
            state = self._state if self._train else "staged for reading only"
            raise Closed(
                f"the batch was {state}",
                feature=", ".join(self._collection.features),
                remedy="stage with train=True, call outputs(), then apply() once",
            )

    def _split(self, grads: Mapping[str, Any]) -> tuple[dict[str, Float32s], dict[str, Any]]:
        """Gradients of stacks, and of all features that have one, the stacks' ones being views."""
        c = self._collection
        grads = {name: grad for name, grad in grads.items() if grad is not None}
        for name in grads:
            if name not in c.stack and (name not in c.features or name in c._in_stack):
                raise UnknownColumn(f"gradient of unknown feature {name!r}", remedy="name outputs of the collection")
        stacks = {}
        for name, features in c.stack.items():
            if name in grads:
                table = None if c.device(name) is None else c.tables[c.features[features[0]]]
                there = table is not None and table.is_there(grads[name])
                shape = (self.size, len(features), c.dim(features[0]))
                stacks[name] = g = _checked(name, grads.pop(name), shape, table)
                flat = g.reshape(-1, shape[2])
                grads |= {f: _Side(flat, shape[1], i) if there else g[:, i] for i, f in enumerate(features)}
        return stacks, grads

    def _parts(self, grads: Mapping[str, Any], check: bool, joined: Container[str] = ()) -> dict[str, Gradient]:
        """`_gradient` of each feature that has one, of other tables than those `joined`.

        With `check`, it is finite where its table asks for that.
        """
        c, (_, of) = self._collection, self._split(grads)
        parts = {f: self._gradient(f, of[f]) for f, t in c.features.items() if f in of and t not in joined}
        if check:
            looked_at: list[Any] = []  # stacks on a device, whose features have one array
            for f, (values, _, scale) in parts.items():
                table = c.tables[c.features[f]]
                if table.nonfinite != "raise" or (scale is None and any(values is other for other in looked_at)):
                    continue
                if not table.all_finite(values, scale):
                    raise nonfinite_gradient("a feature", feature=f, table=table.name)
                looked_at.append(values)
        return parts

    def _sum_together(self, grads: Mapping[str, Any]) -> dict[str, list[str]]:
        """Sum the gradients of the tables that go together; which they are: none where some gradient is missing."""
        if self._together is None:
            return {}
        stacks, of = self._split(grads)
        if not all(f in of for features in self._joined.values() for f in features):
            return {}
        singles = {f: self._gradient(f, of[f])[0] for f in self._outputs_of(self._joined) if f not in stacks}
        return self._joined if self._together.sum(self._flat(stacks | singles)) else self._refused(of)

    def _outputs_of(self, tables: Mapping[str, Sequence[str]]) -> list[str]:
        """Outputs that the features of tables are in: each once, in their order."""
        stacked = self._collection._in_stack
        return list(dict.fromkeys(stacked[f][0] if f in stacked else f for fs in tables.values() for f in fs))

    def _flat(self, outputs: Mapping[str, Float32s]) -> list[Float32s]:
        """Outputs of what goes together, or their gradients, as `Together` takes them."""
        return [outputs[name].reshape(len(outputs[name]), -1)[: self.n_rows] for name in self._outputs_of(self._joined)]

    def _refused(self, grads: Mapping[str, Any]) -> dict[str, list[str]]:
        """Raise for a gradient that is not finite. One table alone looks for the keys by itself: nothing is joined."""
        c = self._collection
        if len(c.tables) > 1:
            for feature in (f for features in self._joined.values() for f in features):
                if not all_finite(self._gradient(feature, grads[feature])[0], None):
                    raise nonfinite_gradient("a feature", feature=feature, table=c.features[feature])
        return {}

    def _gradient(self, feature: str, grad: Any) -> Gradient:
        c, i = self._collection, self._inputs[feature]
        dim = c.dim(feature)
        shape: tuple[int, ...] = (self.size, dim)
        sequence = i.splits is not None and c.pooling[feature] is None
        at: Int64s | None = None
        if sequence:
            at, length = (None, i.length) if i.length else _positions(i)
            shape = (self.size, length, dim)
        step, first = 1, 0
        if isinstance(grad, _Side):
            g, step, first = grad
        else:
            table = c.tables[c.features[feature]]
            whole = table.join(grad) if isinstance(grad, Mapping) else grad
            g = _checked(feature, whole, shape, table).reshape(-1, dim)
        if sequence:
            return (_first(g, len(i.keys)), None, i.weight) if at is None else (g, at, i.weight)
        if i.splits is None:
            if step > 1:
                return g, range(first, self.n_rows * step, step), i.weight
            return _first(g, self.n_rows), None, i.weight
        return g, Lists(i.splits, self._row_scale(feature), step, first), i.weight

    @property
    def state(self) -> str:
        """Where the batch is on its way: "staged", "read", "held", "applied" or "closed"."""
        return self._state

    def close(self) -> None:
        """Let go of the batch's rows; without ``apply`` it updates nothing. Idempotent."""
        if self._state not in ("applied", "closed", "held"):
            self._state = "closed"
            if self._collection._training is self:
                self._collection._training = None
            for request in self._requests.values():
                request.close()


def _input(feature: str, batch: Mapping[str, Any], weight: Any, there: Table | None) -> _Input:
    """A feature's column of a batch; `there` is its table, where that takes what is on its device."""
    try:
        column = batch[feature]
    except KeyError:
        raise UnknownColumn(
            "a feature is not in the batch", feature=feature, remedy=f"the batch has {', '.join(batch) or 'nothing'}"
        ) from None
    dictionary = None
    if isinstance(column, Dictionary):
        dictionary, column = column
    values: Any = column.values if isinstance(column, Ragged) and column.ragged_rank == 1 else column
    taken = isinstance(values, np.ndarray) or (there is not None and there.is_there(values))
    n_dims = len(values.shape) if taken else 0
    if n_dims == 1:
        keys, splits, length = values, column.row_splits[0] if isinstance(column, Ragged) else None, None
    elif n_dims == 2:
        length = int(values.shape[1])
        keys, splits = values.reshape(-1), np.arange(len(values) + 1, dtype=np.int64) * length
    else:
        raise InvalidArgument(
            f"column is {column!r:.80}",
            feature=feature,
            remedy="give integers as array[n], array[n, L] or Ragged of rank 1; hash strings: Field(hash_to='int64')",
        )
    if isinstance(keys, np.ndarray) and keys.size:  # of others, the table looks at the dtype
        kind = keys.dtype if dictionary is None else getattr(dictionary, "dtype", type(dictionary).__name__)
        if keys.dtype.kind not in "iu" or getattr(kind, "kind", "") not in "iu":
            raise InvalidArgument(
                f"keys of type {kind}",
                feature=feature,
                remedy="keys are integers: cast them, or hash strings with Field(hash_to='int64')",
            )
    if weight is not None:
        weight = np.ascontiguousarray(weight.values if isinstance(weight, Ragged) else weight, np.float32).reshape(-1)
        if len(weight) != len(keys):
            raise InvalidArgument(f"{len(weight)} weights for {len(keys)} keys", feature=feature, remedy="align them")
    return _Input(keys, dictionary, splits, length, weight)


def _first_rows(i: _Input, n: int) -> _Input:
    """The first n rows of a feature: padding rows hold no keys."""
    if i.splits is None:
        return _Input(i.keys[:n], i.dictionary, None, None, None if i.weight is None else i.weight[:n])
    splits = i.splits[: n + 1]
    end = int(splits[-1])
    return _Input(i.keys[:end], i.dictionary, splits, i.length, None if i.weight is None else i.weight[:end])


def _first(array: Any, n: int) -> Any:
    """The first n rows; one that is empty is not sliced, which Numba's cannot be."""
    return array if len(array) == n else array[:n]


def _take(request: Request, part: slice, out: Any, weight: Float32s | None) -> None:
    """Rows of a part of the keys times their weights, into ``out[n, dim]``."""
    if weight is None or isinstance(out, np.ndarray):
        request.take(part, out)
        if weight is not None:
            out *= weight[:, None]
    else:  # on a device: lists of one key
        request.pool(part, np.arange(len(out) + 1), out, weight, None)


def _positions(i: _Input) -> tuple[Int64s, int]:
    """Where each key of lists stands in [B, L] flattened, and L: a power of two."""
    assert i.splits is not None
    lengths = np.diff(i.splits)
    longest = int(lengths.max(initial=1))
    length = 1 << (longest - 1).bit_length()
    rows = _ext.row_ids(i.splits)
    return rows * length + (np.arange(len(rows)) - i.splits[rows]), length


def _end_to_end(arrays: list[Any]) -> Any:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _checked(output: str, grad: Any, shape: tuple[int, ...], table: Table | None) -> Any:
    """An output's gradient as contiguous float32 of its shape: NumPy's, or where it is, on the device of `table`."""
    there = table is not None and table.is_there(grad)
    try:
        g = table.memory.array(grad) if table is not None and there else np.asarray(grad)
    except InvalidArgument as e:  # it is not contiguous
        raise InvalidArgument(e.problem, **e.place, feature=output, remedy=e.remedy) from None
    if g.shape != shape or g.dtype.kind != "f" or (there and g.dtype != np.float32):
        raise InvalidArgument(
            f"gradient of {g.dtype}{list(g.shape)}", feature=output, remedy=f"give float32{list(shape)}"
        )
    return g if there else np.ascontiguousarray(g, np.float32)
