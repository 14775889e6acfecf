"""What users gain, in small: keys of their own beat shared buckets, and rare keys cost rows more than they give.

On real data it is measured by ``bench/gain.py``.
"""

import numpy as np
import pytest

from hbkit._ext.batch import mixed
from hbkit.embedding import SGD, Constant, CountAdmission, MaxRows, Table
from hbkit.metrics import AUC

N_KEYS, N_BATCHES, BATCH = 2000, 60, 500


def clicks():
    """Keys by a power law, and clicks whose log odds are the key's own."""
    rng = np.random.default_rng(0)
    odds = rng.normal(0, 2, N_KEYS)
    keys = np.minimum(rng.zipf(1.25, (N_BATCHES, BATCH)) - 1, N_KEYS - 1)
    return keys * 7919, (rng.random(keys.shape) < 1 / (1 + np.exp(-odds[keys]))).astype(np.float32)


def trained(n_buckets=None, **rules):
    """Test AUC and rows of a logistic regression on the key alone."""
    table, auc = Table("t", 1, initializer=Constant(0), optimizer=SGD(lr=0.5), **rules), AUC()
    for i, (keys, label) in enumerate(zip(*clicks(), strict=True)):
        if n_buckets is not None:
            keys = (mixed(keys) % np.uint64(n_buckets)).astype(np.int64)
        test = i >= N_BATCHES * 3 // 4
        score = 1 / (1 + np.exp(-table.lookup(keys, train=not test)[:, 0]))
        if test:
            auc.update(label, score)
        else:
            table.update(keys, (score - label)[:, None])
    return float(auc.result()), len(table)


@pytest.fixture(scope="module")
def exact():
    return trained()


def test_gain_of_a_row_a_key_over_buckets(exact):
    auc, n = exact
    by_share = [trained(n_buckets=int(share * n))[0] for share in (1, 0.5, 0.1)]
    assert auc > by_share[0] + 0.003 > by_share[1] > by_share[2]


def test_gain_of_admission_is_size(exact):
    auc, n = trained(admission=CountAdmission(2))
    assert n < 0.75 * exact[1] and auc > exact[0] - 0.01


def test_gain_of_eviction_is_size(exact):
    auc, n = trained(eviction=[MaxRows(exact[1] // 3)], evict_every=5)
    assert n <= exact[1] // 3 + BATCH and auc > exact[0] - 0.02
