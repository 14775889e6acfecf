"""Trainer: its loss, that it learns and repeats itself, prediction, and the dense state."""

import numpy as np
import pytest
import safetensors.torch
import torch

import hbkit.torch as hb
from hbkit import errors

pytestmark = pytest.mark.usefixtures("no_threads_left")
OPTIMIZERS = {"adagrad": 0.01, "adam": 0.01, "adamw": 0.01, "sgd": 0.1}


def fit(trainer, ds, **options):
    losses = []
    trainer.fit(ds, lambda n_rows, loss: losses.append((n_rows, loss)), **options)
    return losses


@pytest.mark.parametrize("positive_weight", [None, 3.0])
def test_trainer_loss_is_the_weighted_mean_of_the_valid_rows(clicks, collection, dlrm, positive_weight):
    ds = clicks(50, 64, weight="importance")
    c = collection()
    created = c.stage(next(iter(ds.batches())))
    created.outputs()  # now there are rows that prediction can read
    created.close()
    trainer = hb.training.Trainer(dlrm(), c, positive_weight=positive_weight)
    ((label, p, weight),) = trainer.predict(ds)
    factor = np.where(label == 1, positive_weight or 1, 1)
    expected = np.average(-factor * np.log(np.where(label == 1, p, 1 - p)), weights=weight)
    assert fit(trainer, ds) == [(50, pytest.approx(expected, rel=1e-5))]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_trainer_learns_and_repeats_itself_for_any_lookahead(clicks, collection, dlrm, rows_of, optimizer):
    ds = clicks(3000, 128)
    runs = []
    for lookahead in (0, 1, 8):
        c = collection()
        trainer = hb.training.Trainer(dlrm(), c, optimizer, lr=OPTIMIZERS[optimizer])
        losses = fit(trainer, ds, lookahead=lookahead)
        runs.append((losses, rows_of(c), trainer.dense_state()))
    losses, rows, state = runs[0]
    assert [n for n, _ in losses] == [128] * 23 + [56]
    assert np.mean([x for _, x in losses[-8:]]) < np.mean([x for _, x in losses[:4]]) - 0.01
    for other_losses, other_rows, other_state in runs[1:]:
        assert other_losses == losses and other_state == state
        assert all(np.array_equal(other_rows[name], rows[name]) for name in rows)


def test_moments_of_din_do_not_count_padding_and_are_saved(clicks, collection, dlrm):
    def din():
        return hb.training.Trainer(dlrm(kind=hb.models.DIN), collection(pooling={"tags": None}))

    filled, padded, other = din(), din(), din()
    filled.fit(clicks(50, 50))
    padded.fit(clicks(50, 64))
    for a, b in zip(filled.model.buffers(), padded.model.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    other.load_dense_state(padded.dense_state())
    assert all(map(torch.equal, other.model.buffers(), padded.model.buffers()))


@pytest.mark.parametrize("kind", hb.models.MODELS.values())
def test_trainer_beats_chance_on_rows_it_has_not_seen(clicks, collection, dlrm, kind):
    pooling = {"tags": None if kind is hb.models.DIN else "mean"}
    trainer = hb.training.Trainer(dlrm(kind=kind), collection(kind.row_dim(8), pooling=pooling))
    trainer.fit(clicks(8000, 128))
    auc, loss = hb.metrics.AUC(), hb.metrics.LogLoss()
    for label, probability, weight in trainer.predict(clicks(2000, 128, seed=7)):
        auc.update(label, probability, weight)
        loss.update(label, probability, weight)
    assert auc.result() > 0.75 and loss.result() < 0.6


def test_predict_gives_the_valid_rows_and_creates_none(clicks, collection, dlrm):
    c = collection()
    trainer = hb.training.Trainer(dlrm(), c)
    trainer.fit(clicks(500, 64))
    n = {name: len(table) for name, table in c.tables.items()}
    ds = clicks(300, 64, seed=3, weight="importance")
    parts = list(trainer.predict(ds))
    assert {name: len(table) for name, table in c.tables.items()} == n and c.step == 8
    label, probability, weight = (np.concatenate(column) for column in zip(*parts, strict=True))
    core = list(ds.batches())
    np.testing.assert_array_equal(label, np.concatenate([b["click"] for b in core]))
    np.testing.assert_array_equal(weight, np.concatenate([b["importance"] for b in core]))
    assert len(probability) == 300 and probability.dtype == np.float32 and ((probability > 0) & (probability < 1)).all()


def test_predict_leaves_the_gradient_mode_and_can_be_left_early(clicks, collection, dlrm):
    trainer = hb.training.Trainer(dlrm(), collection())
    for _ in trainer.predict(clicks(300, 64)):
        assert torch.is_grad_enabled()
        break
    assert len(fit(trainer, clicks(300, 64))) == 5


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_dense_state_resumes_exactly(clicks, collection, dlrm, optimizer):
    first, second = clicks(500, 64), clicks(500, 64, seed=2)
    c = collection()
    through = hb.training.Trainer(dlrm(), c, optimizer)
    through.fit(first)
    state = through.dense_state()
    expected = fit(through, second)

    c = collection()
    hb.training.Trainer(dlrm(), c, optimizer).fit(first)  # brings the tables to the same point
    resumed = hb.training.Trainer(dlrm(seed=9), c, optimizer)
    resumed.load_dense_state(state)
    assert resumed.dense_state() == state
    assert fit(resumed, second) == expected


def test_dense_state_is_safetensors_without_the_tables(clicks, collection, dlrm):
    trainer = hb.training.Trainer(dlrm(), collection())
    trainer.fit(clicks(100, 64))
    tensors = safetensors.torch.load(trainer.dense_state())
    names = [name for name, _ in trainer.model.named_parameters()]
    assert set(tensors) == {f"model/{n}" for n in names} | {f"adagrad/{n}/{k}" for n in names for k in ("step", "sum")}


def test_dense_state_of_another_optimizer_gives_the_weights(clicks, collection, dlrm):
    trained = hb.training.Trainer(dlrm(), collection(), "adam")
    trained.fit(clicks(300, 64))
    other = hb.training.Trainer(dlrm(seed=9), collection(), "sgd")
    other.load_dense_state(trained.dense_state())
    for a, b in zip(trained.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(fit(other, clicks(300, 64))) == 5


@pytest.mark.parametrize("damage", [lambda s: b"", lambda s: s[:-5], lambda s: b"\xff" * 100, lambda s: s[9:]])
def test_dense_state_refuses_damaged_bytes_and_keeps_the_model(collection, dlrm, damage):
    trainer = hb.training.Trainer(dlrm(), collection())
    before = trainer.dense_state()
    with pytest.raises(errors.Corrupt, match="safetensors"):
        trainer.load_dense_state(damage(before))
    assert trainer.dense_state() == before


def test_dense_state_refuses_another_model_and_keeps_this_one(collection, dlrm):
    trainer, other = (hb.training.Trainer(dlrm(dim), collection(dim)) for dim in (8, 4))
    before = trainer.dense_state()
    with pytest.raises(errors.SchemaMismatch) as caught:
        trainer.load_dense_state(other.dense_state())
    assert "\n" not in str(caught.value)
    assert trainer.dense_state() == before
    with pytest.raises(errors.SchemaMismatch):
        trainer.load_dense_state(hb.training.Trainer(dlrm(kind=hb.models.DeepFM), collection()).dense_state())
    assert trainer.dense_state() == before


def test_trainer_refuses_what_it_cannot_train(clicks, collection, dlrm, tmp_path):
    with pytest.raises(errors.InvalidArgument, match=r"ftrl.*adagrad"):
        hb.training.Trainer(dlrm(), collection(), "ftrl")
    trainer = hb.training.Trainer(dlrm(), collection())
    clicks(10, 5)
    unlabelled = hb.data.Dataset.from_parquet(str(tmp_path)).batch(5)
    with pytest.raises(errors.InvalidArgument, match="supervised"):
        trainer.fit(unlabelled)
    with pytest.raises(errors.InvalidArgument, match="supervised"):
        trainer.predict(unlabelled)


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
    seen, runs, ds = [], [], clicks(2000, 128)
    for amp in (False, True):
        model = dlrm()
        model.top[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        trainer = hb.training.Trainer(model, collection(), amp=amp)
        runs.append([loss for _, loss in fit(trainer, ds)])
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        ((_, probability, _), *_) = trainer.predict(ds)
        assert probability.dtype == np.float32
    assert set(seen[: len(seen) // 2]) == {torch.float32} and set(seen[len(seen) // 2 :]) == {torch.bfloat16}
    np.testing.assert_allclose(*runs, atol=0.05)
    assert runs[0] != runs[1]
