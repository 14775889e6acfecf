"""Tables on a device as PyTorch sees them: rows and gradients are tensors there, and never NumPy's on their way.

Host memory plays the device, so that its tensors are PyTorch's of the CPU; stand-ins see what a GPU would get.
"""

import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import hbkit
import hbkit.torch as hb
from hbkit import embedding, errors
from hbkit.store import device_cached, host_memory
from hbkit_torch import transfer
from hbkit_torch.data import Jagged, to_column

CPU = torch.device("cpu")


@pytest.fixture
def seen(monkeypatch):
    """What tables were given, by the call: the addresses of rows and gradients, and the types of keys."""
    found = {"out": [], "grads": [], "keys": []}
    batch_class = embedding.table.Request

    class Request(batch_class):
        def __init__(self, table, parts, *args, **options):
            found["keys"] += [type(part) for part in parts]
            super().__init__(table, parts, *args, **options)

        def take(self, part, out):
            found["out"].append(out)
            super().take(part, out)

        def pool(self, part, splits, out, *args):
            found["out"].append(out)
            super().pool(part, splits, out, *args)

        def update(self, values, *args, **options):
            found["grads"].append(values)
            super().update(values, *args, **options)

    monkeypatch.setattr(embedding.collection, "Request", Request)
    return found


def address(array):
    return array.data_ptr() if isinstance(array, torch.Tensor) else array.ctypes.data


def tables(store, **options):
    return [
        embedding.Table(name, 4, store=store, optimizer=embedding.Adam(lr=0.1), **options)
        for name in ("user", "item", "tag")
    ]


FEATURES = {"user": "user", "item": "item", "other": "item", "tags": "tag"}


def collection_on(store, pooling="mean", stack=None, **options):
    return embedding.Collection(tables(store, **options), FEATURES, {"tags": pooling}, stack)


def device(budget="1MiB"):
    return device_cached(host_memory(), budget, device="cpu")


def batch(seed, n=12):
    rng = np.random.default_rng(seed)
    splits = np.concatenate([[0], np.cumsum(rng.integers(0, 4, n))])
    keys = {f: torch.from_numpy(rng.integers(0, 30, n)) for f in ("user", "item", "other")}
    return {**keys, "tags": Jagged(torch.from_numpy(rng.integers(0, 9, splits[-1])), (torch.from_numpy(splits),))}


def loss_of(rows):
    """A loss whose gradients differ by row and column; the sequence and the stack are rows like any."""
    values = [v if isinstance(v, torch.Tensor) else v.values for v in rows.values()]
    return sum((v * torch.arange(1.0, 1 + v.shape[-1])).sin().sum() * (i + 1) for i, v in enumerate(values))


def rows_of(c):
    return [table.lookup(np.arange(40)).tobytes() for table in c.tables.values()]


def train(c, update, keys=lambda column: column):
    module = hb.nn.EmbeddingCollection(c, update)
    for seed in range(4):
        loss_of(module({f: keys(column) for f, column in batch(seed).items()})).backward()
        if update == "apply" and seed != 1:  # its gradients wait for the next
            module.apply()
    module.close()
    return rows_of(c)


@pytest.mark.parametrize("stack", [None, {"both": ["user", "item"]}, {"both": ["other", "item"]}])
@pytest.mark.parametrize("pooling", ["mean", None])
def test_device_tables_train_as_host_tables(pooling, stack):
    want = train(collection_on(None, pooling, stack), "apply")
    assert train(collection_on(device(), pooling, stack), "apply") == want
    assert train(collection_on(device(3000), pooling, stack), "apply") == want
    options = {"admission": embedding.CountAdmission(2), "default": 0.25, "padding_key": 5}
    want = train(collection_on(None, pooling, stack, **options), "apply")
    assert train(collection_on(device(), pooling, stack, **options), "apply") == want


def test_device_tables_train_in_backward_as_host_tables():
    assert train(collection_on(device()), "backward") == train(collection_on(None), "backward")


def test_rows_and_gradients_are_the_tensors(seen):
    module = hb.nn.EmbeddingCollection(collection_on(device(), pooling=None))
    rows = module(batch(0))
    assert [type(out) for out in seen["out"]] == [torch.Tensor] * 4
    leaves = [t if isinstance(t, torch.Tensor) else t.values for t in rows.values()]
    assert [t.data_ptr() for t in leaves] == [address(out) for out in seen["out"]]
    assert rows["tags"].mask.dtype == torch.bool and rows["tags"].mask.sum() == len(batch(0)["tags"].values)
    loss_of(rows).backward()
    module.apply()
    grads = {address(g) for g in seen["grads"]}
    assert {rows["user"].grad.data_ptr(), rows["tags"].values.grad.data_ptr()} <= grads
    assert len(grads) == 3  # those of two features of one table are joined on the device


def test_keys_may_be_on_the_device(seen):
    keys = batch(0)
    want = {f: rows.detach() for f, rows in hb.nn.EmbeddingCollection(collection_on(None))(keys).items()}
    module = hb.nn.EmbeddingCollection(collection_on(device()))
    seen["keys"].clear()
    found = module(keys)
    assert seen["keys"] == [torch.Tensor] * 4
    assert all(torch.equal(found[f], want[f]) for f in want)
    loss_of(found).backward()
    module.apply()
    for cast in (torch.int32, torch.uint8, torch.uint64):
        again = module({**keys, "user": keys["user"].to(cast), "item": keys["item"].numpy()})
        assert len(module.collection.tables["user"]) == len(set(keys["user"].tolist()))
        assert again["user"].shape == (12, 4)
        module.drop()
    with pytest.raises(errors.InvalidArgument, match="feature user"):
        module({**keys, "user": keys["user"].float()})
    assert train(collection_on(device()), "apply", as_numpy) == train(collection_on(device()), "apply")


def as_numpy(column):
    if isinstance(column, torch.Tensor):
        return column.numpy()
    return hbkit.Ragged(column.values.numpy(), column.row_splits[0].numpy())


def test_columns_elsewhere_than_their_table_are_refused():
    meta = torch.zeros(3, dtype=torch.int64, device="meta")
    for there in (None, CPU, torch.device("cuda", 0)):
        with pytest.raises(errors.InvalidArgument, match=r"keys on device meta.*feature f.*cpu\(\)"):
            to_column(meta, "f", there)
    assert to_column(meta, "f", torch.device("meta")).device == meta.device
    lists = to_column(Jagged(meta, torch.tensor([0, 2, 3])), "f", torch.device("meta"))
    assert lists.values.device == meta.device and lists.row_splits[0].tolist() == [0, 2, 3]
    with pytest.raises(errors.InvalidArgument, match="row_splits"):
        to_column((meta, torch.tensor([0, 2])), "f", torch.device("meta"))


def test_tables_here_and_there_train_together():
    def run(where):
        stores = [device() if there else None for there in where]
        mixed = [
            embedding.Table(name, 4, store=store, optimizer=embedding.Adagrad())
            for name, store in zip(("user", "item", "tag"), stores, strict=True)
        ]
        return train(embedding.Collection(mixed, FEATURES, stack={"both": ["user", "other"]}), "apply")

    want = run([False] * 3)
    assert run([True, False, True]) == run([False, True, False]) == run([True, True, False]) == want


def test_pipeline_copies_no_rows_of_tables_that_are_where_it_is(clicks, collection, seen):
    there = collection(store=device())
    for step in hb.pipeline(clicks(100, 64), there):
        assert {address(out) for out in seen["out"]} == {t.data_ptr() for t in step.embeddings.values()}
        assert all(isinstance(out, torch.Tensor) for out in seen["out"])
        loss_of(step.embeddings).backward()
        step.apply()
        assert {t.grad.data_ptr() for t in step.embeddings.values()} == {address(g) for g in seen["grads"]}
        seen["out"].clear(), seen["grads"].clear()


def test_pipeline_elsewhere_than_its_tables_goes_by_way_of_the_host(clicks, collection, monkeypatch):
    monkeypatch.setattr(transfer, "place_of", lambda device: torch.device("meta"))  # where no tensor must be made
    c = collection(store=device())
    for step in hb.pipeline(clicks(100, 64), c):
        assert all(t.device == CPU for t in step.embeddings.values())


# ------------------------------------------------------------------------------------------- streams, by stand-ins


class Stream:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append((self.name, "waits for", other.name))


@pytest.fixture
def streams(monkeypatch):
    """``(current, log)``: a list whose last stream is current, above the default one; and what happens on streams."""
    log = []
    current = [Stream("default", log), Stream("mine", log)]

    @contextmanager
    def stream(other):
        current.append(other)
        log.append((other.name, "is current"))
        yield
        current.pop()

    default = current[0]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda place: current[-1])
    monkeypatch.setattr(torch.cuda, "default_stream", lambda place: default)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    return current, log


def on_gpu(name="cuda:1"):
    made = tables(device())
    for table in made:
        table.device = name
    return embedding.Collection(made, FEATURES)


@pytest.mark.parametrize("fails", [False, True])
def test_another_stream_and_the_tables_wait_for_each_other(streams, fails):
    current, log = streams
    try:
        with transfer.in_order(on_gpu()) as others:
            assert others == {torch.device("cuda", 1): current[1]}
            log.append("work")
            assert not fails or 1 / 0
    except ZeroDivisionError:
        assert fails
    work = [("default", "is current"), "work"]
    assert log == [("default", "waits for", "mine"), *work, ("mine", "waits for", "default")]
    assert [stream.name for stream in current][:2] == ["default", "mine"]


def test_tables_in_order_already_wait_for_nothing(streams):
    current, log = streams
    with transfer.in_order(collection_on(device())) as others:  # host memory has no streams
        assert not others
    current.pop()
    with transfer.in_order(on_gpu()) as others:
        assert not others
    assert not log


def test_every_use_of_tables_is_in_order(monkeypatch, clicks, collection):
    depth, calls = [0], []

    class Ordered:
        def __init__(self, c):
            assert isinstance(c, embedding.Collection)

        def __enter__(self):
            depth[0] += 1
            return {}

        def __exit__(self, *raised):
            depth[0] -= 1

    for module in ("embeddings", "pipeline", "update", "backward"):
        monkeypatch.setattr(sys.modules[f"hbkit_torch.{module}"], "in_order", Ordered)  # `pipeline` is a function, too
    for name in ("outputs", "apply"):
        method = getattr(embedding.Staged, name)

        def spy(self, *args, name=name, method=method):
            calls.append(name)
            assert depth[0] == 1
            return method(self, *args)

        monkeypatch.setattr(embedding.Staged, name, spy)
    train(collection_on(device()), "apply")
    train(collection_on(device()), "backward")
    for step in hb.pipeline(clicks(64, 64), collection(store=device())):
        loss_of(step.embeddings).backward()
        step.apply()
    assert calls.count("outputs") == 9 and calls.count("apply") == 3 + 4 + 1


def test_rows_are_allocated_where_tables_are(monkeypatch):
    made = []

    class Rows:
        def __init__(self, shape, dtype, device):
            made.append((shape, device))
            assert dtype == torch.float32  # whatever the default is

        def record_stream(self, stream):
            made.append(stream)

    monkeypatch.setattr(torch, "empty", Rows)
    one = torch.device("cuda", 1)
    transfer.empty_on({})((2, 3), "cuda:1")
    transfer.empty_on({one: "mine"}, one)((4,), "cuda:1")
    assert made == [((2, 3), one), ((4,), one), "mine"]
    assert transfer.empty_on({}, CPU)((2, 3), "cuda:1") is None and len(made) == 3
    assert transfer.place_of(None) is None and transfer.place_of("cuda") == torch.device("cuda", 0)
