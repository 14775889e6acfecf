"""Copies between host and device: without a GPU, a second device of the CPU plays one, in a process of its own."""

import subprocess
import sys

import numpy as np
import pytest

from hbkit import errors
from hbkit_tensorflow.transfer import target, to_device, to_host


def test_to_device_and_back_keeps_values():
    arrays = [np.arange(6, dtype=np.float32).reshape(2, 3), np.array([True, False]), np.zeros((0, 4), np.float32)]
    moved = to_device(arrays, "/device:CPU:0")
    for ours, given in zip(moved, arrays, strict=True):
        assert ours.dtype == given.dtype and np.array_equal(ours, given)
    back = to_host([moved[0], moved[2]])
    assert all(map(np.array_equal, back, [arrays[0], arrays[2]])) and to_host([]) == []


def test_target_names_devices_or_why_not():
    assert target(None) is target("CPU") is target("/CPU:0") is target("cpu:0") is None
    for unknown in "meta:x", "/job:a/b", "":
        with pytest.raises(errors.InvalidArgument, match=f"device='{unknown}'"):
            target(unknown)
    with pytest.raises(errors.DeviceUnavailable, match=r"no device 'CPU:9'.*CPU:0"):
        target("CPU:9")


CODE = """
import numpy as np, pyarrow as pa, pyarrow.parquet as pq, tensorflow as tf
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
import hbkit.tensorflow as hb
from hbkit.embedding import SGD, Collection, Normal, Table
lists = [[i % 3] * (i % 4) for i in range(100)]
pq.write_table(pa.table({"k": np.arange(100) % 30, "x": np.arange(100), "t": lists}), "k.parquet")
rows, n_copies = [], 0
identity = tf.identity

def counted(*args, **kwargs):
    global n_copies
    n_copies += 1
    return identity(*args, **kwargs)

tf.identity = counted
for device in None, "CPU:1":
    tables = [Table(name, 4, optimizer=SGD(lr=0.1), initializer=Normal(0, 1, seed=0)) for name in "kt"]
    c = Collection(tables, pooling={"t": None})
    ds = hb.data.Dataset.from_parquet("k.parquet").batch(64).supervised("x")
    for step in hb.pipeline(ds, c, 2, device=device):
        with tf.device(device or "CPU:0"):  # where a GPU is, operations go there by themselves
            inputs = {"k": step.embeddings["k"], "t": step.embeddings["t"].values}
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                loss = tf.reduce_sum(inputs["k"] ** 2) + tf.reduce_sum(inputs["t"])
            grads = tape.gradient(loss, inputs)
        tensors = [step.dense, step.label, *step.embeddings["t"], step.embeddings["k"], *grads.values()]
        assert {t.device[-5:] for t in tensors} == {device or "CPU:0"}
        step.apply(grads)
    rows.append([t.lookup(np.arange(30)) for t in tables])
assert all(map(np.array_equal, *rows)) and rows[0][0].any()
print(n_copies)
"""


def test_steps_on_a_device_are_one_copy_of_the_same(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr[-2000:]
