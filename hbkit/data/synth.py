"""Synthetic click logs with a known ceiling.

Keys follow a true Zipf law, and every label is a coin whose bias a planted logistic model gives, so the best AUC
and log loss that any model can reach on the rows are known: later training results are read against them.

The planted model is fixed for each shape: the effect of a key is a hash of the key. The seed only chooses the rows.
So data of two seeds serve as training and test part of one problem. Rows are made in blocks of ``BLOCK``; a block is
a pure function of (shape, seed, number of the block), and depends neither on the number of rows or files nor on the
size of the row groups.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hbkit import errors
from hbkit.data.output import ROW_GROUP_ROWS, Output, writers

__all__ = ["BLOCK", "CARDINALITIES", "SHAPES", "ZIPF_S", "Ceiling", "Synthesized", "Zipf", "blocks", "synthesize"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

BLOCK = 65_536
ZIPF_S = 1.05
MAX_FILES = 500  # all stay open until the ceiling is known

# Distinct keys of criteo's c1..c26, in the proportions of the Criteo logs.
CARDINALITIES = (
    *(1_500, 600, 10_000_000, 2_000_000, 300, 24, 12_000, 600, 10, 90_000, 5_000, 8_000_000, 3_000),
    *(27, 15_000, 5_000_000, 12, 5_000, 2_000, 16, 7_000_000, 18, 15, 300_000, 100, 150_000),
)
_DENSE_SIGMA = (0.5, 2.0, 1.5, 1.0, 2.0, 1.8, 1.2, 0.8, 1.6, 0.5, 1.0, 0.7, 1.1)
_DENSE_WEIGHT = (0.35, 0.0, -0.25, 0.0, -0.45, 0.0, 0.4, 0.0, 0.2, 0.0, 0.3, 0.0, 0.0)
_PAIRS = ((5, 8), (13, 16), (19, 21), (4, 22))  # columns (from 0) whose keys also act together
_CRITEO_BIAS = -2.0

N_USERS = 1_000_000
N_CATEGORIES = 5_000
ITEMS_PER_CATEGORY = 2_000
FAVOURITES = 4  # categories that make a user's taste
MAX_HISTORY = 50
_TAOBAO_BIAS = -2.5


class Zipf:
    """The Zipf law over ranks 1..n: P(k) proportional to k ** -s.

    Parameters
    ----------
    n : int
        Distinct ranks.
    s : float
        Exponent, not 1.

    Notes
    -----
    One uniform number gives one rank. The cumulative sum is tabulated up to rank 4096; beyond, it is the midpoint
    integral, whose relative error at that rank is s (s + 1) / 24 k**2, about 5e-9.
    """

    HEAD = 4096

    def __init__(self, n: int, s: float = ZIPF_S) -> None:
        self.n = n
        self.s = s
        self._sums = np.cumsum(np.arange(1, min(n, self.HEAD) + 1, dtype=np.float64) ** -s)
        self._total = float(self._sums[-1])
        self._start = (self.HEAD + 0.5) ** (1 - s)
        if n > self.HEAD:
            self._total += (self._start - (n + 0.5) ** (1 - s)) / (s - 1)

    def ranks(self, u: Floats) -> Ints:
        """The ranks at the quantiles ``u`` in [0, 1)."""
        t = u * self._total
        ranks = np.searchsorted(self._sums, t, side="right") + 1
        tail = np.flatnonzero(ranks > len(self._sums))
        if len(tail):
            if self.n > self.HEAD:
                x = (self._start - (t[tail] - self._sums[-1]) * (self.s - 1)) ** (1 / (1 - self.s))
                ranks[tail] = np.clip(np.ceil(x - 0.5), self.HEAD + 1, self.n)
            else:
                ranks[tail] = self.n
        return ranks.astype(np.int64, copy=False)


class Ceiling:
    """The best AUC and log loss that any model can have on rows of known click probability.

    The labels being independent coins, the expected AUC of the true probabilities is the chance that a random click
    outranks a random non-click: summed over a histogram of the log odds, where ties within a bin count half.
    """

    BINS = 16_384
    LIMIT = 20.0  # log odds

    def __init__(self) -> None:
        self.n_rows = 0
        self._clicks = np.zeros(self.BINS)
        self._others = np.zeros(self.BINS)
        self._loss = 0.0

    def update(self, logit: Floats) -> None:
        """Count rows with these log odds."""
        p = _sigmoid(logit)
        place = (np.clip(logit, -self.LIMIT, self.LIMIT) + self.LIMIT) * (self.BINS / (2 * self.LIMIT))
        b = np.minimum(place.astype(np.int64), self.BINS - 1)
        self._clicks += np.bincount(b, p, self.BINS)
        self._others += np.bincount(b, 1 - p, self.BINS)
        self._loss += float(np.sum(np.logaddexp(0, logit) - p * logit))
        self.n_rows += len(logit)

    @property
    def click_rate(self) -> float:
        """Expected share of clicks."""
        return float(self._clicks.sum()) / self.n_rows

    @property
    def auc(self) -> float:
        """Expected AUC of the true probabilities."""
        below = np.cumsum(self._others) - self._others / 2
        return float(self._clicks @ below / (self._clicks.sum() * self._others.sum()))

    @property
    def log_loss(self) -> float:
        """Expected log loss of the true probabilities, in nats per row."""
        return self._loss / self.n_rows


@dataclass(frozen=True)
class Synthesized:
    """What was written."""

    paths: list[str]
    n_rows: int
    nbytes: int
    bayes_auc: float
    bayes_log_loss: float
    click_rate: float


def _sigmoid(x: Floats) -> Floats:
    y: Floats = 1 / (1 + np.exp(-x))
    return y


def _mix64(x: Words) -> Words:
    """The finaliser of splitmix64, a bijection: distinct numbers give distinct keys, spread over all 64 bits."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _keys(number: Ints, domain: int) -> Ints:
    """Keys of the things numbered so within one domain; ``number < 2**48``."""
    return _mix64(number.astype(np.uint64) | np.uint64(domain << 48)).view(np.int64)


def _hash(key: Ints, salt: int) -> Words:
    """An independent hash of keys for each salt."""
    return _mix64(key.view(np.uint64) ^ np.uint64(salt * 0x9E3779B97F4A7C15 % 2**64))


def _effect(key: Ints, salt: int) -> Floats:
    """The planted effect of keys: nearly standard normal, the sum of the hash's four 16-bit parts."""
    h = _hash(key, salt)
    parts = h.view(np.uint16).reshape(-1, 4).sum(axis=1, dtype=np.float64)
    e: Floats = (parts / 65_535 - 2) * np.sqrt(3.0)
    return e


def _weight(n: int) -> float:
    """A column's share in the planted model: little where most keys are too rare to be learned."""
    return 0.3 if n <= 1_000 else 0.24 if n <= 20_000 else 0.08


def _criteo(rng: np.random.Generator, n: int) -> tuple[dict[str, pa.Array], Floats]:
    """13 log-normal columns, some of which act, and 26 key columns, all of which do."""
    columns: dict[str, pa.Array] = {}
    logit = np.full(n, _CRITEO_BIAS)
    z = rng.standard_normal((13, n))
    for j, (sigma, weight) in enumerate(zip(_DENSE_SIGMA, _DENSE_WEIGHT, strict=True)):
        columns[f"i{j + 1}"] = pa.array(np.exp(1 + sigma * z[j]).astype(np.float32))
        logit += weight * z[j]
    keys = []
    for c, zipf in enumerate(_CRITEO_ZIPF):
        key = _keys(zipf.ranks(rng.random(n)), c + 1)
        logit += _weight(zipf.n) * _effect(key, 1)
        columns[f"c{c + 1}"] = pa.array(key)
        keys.append(key)
    for a, b in _PAIRS:
        logit += 0.3 * _effect(keys[a], 2) * _effect(keys[b], 2)
    return columns, logit


def _taobao(rng: np.random.Generator, n: int) -> tuple[dict[str, pa.Array], Floats]:
    """Users who have favourite categories, what they clicked before, and one candidate item each."""
    user = _keys(_USERS.ranks(rng.random(n)), 32)

    def items(user: Ints, near: float) -> tuple[Ints, Ints]:
        """Numbers of an item and its category for each user, from the user's taste with probability ``near``."""
        n = len(user)
        nth = _hash(user + rng.integers(FAVOURITES, size=n), 3)
        taste = (nth >> np.uint64(11)).astype(np.float64) / 2**53
        category = _CATEGORIES.ranks(np.where(rng.random(n) < near, taste, rng.random(n)))
        return category * ITEMS_PER_CATEGORY + _ITEMS.ranks(rng.random(n)), category

    length = np.minimum(np.exp(2.0 + 0.9 * rng.standard_normal(n)).astype(np.int64), MAX_HISTORY)
    row = np.repeat(np.arange(n), length)
    past_item, past_category = items(user[row], 0.8)
    item, category = items(user, 0.4)
    item_key, category_key = _keys(item, 33), _keys(category, 34)
    familiar = np.bincount(row[past_category == category[row]], minlength=n)
    logit = (
        _TAOBAO_BIAS
        + 0.3 * _effect(user, 1)
        + 0.4 * _effect(item_key, 1)
        + 0.6 * _effect(category_key, 1)
        + 1.1 * np.log2(1 + familiar)
    )
    splits = np.concatenate([[0], np.cumsum(length)]).astype(np.int32)
    columns = {
        "user": pa.array(user),
        "item": pa.array(item_key),
        "category": pa.array(category_key),
        "item_history": pa.ListArray.from_arrays(splits, pa.array(_keys(past_item, 33))),
        "category_history": pa.ListArray.from_arrays(splits, pa.array(_keys(past_category, 34))),
    }
    return columns, logit


_CRITEO_ZIPF = tuple(Zipf(n) for n in CARDINALITIES)
_USERS = Zipf(N_USERS)
_CATEGORIES = Zipf(N_CATEGORIES)
_ITEMS = Zipf(ITEMS_PER_CATEGORY)

_MAKERS: dict[str, Callable[[np.random.Generator, int], tuple[dict[str, pa.Array], Floats]]] = {
    "criteo": _criteo,
    "taobao": _taobao,
}
SHAPES = tuple(_MAKERS)


def blocks(shape: str, n_rows: int, seed: int = 0) -> Iterator[tuple[pa.RecordBatch, Floats]]:
    """The rows of a synthetic log, ``BLOCK`` at a time, with the true log odds of each.

    Parameters
    ----------
    shape : "criteo" or "taobao"
    n_rows : int
    seed : int
        Chooses the rows; in [0, 2**64).

    Yields
    ------
    batch : pyarrow.RecordBatch
        ``label`` (int64, 0 or 1) and the shape's columns.
    logit : float64[batch.num_rows]
    """
    for b, start in enumerate(range(0, n_rows, BLOCK)):
        stream = np.random.Philox(key=np.array([seed, b << 8 | SHAPES.index(shape)], np.uint64))
        rng = np.random.Generator(stream)
        columns, logit = _MAKERS[shape](rng, BLOCK)
        label = (rng.random(BLOCK) < _sigmoid(logit)).astype(np.int64)
        batch = pa.RecordBatch.from_pydict({"label": pa.array(label), **columns})
        n = min(BLOCK, n_rows - start)
        yield batch.slice(0, n), logit[:n]


def synthesize(
    out: str | os.PathLike[str],
    n_rows: int,
    seed: int = 0,
    shape: str = "criteo",
    n_files: int = 1,
    row_group_rows: int = ROW_GROUP_ROWS,
    overwrite: bool = False,
    advance: Callable[[int], None] = lambda n_rows: None,
) -> Synthesized:
    """Write a synthetic click log as Parquet.

    Parameters
    ----------
    out : str or path
        A directory, which gets ``part-00000.parquet`` and so on, or one file that ends in ``.parquet``.
    n_rows : int
    seed : int
        Chooses the rows; the planted model belongs to the shape.
    shape : "criteo" or "taobao"
    n_files : int
        The rows go to the files in order, in nearly equal parts.
    row_group_rows : int
    overwrite : bool
        Replace Parquet files that are there.
    advance : function of int
        Called with the number of rows written since the last call.

    Returns
    -------
    Synthesized
        The same ceiling stands in the metadata of every file, as ``hbkit.bayes_auc`` and so on.

    Raises
    ------
    InvalidArgument
        An argument is out of range, or ``out`` exists.
    StorageError
        The operating system refused to write.

    Notes
    -----
    Memory does not grow with ``n_rows``: a block, and a row group, of one file are held at a time. The files stay
    open until the end, since the ceiling belongs in their footers.
    """
    output = Output(out, overwrite)
    if n_rows < 1:
        raise errors.InvalidArgument(f"{n_rows} rows", remedy="ask for at least one")
    if not 0 <= seed < 2**64:
        raise errors.InvalidArgument(f"seed {seed}", remedy="use 0 to 2**64 - 1")
    if shape not in _MAKERS:
        raise errors.InvalidArgument(f"unknown shape {shape!r}", remedy=f"use one of {', '.join(SHAPES)}")
    if not 1 <= n_files <= min(n_rows, MAX_FILES):
        raise errors.InvalidArgument(f"{n_rows} rows in {n_files} files", remedy=f"use 1 to {MAX_FILES} files")
    if output.is_file and n_files > 1:
        raise errors.InvalidArgument(f"{n_files} files in one", remedy="name a directory", file=output.path)
    names = [f"part-{i:05d}.parquet" for i in range(n_files)]
    ends = [n_rows * (i + 1) // n_files for i in range(n_files)]
    ceiling = Ceiling()
    made = blocks(shape, n_rows, seed)
    first, logit = next(made)
    with output, writers(output, names, first.schema, row_group_rows, "zstd") as files:
        written, f = 0, 0
        while True:
            ceiling.update(logit)
            while first.num_rows:
                part = first.slice(0, ends[f] - written)
                first = first.slice(part.num_rows)
                files[f].write(part)
                written += part.num_rows
                if written == ends[f]:
                    files[f].flush()
                    f += 1
                advance(part.num_rows)
            following = next(made, None)
            if following is None:
                break
            first, logit = following
        metadata = {
            "hbkit.shape": shape,
            "hbkit.seed": str(seed),
            "hbkit.rows": str(n_rows),
            "hbkit.zipf_s": str(ZIPF_S),
            "hbkit.click_rate": f"{ceiling.click_rate:.6f}",
            "hbkit.bayes_auc": f"{ceiling.auc:.6f}",
            "hbkit.bayes_log_loss": f"{ceiling.log_loss:.6f}",
        }
        nbytes = sum(writer.finish(metadata) for writer in files)
    paths = [output.final(name) for name in names]
    return Synthesized(paths, n_rows, nbytes, ceiling.auc, ceiling.log_loss, ceiling.click_rate)
