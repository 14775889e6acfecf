"""``hbkit plan``: how much near memory buys which hit rate, on this data and this disk."""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt

from hbkit import Ragged
from hbkit._ext.hash import hash_ints
from hbkit._ext.index import Index
from hbkit.cli import console
from hbkit.data import Dataset, Field
from hbkit.errors import InvalidArgument, StorageError, UnknownColumn, Unsupported
from hbkit.store.cache import LINE_NBYTES, Cache, Window, as_nbytes
from hbkit.store.policy import POLICIES, Policy

__all__ = ["clairvoyant", "hits", "plan"]

Int64s = npt.NDArray[np.int64]
Trace = Sequence[Int64s]  # the distinct keys of each batch

SAMPLE_KEYS = 60_000  # distinct keys that are simulated
PARTS = 4  # samples that are simulated apart, whose differences say how sure the figures are
INDEX_NBYTES = 16  # of a key that lies on the disk
DISK_NBYTES, PAGE, READERS, SECONDS = 128 << 20, 4096, 16, 1.0


# --- simulation -------------------------------------------------------------------------------------------------


def hits(trace: Trace, n_lines: int, policy: Callable[[int], Policy], ahead: int = 0) -> Int64s:
    """Hits of each batch in a cache that keeps `n_lines` from batch to batch: int64[n].

    What a batch misses is held in addition while it is used. The cache is `hbkit.store.cache.Cache` itself.

    Parameters
    ----------
    trace : sequence of int64[n]
        Distinct keys of each batch.
    ahead : int
        Batches that are announced before their turn.
    """
    cache, window = Cache(n_lines + max(map(len, trace)), policy), Window()
    out = np.zeros(len(trace), np.int64)
    for i in range(-ahead, len(trace)):
        if i + ahead < len(trace):
            number, lines = window.announce(trace[i + ahead]), cache.find(trace[i + ahead])
            near = lines[lines >= 0]
            cache.next_use[near] = np.minimum(cache.next_use[near], number)
        if i < 0:
            continue
        keys, lines = trace[i], cache.find(trace[i])
        cache.access(keys, lines)
        missed = lines < 0
        out[i] = len(keys) - np.count_nonzero(missed)
        lines[missed] = cache.insert(keys[missed])
        cache.next_use[lines] = window.release(i)
        cache.remove(cache.victims(max(0, len(cache) - n_lines)))
    return out


def clairvoyant(trace: Trace, n_lines: int) -> Int64s:
    """Hits of each batch if the keys that are needed soonest are kept: int64[n]. No cache can have more."""
    codes = np.unique(np.concatenate(trace), return_inverse=True)[1]
    batches = np.split(codes, np.cumsum([len(b) for b in trace])[:-1])
    coming = np.full(len(codes) and int(codes.max()) + 1, len(trace))
    following: list[Int64s] = []
    for i in range(len(batches) - 1, -1, -1):
        following.append(coming[batches[i]])
        coming[batches[i]] = i
    near = np.zeros(len(coming), np.bool_)
    held, out = np.zeros(0, np.int64), np.zeros(len(trace), np.int64)
    for i, keys in enumerate(batches):
        new = keys[~near[keys]]
        out[i] = len(keys) - len(new)
        coming[keys] = following.pop()
        near[new] = True
        held = np.concatenate([held, new])
        if len(held) > n_lines:
            order = np.argpartition(coming[held], n_lines)
            near[held[order[n_lines:]]] = False
            held = held[order[:n_lines]]
    return out


# --- sampling ---------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    """The batches of a data set, of a part of the keys: those whose hash is small (SHARDS, FAST 2015).

    Attributes
    ----------
    batches : list of int64[n]
        Hashes of the distinct sampled keys of each batch.
    rate : float
        Share of the keys that are sampled.
    n_rows, n_keys : int
        Rows that were read, and distinct keys in them, estimated where `rate` is below 1.
    batch_keys : float
        Distinct keys of a batch on average, sampled or not.
    """

    batches: list[Int64s]
    rate: float
    n_rows: int
    n_keys: int
    batch_keys: float


def sample(ds: Dataset, names: Sequence[str], n_rows: int, progress: console.Progress) -> Sample:
    """Read up to `n_rows` rows of a batched data set. Each column's keys are its own."""
    batches: list[Int64s] = []
    seen, limit, rows, n_used = Index(), 2**64 - 1, 0, 0
    for batch in ds.batches():
        values = [batch[name] for name in names]
        flat = [v.values if isinstance(v, Ragged) else v for v in values]
        hashed = [hash_ints(np.ascontiguousarray(v).view(np.int64), i) for i, v in enumerate(flat)]
        keys = np.unique(np.concatenate(hashed).view(np.uint64))
        n_used += len(keys)
        keys = keys[keys <= np.uint64(limit)]
        batches.append(keys.view(np.int64))
        seen.find_or_insert(batches[-1])
        while len(seen) > SAMPLE_KEYS:
            limit //= 2
            batches = [b[b.view(np.uint64) <= np.uint64(limit)] for b in batches]
            seen = Index()
            for b in batches:
                seen.find_or_insert(b)
        rows += batch.n_rows
        progress.update(batch.n_rows)
        if rows >= n_rows:
            break
    if len(seen) == 0:
        raise InvalidArgument("the data holds no keys", remedy="name columns that hold some in --sparse")
    rate = (limit + 1) / 2**64
    return Sample(batches, rate, rows, round(len(seen) / rate), n_used / len(batches))


@dataclass
class Rate:
    """A hit rate and its standard error."""

    mean: float
    error: float


def rate_of(found: Sample, n_lines: float, run: Callable[[Trace, int], Int64s]) -> Rate:
    """Hit rate of a cache of `n_lines` over the last three quarters of the batches; before, caches are filling."""
    rates, hit, asked = [], 0, 0
    for part in range(PARTS):
        trace = [b[b % PARTS == part] for b in found.batches]
        of_part = run(trace, max(1, round(n_lines * found.rate / PARTS)))[len(trace) // 4 :]
        n = sum(len(b) for b in trace[len(trace) // 4 :])
        hit, asked = hit + int(of_part.sum()), asked + n
        rates.append(of_part.sum() / max(n, 1))
    return Rate(hit / max(asked, 1), float(np.std(rates, ddof=1) / np.sqrt(PARTS)))


# --- the disk ---------------------------------------------------------------------------------------------------


def read_rate(directory: str) -> float:
    """Random reads of 4 KiB a second, past the page cache, by 16 threads, from a file made in a directory for it.

    Raises
    ------
    StorageError
        The directory cannot be written to, or its file system does not read past the page cache.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".hbkit-plan-") as file:
            block = os.urandom(1 << 20)
            for _ in range(DISK_NBYTES >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            descriptor = os.open(file.name, os.O_RDONLY | os.O_DIRECT)
            try:
                return _read_at_random(descriptor)
            finally:
                os.close(descriptor)
    except OSError as e:
        raise StorageError(
            f"the disk could not be measured: {e.strerror}", file=directory, remedy="name a directory in --disk"
        ) from e


def _read_at_random(descriptor: int) -> float:
    counts, failed = [0] * READERS, []
    end = time.perf_counter() + SECONDS

    def read(number: int) -> None:
        rng, page = np.random.default_rng(number), mmap.mmap(-1, PAGE)  # memory that begins with a page
        try:
            while time.perf_counter() < end:
                for at in rng.integers(0, DISK_NBYTES // PAGE, 64).tolist():
                    os.preadv(descriptor, [page], at * PAGE)
                    counts[number] += 1
        except OSError as e:
            failed.append(e)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(READERS)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return sum(counts) / (time.perf_counter() - start)


# --- the command ------------------------------------------------------------------------------------------------


@click.command()
@click.argument("data")
@click.option("--budget", default="2GiB", show_default=True, help="Near memory, for all tables together.")
@click.option("--sparse", help="Key columns, a,b; all columns of integers, strings and lists of them if left out.")
@click.option("--line-nbytes", type=click.IntRange(1), default=128, show_default=True, help="Row and optimizer state.")
@click.option("--batch-size", type=click.IntRange(1), default=4096, show_default=True)
@click.option("--lookahead", type=click.IntRange(1), default=8, show_default=True, help="Batches known in advance.")
@click.option("--rows", type=click.IntRange(1), default=1_000_000, show_default=True, help="Rows to read at the most.")
@click.option("--disk", type=click.Path(file_okay=False), help="Where rows will lie. The data's directory if left out.")
@click.option("--plot", type=click.Path(), help="PNG to draw the curves into.")
def plan(
    data: str,
    budget: str,
    sparse: str | None,
    line_nbytes: int,
    batch_size: int,
    lookahead: int,
    rows: int,
    disk: str | None,
    plot: str | None,
) -> None:
    """Say how much near memory buys which hit rate and which step time, for tables larger than memory.

    DATA is Parquet: a file, directory, glob or URI. Its keys are read in the order of the rows, a sample of them goes
    through the cache with each policy and with look-ahead, and the disk is measured. "clairvoyant" is what a cache that
    knows the future would reach. Each column is taken as a table of its own; all share the budget.
    """
    near = as_nbytes(budget)
    draw = _drawing() if plot else None
    ds, names = _columns(Dataset.from_parquet(data), data, sparse.split(",") if sparse else [])
    with console.progress("reading", min(rows, ds.n_rows)) as bar:
        found = sample(ds.batch(batch_size), names, rows, bar)
    try:
        reads: float | None = read_rate(disk or (data if os.path.isdir(data) else os.path.dirname(data) or "."))
    except StorageError as e:
        reads = None
        console.note(str(e))
    contenders: dict[str, Callable[[Trace, int], Int64s]] = {
        name: partial(hits, policy=policy) for name, policy in POLICIES.items()
    }
    contenders[f"lfu, {lookahead} ahead"] = partial(hits, policy=POLICIES["lfu"], ahead=lookahead)
    contenders["clairvoyant"] = clairvoyant
    index = INDEX_NBYTES * found.n_keys
    sizes = [n for n in (near * 2.0**i for i in range(-4, 5)) if n > index] or [index + near]
    lines = [min((n - index) / (line_nbytes + LINE_NBYTES), found.n_keys) for n in sizes]
    n_useful = next((i + 1 for i, n in enumerate(lines) if n >= found.n_keys), len(lines))
    sizes, lines = sizes[:n_useful], lines[:n_useful]
    curves: dict[str, list[Rate]] = {}
    with console.progress("simulating", len(contenders) * len(sizes), "caches") as bar:
        for name, run in contenders.items():
            curves[name] = []
            for n in lines:
                curves[name].append(rate_of(found, n, run))
                bar.update(1)
    _show(data, names, found, sizes, lines, curves, reads, near, index)
    if draw is not None and plot is not None:
        draw(plot, sizes, curves)
        console.note(f"drawn in {plot}")


def _columns(whole: Dataset, data: str, names: list[str]) -> tuple[Dataset, list[str]]:
    """The data set of key columns alone, missing values as a key of their own, and their names."""
    unsupported = whole.stats()["unsupported"]
    for name in names:
        if name not in whole.schema:
            why = unsupported.get(name)
            raise UnknownColumn(
                f"column {name!r} cannot be read: {why}" if why else f"there is no column {name!r}",
                remedy=f"columns are {', '.join(whole.schema)}",
            )
    fields = []
    for name, kind in whole.schema.items():
        suits = not kind.dtype.startswith("float") and kind.ragged_rank < 2
        if name in names and not suits:
            raise InvalidArgument("the column holds no keys", column=name, remedy="name others in --sparse")
        if name in names or (not names and suits and not kind.logical):
            string = kind.dtype == "string"
            missing = "" if string else 2**64 - 1 if kind.dtype == "uint64" else -1
            fields.append(
                Field(
                    name,
                    dtype=None if string or kind.dtype == "uint64" else "int64",
                    ragged_rank=kind.ragged_rank,
                    null="empty" if kind.ragged_rank else "default",
                    default=None if kind.ragged_rank else missing,
                    hash_to="int64" if string else None,
                )
            )
    if not fields:
        raise InvalidArgument("no column holds keys", file=data, remedy="name columns in --sparse")
    return Dataset.from_parquet(data, fields=fields), [f.name for f in fields]


def _show(
    data: str,
    names: list[str],
    found: Sample,
    sizes: list[float],
    lines: list[float],
    curves: dict[str, list[Rate]],
    reads: float | None,
    near: int,
    index: int,
) -> None:
    facts: dict[str, object] = {
        f"key columns ({len(names)})": ", ".join(names),
        "rows read": found.n_rows,
        "keys": f"{console.count(found.n_keys)}, of which {found.rate:.2%} are simulated",
        "distinct keys of a batch": round(found.batch_keys),
        "index of all keys": console.size(index),
        "random reads": "not measured" if reads is None else f"{reads:,.0f} of 4 KiB a second",
    }
    console.summary(f"Plan for {data}", facts)
    console.note("")
    ahead, worst = list(curves)[-2], max(rate.error for curve in curves.values() for rate in curve)
    rows = []
    for i, (size, n) in enumerate(zip(sizes, lines, strict=True)):
        missed = [(1 - curves[name][i].mean) * found.batch_keys for name in ("lfu", ahead)]
        times = ["-" if reads is None else f"{1000 * m / reads:.1f}" for m in missed]
        rows.append(
            (
                console.size(size) + (" *" if size == near else ""),
                f"{n / found.n_keys:.1%}",
                *(f"{curve[i].mean:.1%}" for curve in curves.values()),
                *(f"{m:,.0f}" for m in missed),
                *times,
            )
        )
    header = ("memory", "of the keys", *curves, "reads a step", "ahead", "ms of reading a step", "ahead")
    console.table("Hit rates (* is the budget)", header, rows)
    if near <= index:
        console.note(f"The budget of {console.size(near)} does not even hold the index.")
    console.note(
        f"Hit rates are within about {2 * worst:.1%} (two standard errors over {PARTS} samples). A step's reads "
        "are of lfu and of look-ahead, which reads while earlier steps compute; as many rows are written back."
    )


def _drawing() -> Callable[[str, list[float], dict[str, list[Rate]]], None]:
    """What draws the curves; asked for before the work is done."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise Unsupported("matplotlib is not installed", remedy="pip install 'hbkit[plot]', or leave --plot out") from e

    def draw(path: str, sizes: list[float], curves: dict[str, list[Rate]]) -> None:
        figure = Figure(figsize=(8, 5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(
            xlabel="near memory, MB", ylabel="misses, % of distinct keys", xscale="log", ylim=(0, 100)
        )
        for name, curve in curves.items():
            misses = [100 * (1 - rate.mean) for rate in curve]
            errors = [200 * rate.error for rate in curve]
            axes.errorbar([n / 1e6 for n in sizes], misses, errors, label=name, marker="o", ms=3, lw=1, capsize=2)
        axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(Path(path), dpi=120, format="png")

    return draw
