"""AUC, GAUC and LogLoss against scikit-learn, and what merging, ties and weights must keep."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from hbkit import errors, metrics
from hbkit.shuffle import Loopback

ROWS = st.lists(
    st.tuples(
        st.booleans(),
        st.integers(0, 20).map(lambda i: i / 20),  # few values: many ties
        st.integers(0, 3).map(float),
        st.integers(0, 4),
    ),
    max_size=60,
)


def columns(rows):
    label, score, weight, group = ([row[i] for row in rows] for i in range(4))
    return np.array(label, np.float32), np.array(score, np.float32), np.array(weight), np.array(group, np.int64)


def oracle_auc(label, score, weight):
    """scikit-learn's figure; nan where its rows of positive weight have one class."""
    kept = weight > 0
    return roc_auc_score(label, score, sample_weight=weight) if len(set(label[kept])) == 2 else math.nan


def planted(n, spread, centre, seed=0):
    rng = np.random.default_rng(seed)
    label = rng.random(n) < 0.2
    logit = rng.normal(centre + np.where(label, spread, 0), spread, n)
    return label, (1 / (1 + np.exp(-logit))).astype(np.float32)


@given(ROWS)
def test_auc_equals_sklearn_with_ties_and_weights(rows):
    label, score, weight, _ = columns(rows)
    auc = metrics.AUC()
    auc.update(label, score, weight)
    assert auc.result() == pytest.approx(oracle_auc(label, score, weight), abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("spread", [2.0, 0.1, 0.01])  # the last: a model that has hardly left its start
@pytest.mark.parametrize("centre", [0.0, -4.0, 6.0])
def test_auc_is_within_a_ten_thousandth_on_continuous_scores(spread, centre):
    label, score = planted(200_000, spread, centre)
    auc = metrics.AUC()
    for part in np.array_split(np.arange(len(label)), 7):
        auc.update(label[part], score[part])
    exact = roc_auc_score(label, score)
    assert abs(auc.result() - exact) <= 1e-4
    assert abs(auc.result() - exact) <= auc.tied() / 2 + 1e-12


@given(st.lists(st.tuples(st.booleans(), st.floats(width=32, allow_nan=False)), min_size=2, max_size=40))
def test_auc_error_is_bounded_by_half_the_tied_pairs_for_any_float(rows):
    label, score = np.array([r[0] for r in rows]), np.array([r[1] for r in rows], np.float32)
    auc = metrics.AUC()
    auc.update(label, score)
    if label.all() or not label.any():
        assert math.isnan(auc.result())
        return
    click, other = score[label][:, None], score[~label][None, :]
    exact = ((click > other) + (click == other) / 2).mean()
    assert abs(auc.result() - exact) <= auc.tied() / 2 + 1e-12


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2) | st.lists(st.floats(0, 1, width=32), min_size=2))
def test_auc_bins_are_in_the_order_of_the_scores(scores):
    bins = metrics._bins(np.sort(np.array(scores, np.float32)))
    assert (np.diff(bins) >= 0).all() and bins[0] >= 0 and bins[-1] < metrics.N_BINS


def test_auc_bins_have_the_stated_width():
    score = np.sort(np.random.default_rng(0).random(1_000_000, np.float32))
    _, first = np.unique(metrics._bins(score), return_index=True)
    last = np.append(first[1:], len(score)) - 1
    width = score[last].astype(np.float64) - score[first]
    assert (width * 8192 <= np.minimum(score[first], 1 - score[last].astype(np.float64)) + 1e-9).all()


def test_auc_takes_both_zeros_as_one_score():
    auc = metrics.AUC()
    auc.update([0, 1], np.array([0.0, -0.0], np.float32))
    assert auc.result() == 0.5


def test_auc_is_unchanged_by_the_sigmoid():
    label, score = planted(10_000, 1.0, 0.0)
    by_probability, by_logit = metrics.AUC(), metrics.AUC()
    by_probability.update(label, score)
    by_logit.update(label, np.log(score / (1 - score)))
    assert by_probability.result() == pytest.approx(by_logit.result(), abs=1e-4)


@given(ROWS)
def test_gauc_equals_sklearn_group_by_group(rows):
    label, score, weight, group = columns(rows)
    gauc = metrics.GAUC()
    gauc.update(label[::2], score[::2], weight[::2], group[::2])  # a group spans batches
    gauc.update(label[1::2], score[1::2], weight[1::2], group[1::2])
    seen = [
        (oracle_auc(label[group == g], score[group == g], weight[group == g]), weight[group == g].sum())
        for g in np.unique(group)
    ]
    both = [(auc, impressions) for auc, impressions in seen if not math.isnan(auc)]
    expected = np.average([a for a, _ in both], weights=[i for _, i in both]) if both else math.nan
    assert gauc.result() == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert (gauc.n_groups, gauc.n_left_out) == (len(seen), len(seen) - len(both))


def test_gauc_takes_strings_as_groups():
    gauc = metrics.GAUC()
    gauc.update([0, 1, 1], [0.1, 0.9, 0.5], group=["anna", "anna", "ben"])
    gauc.update([0], [0.7], group=["benedict"])
    assert (gauc.result(), gauc.n_groups, gauc.n_left_out) == (1.0, 3, 2)


@given(ROWS)
def test_log_loss_equals_sklearn(rows):
    label, score, weight, _ = columns(rows)
    loss = metrics.LogLoss()
    loss.update(label, score, weight)
    if weight.sum() == 0:
        assert math.isnan(loss.result())
        return
    clipped = np.clip(score.astype(np.float64), 1e-7, 1 - 1e-7)
    expected = log_loss(label.astype(int), clipped, sample_weight=weight, labels=[0, 1])
    assert loss.result() == pytest.approx(expected, rel=1e-9)


def test_log_loss_of_a_wrong_certainty_is_finite():
    loss = metrics.LogLoss()
    loss.update([1, 0], [0.0, 1.0])
    assert loss.result() == pytest.approx(-math.log(1e-7))


@given(ROWS, st.integers(0, 60))
def test_merge_equals_one_metric_over_all_rows(rows, cut):
    label, score, weight, group = columns(rows)
    for metric in (metrics.AUC, metrics.GAUC, metrics.LogLoss):
        whole, left, right = metric(), metric(), metric()
        for m, part in ((whole, slice(None)), (left, slice(cut)), (right, slice(cut, None))):
            extra = (group[part],) if metric is metrics.GAUC else ()
            m.update(label[part], score[part], weight[part], *extra)
        before = right.result()
        assert left.merge(right) is left
        assert left.result() == pytest.approx(whole.result(), rel=1e-12, nan_ok=True)
        assert right.result() == pytest.approx(before, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("metric", [metrics.AUC, metrics.GAUC, metrics.LogLoss])
def test_metric_of_nothing_is_nan(metric):
    assert math.isnan(metric().result())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (([0, 1], [0.5]), "2 labels, 1 scores"),
        (([0, 2], [0.5, 0.5]), "neither 0 nor 1"),
        (([0, math.nan], [0.5, 0.5]), "neither 0 nor 1"),
        (([0, 1], [0.5, math.nan]), "nan"),
        (([0, 1], [0.5, 0.5], [1, -1]), "weight"),
        (([0, 1], [0.5, 0.5], [1, math.nan]), "weight"),
    ],
)
def test_metric_refuses_bad_rows(arguments, says):
    for metric in (metrics.AUC(), metrics.LogLoss()):
        with pytest.raises(errors.InvalidArgument, match=says):
            metric.update(*arguments)


def test_log_loss_refuses_logits():
    with pytest.raises(errors.InvalidArgument, match="sigmoid"):
        metrics.LogLoss().update([1], [2.5])


@pytest.mark.parametrize("group", [None, [1.5, 2.5], [1]])
def test_gauc_refuses_bad_groups(group):
    with pytest.raises(errors.InvalidArgument, match="group"):
        metrics.GAUC().update([0, 1], [0.5, 0.5], group=group)


class Counting:
    """A transport that counts what goes to other ranks."""

    def __init__(self, ranks):
        self.ranks, self.rank, self.size, self.sent = ranks, ranks.rank, ranks.size, 0

    def all_to_all(self, data, counts):
        self.sent += int(counts.sum() - counts[self.rank])
        return self.ranks.all_to_all(data, counts)


@pytest.mark.parametrize("names", [np.arange(2000), np.array([f"user {i}" for i in range(2000)])])
def test_gauc_sends_each_row_once_to_the_rank_that_owns_its_group(names):
    rng, n, size = np.random.default_rng(0), 20_000, 4
    label, score, group = rng.random(n) < 0.3, rng.random(n), names[rng.integers(0, 2000, n)]
    whole, ranks, wires = metrics.GAUC(), [], [Counting(ranks) for ranks in Loopback.group(size)]
    whole.update(label, score, group=group)
    for part in np.array_split(np.arange(n), size):
        ranks.append(metrics.GAUC())
        width = "U9" if len(ranks) == 1 else group.dtype  # ranks may differ in the width of strings
        ranks[-1].update(label[part], score[part], group=group[part].astype(width if group.dtype.kind == "U" else int))
    with ThreadPoolExecutor(size) as pool:
        found = list(pool.map(lambda pair: pair[0].reduce(pair[1]), zip(ranks, wires, strict=True)))
    for metric in found:
        assert metric.result() == pytest.approx(whole.result(), rel=1e-12)
        assert (metric.n_groups, metric.n_left_out) == (whole.n_groups, whole.n_left_out)
    row = group.dtype.itemsize + 13
    assert sum(wire.sent for wire in wires) < 0.8 * n * row + 20_000  # three of four rows, once, and headers


@pytest.mark.parametrize("kind", [metrics.AUC, metrics.LogLoss, metrics.GAUC])
def test_metrics_reduce_over_all_ranks(kind):
    rng = np.random.default_rng(0)
    sizes = [400, 0, 300, 1]  # one rank has no rows, one has one class
    label, score = [rng.integers(0, 2, n) for n in sizes], [rng.random(n) for n in sizes]
    weight, group = [rng.integers(1, 4, n) for n in sizes], [rng.integers(0, 9, n) for n in sizes]
    parts = [
        (y, p, w, g) if kind is metrics.GAUC else (y, p, w)
        for y, p, w, g in zip(label, score, weight, group, strict=True)
    ]
    whole, ranks = kind(), []
    for part in parts:
        ranks.append(kind())
        if len(part[0]):
            ranks[-1].update(*part)
            whole.update(*part)
    with ThreadPoolExecutor(len(sizes)) as pool:
        found = list(
            pool.map(lambda pair: pair[0].reduce(pair[1]), zip(ranks, Loopback.group(len(sizes)), strict=True))
        )
    (result,) = {metric.result() for metric in found}  # the same on all
    assert result == pytest.approx(whole.result(), rel=1e-12)
    if kind is metrics.GAUC:
        assert {(m.n_groups, m.n_left_out) for m in found} == {(whole.n_groups, whole.n_left_out)}
        for metric in (found[0].merge, whole.merge):
            with pytest.raises(errors.InvalidArgument, match="reduced"):
                metric(found[1])
    assert np.isnan(kind().reduce(Loopback.group(1)[0]).result())
