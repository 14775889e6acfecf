"""The core's optimizers against Keras' own dense ones, on rows that every step touches."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from hbkit.embedding import SGD, Adagrad, Adam, AdamW, Ftrl, Normal, Table

PAIRS = [
    (SGD(lr=0.1), lambda: keras.optimizers.SGD(0.1)),
    (SGD(lr=0.1, momentum=0.9), lambda: keras.optimizers.SGD(0.1, momentum=0.9)),
    (SGD(lr=0.1, momentum=0.9, nesterov=True), lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True)),
    (Adagrad(lr=0.1, eps=1e-7, initial_accumulator=0.1, keras_eps=True), lambda: keras.optimizers.Adagrad(0.1)),
    (Adam(lr=0.01, eps=1e-7, keras_eps=True), lambda: keras.optimizers.Adam(0.01)),
    (Adam(lr=0.01, eps=1e-2, keras_eps=True), lambda: keras.optimizers.Adam(0.01, epsilon=1e-2)),
    (
        AdamW(lr=0.01, eps=1e-7, keras_eps=True, weight_decay=0.1),
        lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    ),
    (Ftrl(lr=0.1), lambda: keras.optimizers.Ftrl(0.1)),
    (
        Ftrl(lr=0.1, l1=0.05, l2=0.02, beta=0.5),
        lambda: keras.optimizers.Ftrl(0.1, l1_regularization_strength=0.05, l2_regularization_strength=0.02, beta=0.5),
    ),
]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda c: str(c) if not callable(c) else "")
def test_optimizer_equals_keras(ours, theirs):
    table, keys = Table("t", 16, optimizer=ours, initializer=Normal(0, 0.1)), np.arange(50)
    weight = keras.Variable(table.lookup(keys, train=True))
    optimizer, rng = theirs(), np.random.default_rng(0)
    for _ in range(20):
        grads = rng.normal(size=(50, 16)).astype(np.float32)
        optimizer.apply([tf.constant(grads)], [weight])
        table.update(keys, grads)
    np.testing.assert_allclose(table.lookup(keys), weight.numpy(), rtol=1e-6, atol=1e-6)
