"""Where the rows of sharded tables go, and what that costs: bytes and messages of a step, and a plan that weighs them.

Of each table a rank's batch has u distinct keys. With n ranks, a row of b bytes on the wire, and a key of 9 (with its
count), a rank sends in a step, on the average:

    by key         (n - 1) / n * u * (9 + 2 b)      keys to owners, rows from them, gradients to them
    on one rank    the same; but that rank sends and receives n times as much, and the others next to nothing
    replicated     (n - 1) * u * (9 + b)            keys and gradients to all; no rows

All tables share a message: n - 1 of each kind, 3 (n - 1) a step, with a header each. What differs besides the bytes is
how many blocks a rank packs and unpacks, for each table and peer: by key four, at the one rank that holds a table two,
for a replicated table one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hbkit.embedding.collection import Collection
from hbkit.embedding.sharded import Placement
from hbkit.errors import InvalidArgument
from hbkit.ragged import Dictionary
from hbkit.shuffle.messages import HEADER, REASON_NBYTES
from hbkit.shuffle.partition import owner
from hbkit.shuffle.quantize import row_nbytes
from hbkit.store.line import Int64s

__all__ = ["Load", "Machine", "Plan", "Traffic", "measure", "plan", "traffic"]

Float64s = npt.NDArray[np.float64]

KEY_NBYTES = 9  # and its count
SMALL_NBYTES = 64 << 20  # rows of a table that one rank may hold, or all: others would not spread their memory
WORTH = 0.95  # of the time without it, that another placement must come below
MOST_HOT = 4096  # keys of a table that may be replicated apart from the others


class Machine(NamedTuple):
    """What messages cost.

    Attributes
    ----------
    bandwidth : float
        Bytes a second that a rank sends, and at once receives.
    latency : float
        Seconds a message takes besides its bytes.
    block : float
        Seconds that a table's block in a message takes besides its bytes, at either end.
    """

    bandwidth: float = 1.25e9
    latency: float = 50e-6
    block: float = 5e-6


TEN_GIGABIT = Machine()


class Load(NamedTuple):
    """What a step asks of a table.

    Attributes
    ----------
    dim : int
    unique : float
        Distinct keys in one rank's batch.
    rows : int
        Of the whole table.
    keys : int64[k]
        Its most frequent keys, the first of all first.
    presence : float64[k]
        In which share of the ranks' batches each of them is.
    may_replicate : bool
        Whether copies of its rows would stay equal: it has no admission, and no eviction.
    """

    dim: int
    unique: float
    rows: int
    keys: Int64s = np.zeros(0, np.int64)
    presence: Float64s = np.zeros(0)
    may_replicate: bool = True


class Traffic(NamedTuple):
    """What a rank sends in a training step, headers included.

    Attributes
    ----------
    messages : int
    keys, rows, gradients : float
        Bytes of each kind, the mean over the ranks.
    busiest : float
        All bytes that the busiest rank sends or receives, whichever is more of each kind.
    blocks : float
        Which the busiest rank packs or unpacks.
    """

    messages: int
    keys: float
    rows: float
    gradients: float
    busiest: float
    blocks: float

    def seconds(self, machine: Machine) -> float:
        """Of the busiest rank, if nothing runs beside anything else."""
        return self.busiest / machine.bandwidth + self.messages * machine.latency + self.blocks * machine.block


def measure(
    collection: Collection, batches: Iterable[Mapping[str, Any]], rows: Mapping[str, int] | None = None
) -> dict[str, Load]:
    """What some batches, each of one rank and one step, ask of each table.

    Parameters
    ----------
    collection : Collection
    batches : iterable of mapping of feature to keys
        Keys as integers [..], Ragged or Dictionary.
    rows : mapping of table to int, optional
        How many rows it will have, where that is known; else how many keys these batches have.
    """
    seen: dict[str, list[Int64s]] = {name: [] for name in collection.tables}
    n = 0
    for batch in batches:
        n += 1
        for name, table in collection.tables.items():
            features = [f for f, t in collection.features.items() if t == name]
            seen[name].append(np.unique(np.concatenate([table.keys(_values(batch[f])) for f in features])))
    if n == 0:
        raise InvalidArgument("no batches to measure", remedy="give some, as a rank will have them")
    loads = {}
    for name, table in collection.tables.items():
        keys, times = np.unique(np.concatenate(seen[name]), return_counts=True)
        often = np.argsort(-times, kind="stable")[:MOST_HOT]
        loads[name] = Load(
            table.dim,
            sum(map(len, seen[name])) / n,
            (rows or {}).get(name, len(keys)),
            keys[often],
            times[often] / n,
            table.admission is None and not table.eviction,
        )
    return loads


def _values(column: Any) -> Any:
    column = column.decode() if isinstance(column, Dictionary) else column
    return np.reshape(getattr(column, "values", column), -1)


def _shares(load: Load, n: int, where: Placement | None) -> tuple[Float64s, float]:
    """How many of a batch's distinct keys each rank alone holds, float64[n], and how many all hold."""
    own = np.zeros(n)
    if isinstance(where, str):
        return own, load.unique
    if isinstance(where, int):
        own[where] = load.unique
        return own, 0.0
    shared = np.zeros(len(load.keys), np.bool_) if where is None else np.isin(load.keys, where)
    known = np.bincount(owner(load.keys, n)[~shared], load.presence[~shared], n)
    n_shared = float(load.presence[shared].sum())
    return known + max(load.unique - n_shared - known.sum(), 0) / n, n_shared


def traffic(
    loads: Mapping[str, Load], n_ranks: int, wire: str, placement: Mapping[str, Placement] | None = None
) -> Traffic:
    """Expected traffic of a rank and training step, of tables placed so; those not named by key."""
    n, others = n_ranks, n_ranks - 1
    if n == 1:
        return Traffic(0, 0, 0, 0, 0, 0)
    sent, received, blocks = np.zeros((3, n)), np.zeros((3, n)), np.zeros(n)
    for name, load in loads.items():
        where = (placement or {}).get(name)
        own, shared = _shares(load, n, where)
        nbytes = row_nbytes(load.dim, wire)
        away, asked = own.sum() - own, others * own  # keys of others that a rank has, and of its own that they have
        for k, (n_bytes, out, back) in enumerate(
            ((KEY_NBYTES, away, asked), (nbytes, asked, away), (nbytes + 1 / 8, away, asked))
        ):
            copies = 0 if k == 1 else others * shared
            sent[k] += n_bytes * (out + copies)
            received[k] += n_bytes * (back + copies)
        sent[0] += others * 4 * (1 if where is None or isinstance(where, int) else 2)
        if isinstance(where, int):
            blocks += 2
            blocks[where] += 2 * others
        elif not isinstance(where, str):
            blocks += 4 * others
        if where is not None and not isinstance(where, int):
            blocks += 1 + others
    sent[1:] = np.maximum(sent[1:], others * REASON_NBYTES)
    sent += others * HEADER.itemsize
    keys, rows, gradients = sent.mean(axis=1).tolist()
    busiest = np.maximum(sent, received).sum(axis=0).max()
    return Traffic(3 * others, keys, rows, gradients, float(busiest), float(blocks.max()))


class Plan(NamedTuple):
    """Where tables go, and why: `str` of it is a table for people.

    Attributes
    ----------
    placement : dict of table to placement
        As `Sharded` takes it.
    traffic : Traffic
    text : str
    """

    placement: dict[str, Placement]
    traffic: Traffic
    text: str

    def __str__(self) -> str:
        return self.text


def plan(loads: Mapping[str, Load], n_ranks: int, wire: str = "float32", machine: Machine = TEN_GIGABIT) -> Plan:
    """Place tables so that the busiest rank's messages take the least time, by `traffic`.

    Large tables go by key: nothing spreads bytes and memory better. From the smallest on, small ones are tried whole on
    one rank each, and the smallest of those replicated: they cost bytes, and save blocks. Then, where hot keys keep one
    rank busier than others, as many of the hottest are replicated as help.
    """
    names = sorted(loads, key=lambda name: (loads[name].unique * row_nbytes(loads[name].dim, wire), name))
    small = [name for name in names if loads[name].rows * loads[name].dim * 4 <= SMALL_NBYTES]
    best: dict[str, Placement] = {}
    least = traffic(loads, n_ranks, wire).seconds(machine)
    steps = np.unique(np.linspace(0, len(small), min(len(small), 24) + 1).astype(int)).tolist()
    for whole in steps if n_ranks > 1 else []:
        for copied in (c for c in steps if c <= whole):
            placement: dict[str, Placement] = {n: "replicate" for n in small[:copied] if loads[n].may_replicate}
            load_of = np.zeros(n_ranks)
            for name in reversed(small[:whole]):
                if name not in placement:
                    rank = int(load_of.argmin())
                    placement[name] = rank
                    load_of[rank] += loads[name].unique * row_nbytes(loads[name].dim, wire) + 1
            if (takes := traffic(loads, n_ranks, wire, placement).seconds(machine)) < least * WORTH:
                best, least = placement, takes
    reasons = {name: _reason(loads[name], best.get(name), n_ranks) for name in loads}
    for name in reversed(names if n_ranks > 1 else []):
        load = loads[name]
        if name in best or not load.may_replicate:
            continue
        for k in range(MOST_HOT.bit_length() if len(load.keys) else 0):
            hot = load.keys[: 1 << k]
            if (takes := traffic(loads, n_ranks, wire, {**best, name: hot}).seconds(machine)) < least * WORTH:
                best, least = {**best, name: hot}, takes
                own, _ = _shares(load, n_ranks, None)
                reasons[name] = (
                    f"hot keys give one rank {own.max() / own.mean():.2f} times the mean: {len(hot)} are copied"
                )
    return Plan(best, traffic(loads, n_ranks, wire, best), _text(loads, best, reasons, n_ranks, wire, machine))


def _reason(load: Load, where: Placement | None, n: int) -> str:
    if n == 1:
        return "there is one rank"
    if isinstance(where, str):
        return f"{load.unique:.0f} keys a batch: copies cost fewer blocks than asking for rows"
    if isinstance(where, int):
        return f"{load.unique:.0f} keys a batch: {n} parts of it would be many small blocks"
    return f"{load.unique:.0f} keys a batch: spread over all ranks, the busiest sends the least"


def _text(
    loads: Mapping[str, Load],
    placement: Mapping[str, Placement],
    reasons: Mapping[str, str],
    n: int,
    wire: str,
    machine: Machine,
) -> str:
    lines = [("table", "rows", "keys a batch", "bytes a row", "placement", "why")]
    for name, load in loads.items():
        where = placement.get(name)
        said = "by key" if where is None else where if isinstance(where, str) else f"rank {where}"
        if isinstance(where, np.ndarray):
            said = f"by key, {len(where)} replicated"
        lines.append(
            (name, f"{load.rows:,}", f"{load.unique:,.0f}", str(row_nbytes(load.dim, wire)), said, reasons[name])
        )
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    table = "\n".join("  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[5]]) for line in lines)
    plain, chosen = (traffic(loads, n, wire, p) for p in ({}, placement))
    return (
        f"{table}\n{n} ranks, {wire}: a rank sends {(chosen.keys + chosen.rows + chosen.gradients) / 1e6:.2f} MB in "
        f"{chosen.messages} messages a step; the busiest takes {chosen.seconds(machine) * 1e3:.2f} ms "
        f"(all by key: {plain.seconds(machine) * 1e3:.2f} ms)"
    )
