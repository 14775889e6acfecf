"""`attach`: Keras's own fit, evaluate and predict over staged steps."""

import os
import subprocess
import sys
import textwrap
import threading
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import hbkit.tensorflow as hb
from hbkit import embedding, errors
from hbkit_tensorflow.pipeline import Feed

pytestmark = pytest.mark.usefixtures("no_threads_left")


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)  # Keras saving, under NumPy 2
        yield


def compiled(model, optimizer=None, jit=True, **options):
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(optimizer or keras.optimizers.Adagrad(0.05), loss, jit_compile=jit, **options)
    return model


def auc():
    return keras.metrics.AUC(name="auc", from_logits=True, num_thresholds=50)


@pytest.mark.parametrize(("jit", "others"), [(True, [(8, 8)]), (False, [(1, 0), (8, 0), (0, 8)])])
def test_fit_of_any_prefetch_gives_the_same_history_and_tables(
    clicks, collection, dlrm, rows_of, monkeypatch, jit, others
):
    make = Feed.dataset

    def run(lookahead, prefetch):
        options = tf.data.Options()
        options.autotune.enabled = False  # which may add a prefetch of its own
        with monkeypatch.context() as m:
            m.setattr(Feed, "dataset", lambda feed: make(feed).prefetch(prefetch).with_options(options))
            model, c = compiled(dlrm(), jit=jit, metrics=[auc()]), collection()
            hb.nn.attach(model, hb.nn.EmbeddingCollection(c), lookahead=lookahead)
            history = model.fit(clicks().shuffle(1, 300), epochs=2, validation_data=clicks(200, seed=1), verbose=0)
        return history.history, rows_of(c), c.step

    history, rows, step = run(lookahead=0, prefetch=0)
    assert step == 32 and rows.any() and sorted(history) == ["auc", "loss", "val_auc", "val_loss"]
    for lookahead, prefetch in others:
        again, same, _ = run(lookahead, prefetch)
        assert again == history
        np.testing.assert_array_equal(same.view(np.int32), rows.view(np.int32))


def test_fit_equals_a_loop_over_the_pipeline(clicks, collection, dlrm, rows_of):
    c, d = collection(), collection()
    model = hb.nn.attach(compiled(dlrm(), keras.optimizers.Adam(0.01), jit=False), c)
    (loss,) = model.fit(clicks(), verbose=0).history["loss"]
    by_hand, optimizer, losses = dlrm(), keras.optimizers.Adam(0.01), []
    for s in hb.pipeline(clicks(), d):
        with tf.GradientTape() as tape:
            tape.watch(s.embeddings)
            logits = by_hand(s.dense, s.embeddings)
            total = tf.reduce_sum(s.weight * tf.nn.sigmoid_cross_entropy_with_logits(s.label, logits))
            mean = total / s.n_rows
        rows, weights = tape.gradient(mean, (s.embeddings, by_hand.trainable_variables))
        optimizer.apply(weights, by_hand.trainable_variables)
        s.apply(rows)
        losses.append(float(total))
    assert loss == pytest.approx(sum(losses) / 1000, rel=1e-5)
    np.testing.assert_allclose(rows_of(c), rows_of(d), atol=1e-5)


class KerasEmbeddings(keras.Model):
    """The same model over Keras's own embedding: one more input, the keys."""

    def __init__(self, model, rows):
        super().__init__()
        self.model = model
        constant = keras.initializers.Constant
        self.tables = {f: keras.layers.Embedding(*r.shape, embeddings_initializer=constant(r)) for f, r in rows.items()}

    def call(self, inputs):
        return self.model(inputs["dense"], {f: table(inputs[f]) for f, table in self.tables.items()})[:, None]


@pytest.mark.parametrize(("weight", "jit"), [(None, False), ("importance", True)])
def test_fit_agrees_with_keras_embedding_on_unpadded_batches(clicks, collection, weight, jit):
    """Losses, metrics with and without weights, and predictions, the short last batch included."""
    features = {"user": "user", "item": "item"}
    ds = clicks(300, 64, weight=weight).select(["click", "amount", "age", *features] + ([weight] if weight else []))
    c = collection(features=features, pooling="sum", optimizer=embedding.SGD(lr=0.5))
    staged = c.stage({f: np.arange(200) for f in features}, train=True)  # creates every row, and moves none
    start = {f: np.array(rows) for f, rows in staged.outputs().items()}
    staged.apply({f: np.zeros_like(rows) for f, rows in start.items()})

    def model():
        keras.utils.set_random_seed(3)
        return hb.models.DLRM(list(features), 8, n_dense=2, bottom=(16,), top=(16,))

    def metrics():
        return {
            "metrics": ["accuracy", auc()],
            "weighted_metrics": [keras.metrics.BinaryCrossentropy(from_logits=True)],
        }

    ours = hb.nn.attach(compiled(model(), keras.optimizers.SGD(0.5), jit, **metrics()), c)
    theirs = compiled(KerasEmbeddings(model(), start), keras.optimizers.SGD(0.5), jit=False, **metrics())

    def unpadded():
        for b in ds.batches():
            x = {"dense": np.stack([b["amount"], b["age"]], 1).astype(np.float32), **{f: b[f] for f in features}}
            yield (x, b["click"][:, None], *([b[weight]] if weight else []))

    spec = {"dense": tf.TensorSpec((None, 2)), **{f: tf.TensorSpec((None,), tf.int64) for f in features}}
    weights = [tf.TensorSpec((None,))] if weight else []
    data = tf.data.Dataset.from_generator(unpadded, output_signature=(spec, tf.TensorSpec((None, 1)), *weights))
    data = data.apply(tf.data.experimental.assert_cardinality(5))
    h = ours.fit(ds, epochs=2, validation_data=ds, verbose=0).history
    g = theirs.fit(data, epochs=2, validation_data=data, verbose=0, shuffle=False).history
    assert sorted(h) == sorted(g) and len(h) == 8
    for name in g:
        np.testing.assert_allclose(h[name], g[name], atol=2e-5, err_msg=name)
    np.testing.assert_allclose(ours.predict(ds, verbose=0), theirs.predict(data, verbose=0)[:, 0], atol=1e-4)
    found, expected = ours.evaluate(ds, verbose=0, return_dict=True), theirs.evaluate(data, verbose=0, return_dict=True)
    assert found == pytest.approx(expected, abs=1e-4)


COUNT = """
    import pathlib, sys
    import keras, numpy as np, tensorflow as tf
    import hbkit.tensorflow as hb
    from hbkit import embedding

    path, dump = sys.argv[1:]
    ds = hb.data.Dataset.from_parquet(path).select(["click", "amount", "age", "user", "item", "tags"])
    ds = ds.supervised("click").batch(16)
    model = hb.models.DLRM(["user", "item", "tags"], 8, n_dense=2, bottom=(16,), top=(16,))
    collection = embedding.Collection([embedding.Table(n, 8) for n in ("user", "item", "tags")])
    model.compile("adagrad", keras.losses.BinaryCrossentropy(from_logits=True), jit_compile=True)
    hb.nn.attach(model, collection)

    din = hb.models.DIN(["user", "item"], 8, n_dense=2, sequences={"tags": "item"})
    sequences = embedding.Collection(list(collection.tables.values()), pooling={"tags": None})
    din.compile("adagrad", keras.losses.BinaryCrossentropy(from_logits=True), jit_compile=True)
    hb.nn.attach(din, sequences)
    few = ds.batch(2)

    def unpadded():  # what the padding is for: batches of two sizes
        step = tf.function(model, jit_compile=True)
        for b in ds.batches():
            step(tf.zeros((b.n_rows, 2)), {f: tf.constant(r) for f, r in collection.lookup(b).items()})

    runs = {
        "fit": lambda: model.fit(ds, verbose=0),
        "predict": lambda: model.predict(ds, verbose=0),
        "unpadded": unpadded,
        "sequences": lambda: din.fit(few, steps_per_epoch=200, verbose=0),
    }
    for run in runs.values():
        run()
        print(collection.step, len(list(pathlib.Path(dump).glob("*.before_optimizations.txt"))))
    print(len({len(np.unique(b["user"])) for b in ds.batches()}), "torch" in sys.modules)
    print(len({1 << (max(1, int(b["tags"].lengths().max())) - 1).bit_length() for b in few.batches()}), "lengths")
"""


def test_steps_compile_exactly_once(click_file, tmp_path):
    """XLA writes a file per compilation; a fresh process, since it reads its flags once."""
    dump = str(tmp_path / "xla")
    env = {**os.environ, "XLA_FLAGS": f"--xla_dump_to={dump}", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(COUNT), click_file(16 * 200 - 3), dump]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    fit, predict, unpadded, din, others, lengths = (line.split() for line in done.stdout.splitlines())
    assert (fit, predict, unpadded) == (["200", "1"], ["200", "2"], ["200", "4"])
    assert int(others[0]) > 5 and others[1] == "False"  # numbers of unique keys in a batch; torch
    assert (din, lengths) == (["400", "7"], ["3", "lengths"])


def test_the_graph_sees_batch_shapes_only(clicks, collection, dlrm):
    shapes = set()

    class Spy(hb.models.DLRM):
        def call(self, dense, embeddings):
            shapes.add((tuple(dense.shape), *(tuple(e.shape) for e in embeddings.values())))
            return super().call(dense, embeddings)

    model = Spy(["user", "item", "tags"], 8, n_dense=2)
    shapes.clear()  # those of its building
    hb.nn.attach(compiled(model), collection()).fit(clicks(), verbose=0)
    assert shapes == {((64, 2), (64, 8), (64, 8), (64, 8))}


def test_predict_gives_the_valid_rows_in_order(clicks, collection, dlrm):
    c = collection()
    model = hb.nn.attach(compiled(dlrm(), jit=False), c)
    ds = clicks(150, 64)
    model.fit(ds, verbose=0)
    n_keys, step = {n: len(t) for n, t in c.tables.items()}, c.step
    other = clicks(150, 64, seed=5)  # with keys that have no rows
    found = model.predict(other, verbose=0)
    assert found.shape == (150,)
    expected = [
        model(
            np.stack([b["amount"], b["age"]], 1).astype(np.float32), {f: tf.constant(r) for f, r in c.lookup(b).items()}
        )
        for b in other.batches()
    ]
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-4, atol=1e-5)
    model.evaluate(other, verbose=0)
    assert ({n: len(t) for n, t in c.tables.items()}, c.step) == (n_keys, step)


def test_predict_and_evaluate_work_before_fit(clicks, collection):
    class Lazy(keras.Model):  # its weights do not exist before the first call
        def __init__(self):
            super().__init__()
            self.dropout, self.dense = keras.layers.Dropout(0.5), keras.layers.Dense(1)

        def call(self, dense, embeddings, training=False):
            return self.dense(self.dropout(keras.ops.concatenate([dense, *embeddings.values()], 1), training=training))

    model = hb.nn.attach(compiled(Lazy()), collection())
    assert model.predict(clicks(100), verbose=0).shape == (100, 1)
    assert model.evaluate(clicks(100), verbose=0) > 0
    assert len(model.fit(clicks(100), epochs=2, verbose=0).history["loss"]) == 2


def test_fit_works_with_callbacks(clicks, collection, dlrm):
    c, seen = collection(), []
    model = hb.nn.attach(compiled(dlrm(), jit=False, metrics=[auc()]), c)
    stop = keras.callbacks.EarlyStopping("val_auc", mode="min", patience=1)
    watch = keras.callbacks.LambdaCallback(on_train_batch_end=lambda step, logs: seen.append((step, sorted(logs))))
    history = model.fit(clicks(), epochs=9, validation_data=clicks(200, seed=1), callbacks=[stop, watch], verbose=0)
    assert len(history.history["loss"]) == 2 and model.stop_training  # the AUC rises, and the callback wants it to fall
    assert seen == [(i, ["auc", "loss"]) for i in range(16)] * 2
    assert c.step == 32


def test_fit_stops_amid_an_epoch(clicks, collection, dlrm):
    c = collection()
    model = hb.nn.attach(compiled(dlrm(), jit=False), c)

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = batch == 2

    model.fit(clicks(), epochs=4, callbacks=[Stop()], verbose=0)
    assert c.step == 3
    model.fit(clicks(), epochs=3, steps_per_epoch=5, verbose=0)
    assert c.step == 18
    with pytest.warns(UserWarning, match="ran out of data"):  # asked for more than there is: Keras's warning stays
        model.fit(clicks(), epochs=1, steps_per_epoch=50, verbose=0)
    assert c.step == 34


def test_fit_shows_progress_and_eager_mode_works(clicks, collection, dlrm, capsys):
    c, d = collection(), collection()
    eager = compiled(dlrm(), jit=False, run_eagerly=True)
    h = hb.nn.attach(eager, c).fit(clicks(200), epochs=2, verbose=2).history
    assert "Epoch 2/2" in capsys.readouterr().out
    g = hb.nn.attach(compiled(dlrm(), jit=False), d).fit(clicks(200), epochs=2, verbose=0).history
    np.testing.assert_allclose(h["loss"], g["loss"], rtol=1e-5)


def test_fit_trains_a_model_without_dense_weights(clicks, collection, rows_of):
    class Sum(keras.Model):
        def call(self, dense, embeddings):
            return sum(keras.ops.sum(e, axis=1) for e in embeddings.values())

    c = collection()
    losses = hb.nn.attach(compiled(Sum(), jit=False), c).fit(clicks(), epochs=3, verbose=0).history["loss"]
    assert losses[2] < losses[0] - 0.05


def test_fit_raises_what_the_background_raised(clicks, collection, dlrm):
    def spoil(columns, seen=[]):  # noqa: B006
        seen.append(1)
        if len(seen) == 4:
            raise errors.Corrupt("spoilt", file="a.parquet") from OSError("the cause")
        return columns

    c = collection()
    model = hb.nn.attach(compiled(dlrm(), jit=False), c)
    with pytest.raises(errors.Corrupt, match="spoilt") as raised:
        model.fit(clicks().map(spoil), verbose=0)
    assert isinstance(raised.value.__cause__, OSError) and c.step == 3
    model.fit(clicks(), verbose=0)  # nothing is left in the way
    assert c.step == 19


def test_fit_ends_its_thread_when_a_callback_raises(clicks, collection, dlrm):
    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise KeyboardInterrupt

    model = hb.nn.attach(compiled(dlrm(), jit=False), collection())
    with pytest.raises(KeyboardInterrupt):
        model.fit(clicks(), callbacks=[Interrupt()], verbose=0)
    assert not [t for t in threading.enumerate() if t.name.startswith("hbkit")]


def test_attach_refuses_by_name(click_file, clicks, collection, dlrm):
    ds, c = clicks(100), collection()
    model = hb.nn.attach(dlrm(), c)
    compiled(model, steps_per_execution=2)
    for run in model.fit, model.evaluate, model.predict:
        with pytest.raises(errors.Unsupported, match="steps_per_execution=2"):
            run(ds, verbose=0)
    compiled(model)
    with pytest.raises(errors.Unsupported, match="class_weight"):
        model.fit(ds, class_weight={0: 1.0, 1: 2.0}, verbose=0)
    for data in np.zeros((8, 2), np.float32), tf.data.Dataset.from_tensors((np.zeros((8, 2)), np.zeros(8))):
        with pytest.raises(errors.InvalidArgument, match="no hbkit dataset"):
            model.predict(data, verbose=0)
    with pytest.raises(errors.InvalidArgument, match="no hbkit dataset"):
        model.train_on_batch(np.zeros((8, 2), np.float32), np.zeros(8, np.float32))
    unlabelled = hb.data.Dataset.from_parquet(click_file(100), fields=["amount", "age", "user", "item", "tags"])
    with pytest.raises(errors.InvalidArgument, match="not batched"):
        model.predict(unlabelled, verbose=0)
    with pytest.raises(errors.InvalidArgument, match="no label"):
        model.fit(unlabelled.batch(64), verbose=0)
    assert model.predict(unlabelled.batch(64), verbose=0).shape == (100,)
    for wrap in keras.optimizers.LossScaleOptimizer, lambda optimizer: optimizer:
        compiled(model, wrap(keras.optimizers.SGD(gradient_accumulation_steps=2)))
        with pytest.raises(errors.Unsupported, match="gradient_accumulation_steps=2"):
            model.fit(ds, verbose=0)
    assert c.step == 0


def test_attached_model_names_what_does_not_fit(clicks, collection, dlrm):
    city = hb.nn.attach(compiled(hb.models.DLRM(["user", "city"], 8, n_dense=2), jit=False), collection())
    with pytest.raises(errors.UnknownColumn, match=r"no table.*city"):
        city.fit(clicks(64), verbose=0)
    unpooled = hb.nn.attach(compiled(dlrm(), jit=False), collection(pooling={"tags": None}))
    with pytest.raises(errors.InvalidArgument, match=r"not a sequence.*tags"):
        unpooled.fit(clicks(64), verbose=0)
    layer = hb.nn.EmbeddingCollection(collection())
    model = hb.nn.attach(compiled(dlrm(), jit=False), layer)
    for spoilt, says in (("amount", "Ragged.*amount"), ("user", "float32.*user")):

        def spoil(columns, spoilt=spoilt):
            return {**columns, spoilt: columns["tags"] if spoilt == "amount" else columns["amount"]}

        with pytest.raises(errors.InvalidArgument, match=says):
            model.fit(clicks(64).map(spoil), verbose=0)
    layer.close()
    for run in model.fit, model.predict:
        with pytest.raises(errors.Closed, match="user, item, tags"):
            run(clicks(64), verbose=0)


def test_attached_model_saves_and_loads_its_weights(clicks, collection, dlrm, tmp_path):
    c = collection()
    model = hb.nn.attach(compiled(dlrm(), jit=False), c)
    model.fit(clicks(), verbose=0)
    model.save_weights(tmp_path / "dense.weights.h5")
    other = hb.nn.attach(compiled(dlrm(), jit=False), c)
    other.optimizer.build(other.trainable_variables)  # else Keras warns that it loads no state for it
    other.load_weights(tmp_path / "dense.weights.h5")
    np.testing.assert_array_equal(model.predict(clicks(), verbose=0), other.predict(clicks(), verbose=0))


def pairs(clicks):
    """Users and items alone, in whole batches."""
    return clicks(512, 64).select(["click", "amount", "age", "user", "item"])


def small(policy="float32"):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        keras.utils.set_random_seed(3)
        return hb.models.DLRM(["user", "item"], 8, n_dense=2, bottom=(16,), top=(16,))
    finally:
        keras.config.set_dtype_policy(before)


PAIRS = {"user": "user", "item": "item"}


@pytest.mark.parametrize(("jit", "limit"), [(False, None), (True, 0.05)])
def test_fit_with_a_loss_scale_is_fit_without(clicks, collection, rows_of, jit, limit):
    """Powers of two scale exactly; a clipped norm is that of weights and rows together."""
    scaling = (
        lambda **options: keras.optimizers.SGD(0.5, **options),
        lambda **options: keras.optimizers.SGD(0.5, loss_scale_factor=8.0, **options),
        lambda **options: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.5, **options), 2.0**10),
    )
    runs = []
    for make in scaling:
        c = collection(features=PAIRS, pooling="sum", optimizer=embedding.SGD(lr=0.5))
        model = hb.nn.attach(compiled(small(), make(global_clipnorm=limit), jit), c)
        losses = model.fit(pairs(clicks), verbose=0).history["loss"]
        runs.append((losses, rows_of(c), *[w.numpy() for w in model.weights]))
        assert c.step == 8
    for run in runs[1:]:
        for found, expected in zip(run, runs[0], strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_global_clipnorm_is_of_weights_and_rows(clicks, collection, rows_of):
    c, d = (collection(features=PAIRS, pooling="sum", optimizer=embedding.SGD(lr=0.5)) for _ in range(2))
    model = hb.nn.attach(compiled(small(), keras.optimizers.SGD(0.5, global_clipnorm=0.05), jit=False), c)
    model.fit(pairs(clicks), verbose=0)
    by_hand, optimizer = small(), keras.optimizers.SGD(0.5)
    for s in hb.pipeline(pairs(clicks), d):
        with tf.GradientTape() as tape:
            tape.watch(s.embeddings)
            logits = by_hand(s.dense, s.embeddings)
            mean = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(s.label, logits))
        grads = tape.gradient(mean, [*s.embeddings.values(), *by_hand.trainable_variables])
        grads, norm = tf.clip_by_global_norm(grads, 0.05)
        assert norm > 0.05
        s.apply(dict(zip(s.embeddings, grads, strict=False)))
        optimizer.apply(grads[len(s.embeddings) :], by_hand.trainable_variables)
    np.testing.assert_allclose(rows_of(c), rows_of(d), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(model.weights[0], by_hand.weights[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("where", ["weights", "rows"])
def test_step_of_infinities_changes_neither_and_the_scale_falls(clicks, collection, rows_of, where):
    """In the second step, by a gradient that overflows in the weights or in the rows alone."""

    class Overflowing(keras.Model):
        def __init__(self):
            super().__init__()
            self.top, self.steps = small(), self.add_weight(name="steps", initializer="zeros", trainable=False)
            self.built = True

        def call(self, dense, embeddings):
            logits, zero = self.top(dense, embeddings), tf.reduce_sum(embeddings["user"]) * 0.0
            if where == "weights":
                zero = tf.reduce_sum(self.top.weights[0]) * 0.0
            self.steps.assign_add(1.0)
            # the square root's gradient is infinite at zero
            return logits + tf.where(self.steps == 2.0, tf.sqrt(zero), 0.0 * zero)

    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.5), initial_scale=2.0**10)
    c, seen = collection(features=PAIRS, pooling="sum", optimizer=embedding.SGD(lr=0.5)), []
    model = hb.nn.attach(compiled(Overflowing(), optimizer, jit=False), c)

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append((c.step, float(optimizer.dynamic_scale), model.top.weights[0].numpy(), rows_of(c)))

    model.fit(pairs(clicks), callbacks=[Watch()], verbose=0)
    assert [s[:2] for s in seen[:3]] == [(1, 2.0**10), (1, 2.0**9), (2, 2.0**9)]
    np.testing.assert_array_equal(seen[0][2], seen[1][2])
    made = seen[0][3].any(1)
    np.testing.assert_array_equal(seen[0][3][made], seen[1][3][made])
    assert (seen[2][2] != seen[1][2]).any() and np.isfinite(seen[2][3]).all()


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_fit_in_mixed_precision(clicks, collection, policy):
    c = collection(features=PAIRS, pooling="sum", optimizer=embedding.SGD(lr=0.5))
    model = hb.nn.attach(compiled(small(policy), keras.optimizers.SGD(0.5)), c)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer) == (policy == "mixed_float16")
    assert c.lookup({f: np.zeros(1, np.int64) for f in PAIRS})["user"].dtype == np.float32
    losses = model.fit(pairs(clicks), epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0] - 0.03 and c.step > 20


def test_attached_embeddings_are_saved_with_the_model(clicks, collection, rows_of, tmp_path):
    c = collection()
    model = compiled(hb.models.DLRM(["user", "item", "tags"], 8, n_dense=2), jit=False)
    hb.nn.attach(model, hb.nn.EmbeddingCollection(c, snapshot=tmp_path / "rows"))
    model.fit(clicks(), verbose=0)
    model.save(tmp_path / "model.keras")
    expected, rows = model.predict(clicks(), verbose=0), rows_of(c)
    model.fit(clicks(), verbose=0)
    again, d = keras.models.load_model(tmp_path / "model.keras"), collection()
    hb.nn.attach(again, hb.nn.EmbeddingCollection(d))
    again.load_weights(tmp_path / "model.keras")
    for other, rows_there in ((again, d), (model, c)):
        other.load_weights(tmp_path / "model.keras")
        np.testing.assert_array_equal(rows_of(rows_there), rows)
        np.testing.assert_array_equal(other.predict(clicks(), verbose=0), expected)
    assert d.step == 16
    bare = hb.nn.attach(compiled(small(), jit=False), hb.nn.EmbeddingCollection(collection()))
    with pytest.raises(errors.InvalidArgument, match="snapshot=path"):
        bare.save(tmp_path / "bare.keras")


def test_fit_takes_several_labels(clicks, collection):
    def both(columns):
        return {**columns, "old": (columns["age"] > 40).astype(np.float32)}

    ds = clicks(300, 64).map(both).supervised(["click", "old"])
    model = hb.models.MMoE(["user", "item", "tags"], 8, n_dense=2, n_tasks=2)
    model.compile("adam", keras.losses.BinaryCrossentropy(from_logits=True))
    hb.nn.attach(model, collection())
    losses = model.fit(ds, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0] and model.predict(ds, verbose=0).shape == (300, 2)
