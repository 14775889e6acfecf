"""Promise 2: what trained under one framework loads under the other with the same rows, and goes on alike."""

import importlib.util
import subprocess
import sys

import pytest

STEP = {
    "torch": """
import torch
def step(s, model, optimizer):
    loss = torch.nn.functional.binary_cross_entropy_with_logits(model(s.dense, s.embeddings), s.label, s.weight)
    loss.backward()
    s.apply()
""",
    "tensorflow": """
import tensorflow as tf
def step(s, model, optimizer):
    with tf.GradientTape() as tape:
        tape.watch(s.embeddings)
        loss = tf.nn.sigmoid_cross_entropy_with_logits(s.label, model(s.dense, s.embeddings))
        loss = tf.reduce_mean(loss * s.weight)
    s.apply(tape.gradient(loss, s.embeddings))
""",
}

CODE = """
import hashlib, pathlib, sys
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
import hbkit
import hbkit.{framework} as hb
{step}
def digest():
    out = hashlib.blake2b()
    for table in tables:
        for chunk in table.store.scan():
            for column in chunk:
                out.update(np.ascontiguousarray(column))
    return out.hexdigest()

rng = np.random.default_rng(0)
data = {{"y": rng.integers(0, 2, 400).astype(np.float32), "a": rng.integers(0, 90, 400), "b": rng.integers(0, 90, 400)}}
pq.write_table(pa.table(data), "{framework}.parquet")
tables = [hbkit.embedding.Table(n, 8, optimizer=hbkit.embedding.Adam(lr=0.1)) for n in "ab"]
if pathlib.Path("model").exists():
    hbkit.snapshot.load("model", tables)
    print("loaded", digest(), [t.step for t in tables])
collection = hbkit.embedding.Collection(tables)
ds = hb.data.Dataset.from_parquet("{framework}.parquet").supervised("y").batch(64)
model = hb.models.DLRM(features=["a", "b"], dim=8)
for s in hb.pipeline(ds, collection):
    step(s, model, None)
hbkit.snapshot.save("model", tables, collection.step)
print("saved", digest(), [t.step for t in tables])
"""


def test_tables_pass_between_frameworks_bit_for_bit(tmp_path):
    for framework in STEP:
        if importlib.util.find_spec(framework) is None:
            pytest.skip(f"{framework} is not installed")
    saved = None
    for framework in ("torch", "tensorflow", "torch"):
        code = CODE.format(framework=framework, step=STEP[framework])
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.startswith(("loaded", "saved")))
        assert lines.get("loaded") == saved
        assert lines["saved"] != saved
        saved = lines["saved"]
    assert saved.endswith("[21, 21]")
