"""A small click log, collections over it, and what a test of a training loop needs."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before TensorFlow loads: its start-up messages

import threading

import keras
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import hbkit.tensorflow as hb
from hbkit import embedding

FEATURES = {"user": "user", "item": "item", "tags": "tag"}
KEYS = np.arange(200)


def click_columns(n_rows, seed=0):
    """Users and items with planted weights, up to three tags, two dense columns."""
    rng = np.random.default_rng(seed)
    weights = np.random.default_rng(99).normal(0, 1.5, (2, len(KEYS)))
    user, item = rng.zipf(1.3, (2, n_rows)) % len(KEYS)
    amount = rng.lognormal(2, 1, n_rows)
    logit = weights[0, user] + weights[1, item] + 0.5 * (np.log1p(amount) - 2)
    return {
        "click": (rng.random(n_rows) < 1 / (1 + np.exp(-logit))).astype(np.float32),
        "importance": rng.integers(1, 4, n_rows).astype(np.float32),
        "amount": amount.astype(np.float32),
        "age": rng.integers(18, 70, n_rows),
        "user": user,
        "item": item,
        "tags": [rng.integers(0, 30, n).tolist() for n in rng.integers(0, 4, n_rows)],
    }


@pytest.fixture
def click_file(tmp_path):
    """``click_file(n_rows, seed)``: a path."""

    def make(n_rows=1000, seed=0):
        path = tmp_path / f"clicks-{n_rows}-{seed}.parquet"
        pq.write_table(pa.table(click_columns(n_rows, seed)), path, row_group_size=300)
        return str(path)

    return make


@pytest.fixture
def clicks(click_file):
    """``clicks(n_rows, batch)``: a supervised dataset over a new file."""

    def make(n_rows=1000, batch=64, seed=0, weight=None):
        names = ["click", "amount", "age", *FEATURES] + ([weight] if weight else [])
        path = click_file(n_rows, seed)
        return hb.data.Dataset.from_parquet(path, fields=names).supervised("click", weight).batch(batch)

    return make


@pytest.fixture
def collection():
    """``collection(dim)``: tables for the features of `clicks`; the tags are pooled by mean."""

    def make(dim=8, optimizer=None, pooling=None, features=FEATURES, store=None):
        optimizer = optimizer or embedding.Adagrad(lr=0.05)
        normal = embedding.Normal(0, 0.1, seed=0)
        names = sorted(set(features.values()))
        tables = [embedding.Table(name, dim, optimizer=optimizer, initializer=normal, store=store) for name in names]
        return embedding.Collection(tables, features, pooling or {"tags": "mean"})

    return make


@pytest.fixture
def rows_of():
    """``rows_of(collection)``: every row of every table, as one array."""

    def rows(collection):
        return np.concatenate([table.lookup(KEYS) for table in collection.tables.values()])

    return rows


@pytest.fixture
def dlrm():
    """``dlrm()``: a small model over the features of `clicks`, the same each time."""

    def make(dim=8):
        keras.utils.set_random_seed(1)
        return hb.models.DLRM(list(FEATURES), dim, n_dense=2, bottom=(16,), top=(16,))

    return make


@pytest.fixture
def no_threads_left():
    """Fails the test if a thread of hbkit outlives it."""
    before = set(threading.enumerate())
    yield
    assert [t.name for t in set(threading.enumerate()) - before if t.name.startswith("hbkit")] == []
