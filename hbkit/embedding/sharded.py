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
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from hbkit._ext.hash import hash_bytes
from hbkit._ext.index import Index
from hbkit._ext.segment import Segments, expand, pool, retained
from hbkit._ext.together import Together
from hbkit.embedding import summands
from hbkit.embedding.collection import Collection, Empty, Staged
from hbkit.embedding.summands import Gradient, Joined
from hbkit.embedding.table import Request, Table, distinct
from hbkit.errors import Closed, InvalidArgument, TransportError
from hbkit.shuffle.agree import agree
from hbkit.shuffle.exchange import Bytes, Transport, failed
from hbkit.shuffle.messages import CLOSED, OUT, READY, Channel, Message, Stamp
from hbkit.shuffle.partition import partition
from hbkit.shuffle.quantize import WIRES, Noise, pack, row_nbytes, unpack
from hbkit.shuffle.residuals import Residuals
from hbkit.store.line import Float32s, Int64s
from hbkit.store.together import Together as StoresTogether

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
    feedback : int
        Keys of each table, those first sent, for which this rank keeps what rounding left out of their gradients, to
        add it to the next: ``4 * dim`` bytes each.

    Attributes
    ----------
    transport : hbkit.shuffle.Transport

    Raises
    ------
    SchemaMismatch
        The ranks' tables, features, wire or placement differ; the message shows where, as a diff.
    """

    def __init__(
        self,
        collection: Collection,
        transport: Transport,
        wire: str = "float32",
        placement: Mapping[str, Placement] | None = None,
        feedback: int = 0,
    ) -> None:
        if wire not in WIRES:
            raise InvalidArgument(f"no wire {wire!r}", remedy=f"use one of {', '.join(WIRES)}")
        vars(self).update(vars(collection))  # all that a collection is, over the same tables
        self._training = None
        self._devices = dict.fromkeys(self._devices)  # rows and gradients travel from host memory to host memory
        self.transport, self.wire, self.placement = transport, wire, dict(placement or {})
        self.feedback = feedback
        self._hot: dict[str, Index] = {}
        for name, where in self.placement.items():
            self._place(name, where)
        self._step = Channel(transport, 0)
        self._residuals = {
            name: Residuals(feedback, t.dim) for name, t in self.tables.items() if feedback and wire != "float32"
        }
        self._ahead: list[Channel] = []  # all that were split, by their number less 1
        self._free: set[int] = set()
        self._sent: dict[str, Counter[str]] = {what: Counter() for what in ("keys", "rows", "gradients", "scales")}
        self._row_nbytes = {name: row_nbytes(t.dim, wire) for name, t in self.tables.items()}
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

    def count(self, what: str, nbytes: Mapping[str, int]) -> None:
        """Add bytes of each table to what `stats` says. From any thread."""
        with self._counting:
            self._sent[what].update(nbytes)

    def count_rows(self, what: str, parts: Sequence[_Part], n: Sequence[int] | Int64s) -> None:
        """Add so many rows of each part."""
        rows: Counter[str] = Counter()
        for p, m in zip(parts, n, strict=True):
            rows[p.table.name] += int(m)
        self.count(what, {name: m * self._row_nbytes[name] for name, m in rows.items()})
        if self.wire == "int8":
            self.count(
                "scales", {name: m * (self._row_nbytes[name] - self.tables[name].dim) for name, m in rows.items()}
            )

    def stats(self) -> dict[str, dict[str, Any]]:
        """`Table.stats` of this rank's part of each table by name, and what of it this rank has sent so far.

        ``sent_keys_nbytes`` (with counts), ``sent_rows_nbytes`` and ``sent_gradients_nbytes``, in which
        ``sent_scales_nbytes`` are those of int8. See `traffic` for the messages.
        """
        with self._counting:
            return {
                name: {**stats, **{f"sent_{what}_nbytes": of[name] for what, of in self._sent.items()}}
                for name, stats in super().stats().items()
            }

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
    stand : int64[h] or None
        How often each of those occurs where it came from; None where that does not count.
    owned : Request
        Of those, if they do not go together with those of other tables.
    """

    owned: Request | None = None
    came: Int64s
    here: Int64s
    stand: Int64s | None
    rows: Float32s
    _inverse: Int64s | None = None

    def __init__(
        self, table: Table, parts: Sequence[Any], sharded: Sharded, batch: Together | None, number: int
    ) -> None:
        self.table, self._batch, self._number, n_ranks = table, batch, number, sharded.transport.size
        where = sharded.placement.get(table.name)
        if batch is None:
            self.keys, self._inverse, self.counts = distinct(parts)
        else:
            self.keys, self.counts = batch.keys[number], batch.counts[number]
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
            if batch is None:
                self.keys, self.counts, self._inverse = self.keys[order], self.counts[order], place[self._inverse]
            else:
                batch.reorder(number, order, place)
        self.shared = slice(0, n_shared)
        self.to = self.of = _slices(self.sizes, n_shared)

    @property
    def inverse(self) -> Int64s:
        """Which of the keys each position of the batch holds: int64[n]."""
        if self._inverse is None and self._batch is not None:
            self._inverse = self._batch.inverse(self._number)
        assert self._inverse is not None
        return self._inverse

    def sent(self, array: npt.NDArray[Any], rank: int, shared: bool = True) -> npt.NDArray[Any]:
        """Of an array over `keys`, what goes to a rank with them."""
        own = array[self.to[rank]]
        return np.concatenate([array[self.shared], own]) if shared and self.shared.stop else own

    def own(self, keys: Sequence[Int64s], counts: Sequence[npt.NDArray[Any]] | None, n_shared: Sequence[int]) -> None:
        """Take the keys that each rank sent, the first n_shared of them shared; `counts` in training."""
        ends = np.cumsum([len(k) for k in keys]).tolist()
        firsts = [end - len(k) for end, k in zip(ends, keys, strict=True)]
        self.of_shared = [slice(a, a + s) for a, s in zip(firsts, n_shared, strict=True)]
        self.of = [slice(s.stop, end) for s, end in zip(self.of_shared, ends, strict=True)]
        self.came = np.array([s.stop - s.start for s in self.of], np.int64)
        self.here = np.concatenate(keys)
        self.stand = None if counts is None else np.concatenate([c.astype(np.int64, copy=False) for c in counts])

    def reserve(self, ahead: bool) -> None:
        """Reserve the rows of the keys that came."""
        self.owned = Request(self.table, [self.here], ahead, self.stand)

    def fetch(self) -> None:
        """As `Request.fetch`."""
        if self.owned is not None:
            self.owned.fetch()

    def wait(self, since: float | None = None) -> None:
        """As `Request.wait`."""
        if self.owned is not None:
            self.owned.wait(since)

    def take(self, part: slice, out: Float32s) -> None:
        """As `Request.take`, of the rows that came."""
        expand(self.rows, self.inverse[part], out)

    def pool(
        self, part: slice, splits: Int64s, out: Float32s, weight: Float32s | None, row_scale: Float32s | None
    ) -> None:
        """As `Request.pool`, of the rows that came."""
        pool(self.rows, self.inverse[part], splits, out, weight, row_scale)

    def sums(self, grads: Joined, positions: Int64s) -> Float32s:
        """The gradient of each key: float32[u, dim]."""
        values, rows, scale = grads
        sums: Float32s = Segments(positions, len(self.keys)).of(values, rows, scale).sum()
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
        self._owned: StoresTogether | None = None  # of the tables `_joint`
        self._joint: list[_Part] = []
        super().__init__(sharded, batch, train, size, weights, ahead)
        number = {name: i for i, name in enumerate(self._joined)}
        apart = self._requests
        self._requests = {}  # in the order that all ranks have
        for name, features in sharded._by_table.items():
            if name in apart:
                self._requests[name] = apart[name]
            else:
                self._requests[name] = _Part(sharded.tables[name], (), sharded, self._together, number[name])
                self._spans |= {f: slice(i * self.n_rows, (i + 1) * self.n_rows) for i, f in enumerate(features)}

    def _together_of(self, tables: list[Table], keys: list[Int64s], places: list[tuple[int, int]]) -> Together:
        return Together([table.dim for table in tables], keys, places, [self.n_rows] * len(tables))

    def _request(self, table: Table, features: Sequence[str], ahead: bool = False) -> Any:
        return _Part(table, [self._keys(table, f) for f in features], self._sharded, None, 0)

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
            nbytes = {p.table.name: int(n) * (8 + width) for p, n in zip(parts, n_keys, strict=True)}
            self._sharded.count("keys", nbytes)
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
            p.own(k, c if self._train else None, n_shared)
        together = self._train or self._looks_ahead
        self._joint = [p for p in parts if together and p.table.joinable and len(p.here)]
        if self._joint:
            stores: list[Any] = [p.table.store for p in self._joint]
            stand = [p.stand for p in self._joint if p.stand is not None]
            keys_here, places = [p.here for p in self._joint], [(i, 0) for i in range(len(stores))]
            self._owned = StoresTogether(stores, keys_here, places, [len(k) for k in keys_here], stand or None)
        for p in parts:
            if p not in self._joint:
                p.reserve(self._looks_ahead)
        self._stamp = stamp
        total = sum(m.weight for m in messages)
        self.share = messages[self._rank].weight / total if total > 0 else 0.0

    # --- rows ------------------------------------------------------------------------------------------------

    def outputs(self, empty: Empty | None = None) -> dict[str, Any]:
        """As `Staged.outputs`; every rank must call it now. TransportError where another has failed or is lost."""
        failure: Exception | None = None
        step = self._sharded.step + 1
        try:
            self._begin()
        except Closed:
            raise  # the others do not wait for this batch
        except Exception as e:
            failure = e
        parts = list(self._requests.values())

        def fill(payloads: list[Bytes]) -> None:
            if failure is not None:
                raise failure
            found = self._rows_here(step)
            cursors = [_Cursor(payload) for payload in payloads]
            for p, here in zip(parts, found, strict=True):
                p.rows = retained((len(p.keys), p.table.dim))
                p.rows[p.to[self._rank]] = here[p.of[self._rank]]
                p.rows[p.shared] = here[p.of_shared[self._rank]]
                self._pack(p, here, p.of, cursors)

        came, sizes = self._stack(parts, [p.came for p in parts]), self._stack(parts, [p.sizes for p in parts])
        size = self._row_nbytes(parts)
        messages = self._sharded.exchange("rows", self._stamp, step, size @ came, fill, size @ sizes)
        self._sharded.count_rows("rows", parts, came.sum(1) - came[:, self._rank])
        with self._sharded.telling():
            cursors = [_Cursor(m.payload) for m in messages]
            for p in parts:
                self._unpack(p, p.rows, p.to, cursors)
            return self._read(step)

    def _rows_here(self, step: int) -> list[Float32s]:
        """Rows of the keys that came here, for each part; in training, they are counted and made first."""
        parts = self._requests.values()
        here: list[Float32s] = [retained((len(p.here), p.table.dim)) for p in parts]
        for p in parts:
            if p.owned is not None:
                p.owned.create(self._train, step)
        for p, out in zip(parts, here, strict=True):
            if p.owned is not None:
                p.owned.take(slice(None), out)
        if self._owned is not None:
            outs = [out for p, out in zip(parts, here, strict=True) if p.owned is None]
            if self._train:
                self._owned.create(step, [p.table.admission for p in self._joint], outs)
            else:
                self._owned.gather(outs)
        return here

    def _rows_together(self, step: int, outs: list[Float32s]) -> None:
        self._together.gather(outs, [self._requests[name].rows for name in self._joined])

    def _row_nbytes(self, parts: Sequence[_Part]) -> Int64s:
        return np.array([self._sharded._row_nbytes[p.table.name] for p in parts], np.int64)

    def _stack(self, parts: Sequence[_Part], n: Sequence[Int64s]) -> Int64s:
        """Of each part and rank: int64[parts, ranks]."""
        return np.array(n, np.int64).reshape(len(parts), self._n_ranks)

    def _pack(self, p: _Part, rows: Float32s, to: Sequence[slice], cursors: Sequence[_Cursor]) -> None:
        """Rows of a table that go to each other rank."""
        for r, (some, cursor) in enumerate(zip(to, cursors, strict=True)):
            if r != self._rank and some.stop > some.start:
                pack(rows[some], self._sharded.wire, self._next(cursor, p, some))

    def _next(self, cursor: _Cursor, p: _Part, some: slice) -> Bytes:
        """The block of so many rows of a table."""
        return cursor.take((some.stop - some.start) * self._sharded._row_nbytes[p.table.name])

    def _unpack(self, p: _Part, out: Float32s, of: Sequence[slice], cursors: Sequence[_Cursor]) -> None:
        """Rows of a table that came from each other rank."""
        for r, (some, cursor) in enumerate(zip(of, cursors, strict=True)):
            if r != self._rank and some.stop > some.start:
                unpack(self._next(cursor, p, some), p.table.dim, self._sharded.wire, out[some])

    # --- gradients: a bit for each key of all tables that no used feature reads; of each table a row for each key,
    # --- of the shared ones first ----------------------------------------------------------------------------

    def _update(self, batches: Sequence[tuple[Staged, Mapping[str, Any]]], step: int) -> None:
        me, wire = self._rank, self._sharded.wire
        given = [(batch, grads) for batch, grads in batches if isinstance(batch, _Between)]
        parts = [p for batch, _ in given for p in batch._requests.values()]
        summed: list[tuple[Float32s, npt.NDArray[np.bool_] | None]] = []
        shared: list[Bytes] = []

        def fill(payloads: list[Bytes]) -> None:
            for batch, grads in given:
                summed.extend(batch._sums(grads))
            cursors = [_Cursor(payload) for payload in payloads]
            for r, cursor in enumerate(cursors):
                if r != me:
                    bits = cursor.take((int(to[:, r].sum()) + 7) // 8)
                    idle = _idle(parts, summed, r)
                    bits[:] = 0 if idle is None else np.packbits(idle)
            for p, (sums, _) in zip(parts, summed, strict=True):
                shared.append(self._pack_gradients(p, sums, p.shared, step) if p.sharing else _NO_BYTES)
                for r, cursor in enumerate(cursors):
                    if r != me:
                        cursor.take(len(shared[-1]))[:] = shared[-1]
                        self._pack_gradients(p, sums, p.to[r], step, self._next(cursor, p, p.to[r]))

        to = self._stack(parts, [p.sizes + p.shared.stop for p in parts])
        of = self._stack(parts, [p.came + [s.stop - s.start for s in p.of_shared] for p in parts])
        size = self._row_nbytes(parts)
        sizes, expected = (size @ n + (n.sum(0) + 7) // 8 for n in (to, of))
        messages = self._sharded.exchange("gradients", self._stamp, step, sizes, fill, expected)
        self._sharded.count_rows("gradients", parts, to.sum(1) - to[:, me])
        with self._sharded.telling():
            cursors = [_Cursor(m.payload) for m in messages]
            unused = [
                _idle(parts, summed, r) if r == me else _bits(cursor, int(n))
                for r, (cursor, n) in enumerate(zip(cursors, of.sum(0), strict=True))
            ]
            came: dict[str, list[tuple[_Part, Float32s, npt.NDArray[np.bool_] | None]]] = {}
            for i, (p, (sums, _), block) in enumerate(zip(parts, summed, shared, strict=True)):
                here: Float32s = retained((len(p.here), p.table.dim))
                here[p.of[me]] = sums[p.to[me]]
                if p.sharing:
                    # What this rank sent of shared keys, not what it had: so all add the same.
                    unpack(block, p.table.dim, wire, here[p.of_shared[me]])
                    self._unpack(p, here, p.of_shared, cursors)
                self._unpack(p, here, p.of, cursors)
                came.setdefault(p.table.name, []).append((p, here, _of_part(unused, of, i)))
            if self._owned is not None and self._state == "read" and len(given) == 1 and all(u is None for u in unused):
                names = [p.table.name for p in self._joint]
                if self._owned.sum([came[name][0][1] for name in names]) or wire == "float32":
                    self._apply_together(self._owned, names, step)
                    for name in names:
                        del came[name]
            for name, grads_of in came.items():
                self._apply(self._requests[name], grads_of, step)

    def _pack_gradients(self, p: _Part, sums: Float32s, some: slice, step: int, out: Bytes | None = None) -> Bytes:
        """Some rows of a table's gradients as a block, rounded at random; with feedback, what is lost is kept."""
        keys, name = p.keys[some], p.table.name
        noise = Noise(0, name, self._rank, step, keys)
        residuals = self._sharded._residuals.get(name)
        if residuals is None:
            return pack(sums[some], self._sharded.wire, out, noise)
        slots, rows = residuals.take(keys)
        block = pack(sums[some], self._sharded.wire, out, noise, rows)
        residuals.put(slots, rows)
        return block

    def _sums(self, grads: Mapping[str, Any]) -> list[tuple[Float32s, npt.NDArray[np.bool_] | None]]:
        """Of each part, this rank's share of what `_sum` gives."""
        joined = self._sum_together(grads)
        of = self._parts(grads, self.share > 0, joined)
        whole = dict(zip(joined, self._together.sums(), strict=True)) if joined else {}
        found = [(whole[name], None) if name in whole else self._sum(p, of) for name, p in self._requests.items()]
        for sums, _ in found:
            if self.share == 0:  # of no row that counts, the mean is 0/0
                sums[:] = 0
            elif self.share != 1:
                sums *= np.float32(self.share)
        return found

    def _refused(self, grads: Mapping[str, Any]) -> dict[str, list[str]]:
        return super()._refused(grads) if self.share > 0 else {}

    def _sum(self, p: _Part, given: Mapping[str, Gradient]) -> tuple[Float32s, npt.NDArray[np.bool_] | None]:
        """The gradient of each key of a table, and which have none since all features that read them were left out."""
        features = self._sharded._by_table[p.table.name]
        used = [f for f in features if f in given]
        if not used:
            return np.zeros((len(p.keys), p.table.dim), np.float32), np.ones(len(p.keys), np.bool_)
        grads = summands.joined([given[f] for f in used])
        if used == features:
            return p.sums(grads, p.inverse), None
        positions = np.concatenate([p.inverse[self._spans[f]] for f in used])
        idle = np.ones(len(p.keys), np.bool_)
        idle[positions] = False
        return p.sums(grads, positions), idle

    def _apply(self, p: _Part, came: Sequence[tuple[_Part, Float32s, npt.NDArray[np.bool_] | None]], step: int) -> None:
        """Sum what came for each key, batch by batch and in the order of the ranks, and update."""
        finite = self._sharded.wire == "float32"  # else a sender cannot know what becomes of a large value
        if len(came) == 1 and self._state == "read" and came[0][2] is None and p.owned is not None:
            p.owned.update(came[0][1], None, None, step, finite)
            return
        used = [slice(None) if idle is None else ~idle for _, _, idle in came]
        keys = np.concatenate([of.here[some] for (of, _, _), some in zip(came, used, strict=True)])
        if len(keys):
            grads = np.concatenate([grads[some] for (_, grads, _), some in zip(came, used, strict=True)])
            request = Request(p.table, [keys])
            request.update(grads, None, None, step, finite)
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
    ends = list(accumulate(sizes.tolist(), initial=first))
    return [slice(a, b) for a, b in pairwise(ends)]


def _idle(
    parts: Sequence[_Part], summed: Sequence[tuple[Float32s, npt.NDArray[np.bool_] | None]], rank: int
) -> npt.NDArray[np.bool_] | None:
    """Which of the keys that go to a rank, of all tables, have no gradient; None where all have one."""
    if all(idle is None for _, idle in summed):
        return None
    none = [
        np.zeros(len(p.keys), np.bool_) if idle is None else idle for p, (_, idle) in zip(parts, summed, strict=True)
    ]
    return np.concatenate([p.sent(idle, rank) for p, idle in zip(parts, none, strict=True)])


def _bits(cursor: _Cursor, n: int) -> npt.NDArray[np.bool_] | None:
    """The next n bits, None where none is set."""
    bits = cursor.take((n + 7) // 8)
    return np.unpackbits(bits, count=n).view(np.bool_) if bits.any() else None


def _of_part(of_rank: Sequence[npt.NDArray[np.bool_] | None], sizes: Int64s, part: int) -> npt.NDArray[np.bool_] | None:
    """What is said of the keys of a part by each rank, end to end; None where it is nothing."""
    if all(said is None for said in of_rank):
        return None
    firsts, ends = sizes[:part].sum(0).tolist(), sizes[: part + 1].sum(0).tolist()
    return np.concatenate(
        [
            np.zeros(b - a, np.bool_) if said is None else said[a:b]
            for said, a, b in zip(of_rank, firsts, ends, strict=True)
        ]
    )


def _settings(sharded: Sharded) -> dict[str, object]:
    """What has to be equal on all ranks."""
    settings: dict[str, object] = {"wire": sharded.wire, "feedback": sharded.feedback}
    for name, where in sharded.placement.items():
        if isinstance(where, np.ndarray):
            hot = np.unique(where)
            mark = hash_bytes(hot.view(np.uint8), np.array([0, hot.nbytes]))[0]
            where = f"by key, {len(hot)} keys replicated (hash {mark})"
        settings[f"placement of table {name}"] = where
    for name, t in sharded.tables.items():
        settings |= {f"{what} of table {name}": value for what, value in t.settings().items()}
    settings |= {f"stack {name}": features for name, features in sharded.stack.items()}
    for feature, table in sharded.features.items():
        settings[f"table of feature {feature}"] = table
        settings[f"pooling of feature {feature}"] = sharded.pooling[feature]
    return settings


_NO_BYTES, _NO_KEYS = np.zeros(0, np.uint8), np.zeros(0, np.int64)
