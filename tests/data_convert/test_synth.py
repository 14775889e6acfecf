"""The generator against the laws it claims: Zipf, the ceiling, and blocks that depend on nothing but their number."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from hbkit import errors
from hbkit.data import synth


@settings(max_examples=20)
@given(st.integers(1, 200_000), st.sampled_from([0.5, 1.05, 2.0]))
def test_zipf_ranks_are_the_quantiles_of_the_law(n, s):
    p = np.arange(1, n + 1, dtype=np.float64) ** -s
    sums = np.cumsum(p / p.sum())
    u = np.random.default_rng(0).random(500)
    ranks = synth.Zipf(n, s).ranks(u)
    assert ranks.min() >= 1 and ranks.max() <= n
    # at a boundary of two ranks the last bits decide
    low = np.concatenate([[0], sums])[ranks - 1]
    assert (u >= low - 1e-8).all() and (u <= sums[ranks - 1] + 1e-8).all()


def test_zipf_head_and_tail_meet():
    law = synth.Zipf(10_000_000)
    u = np.linspace(0, 1, 200_001)[:-1]
    ranks = law.ranks(u)
    assert (np.diff(ranks) >= 0).all() and ranks[0] == 1
    assert law.ranks(np.array([np.nextafter(1, 0)]))[0] == 10_000_000
    head = np.unique(ranks[(ranks > 4000) & (ranks < 4200)])
    assert head.min() < 4096 < head.max()


@settings(max_examples=50)
@given(st.lists(st.floats(-8, 8), min_size=2, max_size=60))
def test_ceiling_is_the_expected_auc_and_log_loss(logits):
    logit = np.array(logits)
    p = 1 / (1 + np.exp(-logit))
    ceiling = synth.Ceiling()
    for part in np.array_split(logit, 3):
        ceiling.update(part)
    # naive: every pair, weighted by the chance that one is a click and the other is not
    weight = np.outer(p, 1 - p)
    wins = (logit[:, None] > logit[None, :]) + 0.5 * (logit[:, None] == logit[None, :])
    # a bin of the histogram counts its pairs as ties
    near = np.abs(logit[:, None] - logit[None, :]) <= 2 * synth.Ceiling.LIMIT / synth.Ceiling.BINS
    slack = 0.5 * (weight * (near & (logit[:, None] != logit[None, :]))).sum() / weight.sum()
    assert abs(ceiling.auc - (weight * wins).sum() / weight.sum()) <= slack + 1e-9
    assert ceiling.log_loss == pytest.approx(np.mean(-p * np.log(p) - (1 - p) * np.log(1 - p)), rel=1e-9)
    assert ceiling.click_rate == pytest.approx(p.mean())


@pytest.mark.parametrize("shape", synth.SHAPES)
def test_ceiling_agrees_with_drawn_labels(shape):
    ceiling, labels, logits = synth.Ceiling(), [], []
    for batch, logit in synth.blocks(shape, 4 * synth.BLOCK, seed=5):
        ceiling.update(logit)
        labels.append(batch["label"].to_numpy())
        logits.append(logit)
    label, logit = np.concatenate(labels), np.concatenate(logits)
    # 260,000 coins: the drawn figures lie near the expected ones
    assert roc_auc_score(label, logit) == pytest.approx(ceiling.auc, abs=4e-3)
    assert log_loss(label, 1 / (1 + np.exp(-logit))) == pytest.approx(ceiling.log_loss, abs=4e-3)
    assert 0.80 < ceiling.auc < 0.85 and 0.10 < ceiling.click_rate < 0.25


def test_criteo_keys_follow_their_law_and_fill_int64():
    batch = pa.Table.from_batches([b for b, _ in synth.blocks("criteo", 3 * synth.BLOCK)])
    for c, n in enumerate(synth.CARDINALITIES):
        keys, counts = np.unique(batch[f"c{c + 1}"].to_numpy(), return_counts=True)
        assert len(keys) <= n
        share = 1 / np.sum(np.arange(1, min(n, 10**6) + 1) ** -synth.ZIPF_S)
        if n <= 300_000:
            assert counts.max() / batch.num_rows == pytest.approx(share, rel=0.05)
        if n >= 5_000:
            assert keys.min() < -(2**61) and keys.max() > 2**61
    assert len(np.unique(batch["c3"].to_numpy())) > 20_000
    assert np.exp(1) == pytest.approx(np.median(batch["i2"].to_numpy()), rel=0.05)
    assert batch["i2"].to_numpy().max() > 1_000  # heavy tail


def test_criteo_dense_columns_tell_something_of_the_label():
    batch = next(synth.blocks("criteo", synth.BLOCK))[0]
    auc = roc_auc_score(batch["label"].to_numpy(), -batch["i5"].to_numpy())
    assert 0.53 < auc < 0.7
    assert abs(roc_auc_score(batch["label"].to_numpy(), batch["i2"].to_numpy()) - 0.5) < 0.02


def test_taobao_histories_are_of_the_users_taste():
    batch = pa.Table.from_batches([b for b, _ in synth.blocks("taobao", 2 * synth.BLOCK)])
    user = batch["user"].to_numpy()
    history = batch["category_history"].combine_chunks()
    length = np.diff(history.offsets.to_numpy())
    assert (np.diff(batch["item_history"].combine_chunks().offsets.to_numpy()) == length).all()
    assert length.min() == 0 and length.max() == synth.MAX_HISTORY
    values, owner = history.values.to_numpy(), np.repeat(user, length)
    head = np.unique(user, return_counts=True)
    frequent = head[0][np.argsort(-head[1])[:50]]
    top = []
    for u in frequent:
        _, counts = np.unique(values[owner == u], return_counts=True)
        top.append(np.sort(counts)[-synth.FAVOURITES :].sum() / counts.sum())
    # four categories make most of what a user did, of 5,000 there are
    assert np.mean(top) > 0.75
    # an item has one category wherever it appears
    items = np.concatenate([batch["item"].to_numpy(), batch["item_history"].combine_chunks().values.to_numpy()])
    categories = np.concatenate([batch["category"].to_numpy(), values])
    order = np.argsort(items, kind="stable")
    same_item = np.diff(items[order]) == 0
    assert (np.diff(categories[order])[same_item] == 0).all() and same_item.any()


@pytest.mark.parametrize("shape", synth.SHAPES)
def test_rows_do_not_depend_on_files_row_groups_or_count(tmp_path, shape):
    n = synth.BLOCK + 1234
    one = synth.synthesize(tmp_path / "one.parquet", n, 3, shape)
    many = synth.synthesize(tmp_path / "many", n, 3, shape, n_files=5, row_group_rows=7_000)
    more = synth.synthesize(tmp_path / "more.parquet", n + synth.BLOCK, 3, shape)
    rows = pq.read_table(one.paths[0])
    assert len(many.paths) == 5
    assert pa.concat_tables([pq.read_table(p) for p in many.paths]).equals(rows)
    assert pq.read_table(more.paths[0]).slice(0, n).equals(rows)
    assert many.bayes_auc == one.bayes_auc
    other = synth.synthesize(tmp_path / "other.parquet", n, 4, shape)
    assert not pq.read_table(other.paths[0]).equals(rows)


def test_the_ceiling_stands_in_every_file(tmp_path):
    made = synth.synthesize(tmp_path / "s", 10_000, 1, "criteo", n_files=3, row_group_rows=1000)
    for path in made.paths:
        file = pq.ParquetFile(path)
        metadata = file.metadata.metadata
        assert float(metadata[b"hbkit.bayes_auc"]) == pytest.approx(made.bayes_auc, abs=1e-6)
        assert float(metadata[b"hbkit.bayes_log_loss"]) == pytest.approx(made.bayes_log_loss, abs=1e-6)
        assert (metadata[b"hbkit.rows"], metadata[b"hbkit.seed"], metadata[b"hbkit.shape"]) == (
            b"10000",
            b"1",
            b"criteo",
        )
        groups = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
        assert groups[:-1] == [1000] * 3 and sum(groups) in (3333, 3334)


@pytest.mark.parametrize(
    "arguments",
    [
        {"n_rows": 0},
        {"seed": -1},
        {"seed": 2**64},
        {"shape": "avazu"},
        {"n_files": 0},
        {"n_files": 11},
        {"row_group_rows": 0},
    ],
)
def test_synthesize_refuses(tmp_path, arguments):
    with pytest.raises(errors.InvalidArgument):
        synth.synthesize(tmp_path / "s", **({"n_rows": 10} | arguments))
    assert not (tmp_path / "s").exists()
