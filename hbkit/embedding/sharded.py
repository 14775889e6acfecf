"""Sharded: a collection whose tables are spread over ranks by key, so that they grow with the ranks.

Look-ahead: distinct keys of a batch go to the ranks that own them, with their counts; an owner dedupes what came from
all ranks and makes the rows resident. The step: owners count, admit, create and gather, and send rows; each rank pools
what it got. Then gradients are summed per key, go the same way back, and are summed at the owner in rank order::

    keys ─▶ dedupe ─▶ by owner ═▶ dedupe ─▶ reserve, fetch          a channel and a thread of their own, batches ahead
    out  ◀─ pool   ◀─ unpack   ◀═ pack   ◀─ gather ◀─ create        the step's channel
    grad ─▶ sum    ─▶ pack     ═▶ unpack ─▶ sum    ─▶ update        the step's channel

Batches are staged in rounds, in which all ranks take part: one without a batch gives an empty one.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from hbkit._ext.hash import hash_bytes
from hbkit._ext.index import Index
from hbkit._ext.segment import Segments, expand, pool, retained
from hbkit.embedding.collection import Collection, SequenceOutput, Staged, _Gradient, _join
from hbkit.embedding.table import Request, Table, distinct
from hbkit.errors import Closed, InvalidArgument, TransportError
from hbkit.shuffle.agree import agree
from hbkit.shuffle.exchange import Bytes, Transport, failed
from hbkit.shuffle.messages import CLOSED, OUT, READY, Channel, Message, Stamp
from hbkit.shuffle.partition import partition
from hbkit.shuffle.quantize import WIRES, Noise, pack, row_nbytes, unpack
from hbkit.store.base import Float32s, Int64s

__all__ = ["Placement", "Sharded"]

Placement = int | str | Int64s  # a rank; "replicate"; keys that are replicated


class Sharded(Collection):
    """A `Collection` of which this rank holds the rows that it owns, and reads and updates all of them.

    All ranks do the same in the same order: stage, read, apply. The loss of each is the mean over its own rows by
    weight; together they train as one rank would on the batches of all, end to end. Updates are synchronous.

    Parameters
    ----------
    collection : Collection
        This rank's part of its tables: equally made on every rank, and empty or loaded from one snapshot.
    transport : hbkit.shuffle.Transport
        Of this object from now on, for the calling thread; the exchange of keys has channels that are split from it.
    wire : "float32", "float16", "bfloat16" or "int8"
        How rows and gradients travel. What a rank has of its own is not rounded.
    placement : mapping of table to placement, optional
        Where a table's rows are; one that is not named is spread by key. A rank (int) holds the table whole.
        "replicate": every rank does, and all make the same updates. int64[n]: it is spread by key, but these keys, that
        most batches hold, are replicated. See `hbkit.embedding.placement.plan`.

    Attributes
    ----------
    transport : hbkit.shuffle.Transport

    Raises
    ------
    SchemaMismatch
        The ranks' configurations differ; the message, and a note with it, show where.
    """

    def __init__(
        self,
        collection: Collection,
        transport: Transport,
        wire: str = "float32",
        placement: Mapping[str, Placement] | None = None,
    ) -> None:
        if wire not in WIRES:
            raise InvalidArgument(f"no wire {wire!r}", remedy=f"use one of {', '.join(WIRES)}")
        self.tables, self.features, self.pooling = collection.tables, collection.features, collection.pooling
        self._by_table = collection._by_table
        self._training = None
        self.transport, self.wire, self.placement = transport, wire, dict(placement or {})
        self._hot: dict[str, Index] = {}
        for name, where in self.placement.items():
            self._place(name, where)
        self._step = Channel(transport, 0)
        self._ahead: list[Channel] = []  # all that were split, by their number less 1
        self._free: set[int] = set()
        self._sent: dict[str, Counter[str]] = {name: Counter() for name in self.tables}
        self._counting = threading.Lock()
        agree(self._step, _settings(self), "tables")

    def _place(self, name: str, where: Placement) -> None:
        size = self.transport.size
        if name not in self.tables or not (
            where == "replicate"
            if isinstance(where, str)
            else where.dtype == np.int64 and where.ndim == 1
            if isinstance(where, np.ndarray)
            else 0 <= where < size
        ):
            raise InvalidArgument(
                f"placement of {name!r}: {where}",
                remedy=f"name a table, and a rank from 0 to {size - 1}, 'replicate', or int64[n] of keys",
            )
        table = self.tables[name]
        if not isinstance(where, int) and (
            table.admission is not None or (table.eviction and not isinstance(where, str))
        ):
            raise InvalidArgument(
                f"replicated keys of table {name} with admission or eviction",
                remedy="place it by key or on one rank: these rules count keys where they are owned",
            )
        if isinstance(where, np.ndarray):
            self._hot[name] = Index()
            self._hot[name].find_or_insert(np.unique(where))
        table.placement = where

    def replicated(self, table: str, keys: Int64s) -> npt.NDArray[np.bool_]:
        """Which keys of a table every rank holds: bool[n]."""
        if table in self._hot:
            held: npt.NDArray[np.bool_] = self._hot[table].find(keys) >= 0
            return held
        return np.full(len(keys), table in self.placement and not isinstance(self.placement[table], int))

    def stage(
        self,
        batch: Mapping[str, Any],
        train: bool = True,
        size: int | None = None,
        weights: Mapping[str, Any] | None = None,
        ahead: bool = False,
        weight: float | None = None,
    ) -> Staged:
        """Begin a batch, as `Collection.stage`; every rank must call it now. To work ahead, use `lookahead`.

        Parameters
        ----------
        weight : float, optional
            What the batch counts for among those of the other ranks; its rows when left out.
        """

        def make() -> tuple[None, _Between, float]:
            staged = _Between(self, batch, train, size, weights or {}, ahead)
            return None, staged, staged.n_rows if weight is None else weight

        _, staged, _ = self._round(self._step, make)
        return staged

    def stage_each(
        self,
        batches: Iterable[Mapping[str, Any]],
        train: bool = True,
        size: int | None = None,
        ahead: bool = False,
        prepare: Callable[[Any], Any] | None = None,
        empty: Callable[[], Mapping[str, Any]] | None = None,
    ) -> _Rounds:
        """Stage batches in rounds, until all ranks have run out; every rank must call it now."""
        return _Rounds(self, self._take_channel(train), batches, train, size, ahead, prepare, empty or self._no_rows)

    def _no_rows(self) -> dict[str, Any]:
        return {feature: np.zeros(0, np.int64) for feature in self.features}

    def _take_channel(self, train: bool) -> Channel:
        """A channel that nobody uses now on any rank, for another thread."""
        mine = json.dumps({"free": sorted(self._free), "train": train})
        every = [json.loads(text) for text in self._step.all_gather(mine.encode())]
        for rank, one in enumerate(every):
            if one["train"] != train:
                raise failed(f"rank {rank} looks ahead with train={one['train']}", self.transport.rank, peer=rank)
        free = set[int].intersection(*(set(one["free"]) for one in every))
        if not free:
            self._ahead.append(Channel(self.transport.split(), len(self._ahead) + 1))
            return self._ahead[-1]
        number = min(free)
        self._free.remove(number)
        return self._ahead[number - 1]

    def _round(
        self,
        channel: Channel,
        make: Callable[[], tuple[Any, _Between, float]],
        status: Callable[[], int] = lambda: READY,
    ) -> tuple[Any, _Between, list[int]]:
        """Exchange the keys of a batch that each rank makes: what was prepared, the batch, and the ranks' statuses."""
        failure: Exception | None = None
        made: tuple[Any, _Between, float] | None = None
        blocks: list[Bytes] = [_NO_BYTES] * self.transport.size
        try:
            made = make()
            blocks = made[1].key_blocks()
        except Exception as e:
            failure = e

        def fill(payloads: list[Bytes]) -> None:
            if failure is not None:
                raise failure
            for payload, block in zip(payloads, blocks, strict=True):
                payload[:] = block[: len(payload)]

        stamp = Stamp("keys", channel.number, channel.n_rounds)
        weight = 0.0 if made is None else made[2]
        messages = channel.exchange(stamp, [len(b) for b in blocks], fill, status=status(), weight=weight)
        channel.n_rounds += 1
        assert made is not None
        prepared, staged, _ = made
        statuses = [m.status for m in messages]
        closed = [r for r, s in enumerate(statuses) if s == CLOSED]
        if closed:
            raise failed(f"rank {closed[0]} has closed its look-ahead", self.transport.rank, peer=closed[0])
        if statuses != [OUT] * len(statuses):
            with self.telling():
                staged.own(stamp, messages)
        return prepared, staged, statuses

    def exchange(
        self, kind: str, keys: Stamp, step: int, sizes: Int64s, fill: Callable[[list[Bytes]], None], expected: Int64s
    ) -> list[Message]:
        """`Channel.exchange` at the step of the batch whose keys were exchanged at `keys`."""
        return self._step.exchange(Stamp(kind, keys.stream, keys.round, step), sizes, fill, expected)

    @contextmanager
    def telling(self) -> Iterator[None]:
        """What goes wrong within, beside any message, is told to the other ranks."""
        try:
            yield
        except BaseException as e:
            self.abort(e)
            raise

    def count(self, table: str, what: str, n: int) -> None:
        """Add to what `stats` says of a table. From any thread."""
        with self._counting:
            self._sent[table][what] += n

    def stats(self) -> dict[str, dict[str, Any]]:
        """`Table.stats` of this rank's part of each table by name, and what of it this rank has sent so far.

        ``sent_keys_nbytes`` (with counts), ``sent_rows_nbytes`` and ``sent_gradients_nbytes``, in which
        ``sent_scales_nbytes`` are those of int8. See `traffic` for the messages.
        """
        zero = dict.fromkeys(("keys", "rows", "gradients", "scales"), 0)
        with self._counting:
            sent = {name: {f"sent_{k}_nbytes": counter[k] for k in zero} for name, counter in self._sent.items()}
        return {name: {**stats, **sent[name]} for name, stats in super().stats().items()}

    def traffic(self) -> dict[str, int]:
        """Messages and bytes that this rank has sent, headers included: ``keys_messages``, ``rows_nbytes``, ..."""
        return dict(sum((channel.sent for channel in (self._step, *self._ahead)), Counter()))

    def abort(self, error: BaseException) -> None:
        """Tell the ranks that wait for this one that it has failed: they raise TransportError."""
        self.transport.abort(f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """Leave the channels of the look-ahead, and `Table.close` this rank's part of each table. Idempotent."""
        for channel in self._ahead:
            channel.close()
        super().close()


class _Rounds:
    """Iterator of (prepared, `Staged`) over a channel of its own; see `Sharded.stage_each`.

    All ranks end in the same round: where all are out, or one fails or closes.
    """

    def __init__(
        self,
        sharded: Sharded,
        channel: Channel,
        batches: Iterable[Mapping[str, Any]],
        train: bool,
        size: int | None,
        ahead: bool,
        prepare: Callable[[Any], Any] | None,
        empty: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._sharded, self._channel, self._batches = sharded, channel, batches
        self._stage = partial(_Between, sharded, train=train, size=size, weights={}, ahead=ahead)
        self._prepare, self._empty = prepare, empty
        self._left: Iterator[Mapping[str, Any]] | None = None
        self._out = self._ended = self._closed = False

    def __iter__(self) -> Iterator[tuple[Any, Staged]]:
        return self

    def __next__(self) -> tuple[Any, Staged]:
        if self._ended:
            raise StopIteration
        try:
            prepared, staged, statuses = self._sharded._round(
                self._channel, self._make, lambda: OUT if self._out else READY
            )
        except BaseException:
            self._ended = True
            raise
        if statuses == [OUT] * len(statuses):
            self._ended = True
            raise StopIteration
        return prepared, staged

    def _make(self) -> tuple[Any, _Between, float]:
        if self._left is None:
            self._left = iter(self._batches)
        batch = None if self._out else next((b for b in self._left if getattr(b, "n_rows", 1) != 0), None)
        self._out = batch is None
        if batch is None:
            batch = self._empty()
        prepared = batch if self._prepare is None else self._prepare(batch)
        staged = self._stage(batch=batch)
        weight = getattr(prepared, "weight", None)
        return prepared, staged, float(staged.n_rows if weight is None else np.sum(weight, dtype=np.float64))

    def close(self) -> None:
        """Take part in one more round, so that no other rank waits for it, and free the channel. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if not self._ended:
            self._ended = True
            stamp = Stamp("keys", self._channel.number, self._channel.n_rounds)
            with suppress(TransportError):
                nothing = [0] * self._channel.transport.size
                self._channel.exchange(stamp, nothing, lambda payloads: None, status=CLOSED)
                self._channel.n_rounds += 1
        self._sharded._free.add(self._channel.number)


class _Part:
    """One table's part of a batch: its keys, those that all ranks hold before those that one does, and what came here.

    Attributes
    ----------
    keys, counts : int64[u]
        This rank's distinct keys, and how often each occurs.
    inverse : int64[n]
        Which of them each position of the batch holds.
    shared : slice
        Those that all ranks hold: they go to all in training, and their rows to none.
    to : slice for each rank
        Those that the rank alone holds.
    sizes, came : int64[ranks]
        How many keys each rank alone holds of these, and sent here of such as this one alone holds.
    here : int64[h]
        The keys that were sent here, in the order of the ranks, of each the shared ones first.
    of, of_shared : slice for each rank
        Which of those it sent, of such as this one alone holds and of shared ones.
    owned : Request
        Of those.
    """

    owned: Request | None = None
    came: Int64s
    here: Int64s
    rows: Float32s

    def __init__(self, table: Table, parts: Sequence[Any], sharded: Sharded) -> None:
        self.table, n_ranks = table, sharded.transport.size
        where = sharded.placement.get(table.name)
        self.keys, self.inverse, self.counts = distinct(parts)
        self.sharing = n_ranks > 1 and where is not None and not isinstance(where, int)
        n_shared = 0
        if n_ranks == 1 or isinstance(where, int):
            self.sizes = np.zeros(n_ranks, np.int64)
            self.sizes[where if isinstance(where, int) else 0] = len(self.keys)
        else:
            order, place, self.sizes = partition(self.keys, n_ranks)
            if self.sharing:
                alone = ~sharded.replicated(table.name, self.keys[order])
                n_shared = len(order) - int(np.count_nonzero(alone))
                ends = np.concatenate([[0], np.cumsum(self.sizes)])
                self.sizes = np.diff(np.concatenate([[0], np.cumsum(alone)])[ends])
                order = order[np.argsort(alone, kind="stable")]
                place[order] = np.arange(len(order))
            self.keys, self.counts, self.inverse = self.keys[order], self.counts[order], place[self.inverse]
        self.shared = slice(0, n_shared)
        self.to = self.of = _slices(self.sizes, n_shared)

    def sent(self, array: npt.NDArray[Any], rank: int, shared: bool = True) -> npt.NDArray[Any]:
        """Of an array over `keys`, what goes to a rank with them."""
        own = array[self.to[rank]]
        return np.concatenate([array[self.shared], own]) if shared and self.shared.stop else own

    def own(
        self, keys: Sequence[Int64s], counts: Sequence[npt.NDArray[Any]] | None, n_shared: Sequence[int], ahead: bool
    ) -> None:
        """Reserve the rows of the keys that each rank sent, the first n_shared of them shared; `counts` in training."""
        ends = np.cumsum([len(k) for k in keys]).tolist()
        firsts = [end - len(k) for end, k in zip(ends, keys, strict=True)]
        self.of_shared = [slice(a, a + s) for a, s in zip(firsts, n_shared, strict=True)]
        self.of = [slice(s.stop, end) for s, end in zip(self.of_shared, ends, strict=True)]
        self.came = np.array([s.stop - s.start for s in self.of], np.int64)
        self.here = np.concatenate(keys)
        total = None if counts is None else np.concatenate([c.astype(np.int64, copy=False) for c in counts])
        self.owned = Request(self.table, [self.here], ahead, total)

    @property
    def request(self) -> Request:
        """Of the keys that came here."""
        assert self.owned is not None, "the keys were not exchanged"
        return self.owned

    def fetch(self) -> None:
        """As `Request.fetch`."""
        self.request.fetch()

    def wait(self, since: float | None = None) -> None:
        """As `Request.wait`."""
        self.request.wait(since)

    def take(self, part: slice, out: Float32s) -> None:
        """As `Request.take`, of the rows that came."""
        expand(self.rows, self.inverse[part], out)

    def pool(
        self, part: slice, splits: Int64s, out: Float32s, weight: Float32s | None, row_scale: Float32s | None
    ) -> None:
        """As `Request.pool`, of the rows that came."""
        pool(self.rows, self.inverse[part], splits, out, weight, row_scale)

    def sums(self, grads: _Gradient, positions: Int64s, share: float) -> Float32s:
        """This rank's share of the gradient of each key: float32[u, dim]."""
        values, rows, scale = grads
        sums: Float32s = Segments(positions, len(self.keys)).of(values, rows, scale).sum()
        if share == 0:  # of no row that counts, the mean is 0/0
            sums[:] = 0
        elif share != 1:
            sums *= np.float32(share)
        return sums

    def close(self) -> None:
        """As `Request.close`."""
        if self.owned is not None:
            self.owned.close()


class _Between(Staged):
    """A batch of which each rank has a part of the rows, and owns a part of the keys."""

    _requests: dict[str, _Part]  # type: ignore[assignment]  # the same calls, over what other ranks hold

    def __init__(
        self,
        sharded: Sharded,
        batch: Mapping[str, Any],
        train: bool,
        size: int | None,
        weights: Mapping[str, Any],
        ahead: bool,
    ) -> None:
        self._sharded, self.transport, self._looks_ahead = sharded, sharded.transport, ahead
        self._rank, self._n_ranks = sharded.transport.rank, sharded.transport.size
        super().__init__(sharded, batch, train, size, weights, ahead)

    def _request(self, table: Table, features: Sequence[str], ahead: bool = False) -> Any:
        return _Part(table, [self._keys(table, f) for f in features], self._sharded)

    # --- keys: how many of each table u32, and of its shared ones u32 where it may have such; the keys i64; in training
    # --- their counts u8 or u32. Shared keys go out in training alone ----------------------------------------

    def key_blocks(self) -> list[Bytes]:
        """What each rank is to know: uint8[n] a rank, nothing for this one."""
        parts = list(self._requests.values())
        blocks = []
        for r in range(self._n_ranks):
            if r == self._rank:
                blocks.append(_NO_BYTES)
                continue
            n_shared = [p.shared.stop * self._train for p in parts]
            n_keys = [p.sizes[r] + s for p, s in zip(parts, n_shared, strict=True)]
            lengths = [*n_keys, *(s for p, s in zip(parts, n_shared, strict=True) if p.sharing)]
            arrays: list[npt.NDArray[Any]] = [np.array(lengths, np.uint32)]
            arrays += [p.sent(p.keys, r, self._train) for p in parts]
            width = 0
            if self._train:
                counts = np.concatenate([_NO_KEYS, *(p.sent(p.counts, r) for p in parts)])
                arrays.append(counts.astype(np.uint8 if counts.max(initial=0) < 256 else np.uint32))
                width = arrays[-1].itemsize
            blocks.append(np.concatenate([a.view(np.uint8) for a in arrays]))
            for p, n in zip(parts, n_keys, strict=True):
                self._sharded.count(p.table.name, "keys", int(n) * (8 + width))
        return blocks

    def own(self, stamp: Stamp, messages: Sequence[Message]) -> None:
        """Reserve the rows of the keys that came from all ranks."""
        parts = list(self._requests.values())
        keys: list[list[Int64s]] = [[] for _ in parts]
        counts: list[list[npt.NDArray[Any]]] = [[] for _ in parts]
        shared: list[list[int]] = [[] for _ in parts]
        for r, message in enumerate(messages):
            if r == self._rank:
                for i, p in enumerate(parts):
                    keys[i].append(p.sent(p.keys, r))
                    counts[i].append(p.sent(p.counts, r))
                    shared[i].append(p.shared.stop)
                continue
            cursor = _Cursor(message.payload)
            sizes = cursor.take(4 * len(parts)).view(np.uint32).astype(np.int64)
            n = int(sizes.sum())
            for i, p in enumerate(parts):
                shared[i].append(int(cursor.take(4).view(np.uint32)[0]) if p.sharing else 0)
            came = cursor.take(8 * n).view(np.int64)
            width = len(cursor.rest) // n if n else 1
            counted = cursor.rest.view(np.uint32 if width == 4 else np.uint8)
            for i, some in enumerate(_slices(sizes)):
                keys[i].append(came[some])
                counts[i].append(counted[some])
        for p, k, c, n_shared in zip(parts, keys, counts, shared, strict=True):
            p.own(k, c if self._train else None, n_shared, self._looks_ahead)
        self._stamp = stamp
        total = sum(m.weight for m in messages)
        self.share = messages[self._rank].weight / total if total > 0 else 0.0

    # --- rows ------------------------------------------------------------------------------------------------

    def outputs(self) -> dict[str, Float32s | SequenceOutput]:
        """As `Staged.outputs`; every rank must call it now. TransportError where another has failed or is lost."""
        failure: Exception | None = None
        step = self._sharded.step + 1
        try:
            self._begin()
        except Closed:
            raise  # the others do not wait for this batch
        except Exception as e:
            failure = e
        wire, parts = self._sharded.wire, list(self._requests.values())

        def fill(payloads: list[Bytes]) -> None:
            if failure is not None:
                raise failure
            for p in parts:
                p.request.create(self._train, step)
            cursors = [_Cursor(payload) for payload in payloads]
            for p in parts:
                here: Float32s = retained((len(p.here), p.table.dim))
                p.request.take(slice(None), here)
                p.rows = retained((len(p.keys), p.table.dim))
                p.rows[p.to[self._rank]] = here[p.of[self._rank]]
                p.rows[p.shared] = here[p.of_shared[self._rank]]
                self._pack("rows", p, here, p.of, cursors, lambda some: None)

        size = [row_nbytes(p.table.dim, wire) for p in parts]
        sizes = sum((n * p.came for n, p in zip(size, parts, strict=True)), self._none)
        expected = sum((n * p.sizes for n, p in zip(size, parts, strict=True)), self._none)
        messages = self._sharded.exchange("rows", self._stamp, step, sizes, fill, expected)
        with self._sharded.telling():
            cursors = [_Cursor(m.payload) for m in messages]
            for p in parts:
                self._unpack(p, p.rows, p.to, cursors)
            return self._read()

    @property
    def _none(self) -> Int64s:
        return np.zeros(self._n_ranks, np.int64)

    def _pack(
        self,
        what: str,
        p: _Part,
        rows: Float32s,
        to: Sequence[slice],
        cursors: Sequence[_Cursor],
        noise: Callable[[slice], Noise | None],
    ) -> None:
        """Rows of a table that go to each other rank."""
        wire, dim = self._sharded.wire, p.table.dim
        for r, (some, cursor) in enumerate(zip(to, cursors, strict=True)):
            if r != self._rank:
                n = some.stop - some.start
                if n:
                    pack(rows[some], wire, cursor.take(n * row_nbytes(dim, wire)), noise(some))
                self._count(what, p, n)

    def _count(self, what: str, p: _Part, n: int) -> None:
        """Count rows that are sent."""
        wire, dim = self._sharded.wire, p.table.dim
        self._sharded.count(p.table.name, what, n * row_nbytes(dim, wire))
        if wire == "int8":
            self._sharded.count(p.table.name, "scales", n * (row_nbytes(dim, wire) - dim))

    def _unpack(self, p: _Part, out: Float32s, of: Sequence[slice], cursors: Sequence[_Cursor]) -> None:
        """Rows of a table that came from each other rank."""
        wire, dim = self._sharded.wire, p.table.dim
        for r, (some, cursor) in enumerate(zip(of, cursors, strict=True)):
            if r != self._rank and some.stop > some.start:
                unpack(cursor.take((some.stop - some.start) * row_nbytes(dim, wire)), dim, wire, out[some])

    # --- gradients: of each table a bit for each key that no used feature reads, then a row for each key ------

    def _update(self, batches: Sequence[tuple[Staged, Mapping[str, Any]]], step: int) -> None:
        given = [(batch, grads) for batch, grads in batches if isinstance(batch, _Between)]
        parts = [p for batch, _ in given for p in batch._requests.values()]
        summed: list[tuple[Float32s, npt.NDArray[np.bool_]]] = []
        shared: list[Bytes] = []

        def fill(payloads: list[Bytes]) -> None:
            for batch, grads in given:
                of = batch._parts(grads, check=batch.share > 0)
                summed.extend(batch._sum(p, of) for p in batch._requests.values())
            cursors = [_Cursor(payload) for payload in payloads]
            for p, (sums, idle) in zip(parts, summed, strict=True):
                shared.append(pack(sums[p.shared], self._sharded.wire, noise=self._noise(p, step, p.shared)))
                block = shared[-1]
                for r, cursor in enumerate(cursors):
                    if r != self._rank:
                        bits = np.packbits(p.sent(idle, r))
                        cursor.take(len(bits))[:] = bits
                        cursor.take(len(block))[:] = block
                self._count("gradients", p, p.shared.stop * (self._n_ranks - 1))
                self._pack("gradients", p, sums, p.to, cursors, partial(self._noise, p, step))

        size = [row_nbytes(p.table.dim, self._sharded.wire) for p in parts]
        to = [p.sizes + p.shared.stop for p in parts]
        of = [p.came + [s.stop - s.start for s in p.of_shared] for p in parts]
        sizes = sum((n * m + (m + 7) // 8 for n, m in zip(size, to, strict=True)), self._none)
        expected = sum((n * m + (m + 7) // 8 for n, m in zip(size, of, strict=True)), self._none)
        messages = self._sharded.exchange("gradients", self._stamp, step, sizes, fill, expected)
        with self._sharded.telling():
            cursors = [_Cursor(m.payload) for m in messages]
            came: dict[str, list[tuple[_Part, Float32s, npt.NDArray[np.bool_]]]] = {}
            for p, n_keys, (sums, idle), block in zip(parts, of, summed, shared, strict=True):
                me = self._rank
                unused = [
                    p.sent(idle, r) if r == me else _bits(cursor, n)
                    for r, (cursor, n) in enumerate(zip(cursors, n_keys.tolist(), strict=True))
                ]
                here: Float32s = retained((len(p.here), p.table.dim))
                here[p.of[me]] = sums[p.to[me]]
                # What this rank sent of shared keys, not what it had: so all add the same.
                unpack(block, p.table.dim, self._sharded.wire, here[p.of_shared[me]])
                for some in (p.of_shared, p.of):
                    self._unpack(p, here, some, cursors)
                came.setdefault(p.table.name, []).append((p, here, np.concatenate(unused)))
            for name, grads_of in came.items():
                self._apply(self._requests[name], grads_of, step)

    def _sum(self, p: _Part, given: Mapping[str, _Gradient]) -> tuple[Float32s, npt.NDArray[np.bool_]]:
        """The gradient of each key of a table, and which have none since all features that read them were left out."""
        features = self._sharded._by_table[p.table.name]
        used = [f for f in features if f in given]
        if not used:
            return np.zeros((len(p.keys), p.table.dim), np.float32), np.ones(len(p.keys), np.bool_)
        positions = p.inverse
        idle = np.zeros(len(p.keys), np.bool_)
        if used != features:
            positions = np.concatenate([p.inverse[self._spans[f]] for f in used])
            idle[:] = True
            idle[positions] = False
        return p.sums(_join([given[f] for f in used]), positions, self.share), idle

    def _noise(self, p: _Part, step: int, some: slice) -> Noise:
        return Noise(0, p.table.name, self._rank, step, p.keys[some])

    def _apply(self, p: _Part, came: Sequence[tuple[_Part, Float32s, npt.NDArray[np.bool_]]], step: int) -> None:
        """Sum what came for each key, batch by batch and in the order of the ranks, and update."""
        finite = self._sharded.wire == "float32"  # else a sender cannot know what becomes of a large value
        if len(came) == 1 and self._state == "read" and not came[0][2].any():
            p.request.update(came[0][1], None, None, step, finite)
            return
        keys = np.concatenate([of.here[~idle] for of, _, idle in came])
        if len(keys):
            request = Request(p.table, [keys])
            request.update(np.concatenate([grads[~idle] for _, grads, idle in came]), None, None, step, finite)
            request.close()


class _Cursor:
    """The next bytes of a payload."""

    def __init__(self, data: Bytes) -> None:
        self.rest = data

    def take(self, n: int) -> Bytes:
        """The next n, of at least so many."""
        some, self.rest = self.rest[:n], self.rest[n:]
        return some


def _slices(sizes: Int64s, first: int = 0) -> list[slice]:
    """Of so many items each, end to end from `first` on."""
    ends = (np.cumsum(sizes) + first).tolist()
    return [slice(a, b) for a, b in zip([first, *ends], ends, strict=False)]


def _bits(cursor: _Cursor, n: int) -> npt.NDArray[np.bool_]:
    return np.unpackbits(cursor.take((n + 7) // 8), count=n).view(np.bool_)


def _settings(sharded: Sharded) -> dict[str, object]:
    """What has to be equal on all ranks."""
    settings: dict[str, object] = {"wire": sharded.wire}
    for name, where in sharded.placement.items():
        if isinstance(where, np.ndarray):
            hot = np.unique(where)
            mark = hash_bytes(hot.view(np.uint8), np.array([0, hot.nbytes]))[0]
            where = f"by key, {len(hot)} keys replicated (hash {mark})"
        settings[f"placement of table {name}"] = where
    for name, t in sharded.tables.items():
        settings |= {f"{what} of table {name}": value for what, value in t.settings().items()}
    for feature, table in sharded.features.items():
        settings[f"table of feature {feature}"] = table
        settings[f"pooling of feature {feature}"] = sharded.pooling[feature]
    return settings


_NO_BYTES, _NO_KEYS = np.zeros(0, np.uint8), np.zeros(0, np.int64)
