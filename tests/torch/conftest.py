"""A small click log, collections over it, and what a test of a training loop needs."""

import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hbkit
import hbkit.torch as hb
from hbkit import embedding
from hbkit.store import device_cached, host_memory

FEATURES = {"user": "user", "item": "item", "tags": "tag"}


def click_columns(n_rows, seed=0, n_keys=200):
    """Users and items with planted weights, one to three tags, two dense columns."""
    rng = np.random.default_rng(seed)
    weights = np.random.default_rng(99).normal(0, 1.5, (2, n_keys))
    user, item = rng.zipf(1.3, (2, n_rows)) % n_keys
    amount = rng.lognormal(2, 1, n_rows)
    logit = weights[0, user] + weights[1, item] + 0.5 * (np.log1p(amount) - 2)
    return {
        "click": (rng.random(n_rows) < 1 / (1 + np.exp(-logit))).astype(np.float32),
        "importance": rng.integers(1, 4, n_rows).astype(np.float32),
        "amount": amount.astype(np.float32),
        "age": rng.integers(18, 70, n_rows),
        "user": user,
        "item": item + 10**12,
        "tags": [rng.integers(0, 30, n).tolist() for n in rng.integers(0, 4, n_rows)],
    }


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Batches this small only wait for torch's threads, the more so when tests run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def clicks(tmp_path):
    """``clicks(n_rows, batch)``: a supervised dataset over a new file."""

    def make(n_rows=1000, batch=64, seed=0, weight=None, columns=None):
        path = tmp_path / f"clicks-{n_rows}-{seed}.parquet"
        pq.write_table(pa.table(click_columns(n_rows, seed)), path, row_group_size=300)
        names = columns or ["click", "amount", "age", *FEATURES] + ([weight] if weight else [])
        return hb.data.Dataset.from_parquet(str(path), fields=names).supervised("click", weight).batch(batch)

    return make


@pytest.fixture
def place():
    """Where `collection` has its rows; a test that is parametrized by it runs over "host" and "device", say.

    Host memory plays the device: PyTorch's tensors in it are those "on the device".
    """
    return "host"


@pytest.fixture
def collection(place):
    """``collection(dim)``: tables for the features of `clicks`; the tags are pooled by mean."""
    there = {"host": None, "device": device_cached(host_memory(), "1MiB", device="cpu")}[place]

    def make(dim=8, optimizer=None, pooling=None, features=FEATURES, seed=0, store=None):
        tables = [
            embedding.Table(
                name,
                dim,
                optimizer=optimizer or embedding.Adagrad(lr=0.05),
                initializer=embedding.Normal(0, 0.1, seed=seed),
                store=store or there,
            )
            for name in sorted(set(features.values()))
        ]
        return embedding.Collection(tables, features, pooling or {"tags": "mean"})

    return make


@pytest.fixture
def rows_of():
    """``rows_of(collection)``: every row of every table, by table and key."""

    def rows(collection):
        keys = np.concatenate([np.arange(200), np.arange(200) + 10**12])
        return {name: table.lookup(keys) for name, table in collection.tables.items()}

    return rows


@pytest.fixture
def dlrm():
    """``dlrm(dim)``: a seeded model for the features of `clicks`; DIN takes the tags unpooled."""

    def make(dim=8, kind=hb.models.DLRM, seed=1):
        torch.manual_seed(seed)
        if kind is hb.models.DIN:
            return kind(["user", "item"], dim, n_dense=2, sequences={"tags": "item"})
        return kind(list(FEATURES), dim, n_dense=2)

    return make


@pytest.fixture
def no_threads_left():
    """Checks after the test that no thread of a pipeline is alive."""
    yield
    assert [t for t in threading.enumerate() if t.name.startswith("hbkit")] == []


@pytest.fixture
def core_columns():
    """One batch's columns in the core's form."""
    c = click_columns(40)
    return {**c, "tags": hbkit.Ragged.from_lists(c["tags"], np.int64)}


@pytest.fixture
def copies():
    """``with copies() as made``: the devices of the copies that went from one device to another, one by one."""

    class Copies(TorchDispatchMode):
        def __enter__(self):
            super().__enter__()
            self.made = []
            return self.made

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
                source = args[1] if func.overloadpacket is torch.ops.aten.copy_ else args[0]
                if source.device != out.device:
                    self.made.append(out.device.type)
            return out

    return Copies
