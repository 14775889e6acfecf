"""The models start as PyTorch's do, and give the same logits and gradients from the same weights, to 1e-5."""

import importlib.util
import inspect
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from scipy.stats import ks_2samp

import hbkit.tensorflow as hb
from hbkit_tensorflow.pipeline import Sequence

CASES = {
    f"{name} of {n_dense}": (name, n_dense, {})
    for name in ("dlrm", "deepfm", "xdeepfm", "dcnv2", "pnn")
    for n_dense in (0, 3)
}
CASES |= {"mmoe": ("mmoe", 3, {}), "mmoe of two": ("mmoe", 0, {"n_tasks": 2})}
CASES |= {"din": ("din", 3, {"sequences": {"seen": "b", "bought": "c"}})}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """PyTorch's arrays, by case and name."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    path = tmp_path_factory.mktemp("torch") / "out.npz"
    script = pathlib.Path(__file__).with_name("torch_side.py")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), json.dumps(CASES), str(path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(path) as found:
        return dict(found)


@pytest.mark.parametrize("case", CASES)
def test_models_agree_between_frameworks_from_the_same_weights(case, theirs):
    """Weights stand in the same order in both; a kernel of Keras is torch's weight, transposed."""
    name, n_dense, options = CASES[case]
    theirs = {key.removeprefix(f"{case}/"): value for key, value in theirs.items() if key.startswith(f"{case}/")}
    model = hb.models.MODELS[name](["a", "b", "c"], 4, n_dense, **options)
    arguments = [f"{p.name}={p.default}" for p in inspect.signature(type(model)).parameters.values()]
    assert arguments == theirs["arguments"].tolist()
    assert len(model.trainable_weights) == sum(key.startswith("weight/") for key in theirs)
    for i, weight in enumerate(model.trainable_weights):
        start, their_start = weight.numpy(), theirs[f"start/{i}"]
        if start.any() or their_start.any():  # drawn: from one distribution
            assert ks_2samp(start.ravel(), their_start.ravel()).pvalue > 1e-4, weight.path
        weight.assign(theirs[f"weight/{i}"].T)  # a vector's transpose is itself
    leaves = {f: tf.constant(theirs[f"rows/{f}"]) for f in ["a", "b", "c", *options.get("sequences", {})]}
    masks = {f: theirs[f"mask/{f}"] for f in options.get("sequences", {})}

    def training(value):
        return {"training": value} if model._call_has_training_arg else {}

    with tf.GradientTape() as tape:
        tape.watch(leaves)
        embeddings = {f: Sequence(leaf, tf.constant(masks[f])) if f in masks else leaf for f, leaf in leaves.items()}
        logits = model(tf.constant(theirs["dense"]), embeddings, **training(True))
        total = tf.reduce_sum(logits * theirs["factors"])
    weights, grads = tape.gradient(total, ([w.value for w in model.trainable_weights], leaves))

    def agree(ours, theirs):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())

    agree(logits, theirs["logits"])
    for i, grad in enumerate(weights):
        agree(tf.transpose(grad), theirs[f"weight_grad/{i}"])
    for i, moments in enumerate(model.non_trainable_weights):
        agree(moments, theirs[f"buffer/{i}"])
    agree(model(tf.constant(theirs["dense"]), embeddings, **training(False)), theirs["evaluated"])
    for f, grad in grads.items():
        agree(grad, theirs[f"rows_grad/{f}"])
