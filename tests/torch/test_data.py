"""Columns as tensors and back: shared memory, and the dataset that yields them."""

import sys

import numpy as np
import pytest
import torch
from torch_maps import doubled

import hbkit
import hbkit.torch as hb
from hbkit import errors
from hbkit_torch.data import Jagged, from_column, to_column


def test_column_shares_the_memory_of_a_writable_array():
    array = np.arange(6, dtype=np.float32)
    tensor = from_column(array)
    assert tensor.data_ptr() == array.ctypes.data
    assert to_column(tensor).ctypes.data == array.ctypes.data


def test_column_copies_a_read_only_array_without_a_warning(recwarn):
    array = np.arange(6)
    array.flags.writeable = False
    tensor = from_column(array)
    tensor += 1
    assert array[0] == 0 and not recwarn


def test_column_of_lists_is_jagged_over_the_same_memory():
    ragged = hbkit.Ragged(np.arange(5), (np.array([0, 2, 2, 5]),))
    jagged = from_column(ragged)
    assert isinstance(jagged, Jagged)
    assert jagged.values.data_ptr() == ragged.values.ctypes.data
    assert jagged.row_splits[0].data_ptr() == ragged.row_splits[0].ctypes.data
    assert to_column(jagged) == ragged
    assert to_column((jagged.values, jagged.row_splits[0])) == ragged
    nested = hbkit.Ragged.from_lists([[[1, 2], []], [], [[3]]], np.int64)
    assert to_column(from_column(nested)) == nested


def test_column_of_strings_stays_as_it_is():
    strings = hbkit.Strings.from_list(["a", "bc"])
    assert from_column(strings) is strings


def test_column_on_another_device_is_refused():
    with pytest.raises(errors.InvalidArgument, match=r"meta.*user"):
        to_column(torch.empty(3, device="meta"), "user")


def test_dataset_yields_the_core_batches_as_tensors(clicks):
    ds = clicks(300, 64)
    for ours, core in zip(ds, ds.batches(), strict=True):
        assert (ours.n_rows, ours.cursor, list(ours)) == (core.n_rows, core.cursor, list(core))
        for name in ("click", "amount", "age", "user"):
            assert isinstance(ours[name], torch.Tensor)
            np.testing.assert_array_equal(ours[name].numpy(), core[name])
        assert to_column(ours["tags"]) == core["tags"]


def test_dataset_yields_the_memory_of_the_core(clicks):
    ds = clicks(100, 50)
    core = list(ds.batches())
    ds.batches = lambda worker: iter(core)  # the same batches, to compare their addresses
    for ours, theirs in zip(ds, core, strict=True):
        assert ours["user"].data_ptr() == theirs["user"].ctypes.data
        assert ours["tags"].values.data_ptr() == theirs["tags"].values.ctypes.data


def test_dataset_chain_is_that_of_the_core(clicks):
    import pyarrow.compute as pc

    ds = clicks(1000, 64).filter(pc.field("age") < 40).shuffle(3, 500).prefetch(2).repeat(2).set_epoch(1)
    ds = ds.map(lambda columns: {**columns, "half": columns["age"] / 2}).select(["click", "age", "half"])
    assert isinstance(ds, hb.data.Dataset)
    assert (ds.batch_size, ds.label, ds.weight) == (64, "click", None)
    batches = list(ds)
    assert sum(b.n_rows for b in batches) == 2 * ds.n_rows == ds.stats()["n_rows"]
    assert all(bool((b["half"] * 2 == b["age"]).all()) for b in batches)
    again = ds.load_state_dict(batches[2].cursor)
    assert again is ds and ds.state_dict() == batches[2].cursor
    assert torch.equal(next(iter(ds))["age"], batches[3]["age"])


# ------------------------------------------------------------------------------------------ DataLoader


def seen(batches):
    batches = [b[0] if isinstance(b, tuple) else b for b in batches]
    return [(b["age"].tolist(), b.cursor, [s.tolist() for s in b["tags"].row_splits]) for b in batches]


@pytest.mark.parametrize(("method", "num_workers"), [(None, 0), ("fork", 2), ("spawn", 1)])
def test_data_loader_of_worker_processes_gives_each_batch_once_in_order(clicks, method, num_workers):
    ds = clicks(700, 64).shuffle(3, 200).map(doubled).repeat(2)
    want = seen(ds)
    options = {"multiprocessing_context": method} if method else {}
    loader = torch.utils.data.DataLoader(ds, batch_size=None, num_workers=num_workers, **options)
    assert seen(loader) == want
    if method != "spawn":  # which takes seconds
        shards = [hb.data.Dataset.from_parquet(ds._plan.units[0].file.path, shard=(i, 2)).batch(64) for i in (0, 1)]
        ages = [b["age"] for shard in shards for b in shard.loader(num_workers, **options)]
        assert torch.equal(torch.cat(ages).sort().values, torch.cat([b["age"] for b in clicks(700, 64)]).sort().values)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_keeps_the_place_of_the_dataset(clicks, num_workers):
    """What was taken counts, not what workers have read ahead; and what was resumed is resumed once."""
    ds = clicks(700, 64)
    want = seen(ds)
    for at, _ in enumerate(ds.loader(num_workers)):
        if at == 2:
            break
    state = ds.state_dict()
    assert state == want[2][1]
    resumed = clicks(700, 64).load_state_dict(state)
    loader = resumed.loader(num_workers)
    assert seen(loader) == want[3:] and resumed.state_dict() == want[-1][1]
    assert seen(loader) == want


@pytest.mark.parametrize(("num_workers", "options"), [(0, {}), (2, {}), (2, {"persistent_workers": True})])
def test_loader_reshuffles_each_iteration(clicks, num_workers, options):
    ds = clicks(300, 64).shuffle_batch(50, buffer_size=150, seed=3)
    want = [seen(clicks(300, 50).shuffle(3, 150).set_epoch(e)) for e in (0, 1)]
    loader = ds.loader(num_workers, **options)
    assert [seen(loader) for _ in (0, 1)] == want and want[0] != want[1]


def test_loader_drops_into_a_training_loop(clicks):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for x, y, weight in clicks(500, 64, weight="importance").loader(num_workers=1):
        assert list(x) == ["amount", "age", "user", "item", "tags"] and x.n_rows == len(y) == len(weight)
        pred = model(torch.stack([x["amount"], x["age"] / 70], 1))[:, 0]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(pred, y, weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert len(losses) == 8 and np.isfinite(losses).all()


def test_loader_weighs_padded_rows_nothing_and_stacks_labels(clicks):
    x, y, weight = list(clicks(100, 64).batch(64, "pad").supervised(["click", "age"]).loader())[1]
    assert "age" not in x and y.shape == (64, 2) and y.dtype == torch.float32
    assert weight.tolist() == [1.0] * 36 + [0.0] * 28
    weight = list(clicks(100, 64, weight="importance").batch(64, "pad").loader())[1][2]
    assert weight[:36].all() and not weight[36:].any()
    with pytest.raises(errors.UnknownColumn, match="column click"):
        next(iter(clicks(100, 64).map(lambda c: {"age": c["age"]}).loader()))


def test_loader_that_is_left_early_ends_its_workers(clicks):
    import multiprocessing

    for _ in clicks(1000, 16).loader(num_workers=2):
        assert len(multiprocessing.active_children()) == 2
        break
    assert multiprocessing.active_children() == []


def test_error_in_a_worker_names_the_column(clicks):
    ds = clicks(100, 64).map(lambda c: {**c, "age": c["age"][:3]})
    with pytest.raises(errors.InvalidArgument, match=r"age.*keep the number of rows"):
        next(iter(ds.loader(num_workers=1)))


def test_loader_copies_a_batch_to_its_device_at_once(clicks, copies):
    with copies() as made:
        x, y = next(iter(clicks(100, 64).loader(device="meta")))
    assert x["age"].device.type == x["tags"].values.device.type == y.device.type == "meta"
    assert made == ["meta"]
    x, y = next(iter(clicks(100, 64).to_sparse().loader(device="meta")))
    assert x["tags"].device.type == "meta"


def test_loader_pins_where_there_is_a_gpu(clicks, monkeypatch):
    """There is none here: what `DataLoader` does with ``pin_memory`` is seen by a stand-in."""
    from torch.utils.data._utils.pin_memory import pin_memory

    assert not clicks(100, 64).loader().pin_memory
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t, *a: pinned.append(t) or t)
    batch = next(iter(clicks(100, 64)))
    made = pin_memory(batch)
    assert isinstance(made, hbkit.data.Batch) and made.cursor == batch.cursor
    assert isinstance(made["tags"], Jagged) and len(pinned) == 7
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert clicks(100, 64).loader().pin_memory and not clicks(100, 64).loader(device="meta").pin_memory


# ----------------------------------------------------------------------------- other forms of columns


def test_to_dense_pads_lists(clicks):
    ds = clicks(100, 64).to_dense(["tags"], pad=-1)
    for ours, core in zip(ds, ds.batches(), strict=True):
        np.testing.assert_array_equal(ours["tags"], core["tags"].to_padded(pad=-1))
    assert all(t.ndim == 2 for t in [next(iter(clicks(100, 64).to_dense()))["tags"]])
    with pytest.raises(errors.UnknownColumn, match="column nope"):
        next(iter(clicks(100, 64).to_dense(["nope"])))


def test_to_sparse_gives_sparse_tensors_and_takes_them_back(clicks):
    ds = clicks(100, 64).to_sparse()
    for ours, core in zip(ds, ds.batches(), strict=True):
        sparse = ours["tags"]
        assert sparse.layout == torch.sparse_coo and isinstance(ours["age"], torch.Tensor)
        np.testing.assert_array_equal(sparse.to_dense(), core["tags"].to_padded())
        assert to_column(sparse, "tags") == core["tags"]
    strings = hbkit.Ragged(hbkit.Strings.from_list(["a"]), (np.array([0, 1]),))
    with pytest.raises(errors.Unsupported, match="column tags"):
        next(iter(clicks(64, 64).map(lambda c: {"click": c["click"][:1], "tags": strings}).batch(1).to_sparse()))
    with pytest.raises(errors.Unsupported, match="feature user"):
        to_column(torch.zeros(2, 2, 2).to_sparse(), "user")


class StandIn:
    """`torchrec.KeyedJaggedTensor`, as far as a dataset uses it."""

    def __init__(self, keys, values, lengths):
        self._keys, self._values, self._lengths = keys, values, lengths

    def keys(self):
        return self._keys

    def values(self):
        return self._values

    def lengths(self):
        return self._lengths

    def offsets(self):
        return torch.cat([torch.zeros(1, dtype=torch.int64), self._lengths.cumsum(0)])


StandIn.__name__ = "KeyedJaggedTensor"


@pytest.fixture
def torchrec(monkeypatch):
    """TorchRec, or where it is not installed what stands in for it."""
    try:
        import torchrec
    except ImportError:
        import types
        from importlib.machinery import ModuleSpec

        torchrec = types.ModuleType("torchrec")
        torchrec.__spec__, torchrec.KeyedJaggedTensor = ModuleSpec("torchrec", None), StandIn
        monkeypatch.setitem(sys.modules, "torchrec", torchrec)
    return torchrec


def test_to_keyed_jagged_gives_torchrecs_tensor(clicks, torchrec):
    ds = clicks(100, 64).to_keyed_jagged(["user", "tags"], into="sparse")
    for ours, core in zip(ds, ds.batches(), strict=True):
        found = ours["sparse"]
        assert isinstance(found, torchrec.KeyedJaggedTensor) and list(ours) == [
            "click",
            "amount",
            "age",
            "item",
            "sparse",
        ]
        assert found.keys() == ["user", "tags"]
        lengths = np.concatenate([np.ones(core.n_rows), core["tags"].lengths()])
        np.testing.assert_array_equal(found.lengths(), lengths)
        np.testing.assert_array_equal(found.values(), np.concatenate([core["user"], core["tags"].values]))
        assert found.offsets()[-1] == len(found.values())
    x, _ = next(iter(ds.loader(num_workers=1, device="meta")))
    assert x["sparse"].values().device.type == x["age"].device.type == "meta"


def test_to_keyed_jagged_shares_the_values_of_one_column(clicks, torchrec):
    ds = clicks(100, 100)
    core = list(ds.batches())
    ds = ds.to_keyed_jagged(["tags"])
    ds.batches = lambda worker: iter(core)
    found = next(iter(ds))["features"]
    assert found.values().data_ptr() == core[0]["tags"].values.ctypes.data


def test_to_keyed_jagged_refuses_by_name(clicks, torchrec, monkeypatch):
    ds = clicks(100, 64).map(lambda c: {**c, "deep": hbkit.Ragged.from_lists([[[1]]] * len(c["age"]), np.int64)})
    with pytest.raises(errors.InvalidArgument, match="column deep"):
        next(iter(ds.to_keyed_jagged(["user", "deep"])))
    with pytest.raises(errors.UnknownColumn, match="column nope"):
        next(iter(ds.to_keyed_jagged(["nope"])))
    with pytest.raises(errors.InvalidArgument, match="at least one"):
        ds.to_keyed_jagged([])
    monkeypatch.setattr("hbkit_torch.data.find_spec", lambda name: None)
    with pytest.raises(errors.Unsupported, match="pip install torchrec"):
        ds.to_keyed_jagged(["user"])


def test_calls_of_hybridbackend(clicks, tmp_path):
    """As its users write them: one call after another, rows shuffled, lists as sparse tensors or padded."""
    clicks(300, 64)
    (path,) = map(str, tmp_path.glob("*.parquet"))
    ds = hb.data.Dataset.from_parquet([path], fields=["click", "age", "tags"], num_parallel_reads=2)
    assert [len(b["age"]) for b in ds.batch(128, drop_remainder=True)] == [128, 128]
    shuffled = ds.shuffle_batch(128, drop_remainder=False, buffer_size=256, seed=1, reshuffle_each_iteration=False)
    first, second = ([b["age"] for b in shuffled] for _ in range(2))
    assert [len(b) for b in first] == [128, 128, 44] and all(map(torch.equal, first, second))
    assert next(iter(shuffled.to_sparse())).keys() == {"click", "age", "tags"}
    assert next(iter(shuffled.to_dense()))["tags"].shape == (128, 3)
