"""Streaming metrics of click models: AUC, GAUC and log loss, in NumPy.

Each metric takes batches with ``update``, gives its value with ``result`` and adds another instance's batches with
``merge``, so that threads and files can be evaluated apart and summed; ``reduce`` does so over all ranks. The order of
batches and merges does not matter beyond the rounding of sums. A value that the data does not define is ``nan``: no
rows at all, or for AUC only one class.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from hbkit import errors
from hbkit.shuffle import partition

if TYPE_CHECKING:
    from hbkit.shuffle import Transport

__all__ = ["AUC", "GAUC", "LogLoss"]

Array = npt.NDArray[Any]

# A score falls into the bin of its float32 bit pattern without the lowest 10 bits: 8,192 bins to a power of two. Floats
# are fine beside 0 and coarse beside 1, where the probabilities of a frequent class lie, so scores in [1/2, 1) are
# binned by 1 - score, mirrored: 2^-24 to 1/2 are 23 powers of two, which take the place of one.
DROPPED_BITS = 10
HALF = int(np.float32(0.5).view(np.int32))
MIRRORED = 23 << 23
N_BINS = ((1 << 32) + MIRRORED) >> DROPPED_BITS


def _rows(label: Any, score: Any, weight: Any) -> tuple[Array, Array, Array]:
    """Check one batch: label bool[n], score float32[n] without nan, weight float64[n] that is not negative."""
    label = np.asarray(label).reshape(-1)
    score = np.asarray(score).reshape(-1).astype(np.float32)
    weight = np.ones(len(label)) if weight is None else np.asarray(weight, np.float64).reshape(-1)
    if not len(label) == len(score) == len(weight):
        raise errors.InvalidArgument(
            f"{len(label)} labels, {len(score)} scores and {len(weight)} weights",
            remedy="give one score, and one weight if any, for each label",
        )
    clicked = label == 1
    if not (clicked | (label == 0)).all():
        raise errors.InvalidArgument("a label is neither 0 nor 1", remedy="map the labels to 0 and 1")
    if np.isnan(score).any():
        raise errors.InvalidArgument("a score is nan", remedy="look for a diverged model or a nan in its input")
    if not (np.isfinite(weight) & (weight >= 0)).all():
        raise errors.InvalidArgument("a weight is negative or not finite", remedy="weigh rows with 0 or more")
    return clicked, score, weight


def _bins(score: Array) -> Array:
    """Bin of each score, nondecreasing in the score: score float32[n] without nan, bins int64[n]."""
    upper = (score >= 0.5) & (score < 1)
    bits = np.where(upper, 1 - score, score + 0).astype(np.float32).view(np.int32).astype(np.int64)  # -0.0 + 0 is 0.0
    order = np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    order = np.where(upper, 2 * HALF - order, order + np.where(score >= 1, MIRRORED, 0))
    return (order + (1 << 31)) >> DROPPED_BITS


def _packed(arrays: Sequence[Array]) -> Array:
    """The arrays as bytes."""
    file = io.BytesIO()
    for array in arrays:
        np.lib.format.write_array(file, array, allow_pickle=False)
    return np.frombuffer(file.getvalue(), np.uint8)


def _exchange(ranks: Transport, parts: Sequence[Array]) -> list[list[Array]]:
    """Send packed arrays to each rank; those that came from each, in rank order."""
    received, counts = ranks.all_to_all(np.concatenate(parts), np.array([len(part) for part in parts]))
    out: list[list[Array]] = []
    for part in np.split(received, np.cumsum(counts)[:-1]):
        file = io.BytesIO(part.tobytes())
        out.append([])
        while file.tell() < len(part):
            out[-1].append(np.lib.format.read_array(file, allow_pickle=False))
    return out


def _gather(ranks: Transport, arrays: Sequence[Array]) -> list[list[Array]]:
    """The arrays of each rank, in rank order."""
    return _exchange(ranks, [_packed(arrays)] * ranks.size)


def _keys(group: Array) -> npt.NDArray[np.int64]:
    """Keys of groups, equal for equal ones, whatever their width: to find the rank that owns a group."""
    if group.dtype.kind in "iu":
        return group.astype(np.uint64).view(np.int64)
    names, index = np.unique(group, return_inverse=True)
    return np.array([zlib.crc32(str(name).encode()) for name in names], np.int64)[index]


class AUC:
    """Area under the ROC curve: the chance that a click's score is above a non-click's, ties counted half.

    Scores are counted in a fixed histogram over their float32 bit pattern, so probabilities, logits and any other
    float32 are equally fine, memory does not grow with the rows, and merging is an addition.

    Notes
    -----
    Scores that share a bin count as tied: they differ by less than 1 part in 8,192 of the score and, between 1/2 and
    1, of 1 - score. The error this makes is at most half of ``tied()``; for the scores of a model it is below 1e-4.
    The histogram takes 67 MiB of address space, of which only the pages that scores fall into are ever touched.

    Source: Fawcett, An introduction to ROC analysis, 2006.
    """

    def __init__(self) -> None:
        self._counts = np.zeros((2, N_BINS))
        self._low, self._high = N_BINS, 0  # bins outside of [low, high) are empty

    def update(self, label: Any, score: Any, weight: Any = None) -> None:
        """Count one batch.

        Parameters
        ----------
        label : array[n] of 0 and 1
        score : float[n], higher means more likely 1; float64 is rounded to float32
        weight : float[n], optional, 0 or more; without it each row counts 1

        Raises
        ------
        InvalidArgument
            Lengths differ, a label is not 0 or 1, a score is nan, a weight is negative.
        """
        clicked, score, weight = _rows(label, score, weight)
        bins = _bins(score)
        self._low, self._high = min(self._low, bins.min(initial=N_BINS)), max(self._high, bins.max(initial=-1) + 1)
        for counts, rows in zip(self._counts, (~clicked, clicked), strict=True):
            np.add.at(counts, bins[rows], weight[rows])

    def merge(self, other: AUC) -> Self:
        """Add the rows that ``other`` has counted; gives this metric."""
        used = slice(other._low, other._high)
        self._counts[:, used] += other._counts[:, used]
        self._low, self._high = min(self._low, other._low), max(self._high, other._high)
        return self

    def reduce(self, ranks: Transport) -> Self:
        """A new metric of the rows that all ranks have counted, the same on each. Every rank must call it."""
        out, own = type(self)(), self._used()
        bins = np.flatnonzero(own.any(0))
        for found, counts in _gather(ranks, [bins + self._low, own[:, bins]]):
            out._counts[:, found] += counts
            out._low, out._high = min(out._low, found.min(initial=N_BINS)), max(out._high, found.max(initial=-1) + 1)
        return out

    def _used(self) -> Array:
        return self._counts[:, self._low : self._high]

    def result(self) -> float:
        """The AUC of all rows so far; nan while there are only clicks, only non-clicks, or no rows."""
        negative, positive = self._used()
        pairs = negative.sum() * positive.sum()
        below = np.cumsum(negative) - negative
        return float((positive * (below + negative / 2)).sum() / pairs) if pairs else float("nan")

    def tied(self) -> float:
        """Share of (click, non-click) pairs that fall in one bin; half of it bounds the error of ``result``."""
        negative, positive = self._used()
        pairs = negative.sum() * positive.sum()
        return float((positive * negative).sum() / pairs) if pairs else float("nan")


class GAUC:
    """AUC within each group (user, session), averaged with the weight of the group's impressions.

    A group whose rows are all of one class has no AUC; it is left out of the average and counted in ``n_left_out``.
    Exact: within a group only equal float32 scores are tied.

    Notes
    -----
    A group's rows may come in any batch, so the rows are kept: 21 bytes each, for groups of 64-bit integers.

    Source: Zhu et al., Optimized Cost per Click in Taobao Display Advertising, KDD 2017.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[Array, Array, Array, Array]] = []
        self._reduced: Array | None = None  # the sums of all ranks' groups, once they are made

    def update(self, label: Any, score: Any, weight: Any = None, group: Any = None) -> None:
        """Take one batch.

        Parameters
        ----------
        label, score, weight
            As in `AUC.update`.
        group : array[n] of integers or strings, the same type in every batch

        Raises
        ------
        InvalidArgument
            As in `AUC.update`; or there is no group, or groups of another length or kind; or `reduce` gave this metric.
        """
        self._check_not_reduced()
        clicked, score, weight = _rows(label, score, weight)
        group = np.asarray(group).reshape(-1)
        if group.dtype.kind not in "iuSU" or len(group) != len(clicked):
            raise errors.InvalidArgument(
                f"{len(group)} groups of type {group.dtype} for {len(clicked)} labels",
                remedy="give GAUC one integer or string for each row, such as the user",
            )
        if self._parts and self._parts[0][0].dtype.kind != group.dtype.kind:
            raise errors.InvalidArgument(
                f"groups of type {group.dtype} after groups of type {self._parts[0][0].dtype}",
                remedy="give every batch groups of one type",
            )
        self._parts.append((group.copy(), score, clicked, weight))

    def merge(self, other: GAUC) -> Self:
        """Add the rows that ``other`` has taken; gives this metric. A group may have rows in both.

        Raises
        ------
        InvalidArgument
            One of them is what `reduce` gave.
        """
        self._check_not_reduced()
        other._check_not_reduced()
        self._parts += other._parts
        return self

    def _check_not_reduced(self) -> None:
        if self._reduced is not None:
            raise errors.InvalidArgument(
                "a reduced GAUC has no rows and takes none", remedy="update the metrics of the ranks, and reduce them"
            )

    def reduce(self, ranks: Transport) -> Self:
        """A new metric of the rows that all ranks have taken, the same on each, which takes no more rows.

        Every rank must call it. The rows of a group go to the rank that owns it; what returns is sums.
        """
        own, parts = self._rows(), [_packed([])] * ranks.size
        if own is not None:
            order, _, counts = partition(_keys(own[0]), ranks.size)
            parts = [_packed([c[rows] for c in own]) for rows in np.split(order, np.cumsum(counts)[:-1])]
        owned, out = GAUC(), type(self)()
        owned._parts = [
            (group, score, clicked, weight)
            for group, score, clicked, weight in filter(None, _exchange(ranks, parts))
            if len(group)
        ]
        out._reduced = np.sum([sums for (sums,) in _gather(ranks, [owned._sums()])], axis=0)
        return out

    def _rows(self) -> tuple[Array, Array, Array, Array] | None:
        """Groups, scores, labels and weights of all rows; None where there are none."""
        if not self._parts:
            return None
        # One part from now on: asking for three figures should not sort apart what was joined already.
        group, score, label, weight = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        self._parts = [(group, score, label, weight)]
        return self._parts[0]

    def _sums(self) -> Array:
        """Of the groups: AUC times impressions, impressions, how many, and how many that have one class only."""
        if self._reduced is not None:
            return self._reduced
        auc, impressions = self._groups()
        one = np.isnan(auc)
        return np.array([(auc * impressions)[~one].sum(), impressions[~one].sum(), len(auc), one.sum()])

    def _groups(self) -> tuple[Array, Array]:
        """AUC (nan: one class only) and impressions of each group."""
        rows = self._rows()
        if rows is None or not len(rows[0]):
            return np.empty(0), np.empty(0)
        group, score, clicked, weight = rows
        order = np.lexsort((score, group))
        group, score = group[order], score[order]
        positive = np.where(clicked, weight, 0.0)[order]
        negative = np.where(clicked, 0.0, weight)[order]
        new_group = np.append(True, group[1:] != group[:-1])
        first = np.flatnonzero(new_group)  # of each group; `run` is the first row of each group's equal scores
        run = np.flatnonzero(new_group | np.append(True, score[1:] != score[:-1]))
        run_positive, run_negative = np.add.reduceat(positive, run), np.add.reduceat(negative, run)
        first_run = np.searchsorted(run, first)
        below = np.cumsum(run_negative) - run_negative
        below -= np.repeat(below[first_run], np.diff(np.append(first_run, len(run))))
        wins = np.add.reduceat(run_positive * (below + run_negative / 2), first_run)
        n_positive, n_negative = np.add.reduceat(positive, first), np.add.reduceat(negative, first)
        pairs = n_positive * n_negative
        auc = np.divide(wins, pairs, out=np.full(len(first), np.nan), where=pairs > 0)
        return auc, n_positive + n_negative

    @property
    def n_groups(self) -> int:
        """Groups seen so far, those with one class too."""
        return int(self._sums()[2])

    @property
    def n_left_out(self) -> int:
        """Groups that have rows of one class only, which ``result`` leaves out."""
        return int(self._sums()[3])

    def result(self) -> float:
        """Impression-weighted mean of the groups' AUC; nan while no group has both classes."""
        weighted, impressions, _, _ = self._sums()
        return float(weighted / impressions) if impressions else float("nan")


class LogLoss:
    """Mean negative log likelihood (natural log) of 0/1 labels under predicted probabilities.

    Probabilities are clipped to [1e-7, 1 - 1e-7], so one wrong certainty costs 16.1 and not infinity.
    """

    def __init__(self) -> None:
        self._loss = 0.0
        self._weight = 0.0

    def update(self, label: Any, score: Any, weight: Any = None) -> None:
        """Count one batch; as `AUC.update`, and a score is a probability.

        Raises
        ------
        InvalidArgument
            As in `AUC.update`; or a score is not between 0 and 1.
        """
        clicked, score, weight = _rows(label, score, weight)
        if ((score < 0) | (score > 1)).any():
            raise errors.InvalidArgument("a score is not a probability", remedy="apply the sigmoid before LogLoss")
        likelihood = np.clip(np.where(clicked, score, 1 - score.astype(np.float64)), 1e-7, 1 - 1e-7)
        self._loss -= float((weight * np.log(likelihood)).sum())
        self._weight += float(weight.sum())

    def merge(self, other: LogLoss) -> Self:
        """Add the rows that ``other`` has counted; gives this metric."""
        self._loss += other._loss
        self._weight += other._weight
        return self

    def reduce(self, ranks: Transport) -> Self:
        """A new metric of the rows that all ranks have counted, the same on each. Every rank must call it."""
        out = type(self)()
        for (sums,) in _gather(ranks, [np.array([self._loss, self._weight])]):
            out._loss += float(sums[0])
            out._weight += float(sums[1])
        return out

    def result(self) -> float:
        """The weighted mean loss of all rows so far; nan while their weights sum to 0."""
        return self._loss / self._weight if self._weight else float("nan")
