"""EmbeddingCollection as a training loop uses it: accumulation, updates in backward, scaled losses, saved models."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import hbkit.tensorflow as hb
from hbkit import embedding, errors
from hbkit.shuffle import Loopback
from hbkit.store import device_cached, host_memory
from hbkit_tensorflow.pipeline import Sequence

MATCH = "update='backward'.*update='apply'"


def batch(n, seed):
    rng = np.random.default_rng(seed)
    lists = tf.RaggedTensor.from_row_lengths(rng.integers(0, 9, 2 * n), [2] * n)
    return {"user": tf.constant(rng.integers(0, 20, n)), "item": tf.constant(rng.integers(0, 20, n)), "tags": lists}


def top(dim=8):
    keras.utils.set_random_seed(3)
    mlp = hb.nn.MLP([8, 1])
    mlp(tf.zeros((1, 3 * dim)))
    return mlp


def loss_of(mlp, rows, part, n=None):
    rows = {f: tf.reduce_sum(r.values, 1) if isinstance(r, Sequence) else r for f, r in rows.items()}
    logits = mlp(tf.concat(list(rows.values()), 1))[:, 0]
    label = tf.cast(part["user"] % 2, tf.float32)
    return tf.reduce_sum(tf.nn.sigmoid_cross_entropy_with_logits(label, tf.cast(logits, tf.float32))) / (
        n or len(label)
    )


@pytest.mark.parametrize("graph", [False, True])
def test_accumulation_is_one_update_of_the_joined_batch(collection, rows_of, graph):
    parts = [batch(n, n) for n in (5, 3, 8)]
    joined = {f: tf.concat([part[f] for part in parts], 0) for f in parts[0]}
    runs = []
    for batches in (parts, [joined]):
        c, mlp = collection(optimizer=embedding.Adam(lr=0.1)), top()
        layer = hb.nn.EmbeddingCollection(c)

        def gradients(part, last, layer=layer, mlp=mlp):
            with tf.GradientTape() as tape:
                rows = layer(part, training=True)
                tape.watch(rows)
                loss = loss_of(mlp, rows, part, n=16)
            grads = tape.gradient(loss, rows)
            layer.apply(grads) if last else layer.accumulate(grads)
            layer(part)  # a look between

        run = tf.function(gradients, reduce_retracing=True) if graph else gradients
        for _ in range(2):
            for part in batches:
                run(part, part is batches[-1])
        assert c.step == 2
        runs.append(rows_of(c))
    np.testing.assert_allclose(*runs, rtol=1e-4, atol=1e-6)


def test_pipeline_accumulates(clicks, collection, dlrm, rows_of):
    runs = []
    for size, k in ((64, 2), (128, 1)):
        c, model = collection(optimizer=embedding.SGD(lr=0.5)), dlrm()
        for i, s in enumerate(hb.pipeline(clicks(512, size), c)):
            with tf.GradientTape() as tape:
                tape.watch(s.embeddings)
                loss = tf.reduce_sum(tf.square(model(s.dense, s.embeddings))) / 128
            grads = tape.gradient(loss, s.embeddings)
            s.apply(grads) if i % k == k - 1 else s.accumulate(grads)
        assert c.step == 4
        runs.append(rows_of(c))
    np.testing.assert_allclose(*runs, rtol=1e-4, atol=1e-6)


def test_tables_on_a_device_train_as_host_tables(clicks, collection, dlrm, rows_of):
    """Rows and gradients go by way of host memory, which plays the device here."""
    runs = []
    for store in (None, device_cached(host_memory(), "100KiB", device="cpu")):
        c, mlp, model = collection(optimizer=embedding.Adam(lr=0.1), pooling={"tags": None}, store=store), top(), dlrm()
        layer = hb.nn.EmbeddingCollection(c)
        for seed in range(3):
            part = batch(6, seed)
            with tf.GradientTape() as tape:
                rows = layer(part, training=True)
                tape.watch(rows)
                loss = loss_of(mlp, rows, part)
            layer.apply(tape.gradient(loss, rows))
        c.pooling["tags"] = "mean"
        for s in hb.pipeline(clicks(128, 64), layer):
            with tf.GradientTape() as tape:
                tape.watch(s.embeddings)
                loss = tf.reduce_sum(tf.square(model(s.dense, s.embeddings)))
            s.apply(tape.gradient(loss, s.embeddings))
        assert c.step == 5
        runs.append(rows_of(c).tobytes())
    assert runs[0] == runs[1]


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16])
def test_float16_gradients_are_taken(collection, rows_of, dtype):
    runs = []
    for as_dtype in (tf.float32, dtype):
        c = collection(optimizer=embedding.SGD(lr=1.0))
        layer = hb.nn.EmbeddingCollection(c)
        rows = layer(batch(4, 0), training=True)
        layer.apply({"user": tf.ones_like(rows["user"], dtype=as_dtype)})
        runs.append(rows_of(c))
    np.testing.assert_array_equal(*runs)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_rows_stay_float32_under_mixed_precision(collection, policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        layer, mlp = hb.nn.EmbeddingCollection(collection(optimizer=embedding.SGD(lr=1.0))), top()
    finally:
        keras.config.set_dtype_policy(before)
    losses = []
    for _ in range(5):
        with tf.GradientTape() as tape:
            rows = layer(batch(16, 0), training=True)
            assert all(r.dtype == tf.float32 for r in rows.values())
            tape.watch(rows)
            assert mlp(tf.concat(list(rows.values()), 1)).dtype == policy.removeprefix("mixed_")
            loss = loss_of(mlp, rows, batch(16, 0))
        layer.apply(tape.gradient(loss, rows))
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.01


def test_sequences_in_a_graph_are_those_of_eager_mode(collection, rows_of):
    runs = []
    for wrap in (lambda f: f, tf.function(autograph=False, reduce_retracing=True)):
        c = collection(pooling={"tags": None})
        layer = hb.nn.EmbeddingCollection(c)

        def step(part, layer=layer):
            with tf.GradientTape() as tape:
                rows = layer(part, training=True)
                assert rows["tags"].values.shape[2] == 8 and rows["tags"].mask.dtype == tf.bool
                tape.watch(rows["tags"].values)
                loss = tf.reduce_sum(
                    tf.square(rows["tags"].values - 1.0) * tf.cast(rows["tags"].mask, "float32")[..., None]
                )
            layer.apply({"tags": Sequence(tape.gradient(loss, rows["tags"].values), None)})
            return loss

        step = step if wrap is None else wrap(step)
        runs.append(([float(step(batch(n, n))) for n in (3, 5, 3)], rows_of(c)))
    np.testing.assert_allclose(runs[0][0], runs[1][0], rtol=1e-6)
    np.testing.assert_allclose(runs[0][1], runs[1][1], atol=1e-6)


@pytest.mark.parametrize(
    "optimizer",
    [keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()), keras.optimizers.SGD(loss_scale_factor=8.0)],
)
def test_scaled_loss_is_refused_in_a_loop_of_ones_own(clicks, collection, optimizer):
    layer = hb.nn.EmbeddingCollection(collection())
    with tf.GradientTape() as tape:
        rows = layer(batch(4, 0), training=True)
        tape.watch(rows)
        loss = optimizer.scale_loss(tf.reduce_sum(rows["user"]))
    grads = tape.gradient(loss, rows)
    for update in (layer.apply, layer.accumulate):
        with pytest.raises(errors.Unsupported, match=r"LossScaleOptimizer.*attach"):
            update(grads)
    for s in hb.pipeline(clicks(64), layer):
        with tf.GradientTape() as tape:
            tape.watch(s.embeddings)
            loss = optimizer.scale_loss(tf.reduce_sum(s.embeddings["user"]))
        with pytest.raises(errors.Unsupported, match=r"LossScaleOptimizer.*attach"):
            s.apply(tape.gradient(loss, s.embeddings))
    for s in hb.pipeline(clicks(64), layer):
        assert keras.optimizers.SGD().scale_loss(1.0) == 1.0  # scales nothing
        s.apply({"user": tf.ones_like(s.embeddings["user"])})


# ------------------------------------------------------------------------------------------------ in backward


@pytest.fixture
def in_backward(collection):
    layer = hb.nn.EmbeddingCollection(collection(optimizer=embedding.Adam(lr=0.1)), update="backward")
    yield layer, top(), keras.optimizers.SGD(0.1)
    layer.close()  # else it would refuse things as long as it lives


@pytest.mark.parametrize("graph", [False, True])
def test_update_in_backward_is_that_of_apply(collection, rows_of, in_backward, graph):
    runs = []
    for update in ("apply", "backward"):
        layer, mlp, optimizer = in_backward
        if update == "apply":
            layer = hb.nn.EmbeddingCollection(collection(optimizer=embedding.Adam(lr=0.1)))
            optimizer, mlp = keras.optimizers.SGD(0.1), top()

        def step(part, used, layer=layer, mlp=mlp, optimizer=optimizer, update=update):
            with tf.GradientTape() as tape:
                rows = layer(part, training=True)
                if update == "apply":
                    tape.watch(rows)
                loss = loss_of(mlp, rows if used else {**rows, "tags": rows["user"]}, part)
            if update == "apply":
                grads, weights = tape.gradient(loss, (rows, mlp.trainable_variables))
                layer.apply(grads)
            else:
                weights = tape.gradient(loss, mlp.trainable_variables)
            optimizer.apply(weights, mlp.trainable_variables)

        optimizer.build(mlp.trainable_variables)
        run = tf.function(step, reduce_retracing=True) if graph else step
        for seed in range(4):
            run(batch(6, seed), seed != 2)
        assert layer.collection.step == 4
        runs.append((rows_of(layer.collection), *[w.numpy() for w in mlp.weights]))
    for found, expected in zip(*runs, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def gradient(layer, mlp, seeds, scaler=None):
    with tf.GradientTape() as tape:
        loss = sum(loss_of(mlp, layer(batch(6, seed), training=True), batch(6, seed)) for seed in seeds)
        loss = loss if scaler is None else scaler.scale_loss(loss)
    return tape.gradient(loss, mlp.trainable_variables)


def test_update_in_backward_refuses_by_name(clicks, collection, in_backward):
    layer, mlp, optimizer = in_backward
    with pytest.raises(errors.Unsupported, match=f"LossScaleOptimizer.*{MATCH}"):
        gradient(layer, mlp, [0], keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()))
    for _ in range(2):
        grads = gradient(layer, mlp, [0])
    with pytest.raises(errors.Unsupported, match=f"Accumulation.*{MATCH}"):
        optimizer.apply(grads, mlp.trainable_variables)
    for options, says in (
        ({"gradient_accumulation_steps": 2}, "Accumulation"),
        ({"global_clipnorm": 1.0}, "global norm"),
    ):
        grads = gradient(layer, mlp, [0])
        with pytest.raises(errors.Unsupported, match=f"{says}.*{MATCH}"):
            keras.optimizers.SGD(**options).apply(grads, mlp.trainable_variables)
    with pytest.raises(errors.Unsupported, match=f"Accumulation of several.*{MATCH}"):
        gradient(layer, mlp, [0, 1])
    layer(batch(6, 0), training=True)
    for update in (layer.apply, layer.accumulate):
        with pytest.raises(errors.Closed, match="has updated"):
            update({"user": tf.zeros((6, 8))})
    with pytest.raises(errors.Unsupported, match=f"pipeline.*{MATCH}"):
        hb.pipeline(clicks(64), layer)
    with pytest.raises(errors.InvalidArgument, match="update='never'"):
        hb.nn.EmbeddingCollection(collection(), update="never")


# ------------------------------------------------------------------------------------------------- saved models


@keras.saving.register_keras_serializable("tests")
class Whole(keras.Model):
    def __init__(self, embeddings):
        super().__init__()
        self.embeddings, self.mlp, self.built = embeddings, top(), True

    def call(self, batch, training=False):
        return self.mlp(tf.concat(list(self.embeddings(batch, training=training).values()), 1))

    def get_config(self):
        return {"embeddings": keras.saving.serialize_keras_object(self.embeddings)}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config["embeddings"]))


def trained(model, seeds):
    layer = model.embeddings
    for seed in seeds:
        with tf.GradientTape() as tape:
            rows = layer(batch(6, seed), training=True)
            tape.watch(rows)
            loss = loss_of(model.mlp, rows, batch(6, seed))
        layer.apply(tape.gradient(loss, rows))
    return model


def test_saved_model_comes_back_with_the_rows_of_its_commit(collection, rows_of, tmp_path):
    layer = hb.nn.EmbeddingCollection(collection(), snapshot=tmp_path / "rows")
    model = trained(Whole(layer), range(2))
    model.save(tmp_path / "model.keras")
    then = rows_of(layer.collection), model.mlp.weights[0].numpy(), model(batch(6, 0)).numpy()
    trained(model, range(2, 4))
    model.mlp.weights[0].assign_add(tf.ones_like(model.mlp.weights[0]))
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for other in (loaded, model):
        if other is model:
            model.load_weights(tmp_path / "model.keras")
        assert other.embeddings.collection.step == 2
        np.testing.assert_array_equal(rows_of(other.embeddings.collection), then[0])
        np.testing.assert_array_equal(other.mlp.weights[0], then[1])
        np.testing.assert_array_equal(other(batch(6, 0)), then[2])
    for other in (trained(loaded, range(2, 4)), trained(model, range(2, 4))):
        np.testing.assert_array_equal(rows_of(other.embeddings.collection), rows_of(layer.collection))


def test_weights_need_a_commit(collection, tmp_path):
    model = Whole(hb.nn.EmbeddingCollection(collection()))
    with pytest.raises(errors.InvalidArgument, match=r"no snapshot.*user.*snapshot=path"):
        model.save_weights(tmp_path / "model.weights.h5")
    model = trained(Whole(hb.nn.EmbeddingCollection(collection(), snapshot=tmp_path / "rows")), range(1))
    model.save_weights(tmp_path / "model.weights.h5")
    (tmp_path / "rows").rename(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"commit c00000001 .* is not there"):  # as Keras tells of it
        model.load_weights(tmp_path / "model.weights.h5")
    table = embedding.Table("user", 8, admission=embedding.CountAdmission(2))
    layer = hb.nn.EmbeddingCollection(embedding.Collection([table]))
    with pytest.raises(errors.Unsupported, match=r"admission.*table user"):
        layer.get_config()


def models():
    for name, kind in hb.models.MODELS.items():
        more = {"sequences": {"tags": "item"}} if name == "din" else {}
        features = ["user", "item"] if name == "din" else ["user", "item", "tags"]
        yield pytest.param(kind, features, more, id=name)


@pytest.mark.parametrize(("kind", "features", "more"), list(models()))
def test_models_are_saved_and_loaded_whole(kind, features, more, tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16" if kind is hb.models.DLRM else "float32")
    try:
        model = kind(features, 8, n_dense=2, **more)
    finally:
        keras.config.set_dtype_policy("float32")
    model.save(tmp_path / "model.keras")
    other = keras.models.load_model(tmp_path / "model.keras")
    width = kind.row_dim(8)
    rows = {f: tf.random.normal((5, width)) for f in ("user", "item", "tags")}
    rows |= {f: Sequence(tf.random.normal((5, 4, width)), tf.ones((5, 4), tf.bool)) for f in more.get("sequences", ())}
    dense = tf.random.normal((5, 2))
    found, expected = other(dense, rows), model(dense, rows)
    assert type(other) is kind and found.dtype == expected.dtype
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))


def test_features_side_by_side_are_one_output_but_not_in_a_graph():
    tables = [embedding.Table(f, dim=4) for f in ("user", "item")]
    layer = hb.nn.EmbeddingCollection(embedding.Collection(tables, stack={"both": ["user", "item"]}))
    keys = {f: tf.constant([1, 2, 3]) for f in ("user", "item")}
    assert {name: rows.shape.as_list() for name, rows in layer(keys, training=True).items()} == {"both": [3, 2, 4]}
    layer.apply({"both": tf.ones((3, 2, 4))})
    with pytest.raises(errors.Unsupported, match=r"side by side in a tf.function.*feature both"):
        tf.function(layer, autograph=False)(keys)


def test_shard_takes_any_transport_and_placements():
    (alone,) = Loopback.group(1)
    embeddings = embedding.Collection([embedding.Table("user", dim=4)])
    sharded = hb.distributed.shard(embeddings, alone, "int8", placement={"user": 0}, feedback=100)
    assert sharded.collection.placement == {"user": 0} and sharded.collection.feedback == 100
