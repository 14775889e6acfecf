"""Tables whose rows are float16 or bfloat16."""

import numpy as np
import pytest

from hbkit import errors, snapshot
from hbkit.embedding import SGD, Column, Constant, RowWiseAdagrad, Table

DIM = 16
KEYS = np.arange(500, dtype=np.int64) * 7919
NARROW = ["float16", "bfloat16"]


def trained(dtype, **kwargs):
    table = Table("t", DIM, dtype, optimizer=RowWiseAdagrad(lr=0.05), **kwargs)
    rng = np.random.default_rng(1)
    for _ in range(20):
        keys = rng.choice(KEYS, 300)
        grads = rng.standard_normal((300, DIM)).astype(np.float32)
        table.lookup(keys, train=True)
        table.update(keys, grads)
    return table


def is_held(rows, dtype):
    """Whether float32 rows are values of a narrow type."""
    if dtype == "float16":
        return (rows.astype(np.float16).astype(np.float32) == rows).all()
    return (rows.view(np.uint32) & 0xFFFF == 0).all()


@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_rows_learn_as_wide_ones_do(dtype):
    wide, narrow = trained("float32"), trained(dtype)
    rows = narrow.lookup(KEYS)
    assert is_held(rows, dtype)
    step = 2.0**-8 if dtype == "bfloat16" else 2.0**-11
    error = np.abs(rows - wide.lookup(KEYS))
    assert error.max() < 20 * step  # twenty roundings of values below 1
    assert error.mean() < 2 * step
    assert (trained(dtype).lookup(KEYS) == rows).all()


@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_rows_take_half_the_memory(dtype):
    keys = np.arange(400_000, dtype=np.int64)
    held = []
    for d in ("float32", dtype):
        table = Table("t", 32, d, optimizer=SGD(lr=0.1))
        table.lookup(keys, train=True)
        held.append(table.stats()["lines_nbytes"])
    assert held[1] < 0.6 * held[0]


@pytest.mark.parametrize("dtype", NARROW)
def test_rounding_is_right_on_average(dtype):
    """Steps far below what one row can hold add up over many: rounding to the nearest would lose every one."""
    table = Table("t", 64, dtype, initializer=Constant(1.0), optimizer=SGD(lr=1.0))
    keys = np.arange(1000, dtype=np.int64)
    table.lookup(keys, train=True)
    for _ in range(10):
        table.update(keys, np.full((1000, 64), 1e-4, np.float32))
    assert table.lookup(keys).mean() == pytest.approx(1 - 1e-3, abs=1e-4)
    assert (table.lookup(keys) == 1).any()


@pytest.mark.parametrize("dtype", NARROW)
def test_snapshots_keep_narrow_rows(tmp_path, dtype):
    table = trained(dtype)
    snapshot.save(str(tmp_path / "s"), [table], step=20)
    again = Table("t", DIM, dtype, optimizer=RowWiseAdagrad(lr=0.05))
    snapshot.load(str(tmp_path / "s"), [again])
    assert (again.lookup(KEYS) == table.lookup(KEYS)).all()
    grads = np.ones((len(KEYS), DIM), np.float32)
    for t in (table, again):
        t.update(KEYS, grads)
    assert (again.lookup(KEYS) == table.lookup(KEYS)).all()


def test_named_columns_of_narrow_rows():
    columns = {"embedding": Column(8), "linear": Column(1, initializer=Constant(0), optimizer=SGD(lr=0.5))}
    table = Table("t", dtype="bfloat16", columns=columns)
    table.lookup(KEYS, train=True)
    table.update(KEYS, np.ones((len(KEYS), 9), np.float32))
    assert (table.split(table.lookup(KEYS))["linear"] == -0.5).all()


def test_other_dtypes_are_refused():
    with pytest.raises(errors.Unsupported, match="float64"):
        Table("t", DIM, "float64")
