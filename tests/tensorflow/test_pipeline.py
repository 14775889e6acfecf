"""The pipeline: what a step holds, that look-ahead changes nothing, and that no thread outlives the loop."""

import gc
import signal
import subprocess
import sys
import threading
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import hbkit.tensorflow as hb
from hbkit import embedding, errors, store
from hbkit_tensorflow.pipeline import Feed

pytestmark = pytest.mark.usefixtures("no_threads_left")
LOOKAHEADS = [0, 1, 8]


def train(step, model):
    with tf.GradientTape() as tape:
        tape.watch(step.embeddings)
        logits = model(step.dense, step.embeddings)
        loss = tf.reduce_sum(tf.nn.sigmoid_cross_entropy_with_logits(step.label, logits) * step.weight)
    step.apply(tape.gradient(loss, step.embeddings))
    return float(loss)


def test_step_holds_the_columns_of_its_batch_padded(clicks, collection):
    ds = clicks(100, 64, weight="importance")
    for step, batch in zip(hb.pipeline(ds, collection()), ds.batches(), strict=True):
        n = batch.n_rows
        assert (step.n_rows, step.cursor) == (n, batch.cursor)
        assert step.dense.dtype == step.label.dtype == step.weight.dtype == tf.float32
        np.testing.assert_array_equal(step.dense[:n], np.stack([batch["amount"], batch["age"]], 1))
        np.testing.assert_array_equal(step.label[:n], batch["click"])
        np.testing.assert_array_equal(step.weight[:n], batch["importance"])
        assert list(step.embeddings) == ["user", "item", "tags"]
        assert step.embeddings["user"].shape == (64, 8)
        for padded in (step.dense, step.label, step.weight, *step.embeddings.values()):
            assert len(padded) == 64 and not padded[n:].numpy().any()
    assert n == 36


def test_step_without_label_and_weight_columns(click_file, collection):
    ds = hb.data.Dataset.from_parquet(click_file(100), fields=["age", "user"]).batch(64)
    *_, last = hb.pipeline(ds, collection(features={"user": "user"}, pooling="sum"))
    assert last.weight.numpy().tolist() == [1.0] * 36 + [0.0] * 28
    assert not last.label.numpy().any()


def test_step_holds_the_rows_of_the_collection(clicks, collection):
    ds, c = clicks(200, 64), collection()
    steps = hb.pipeline(ds, c, lookahead=2)
    for step, batch in zip(steps, ds.batches(), strict=True):
        found = c.lookup(batch)
        assert all(np.array_equal(step.embeddings[f][: step.n_rows], found[f]) for f in found)
        step.apply({f: tf.ones_like(e) for f, e in step.embeddings.items()})


@pytest.mark.parametrize("compiled", [True, False])
def test_pipeline_of_any_lookahead_gives_the_same_tables(clicks, collection, dlrm, rows_of, compiled):
    def run(lookahead):
        c, model = collection(), dlrm()
        forward = tf.function(model, jit_compile=True) if compiled else model
        return [train(s, forward) for s in hb.pipeline(clicks(), c, lookahead=lookahead)], rows_of(c)

    losses, rows = run(0)
    assert rows.any() and len(losses) == 16
    for lookahead in LOOKAHEADS[1:]:
        again, same = run(lookahead)
        assert again == losses
        np.testing.assert_array_equal(same.view(np.int32), rows.view(np.int32))


@pytest.mark.parametrize("lookahead", [1, 3])
def test_pipeline_stages_no_further_than_lookahead(clicks, collection, lookahead):
    c, staged = collection(), []
    stage = c.stage
    c.stage = lambda *args, **kwargs: staged.append(1) or stage(*args, **kwargs)
    for n_taken, _ in enumerate(hb.pipeline(clicks(1000, 50), c, lookahead=lookahead), 1):
        assert len(staged) <= n_taken + lookahead
    assert len(staged) == 20


def test_pipeline_only_reads_without_train(clicks, collection):
    c = collection()
    for step in hb.pipeline(clicks(), c, train=False):
        with pytest.raises(errors.Closed, match="for reading only"):
            step.apply({"user": step.embeddings["user"]})
    assert sum(map(len, c.tables.values())) == 0 and c.step == 0


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_pipeline_ends_its_thread_when_the_loop_breaks(clicks, collection, dlrm, lookahead):
    c, model = collection(), dlrm()
    for step in hb.pipeline(clicks(), c, lookahead=lookahead):
        train(step, model)
        break
    gc.collect()
    assert c.step == 1
    for step in hb.pipeline(clicks(100, 50), c, lookahead=lookahead):  # nothing of the first loop is in the way
        train(step, model)
    assert c.step == 3


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_pipeline_ends_its_thread_when_the_body_raises(clicks, collection, lookahead):
    with pytest.raises(RuntimeError, match="mine"), hb.pipeline(clicks(), collection(), lookahead=lookahead) as steps:
        for _ in steps:
            raise RuntimeError("mine")
    assert not [t for t in threading.enumerate() if t.name.startswith("hbkit")]
    assert list(steps) == []


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_pipeline_raises_what_the_background_raised(clicks, collection, dlrm, lookahead):
    def spoil(columns, seen=[]):  # noqa: B006
        seen.append(1)
        if len(seen) == 4:
            raise RuntimeError("spoilt") from OSError("the cause")
        return columns

    c, model = collection(), dlrm()
    with pytest.raises(RuntimeError, match="spoilt") as raised:
        for step in hb.pipeline(clicks().map(spoil), c, lookahead=lookahead):
            train(step, model)
    assert isinstance(raised.value.__cause__, OSError)
    assert "spoil" in [entry.name for entry in raised.traceback]
    assert c.step == 3


def test_step_is_applied_once_and_in_its_turn(clicks, collection, dlrm):
    steps, model = hb.pipeline(clicks(), collection()), dlrm()
    first = next(steps)
    train(first, model)
    with pytest.raises(errors.Closed, match="was applied"):
        first.apply({"user": first.embeddings["user"]})
    second, _ = next(steps), next(steps)
    with pytest.raises(errors.Closed, match="was closed"):
        second.apply({"user": second.embeddings["user"]})
    steps.close()


def test_step_leaves_rows_that_the_loss_did_not_use(clicks, collection):
    c = collection(optimizer=embedding.Adam(lr=0.1))  # which would move rows by a gradient of zeros too
    for i, step in enumerate(hb.pipeline(clicks(), c)):
        with tf.GradientTape() as tape:
            tape.watch(step.embeddings)
            loss = tf.reduce_sum(step.embeddings["user" if i else "item"])
        step.apply(tape.gradient(loss, step.embeddings))
        if i == 0:
            trained = c.tables["item"].lookup(np.arange(200))
    known = trained.any(1)
    assert 0 < known.sum() < len(known)
    np.testing.assert_array_equal(c.tables["item"].lookup(np.arange(200))[known], trained[known])


def test_step_without_any_gradient_raises(clicks, collection):
    step = next(steps := hb.pipeline(clicks(), collection()))
    with pytest.raises(errors.Closed, match="no embedding has a gradient"):
        step.apply(dict.fromkeys(step.embeddings))
    steps.close()


def test_step_takes_the_gradient_of_rows_that_were_gathered(clicks, collection):
    c = collection(optimizer=embedding.SGD(lr=1.0))
    for step in hb.pipeline(clicks(100, 100), c):
        before = c.tables["user"].lookup(np.arange(200))
        with tf.GradientTape() as tape:
            tape.watch(step.embeddings)
            loss = tf.reduce_sum(tf.gather(step.embeddings["user"], [0, 0, 5]))  # the gradient is IndexedSlices
        step.apply(tape.gradient(loss, step.embeddings))
    (batch,) = clicks(100, 100).batches()
    expected = before.copy()
    np.subtract.at(expected, batch["user"][[0, 0, 5]], 1.0)
    np.testing.assert_allclose(c.tables["user"].lookup(np.arange(200)), expected, rtol=1e-6)


def test_step_gives_a_sequence_where_there_is_no_pooling(clicks, collection):
    ds, c = clicks(100, 64), collection(pooling={"tags": None}, optimizer=embedding.SGD(lr=1.0))
    for step, batch in zip(hb.pipeline(ds, c), ds.batches(), strict=True):
        values, mask = step.embeddings["tags"]
        lengths = np.pad(batch["tags"].lengths(), (0, 64 - batch.n_rows))
        np.testing.assert_array_equal(mask.numpy().sum(1), lengths)
        assert values.shape == (64, 4, 8) and not values.numpy()[~mask.numpy()].any()
        before = c.tables["tag"].lookup(np.arange(30))
        with tf.GradientTape() as tape:
            tape.watch(step.embeddings["tags"].values)
            loss = tf.reduce_sum(step.embeddings["tags"].values)
        step.apply({"tags": tape.gradient(loss, step.embeddings["tags"].values)})
        used = np.bincount(batch["tags"].values, minlength=30)
        np.testing.assert_allclose(c.tables["tag"].lookup(np.arange(30)), before - used[:, None], rtol=1e-5, atol=1e-6)


def test_pipeline_refuses_by_name(click_file, clicks, collection):
    ds, c = clicks(), collection()
    with pytest.raises(errors.InvalidArgument, match="not batched"):
        hb.pipeline(hb.data.Dataset.from_parquet(click_file()), c)
    with pytest.raises(errors.InvalidArgument, match="lookahead=-1"):
        hb.pipeline(ds, c, lookahead=-1)
    with pytest.raises(errors.UnknownColumn, match="feature user"):
        next(hb.pipeline(ds.select(["click", "item", "tags"]), c))
    with pytest.raises(errors.InvalidArgument, match=r"Ragged.*column tags"):
        next(hb.pipeline(ds, collection(features={"user": "user", "item": "item"}, pooling="sum")))
    with pytest.raises(errors.InvalidArgument, match="feature amount"):
        next(hb.pipeline(ds.select(["click", "amount"]), collection(features={"amount": "user"}, pooling="sum")))


def test_pipeline_refuses_a_closed_layer(clicks, collection):
    layer = hb.nn.EmbeddingCollection(collection())
    layer.close()
    with pytest.raises(errors.Closed, match="feature user, item, tags"):
        hb.pipeline(clicks(), layer)


def test_feed_gives_each_epoch_its_own_order(clicks, collection):
    ds = clicks(500, 50).shuffle(3, 200)
    orders = [[x for b in ds.set_epoch(e) for x in b["amount"].numpy().tolist()] for e in range(3)]
    assert orders[0] != orders[1] != orders[2]
    for training, expected in (True, orders[1:]), (False, [orders[1], orders[1]]):
        feed = Feed(ds.set_epoch(1), collection(), training, 2)
        elements = feed.dataset()
        for order in expected:
            found = []
            for inputs, _, _ in elements:
                step = feed.take(int(inputs["ticket"]))
                found += inputs["dense"].numpy()[: step.n_rows, 0].tolist()
                step.close()
            assert found == order
        feed.close()


def test_feed_closes_steps_that_nobody_took(clicks, collection):
    feed = Feed(clicks(), collection(), True, 4)
    iterator = iter(feed.dataset())
    ticket = int(next(iterator)[0]["ticket"])
    feed.close()
    assert feed.take(ticket) is None


def test_dense_weights_train_beside_the_rows(clicks, collection, dlrm):
    c, model, optimizer = collection(), dlrm(), keras.optimizers.Adagrad(0.05)
    losses = []
    for _ in range(3):
        for s in hb.pipeline(clicks(), c):
            with tf.GradientTape() as tape:
                tape.watch(s.embeddings)
                logits = model(s.dense, s.embeddings)
                loss = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(s.label, logits))
            rows, weights = tape.gradient(loss, (s.embeddings, model.trainable_variables))
            optimizer.apply(weights, model.trainable_variables)
            s.apply(rows)
            losses.append(float(loss))
    assert np.mean(losses[-16:]) < np.mean(losses[:16]) - 0.03


def test_pipeline_overlaps_decoding_deduping_and_fetching_with_the_step(clicks, collection, monkeypatch, tmp_path):
    """While a step is held, others are decoded, staged and fetched up to the bound, none of it by the step's thread."""
    done = {"decode": [], "stage": [], "fetch": []}

    def noted(what, fn):
        def call(*args, **kwargs):
            out = fn(*args, **kwargs)
            done[what].append(threading.current_thread())
            return out

        return call

    monkeypatch.setattr(embedding.Collection, "stage", noted("stage", embedding.Collection.stage))
    monkeypatch.setattr(embedding.Staged, "fetch", noted("fetch", embedding.Staged.fetch))
    ds = clicks(1000, 64).map(noted("decode", dict))
    steps = hb.pipeline(ds, collection(store=store.cached_ssd(tmp_path)), lookahead=6)
    next(steps)
    want = {"decode": 7, "stage": 7, "fetch": 6}  # the last one decoded waits behind those whose rows are fetched
    until = time.monotonic() + 30
    while any(len(done[what]) < n for what, n in want.items()) and time.monotonic() < until:
        time.sleep(0.001)
    assert {what: len(threads) for what, threads in done.items()} == want
    assert not any(threading.current_thread() in threads for threads in done.values())
    assert not set(done["fetch"]) & set(done["stage"])  # nor does staging wait for rows
    steps.close()


def test_interrupt_lets_go_of_rows(tmp_path):
    """A real signal, while the loop trains: the process ends by KeyboardInterrupt, without threads or pinned rows."""
    code = """
import os, signal, threading, numpy as np, pyarrow as pa, pyarrow.parquet as pq
import tensorflow as tf, hbkit.tensorflow as hb
from hbkit.embedding import Collection, Table
from hbkit.store import cached_ssd
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background ignores it
pq.write_table(pa.table({"k": np.arange(100_000) % 5000}), "k.parquet")
c = Collection([Table("k", 4, store=cached_ssd("store", host_budget="4MiB"))])
ds = hb.data.Dataset.from_parquet("k.parquet").batch(64).repeat()
try:
    for at, step in enumerate(hb.pipeline(ds, c, 4)):
        step.apply({"k": tf.ones_like(step.embeddings["k"])})
        if at == 3:
            print("training", flush=True)
except KeyboardInterrupt:
    print([t.name for t in threading.enumerate() if t.name.startswith("hbkit-")], c.step > 0)
    for step in hb.pipeline(ds, c, 4):
        step.apply({"k": tf.ones_like(step.embeddings["k"])})
        break
    c.close()
    print("closed")
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "training\n"
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out) == (0, "[] True\nclosed\n")


@pytest.mark.parametrize("at", ["wait", "outputs"])
def test_interrupt_at_the_step_lets_go_of_the_batch(clicks, collection, monkeypatch, at):
    """Between the background and the loop: while rows are waited for, or gathered."""
    c, real = collection(), getattr(embedding.Staged, at)
    steps = hb.pipeline(clicks(300, 64), c, 2)
    next(steps)

    def interrupted(staged, *args):
        real(staged, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(embedding.Staged, at, interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(steps)
    monkeypatch.setattr(embedding.Staged, at, real)
    assert c._training is None and not [t for t in threading.enumerate() if t.name.startswith("hbkit")]
    assert len(list(hb.pipeline(clicks(300, 64), c, 2))) == 5


@pytest.mark.parametrize("how", ["break", "error", "end"])
def test_no_lease_is_left(clicks, collection, how, monkeypatch):
    """Every batch that was staged is closed, however the loop ends."""
    made = []
    stage = embedding.Collection.stage
    monkeypatch.setattr(embedding.Collection, "stage", lambda *a, **k: made.append(stage(*a, **k)) or made[-1])
    try:
        for at, step in enumerate(hb.pipeline(clicks(500, 64), collection(), 3)):
            if at == 2 and how == "break":
                break
            if at == 2 and how == "error":
                raise ZeroDivisionError
            step.apply({"user": tf.ones_like(step.embeddings["user"])})
    except ZeroDivisionError:
        pass
    assert len(made) >= 3 and {s._state for s in made} <= {"applied", "closed"}
