"""A training killed at any step and resumed from its last commit gives what an uninterrupted one gives, bit for bit."""

import importlib.util
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hbkit import errors
from hbkit.embedding import Adam, Collection, Table, random_arrays, set_random_arrays
from hbkit.snapshot import save, verify

MODEL = {
    "torch": """
import torch
torch.set_num_threads(1)
class Model(hb.models.DLRM):
    def forward(self, dense, embeddings):
        return super().forward(torch.nn.functional.dropout(dense, 0.3, self.training), embeddings)
def weights(trainer):
    return {name: w.detach().numpy() for name, w in trainer.model.named_parameters()}
""",
    "tensorflow": """
import keras
class Model(keras.Model):
    def __init__(self, **options):
        super().__init__()
        self.inner, self.dropout = hb.models.DLRM(**options), keras.layers.Dropout(0.3)
        self(keras.ops.zeros((1, 2)), dict.fromkeys("ab", keras.ops.zeros((1, 4))))
    def call(self, dense, embeddings, training=False):
        return self.inner(self.dropout(dense, training=training), embeddings)
def weights(trainer):
    return {w.path: w.numpy() for w in trainer.model.weights}
""",
}

# Trains EPOCHS epochs from the last commit, writes each step's loss, commits every 7 steps, dies after `limit` steps.
CODE = """
import hashlib, os, pathlib, signal, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
import numpy as np
import hbkit
import hbkit.{framework} as hb
{model}
path, limit, lookahead = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
hb.training.seed(5)
np.random.seed(5)
from hbkit.embedding import Adam, CountAdmission, Table
tables = [Table(n, 4, optimizer=Adam(lr=0.1), admission=CountAdmission(2)) for n in "ab"]
model = Model(features=["a", "b"], dim=4, n_dense=2)
trainer = hb.training.Trainer(model, hbkit.embedding.Collection(tables), "adam")

def noisy(columns):
    return {{**columns, "y": np.where(np.random.rand(len(columns["y"])) < 0.1, 1, columns["y"]).astype(np.float32)}}

ds = hb.data.Dataset.from_parquet("data.parquet").supervised("y").shuffle(3, 100).batch(16)
if {map}:
    ds = ds.map(noisy)
steps = 0
def on_step(n_rows, loss):
    global steps
    steps += 1
    print(trainer.collection.step, loss.hex(), flush=True)
    if trainer.collection.step % 7 == 0:
        trainer.save(path, base="latest")
    if steps == limit:
        os.kill(os.getpid(), signal.SIGKILL)

epoch = 0
if pathlib.Path(path).exists():
    trainer.load(path, ds)
    epoch = ds.state_dict()["epoch"]
for epoch in range(epoch, 3):
    trainer.fit(ds.set_epoch(epoch), on_step, lookahead)
out = hashlib.blake2b()
for table in tables:
    for chunk in table.store.scan():
        for column in chunk:
            out.update(np.ascontiguousarray(column))
    for column in table.admission.state().values():
        out.update(column)
for name, weight in sorted(weights(trainer).items()):
    out.update(weight.tobytes())
print("end", out.hexdigest())
"""

N_STEPS = 3 * 19  # of 300 rows, the last batch of an epoch shorter


def run(code, cwd, *args, killed):
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == (-9 if killed else 0), done.stderr
    return [tuple(line.split()) for line in done.stdout.splitlines()]


def has(framework):
    missing = importlib.util.find_spec(framework) is None
    return pytest.param(framework, marks=pytest.mark.skipif(missing, reason=f"{framework} is not installed"))


@pytest.mark.slow
@pytest.mark.parametrize("framework", [has(f) for f in MODEL])
def test_killed_and_resumed_is_as_uninterrupted_bit_for_bit(tmp_path, framework):
    rng = np.random.default_rng(0)
    columns = {
        "y": rng.integers(0, 2, 300).astype(np.float32),
        "x1": rng.standard_normal(300).astype(np.float32),
        "x2": rng.standard_normal(300).astype(np.float32),
        "a": rng.zipf(1.5, 300) % 50,
        "b": rng.zipf(1.5, 300) % 50,
    }
    pq.write_table(pa.table(columns), tmp_path / "data.parquet", row_group_size=70)
    # NumPy's generator is drawn from when a batch is made, so what is drawn follows the look-ahead: none for this part.
    for map_, depth in ((False, 8), (True, 0))[: 1 + (framework == "torch")]:
        code = CODE.format(framework=framework, model=MODEL[framework], map=map_)
        whole = run(code, tmp_path, f"whole-{map_}", 0, depth, killed=False)
        expected = dict(whole)
        assert list(expected) == [*map(str, range(1, N_STEPS + 1)), "end"]
        path, seen = f"parts-{map_}", []
        for limit in (
            10,
            13,
            9,
            0,
        ):  # killed in the first epoch, in the second, and again; commits are at 7, 14, 21, ...
            part = run(code, tmp_path, path, limit, depth and 3, killed=limit > 0)
            assert [(map_, s, loss) for s, loss in part if expected[s] != loss] == []
            seen.append(part[0][0])
        assert seen == ["1", "8", "15", "22"] and part[-1] == whole[-1]
        assert [c.step for c in verify(tmp_path / path)] == list(range(7, N_STEPS + 1, 7))


def test_random_arrays_give_the_same_draws_again():
    import random

    for spare in (False, True):  # gauss and standard_normal keep the second of two draws
        for _ in range(spare):
            random.gauss(0, 1)
            np.random.standard_normal()  # noqa: NPY002 it is the global one that is meant
        arrays = random_arrays()
        draws = []
        for _ in range(2):
            draws.append((random.gauss(0, 1), random.random(), np.random.standard_normal(3).tolist()))  # noqa: NPY002
            set_random_arrays(arrays)
        assert draws[0] == draws[1]


@pytest.mark.parametrize("framework", [has("torch")])
def test_load_names_what_is_wrong(tmp_path, framework):
    hb = pytest.importorskip(f"hbkit.{framework}")
    t = Table("a", 4, optimizer=Adam())
    trainer = hb.training.Trainer(hb.models.DLRM(features=["a"], dim=4), Collection([t]))
    with pytest.raises(errors.NotFound):
        trainer.load(tmp_path)
    save(tmp_path, [t], 0)
    with pytest.raises(errors.SchemaMismatch, match="no model"):
        trainer.load(tmp_path)
    first = trainer.save(tmp_path, base="latest")
    for state in (b"", b"x" * 100, trainer.dense_state()):
        with pytest.raises(errors.Corrupt, match="random state"):
            trainer.load_random_state(state)
    with pytest.raises(errors.NotFound):
        trainer.save(tmp_path, base="c00000009")
    assert trainer.load(tmp_path).commit == first and trainer.cursor is None
