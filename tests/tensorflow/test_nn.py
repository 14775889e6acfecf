"""Layers: the embedding layer on raw keys, eagerly and in graphs, and the pieces of the models against NumPy."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import hbkit.tensorflow as hb
from hbkit import Ragged, embedding, errors
from hbkit_tensorflow.pipeline import Sequence

BATCH = {
    "user": np.array([1, 2, 1]),
    "item": np.array([7, 7, 9]),
    "tags": Ragged.from_lists([[1, 2], [], [3]], np.int64),
}
FORMS = {
    "arrays": BATCH,
    "tensors": {
        "user": tf.constant([1, 2, 1]),
        "item": tf.constant([7, 7, 9], tf.int64),
        "tags": tf.ragged.constant([[1, 2], [], [3]]),
    },
    "others": {
        **BATCH,
        "user": np.array([1, 2, 1], np.uint8),
        "tags": tf.ragged.constant([[1, 2], [], [3]], dtype=tf.int64),
        "x": "y",
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_embedding_collection_gives_the_rows_of_the_core(collection, form):
    c, d = collection(), collection()
    layer = hb.nn.EmbeddingCollection(c)
    assert not any(r.numpy().any() for r in layer(FORMS[form]).values())
    assert sum(map(len, c.tables.values())) == 0
    found, staged = layer(FORMS[form], training=True), d.stage(BATCH, train=True)
    expected = staged.outputs()
    assert found.keys() == expected.keys() and found["user"].numpy().any()
    for feature, rows in expected.items():
        np.testing.assert_array_equal(found[feature].numpy(), rows)
    assert {n: len(t) for n, t in c.tables.items()} == {"item": 2, "tag": 3, "user": 2}
    assert layer.weights == []


def test_embedding_collection_applies_gradients(collection):
    c = collection(optimizer=embedding.SGD(lr=1.0))
    layer = hb.nn.EmbeddingCollection(c)
    with tf.GradientTape() as tape:
        rows = layer(BATCH, training=True)
        tape.watch(rows)
        loss = tf.reduce_sum(rows["user"]) + 2 * tf.reduce_sum(rows["tags"])
    before = {f: r.numpy() for f, r in rows.items()}
    layer.apply(tape.gradient(loss, rows))
    after = layer(BATCH)
    np.testing.assert_allclose(after["user"], before["user"] - [[2], [1], [2]], rtol=1e-5)  # key 1 stands in two rows
    np.testing.assert_allclose(after["tags"], before["tags"] - [[1], [0], [2]], rtol=1e-5)  # a mean of two, none, one
    np.testing.assert_array_equal(after["item"], before["item"])
    assert c.step == 1
    with pytest.raises(errors.Closed, match="no call to apply"):
        layer.apply(before)


def test_embedding_collection_in_a_graph_is_the_same(collection, rows_of):
    """Raw keys inside of a tf.function: a call back for the rows, one for the update, in order."""
    data = [
        (tf.constant(np.random.default_rng(i).integers(0, 50, n)), tf.ragged.constant(lists, dtype=tf.int64))
        for i, (n, lists) in enumerate([(3, [[1], [], [2, 3]]), (4, [[5], [1], [], [1, 1]]), (3, [[9], [9], []])])
    ]

    def run(wrap):
        c = collection(features={"user": "user", "tags": "tag"}, pooling={"tags": "sum"})
        layer = hb.nn.EmbeddingCollection(c)

        def step(user, tags):
            with tf.GradientTape() as tape:
                rows = layer({"user": user, "tags": tags}, training=True)
                tape.watch(rows)
                loss = tf.reduce_sum(tf.square(tf.concat([rows["user"], rows["tags"]], 1) - 1.0))
            layer.apply(tape.gradient(loss, rows))
            return loss, layer({"user": user, "tags": tags})["user"]

        step = wrap(step)
        found = [step(*batch) for batch in data * 2]
        return [float(loss) for loss, _ in found], np.concatenate([rows for _, rows in found]), rows_of(c), c.step

    eager, graph = run(lambda f: f), run(tf.function(reduce_retracing=True))
    np.testing.assert_allclose(graph[0], eager[0], rtol=1e-6)
    np.testing.assert_allclose(graph[1], eager[1], atol=1e-6)
    np.testing.assert_allclose(graph[2], eager[2], atol=1e-6)
    assert graph[3] == eager[3] == 6 and eager[0][-1] < eager[0][2]


def test_embedding_collection_gives_sequences(collection):
    layer = hb.nn.EmbeddingCollection(collection(pooling={"tags": None}, optimizer=embedding.SGD(lr=1.0)))
    with tf.GradientTape() as tape:
        rows = layer(BATCH, training=True)
        tape.watch(rows["tags"].values)
        loss = tf.reduce_sum(rows["tags"].values)
    assert rows["tags"].mask.numpy().tolist() == [[True, True], [False, False], [True, False]]
    assert rows["tags"].values.shape == (3, 2, 8)
    layer.apply({"tags": tape.gradient(loss, rows["tags"].values)})
    changed = layer(BATCH)["tags"].values - rows["tags"].values
    np.testing.assert_allclose(changed, -np.repeat(rows["tags"].mask.numpy()[..., None] * 1.0, 8, axis=2), rtol=1e-5)


def test_embedding_collection_drops_a_call_that_was_not_applied(collection):
    c = collection()
    layer = hb.nn.EmbeddingCollection(c)
    layer(BATCH, training=True)
    rows = layer(BATCH, training=True)
    layer.apply(rows)
    assert c.step == 1
    layer(BATCH, training=True)
    layer.drop()
    with pytest.raises(errors.Closed):
        layer.apply(rows)


def test_embedding_collection_refuses_by_feature(collection):
    layer = hb.nn.EmbeddingCollection(collection())
    with pytest.raises(errors.UnknownColumn, match="feature item"):
        layer({"user": BATCH["user"]})
    with pytest.raises(errors.InvalidArgument, match=r"float32 \(feature user\)"):
        layer({**BATCH, "user": tf.constant([0.5])})
    with pytest.raises(errors.InvalidArgument, match="feature user"):
        layer({**BATCH, "user": tf.constant(["a"])})
    with pytest.raises(errors.Unsupported, match="feature tags"):
        layer({**BATCH, "tags": tf.sparse.from_dense([[[1, 0]]])})
    with pytest.raises(errors.InvalidArgument, match=r"ragged_rank=2.*feature tags"):
        layer({**BATCH, "tags": tf.ragged.constant([[[1]], [], []])})
    with pytest.raises(errors.InvalidArgument, match=r"2 rows where others have 3.*feature tags"):
        layer({**BATCH, "tags": tf.ragged.constant([[1], []])})
    rows = layer(BATCH, training=True)
    for wrong, says in ((tf.zeros((2, 8)), "float32"), (tf.zeros((3, 8), tf.int32), "int32")):
        with pytest.raises(errors.InvalidArgument, match=rf"gradient of {says}.*feature user"):
            layer.apply({"user": wrong})
    with pytest.raises(errors.UnknownColumn, match="city"):
        layer.apply({"city": rows["user"]})
    layer.apply({"user": rows["user"]})  # and the call is still there
    with pytest.raises(errors.UnknownColumn, match="feature item"):
        tf.function(lambda: layer({"user": tf.constant([1])}), autograph=False)()
    layer.close()
    with pytest.raises(errors.Closed, match="feature user, item, tags"):
        layer(BATCH)


@pytest.mark.parametrize("name", hb.models.MODELS)
def test_losses_over_the_collection_are_those_over_keras_embedding(name):
    """Twins: the same start, SGD on both, 50 steps of repeating keys; what was seen before is a sequence of DIN's."""
    kind, n_keys, n_steps, batch = hb.models.MODELS[name], 100, 50, 64
    dim, past = kind.row_dim(8), {"seen": "item"} if name == "din" else {}
    rate = 1.0 if name == "din" else 10.0  # Dice divides by small deviations: larger steps blow up the rounding
    sgd, normal = embedding.SGD(lr=rate), embedding.Normal(0, 0.3, seed=0)
    tables = [embedding.Table(name, dim, optimizer=sgd, initializer=normal) for name in ("user", "item")]
    features = {"user": "user", "item": "item", **past}
    layer = hb.nn.EmbeddingCollection(embedding.Collection(tables, features, dict.fromkeys(past)))
    start = {table.name: table.lookup(np.arange(n_keys), train=True) for table in tables}
    twin = {
        f: tf.keras.layers.Embedding(n_keys, dim, embeddings_initializer=keras.initializers.Constant(r))
        for f, r in start.items()
    }

    def model():
        keras.utils.set_random_seed(5)
        return kind(["user", "item"], 8, n_dense=2, **({"sequences": past} if past else {}))

    ours, theirs = model(), model()
    cross_entropy = tf.nn.sigmoid_cross_entropy_with_logits

    @tf.function(autograph=False)
    def our_step(dense, rows, label):
        with tf.GradientTape() as tape:
            leaves = {f: r.values if f in past else r for f, r in rows.items()}
            tape.watch(leaves)
            loss = tf.reduce_mean(cross_entropy(label, ours(dense, rows)))
        grads, weights = tape.gradient(loss, (leaves, ours.trainable_variables))
        for variable, grad in zip(ours.trainable_variables, weights, strict=True):
            variable.assign_sub(0.1 * grad)
        return loss, grads

    @tf.function(autograph=False)
    def their_step(dense, keys, label):
        tables = [table.embeddings for table in twin.values()]
        with tf.GradientTape() as tape:
            rows = {f: twin[features[f]](k) for f, k in keys.items()}
            rows |= {f: Sequence(rows[f], tf.ones((batch, 4), tf.bool)) for f in past}
            loss = tf.reduce_mean(cross_entropy(label, theirs(dense, rows)))
        weights, rows = tape.gradient(loss, (theirs.trainable_variables, tables))
        for variable, grad in zip(theirs.trainable_variables, weights, strict=True):
            variable.assign_sub(0.1 * grad)
        for table, grad in zip(tables, rows, strict=True):
            table.assign_sub(rate * tf.convert_to_tensor(grad))
        return loss

    rng = np.random.default_rng(0)
    planted = rng.normal(0, 3, n_keys)
    losses = []
    for table in twin.values():
        table.build(None)
    for _ in range(n_steps):
        keys = {f: rng.zipf(1.3, (batch, 4) if f in past else batch) % n_keys for f in features}
        dense = tf.constant(rng.lognormal(0, 1, (batch, 2)).astype(np.float32))
        chance = 1 / (1 + np.exp(-planted[keys["user"]] - planted[keys["item"]]))
        label = tf.constant((rng.random(batch) < chance).astype(np.float32))
        loss, grads = our_step(dense, layer(keys, training=True), label)
        layer.apply(grads)
        losses.append((float(loss), float(their_step(dense, {f: tf.constant(k) for f, k in keys.items()}, label))))
    ours_, theirs_ = np.array(losses).T
    np.testing.assert_allclose(ours_, theirs_, atol=1e-4)
    assert ours_[-10:].mean() < ours_[:10].mean() - 0.02


def test_dot_interaction_is_the_dots_of_all_pairs():
    x = np.random.default_rng(0).normal(size=(5, 4, 3)).astype(np.float32)
    expected = [[x[b, i] @ x[b, j] for i in range(4) for j in range(i)] for b in range(5)]
    np.testing.assert_allclose(hb.nn.DotInteraction()(x), expected, rtol=1e-5, atol=1e-6)


def test_factorization_machine_is_the_sum_of_all_pairs():
    x = np.random.default_rng(0).normal(size=(5, 4, 3)).astype(np.float32)
    expected = [sum(x[b, i] @ x[b, j] for i in range(4) for j in range(i)) for b in range(5)]
    np.testing.assert_allclose(hb.nn.FactorizationMachine()(x), expected, rtol=1e-4, atol=1e-5)


def test_cross_network_is_its_formula():
    layer, x = hb.nn.CrossNetwork(3, 2), np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    found, crossed = layer(x), x
    assert len(layer.weights) == 4
    for kernel, bias in zip(layer.weights[::2], layer.weights[1::2], strict=True):
        crossed = x * (crossed @ kernel.numpy() + bias.numpy()) + crossed
    np.testing.assert_allclose(found, crossed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("last_relu", [True, False])
def test_mlp_has_relu_between_its_layers(last_relu):
    layer, x = hb.nn.MLP([8, 4], last_relu), np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    found = layer(x)
    (k0, b0, k1, b1) = (w.numpy() for w in layer.weights)
    expected = np.maximum(x @ k0 + b0, 0) @ k1 + b1
    np.testing.assert_allclose(found, np.maximum(expected, 0) if last_relu else expected, rtol=1e-4, atol=1e-5)
    assert (found.numpy() < 0).any() != last_relu


def test_signed_log_keeps_the_sign():
    x = np.array([-1e6, -1.0, 0.0, 1e-8, 3.0, 1e30], np.float32)
    np.testing.assert_allclose(hb.nn.SignedLog()(x), np.sign(x) * np.log1p(np.abs(x)), rtol=1e-6)


def test_layers_warn_of_nothing(collection):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        test_embedding_collection_applies_gradients(collection)
        test_embedding_collection_gives_sequences(collection)
