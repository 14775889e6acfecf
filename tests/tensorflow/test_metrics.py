"""The metrics take tensors as they take arrays."""

import numpy as np
import pytest
import tensorflow as tf
from sklearn.metrics import roc_auc_score

import hbkit.tensorflow as hb
from hbkit import metrics

RNG = np.random.default_rng(0)
LABEL, GROUP = RNG.integers(0, 2, 500), RNG.integers(0, 20, 500)
SCORE, WEIGHT = RNG.random(500).astype(np.float32), RNG.random(500).astype(np.float32)


@pytest.mark.parametrize("name", ["AUC", "GAUC", "LogLoss"])
def test_metrics_of_tensors_are_those_of_arrays(name):
    ours, theirs = getattr(hb.metrics, name)(), getattr(metrics, name)()
    group = {"group": GROUP} if name == "GAUC" else {}
    for rows in np.split(np.arange(500), 4):
        columns = [LABEL[rows], SCORE[rows], WEIGHT[rows]]
        theirs.update(*columns, **{k: v[rows] for k, v in group.items()})
        ours.update(*map(tf.constant, columns), **{k: tf.constant(v[rows]) for k, v in group.items()})
    assert ours.result() == theirs.result()
    assert isinstance(ours.merge(theirs), getattr(hb.metrics, name))


def test_auc_takes_variables_and_bfloat16():
    auc = hb.metrics.AUC()
    auc.update(tf.constant(LABEL), tf.Variable(SCORE))
    assert auc.result() == pytest.approx(roc_auc_score(LABEL, SCORE), abs=1e-4)
    rounded = tf.cast(SCORE, tf.bfloat16)
    auc = hb.metrics.AUC()
    auc.update(tf.constant(LABEL, tf.float32), rounded)
    assert auc.result() == pytest.approx(roc_auc_score(LABEL, tf.cast(rounded, tf.float32)), abs=1e-4)
