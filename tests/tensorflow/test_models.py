"""The models: their formulas, how they start, and what they refuse."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import hbkit.tensorflow as hb
from hbkit import embedding, errors
from hbkit_tensorflow.pipeline import Sequence

FEATURES = ["a", "b", "c"]


def inputs(width, n_dense=2, n=6, seed=0):
    rng = np.random.default_rng(seed)
    dense = rng.lognormal(0, 2, (n, n_dense)).astype(np.float32)
    return dense, {f: rng.normal(size=(n, width)).astype(np.float32) for f in FEATURES}


def mlp(layer, x):
    weights = [w.numpy() for w in layer.weights]
    for i in range(0, len(weights), 2):
        x = x @ weights[i] + weights[i + 1]
        if i + 2 < len(weights):
            x = np.maximum(x, 0)
    return x


@pytest.mark.parametrize("n_dense", [0, 2])
def test_dlrm_is_its_formula(n_dense):
    model, (dense, rows) = hb.models.DLRM(FEATURES, 4, n_dense, bottom=(8,), top=(8,)), inputs(4, n_dense)
    vectors = [rows[f] for f in FEATURES]
    bottom = [np.maximum(mlp(model.bottom, np.log1p(dense)), 0)] if n_dense else []
    vectors = bottom + vectors
    dots = [(vectors[i] * vectors[j]).sum(1) for i in range(len(vectors)) for j in range(i)]
    expected = mlp(model.top, np.concatenate([*bottom, np.stack(dots, 1)], 1))[:, 0]
    np.testing.assert_allclose(model(dense, rows), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_dense", [0, 2])
def test_deepfm_is_its_formula(n_dense):
    model, (dense, rows) = hb.models.DeepFM(FEATURES, 4, n_dense, hidden=(8,)), inputs(5, n_dense)
    linear, vectors = sum(rows[f][:, 0] for f in FEATURES), [rows[f][:, 1:] for f in FEATURES]
    pairs = sum((vectors[i] * vectors[j]).sum(1) for i in range(3) for j in range(i))
    x = np.log1p(dense)
    expected = linear + pairs + mlp(model.deep, np.concatenate([x, *vectors], 1))[:, 0]
    if n_dense:
        expected = expected + (x @ model.linear.kernel.numpy())[:, 0]
    np.testing.assert_allclose(model(dense, rows), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", hb.models.MODELS)
def test_models_start_glorot_uniform_with_zero_bias(name):
    options = {"din": {"sequences": {"seen": "a"}}, "mmoe": {"n_tasks": 2}}.get(name, {})
    model = hb.models.MODELS[name](FEATURES, 16, 13, **options)
    weights = {w.path: w.numpy() for w in model.weights}
    kinds = {
        kind: [w for path, w in weights.items() if path.endswith(kind)]
        for kind in ("kernel", "bias", "slope", "moments")
    }
    assert len(weights) == len(model.weights)  # a dense state goes by these paths
    assert sum(map(len, kinds.values())) == len(weights)
    assert len(kinds["slope"]) == len(kinds["moments"]) == 3 * (name == "din")
    kernels = kinds.pop("kernel")
    assert not any(w.any() for found in kinds.values() for w in found)
    for kernel in kernels:
        limit = np.sqrt(6 / sum(kernel.shape))
        assert np.abs(kernel).max() <= limit
        if kernel.size > 1000:
            assert kernel.std() == pytest.approx(limit / np.sqrt(3), rel=0.1)


@pytest.mark.parametrize("name", hb.models.MODELS)
def test_models_compile_whole(name):
    model = hb.models.MODELS[name](FEATURES, 4, 2)
    dense, rows = inputs(model.row_dim(4))
    found = tf.function(model, jit_compile=True)(dense, rows)
    np.testing.assert_allclose(found, model(dense, rows), rtol=1e-4, atol=1e-5)
    assert found.shape == (6,)


@pytest.mark.parametrize("name", hb.models.MODELS)
def test_models_refuse_by_feature(name):
    model = hb.models.MODELS[name](FEATURES, 4)
    dense, rows = inputs(model.row_dim(4), 0)
    with pytest.raises(errors.UnknownColumn, match="feature b"):
        model(dense, {"a": rows["a"], "c": rows["c"]})
    with pytest.raises(errors.InvalidArgument, match="feature b"):
        model(dense, {**rows, "b": rows["b"][:, :2]})
    with pytest.raises(errors.InvalidArgument, match=r"sequence \(feature c\)"):
        model(dense, {**rows, "c": rows["c"][:, None]})


def test_din_takes_sequences_compiles_whole_and_refuses_by_feature():
    model = hb.models.DIN(FEATURES, 4, 2, {"seen": "b"})
    dense, rows = inputs(4)
    rng = np.random.default_rng(1)
    values, mask = rng.normal(size=(6, 3, 4)).astype(np.float32), rng.random((6, 3)) < 0.5
    rows["seen"] = Sequence(tf.constant(values), tf.constant(mask))
    found = tf.function(model, jit_compile=True)(dense, rows)
    np.testing.assert_allclose(found, model(dense, rows), rtol=1e-4, atol=1e-5)
    hidden = Sequence(tf.where(mask[:, :, None], values, 7.0), tf.constant(mask))  # what is masked is not seen
    np.testing.assert_array_equal(model(dense, {**rows, "seen": hidden}), model(dense, rows))
    with pytest.raises(errors.InvalidArgument, match=r"needs a sequence.*feature seen"):
        model(dense, {**rows, "seen": rows["a"]})
    with pytest.raises(errors.UnknownColumn, match="feature seen"):
        model(dense, {f: rows[f] for f in FEATURES})


def test_mmoe_gives_a_logit_for_each_task():
    model, (dense, rows) = hb.models.MMoE(FEATURES, 4, 2, n_tasks=3), inputs(4)
    assert model(dense, rows).shape == (6, 3)
    assert hb.models.MMoE(FEATURES, 4, 2)(dense, rows).shape == (6,)


@pytest.mark.parametrize("name", hb.models.MODELS)
def test_model_takes_rows_side_by_side_to_the_same_bits(name, clicks, collection, rows_of):
    """Losses, rows and weights are those of features apart; a stack of another model is refused."""
    kind, ds, found = hb.models.MODELS[name], clicks(700, 64), []
    for stacked in (True, False):
        c = collection(kind.row_dim(8))
        keras.utils.set_random_seed(1)
        model = kind(list(c.features), 8, n_dense=2)
        if stacked:
            c = embedding.Collection(list(c.tables.values()), c.features, c.pooling, kind.stack(model.features))
            assert bool(c.stack) == (name != "din")
        losses = []
        hb.training.Trainer(model, c).fit(ds, lambda n, loss, losses=losses: losses.append(loss))
        found.append((losses, rows_of(c), [w.numpy() for w in model.weights]))
    np.testing.assert_equal(*found)
    if name != "din":
        (output,) = kind.stack(FEATURES)
        with pytest.raises(errors.InvalidArgument, match="stack of 2 features"):
            kind(FEATURES, 8)(tf.zeros((5, 0)), {output: tf.zeros((5, 2, 8))})
