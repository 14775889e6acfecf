"""The trainer: that it learns, repeats itself bit for bit, and restores what it saved."""

import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf

import hbkit.tensorflow as hb
from hbkit import errors
from hbkit_tensorflow.training import OPTIMIZERS


def fitted(trainer, ds, lookahead=8):
    losses = []
    trainer.fit(ds, on_step=lambda n_rows, loss: losses.append((n_rows, loss)), lookahead=lookahead)
    return losses


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_trainer_learns(clicks, collection, dlrm, optimizer):
    trainer = hb.training.Trainer(dlrm(), collection(), optimizer, lr=0.01)
    losses = [fitted(trainer, clicks()) for _ in range(3)]
    assert [n for n, _ in losses[0]] == [64] * 15 + [40]
    assert all(type(n) is int and type(loss) is float for n, loss in losses[0])
    assert np.mean([x for _, x in losses[2]]) < np.mean([x for _, x in losses[0]]) - 0.02


@pytest.mark.parametrize("compile", [True, False])
def test_trainer_of_any_lookahead_gives_the_same(clicks, collection, dlrm, rows_of, compile):
    def run(lookahead):
        trainer = hb.training.Trainer(dlrm(), c := collection(), lr=0.05, compile=compile)
        return fitted(trainer, clicks(), lookahead), trainer.dense_state(), rows_of(c).tobytes()

    assert run(0) == run(8)


@pytest.mark.parametrize("positive_weight", [None, 3.0])
def test_trainer_loss_is_the_weighted_mean_of_the_valid_rows(clicks, collection, dlrm, positive_weight):
    c, model = collection(), dlrm()
    ds, rows = clicks(100, 64, weight="importance"), []
    for step in hb.pipeline(ds, collection()):
        n = step.n_rows
        losses = tf.nn.sigmoid_cross_entropy_with_logits(step.label, model(step.dense, step.embeddings))[:n].numpy()
        losses *= np.where(step.label[:n] == 1, positive_weight or 1, 1)
        rows.append((n, np.average(losses, weights=step.weight[:n])))
        break
    found = fitted(hb.training.Trainer(model, c, positive_weight=positive_weight), ds)
    assert found[0][0] == rows[0][0] and found[0][1] == pytest.approx(rows[0][1], rel=1e-5)
    *_, last = hb.pipeline(ds, c, train=False)
    assert last.n_rows == found[1][0] == 36


def test_trainer_predicts_the_valid_rows_and_creates_none(clicks, collection, dlrm):
    c = collection()
    trainer = hb.training.Trainer(dlrm(), c)
    trainer.fit(clicks())
    n_keys, step = {n: len(t) for n, t in c.tables.items()}, c.step
    ds = clicks(150, 64, seed=3, weight="importance")
    label, probability, weight = map(np.concatenate, zip(*trainer.predict(ds), strict=True))
    batches = list(ds.batches())
    np.testing.assert_array_equal(label, np.concatenate([b["click"] for b in batches]))
    np.testing.assert_array_equal(weight, np.concatenate([b["importance"] for b in batches]))
    expected = [
        tf.sigmoid(trainer.model(np.stack([b["amount"], b["age"]], 1).astype(np.float32), c.lookup(b))) for b in batches
    ]
    np.testing.assert_allclose(probability, np.concatenate(expected), rtol=1e-4)
    assert ({n: len(t) for n, t in c.tables.items()}, c.step) == (n_keys, step)


@pytest.mark.parametrize("optimizer", ["adagrad", "adam"])
def test_dense_state_continues_where_it_was_taken(clicks, collection, dlrm, optimizer):
    c, d = collection(), collection()
    one, two = (hb.training.Trainer(dlrm(), e, optimizer) for e in (c, d))
    one.fit(clicks())
    two.fit(clicks())
    state = one.dense_state()
    other = hb.training.Trainer(hb.models.DLRM(["user", "item", "tags"], 8, 2, (16,), (16,)), d, optimizer)
    other.load_dense_state(state)
    assert fitted(one, clicks(seed=1)) == fitted(other, clicks(seed=1))
    assert one.dense_state() == other.dense_state() != state
    names = safetensors.numpy.load(state)
    assert "model/bottom/dense_0/kernel" in names and any(name.startswith(f"{optimizer}/") for name in names)


def test_dense_state_loads_under_another_optimizer(collection, dlrm):
    state = hb.training.Trainer(dlrm(), collection(), "adam").dense_state()
    hb.training.Trainer(dlrm(), collection(), "sgd").load_dense_state(state)


def test_load_dense_state_refuses(collection, dlrm):
    trainer = hb.training.Trainer(dlrm(), collection())
    state = trainer.dense_state()
    for bad in b"", b"no safetensors", state[:-1], state[:20]:
        with pytest.raises(errors.Corrupt):
            trainer.load_dense_state(bad)
    wider = hb.models.DLRM(["user", "item", "tags"], 8, n_dense=2, bottom=(16,), top=(17,))
    with pytest.raises(errors.SchemaMismatch, match="top/dense_0"):
        hb.training.Trainer(wider, collection()).load_dense_state(state)
    with pytest.raises(errors.SchemaMismatch):
        hb.training.Trainer(hb.models.DeepFM(["user"], 8), collection()).load_dense_state(state)
    assert trainer.dense_state() == state


def test_trainer_refuses_by_name(click_file, collection, dlrm):
    with pytest.raises(errors.InvalidArgument, match="'lamb'"):
        hb.training.Trainer(dlrm(), collection(), "lamb")
    with pytest.raises(errors.InvalidArgument, match="no weights yet"):
        hb.training.Trainer(tf.keras.Sequential([tf.keras.layers.Dense(1)]), collection())
    ds = hb.data.Dataset.from_parquet(click_file()).batch(64)
    trainer = hb.training.Trainer(dlrm(), collection())
    for run in trainer.fit, trainer.predict:
        with pytest.raises(errors.InvalidArgument, match="no label"):
            run(ds)


# What PyTorch 2 computes of the gradients below, so that a name means the same in both adapters: made with
# torch.optim.<Name>([w], lr=0.1), w = [1, -2, 3], one step for each row of gradients.
GRADIENTS = [[0.5, -1e-6, 0.0], [-0.25, 1e-7, 2.0], [1.0, 1e-3, -1e-8]]
PYTORCH = {
    "adagrad": [0.8574342, -2.0099592, 2.9000001],
    "adam": [0.8075552, -1.9063821, 2.8680642],
    "adamw": [0.8047847, -1.9006444, 2.8591478],
    "sgd": [0.8749999, -2.0000999, 2.8],
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_are_those_of_pytorch(name):
    variable = tf.keras.Variable([1.0, -2.0, 3.0])
    optimizer = OPTIMIZERS[name](0.1)
    for gradient in GRADIENTS:
        optimizer.apply([tf.constant(gradient)], [variable])
    # Gradients near epsilon (the second column): Keras's Adam has it in another place in its first steps.
    columns = [0, 2] if name.startswith("adam") else [0, 1, 2]
    np.testing.assert_allclose(variable.numpy()[columns], np.array(PYTORCH[name])[columns], atol=2e-5)


def two_labels(clicks, n_rows=2000):
    def both(columns):
        return {**columns, "old": (columns["age"] > 40).astype(np.float32)}

    return clicks(n_rows, 128).map(both).supervised(["click", "old"])


def test_trainer_of_several_labels_learns_each_by_the_mean_of_their_losses(clicks, collection):
    ds, c = two_labels(clicks), collection()
    hb.training.seed(0)
    trainer = hb.training.Trainer(hb.models.MMoE(["user", "item", "tags"], 8, n_dense=2, n_tasks=2), c, lr=0.02)
    created = c.stage(next(iter(ds.batches())))
    created.outputs()  # now there are rows that prediction can read
    created.close()
    label, p, _ = next(iter(trainer.predict(ds)))
    losses = []
    for _ in range(3):
        trainer.fit(ds, lambda n_rows, loss: losses.append(loss))
    assert losses[0] == pytest.approx(-np.log(np.where(label == 1, p, 1 - p)).mean(), rel=1e-5)
    label, p, weight = (np.concatenate(part) for part in zip(*trainer.predict(ds), strict=True))
    assert label.shape == p.shape == (2000, 2) and weight.shape == (2000,)
    for i in range(2):
        auc = hb.metrics.AUC()
        auc.update(label[:, i], p[:, i])
        assert auc.result() > 0.7


def test_trainer_with_amp_computes_in_bfloat16_and_keeps_float32(clicks, collection, dlrm):
    runs, ds = [], clicks(1000, 64)
    for amp in (False, True):
        model = dlrm()
        trainer = hb.training.Trainer(model, collection(), amp=amp)
        runs.append([loss for _, loss in fitted(trainer, ds)])
        assert model.top.layers[0].compute_dtype == ("bfloat16" if amp else "float32")
        assert {w.dtype for w in model.weights} == {"float32"}
        ((_, probability, _), *_) = trainer.predict(ds)
        assert probability.dtype == np.float32
    np.testing.assert_allclose(*runs, atol=0.05)
    assert runs[0] != runs[1]
