"""A dense weight becomes rows of a table, and rows a dense weight."""

import numpy as np
import tensorflow as tf

import hbkit
from hbkit.snapshot import export_dense, import_arrays


def test_a_dense_weight_is_imported_and_exported():
    weight = tf.Variable(tf.random.normal((6, 4)))
    t = hbkit.embedding.Table("t", 4)
    assert import_arrays(t, None, weight) == 6
    np.testing.assert_array_equal(t.lookup(np.arange(6)), weight.numpy())
    weights, vocabulary = export_dense(t)
    assert vocabulary.tolist() == list(range(6))
    np.testing.assert_array_equal(tf.Variable(weights), weight.numpy())
    import_arrays(t, tf.constant([5, 3], tf.int64), weight[:2])
    np.testing.assert_array_equal(t.lookup([5, 3]), weight.numpy()[:2])
