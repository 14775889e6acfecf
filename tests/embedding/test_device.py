"""Batches of tables on a device stay there from ids to update, and do what those of host memory do, bit for bit.

Here host memory plays the device, and arrays of a library that is not NumPy (`Far`) are those "on the device". The same
tests run once more on devices of a driver in software, and, smaller, in Numba's simulator, with arrays of theirs.
"""

import ctypes
import os
import sys

import numpy as np
import pytest
import soft

from hbkit import errors
from hbkit.embedding import (
    Adagrad,
    Adam,
    Collection,
    Column,
    CountAdmission,
    RowWiseAdagrad,
    SequenceOutput,
    Sharded,
    Table,
)
from hbkit.ragged import Dictionary, Ragged
from hbkit.shuffle import Loopback
from hbkit.store import device_cached, host_memory

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
SOFT = soft.driver is not None  # CUDA's driver is one in software
HOST = not (SIMULATED or SOFT)  # host memory plays the device
if SIMULATED:  # threads wait for each other at each vote, and would do so for 5 ms
    sys.setswitchinterval(1e-4)
DIM, N_ROWS, N_KEYS = 4, *((5, 9) if SIMULATED else (50, 80))


def test_device_tables_in_the_simulator(in_simulator):
    in_simulator(__file__)


def test_device_tables_on_soft_devices(on_soft_devices):
    on_soft_devices(__file__, select="")


class Far:
    """An array that is not NumPy's, as another library has it in host memory."""

    def __init__(self, array):
        self.array = array

    shape = property(lambda self: self.array.shape)

    def __len__(self):
        return len(self.array)

    def __getitem__(self, some):
        return Far(self.array[some])

    def __setitem__(self, some, values):
        self.array[some] = np.asarray(values)

    def __array__(self, dtype=None, copy=None):
        return self.array

    def __dlpack__(self):
        raise AssertionError("DLPack says what an array is; it is not used")

    __dlpack_device__ = None

    def reshape(self, *shape):
        return Far(self.array.reshape(*shape))


class There(Far):
    """An array in the memory of a device of the software driver, which is host memory, as a framework has it."""

    def __init__(self, array, memory=None):
        from numba import cuda

        self.array, self.memory, self.wait = array, memory, cuda.synchronize
        if memory is None:
            self.memory = cuda.to_device(np.array(array))
            at = (ctypes.c_uint8 * array.nbytes).from_address(self.memory.__cuda_array_interface__["data"][0] or 0)
            self.array = np.frombuffer(at, array.dtype).reshape(array.shape) if array.size else np.array(array)

    @property
    def __cuda_array_interface__(self):
        return {**self.array.__array_interface__, "version": 3}

    def __dlpack_device__(self):
        return 2, 0

    def __getitem__(self, some):
        return There(self.array[some], self.memory)

    def __setitem__(self, some, values):
        self.wait()
        self.array[some] = np.asarray(values)

    def __array__(self, dtype=None, copy=None):
        self.wait()
        return self.array.copy()  # which outlives the device's memory

    def reshape(self, *shape):
        return There(self.array.reshape(*shape), self.memory)


def place(budget="1MiB"):
    return device_cached(host_memory(), budget, device="cpu" if HOST else "cuda:0")


def far(table, array):
    """A NumPy array on a table's device, as another library has it."""
    if SIMULATED:
        return table.memory.send(np.ascontiguousarray(array))
    return Far(np.array(array)) if HOST else There(np.array(array))


def near(array):
    return array.copy_to_host() if hasattr(array, "copy_to_host") else np.asarray(array)


def empty_on(collection, asked):
    """What `Staged.outputs` takes; it notes what it was asked for."""
    table = next(table for table in collection.tables.values() if table.device)

    def empty(shape, device):
        assert device == table.device
        asked.append(shape)
        return far(table, np.full(shape, np.nan, np.float32))

    return empty


FEATURES = {"x": "a", "y": "a", "z": "b", "w": "b", "list": "a", "sequence": "b", "wide": "a", "weighted": "b"}
UNPOOLED = ("sequence", "wide", "weighted")


def collection(store, features=FEATURES, **options):
    a = Table("a", DIM, optimizer=Adam(lr=0.1), store=store, **options)
    b = Table("b", DIM, optimizer=RowWiseAdagrad(lr=0.1), store=store, **options)
    pooling = {"list": "mean", **dict.fromkeys(UNPOOLED)}
    return Collection([a, b], features, pooling, {"stack": ["x", "z"]})


def batch(step):
    """Keys of all features, and weights of some."""
    rng = np.random.default_rng(step)
    keys = {f: rng.integers(0, N_KEYS, N_ROWS) for f in "xyzw"}
    for f in ("list", "sequence"):
        splits = np.concatenate([[0], np.cumsum(rng.integers(0, 4, N_ROWS))])
        keys[f] = Ragged(rng.integers(0, N_KEYS, splits[-1]), splits)
    keys |= {f: rng.integers(0, N_KEYS, (N_ROWS, 3)) for f in ("wide", "weighted")}
    weights = {
        "weighted": rng.random(3 * N_ROWS).astype(np.float32),
        "y": rng.random(N_ROWS).astype(np.float32),
        "list": rng.random(len(keys["list"].values)).astype(np.float32),
        "sequence": rng.random(len(keys["sequence"].values)).astype(np.float32),
    }
    return keys, weights


def sent(table, column):
    return (
        Ragged.on_device(far(table, column.values), column.row_splits[0])
        if isinstance(column, Ragged)
        else far(table, column)
    )


def train(c, there, keys_there=False):
    """Outputs of all steps: two batches accumulate, one has no gradient of a feature; there are rows of padding."""
    found, held, asked, table = [], [], [], c.tables["a"]
    for step in (0, 2) if SIMULATED else range(4):  # the simulator is slow
        keys, weights = batch(step)
        columns = {f: sent(table, k) for f, k in keys.items()} if keys_there else keys
        staged = c.stage(columns, size=N_ROWS + 2, weights=weights)
        staged.fetch()
        staged.wait()
        outputs = staged.outputs(empty_on(c, asked) if there else None)
        rows = {f: o.values if isinstance(o, SequenceOutput) else o for f, o in outputs.items()}
        found += [near(rows[f]) for f in rows] + [outputs[f].mask for f in UNPOOLED]
        assert all(isinstance(o, np.ndarray) != there for o in rows.values())
        rng = np.random.default_rng(100 + step)
        grads = {f: rng.standard_normal(tuple(o.shape)).astype(np.float32) for f, o in rows.items()}
        if step == 2:
            del grads["y"]
        if there:
            grads = {f: far(table, g) for f, g in grads.items()}
        if step == 1:
            staged.hold()
            held = [(staged, grads)]
            continue
        staged.apply(grads, held)
        held = []
    return found


def contents(c):
    """Columns of each table's lines, end to end."""
    lines = [zip(*table.store.scan(), strict=True) for table in c.tables.values()]
    return [np.concatenate(column).tobytes() for columns in lines for column in columns]


OPTIONS = [{}, {"padding_key": 3}, {"admission": CountAdmission(2), "default": 0.5}, {"nonfinite": "skip"}]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "padding", "admission", "skip"])
def test_a_device_does_what_host_memory_does(options):
    if SIMULATED and "padding_key" not in options:
        pytest.skip("the simulator is slow, and what the other options change is the host's, or tested in tests/store")
    host = collection(None, **options)
    want = train(host, there=False)
    for there, keys_there in [(True, True)] if SIMULATED else [(False, False), (True, False), (True, True)]:
        c = collection(place(), **options)
        for ours, theirs in zip(train(c, there, keys_there), want, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        keys = np.arange(N_KEYS + 3)
        for name, table in c.tables.items():
            assert table.lookup(keys).tobytes() == host.tables[name].lookup(keys).tobytes()
            table.store.validate()
        assert contents(c) == contents(host)
        c.close()


@pytest.mark.skipif(SIMULATED, reason="so many keys take long there; rows that come and go are tested in tests/store")
def test_a_cache_that_holds_no_batch_changes_nothing():
    host, c = collection(None), collection(place(3000 if HOST else 5000))
    for ours, theirs in zip(train(c, True), train(host, False), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert contents(c) == contents(host)
    for table in c.tables.values():
        stats = table.stats()
        assert stats["evictions"] > 0 and stats["streamed_rows"] > 0
    c.close()


@pytest.mark.skipif(not HOST, reason="nothing here is the device's")
def test_tables_elsewhere_and_outputs_that_are_declined_are_numpy():
    asked = []

    def run(stores, empty=None):
        tables = [Table(n, DIM, optimizer=Adam(), store=s) for n, s in zip("abc", stores, strict=True)]
        c = Collection(tables, {"x": "a", "y": "b", "z": "c"}, stack={"stack": ["x", "y"]})
        rng, found = np.random.default_rng(0), []
        for _ in range(3):
            staged = c.stage({f: rng.integers(0, N_KEYS, N_ROWS) for f in "xyz"})
            outputs = staged.outputs(empty)
            found.append(outputs)
            g = rng.standard_normal((N_ROWS, 3, DIM)).astype(np.float32)
            there = {o: isinstance(rows, Far) for o, rows in outputs.items()}
            grads = {"stack": g[:, :2], "z": g[:, 2]}
            staged.apply({o: Far(np.array(grad)) if there[o] else grad for o, grad in grads.items()})
        return found, contents(c)

    def empty(shape, device):
        asked.append(shape)
        return Far(np.empty(shape, np.float32))

    want, rows = run([None] * 3)
    for stores in ([place(), None, place()], [None, None, place()], [place()] * 3):
        found, same = run(stores, empty)
        assert same == rows
        for ours, theirs in zip(found, want, strict=True):
            assert isinstance(ours["z"], Far)
            assert isinstance(ours["stack"], Far) == (None not in stores)  # it is on several devices, or on none
            for output, value in ours.items():
                np.testing.assert_array_equal(near(value), theirs[output])
    asked.clear()
    found, same = run([place()] * 3, lambda shape, device: asked.append(shape))
    assert same == rows and asked[0] == (N_ROWS, 2, DIM)
    assert all(isinstance(value, np.ndarray) for outputs in found for value in outputs.values())


def pair(features=None, **options):
    tables = [Table(n, DIM, optimizer=Adagrad(), store=place(), **options) for n in "ab"]
    return Collection(tables, features)


def test_gradients_that_do_not_fit_are_refused():
    c = pair()
    keys = np.arange(N_ROWS)
    staged = c.stage({"a": keys, "b": keys})
    outputs = staged.outputs(empty_on(c, []))
    good = np.ones((N_ROWS, DIM), np.float32)
    for bad in (good[1:], good[:, 1:], good.astype(np.float64), np.ones((N_ROWS, DIM), np.int32)):
        with pytest.raises(errors.InvalidArgument, match=r"gradient of .*feature a.*float32\["):
            staged.apply({"a": far(c.tables["a"], bad), "b": outputs["b"]})
    if HOST:
        with pytest.raises(errors.InvalidArgument, match=r"strides.*feature a.*contiguous"):
            staged.apply({"a": Far(np.ones((DIM, N_ROWS), np.float32).T), "b": outputs["b"]})
    staged.apply({"a": far(c.tables["a"], good), "b": outputs["b"]})
    c.close()


def test_keys_that_do_not_fit_are_refused():
    c = pair()
    a = c.tables["a"]
    for bad in (np.ones(3, np.float32), np.ones(3, np.int32), np.ones((3, 2, 2), np.int64)):
        with pytest.raises(errors.InvalidArgument, match=r"feature a.*give"):
            c.stage({"a": far(a, bad), "b": np.ones(3, np.int64)})
    with pytest.raises(errors.InvalidArgument, match="3 rows where others have 2"):
        c.stage({"a": far(a, np.ones(2, np.int64)), "b": np.ones(3, np.int64)})
    if HOST:
        host = Collection([Table("a", DIM)])
        with pytest.raises(errors.InvalidArgument, match="give integers as array"):
            host.stage({"a": Far(np.ones(3, np.int64))})
    c.close()


@pytest.mark.skipif(not HOST, reason="nothing here is the device's")
def test_keys_of_every_kind_are_those_of_numpy():
    found = []
    for store in (host_memory(), place()):
        on = store != host_memory()
        big = Table("u", DIM, key_dtype="uint64", store=store)
        small = Table("i", DIM, key_dtype="int32", store=store)
        c = Collection([big, small], {"u": "u", "two": "u", "empty": "i", "i": "i"})
        u = np.array([2**63 + 1, 7, 2**64 - 1], np.uint64)
        columns = {"u": u, "two": np.arange(6, dtype=np.uint64).reshape(3, 2), "i": np.array([1, -2, 1])}
        columns["empty"] = Ragged(np.zeros(0, np.int64), np.zeros(4, np.int64))
        batches = [{f: sent(big, column) for f, column in columns.items()}] if on else [columns]
        entries = Dictionary(np.arange(2, dtype=np.uint64) + 2**63, np.array([1, 0, 1], np.uint32))
        batches.append({**columns, "u": entries})
        found += [[rows.tobytes() for rows in c.lookup(b).values()] for b in batches]
        for b in batches:
            staged = c.stage(b)
            staged.apply({o: np.ones_like(rows) for o, rows in staged.outputs().items()})
        found.append(contents(c))
        if on:
            with pytest.raises(errors.InvalidArgument, match="does not fit int32"):
                c.stage({**columns, "i": Far(np.array([1, 2**31, 0]))})
    assert found[:3] == found[3:]


GOOD, BAD = np.ones((2, N_ROWS, DIM), np.float32)
BAD[1, 2] = np.inf


def update(c, **grads):
    """One step over three keys."""
    staged = c.stage(dict.fromkeys(c.features, np.arange(N_ROWS) % 3))
    staged.outputs()
    try:
        staged.apply({f: far(c.tables[c.features[f]], grad) for f, grad in grads.items()})
    finally:
        staged.close()


@pytest.mark.skipif(SIMULATED, reason="the simulator is slow; what it adds here is tested in tests/cuda")
def test_gradients_that_are_not_finite_change_nothing():
    c = pair({"one": "a", "two": "a", "three": "b"})
    update(c, one=GOOD, two=GOOD, three=GOOD)
    before = contents(c)
    with pytest.raises(errors.InvalidArgument, match=r"gradient of a feature \(feature two, table a\)"):
        update(c, one=GOOD, two=BAD, three=GOOD)
    assert contents(c)[3:5] == before[3:5]  # rows and states of the first; it counted the batch
    c = Collection([c.tables["a"]])
    with pytest.raises(errors.InvalidArgument, match=r"gradient of 1 of 3 keys \(table a, key 1\)"):
        update(c, a=BAD)
    c.close()


@pytest.mark.skipif(SIMULATED, reason="as above")
def test_gradients_that_are_not_finite_are_skipped():
    c = pair(nonfinite="skip")
    update(c, a=BAD, b=GOOD)
    assert c.tables["a"].stats()["skipped_updates"] == 1
    c.close()
    c = pair(padding_key=1)  # whose gradient counts nowhere
    c = Collection([c.tables["a"]])
    update(c, a=BAD)
    c.close()


@pytest.mark.skipif(not HOST, reason="nothing here is the device's")
def test_gradients_of_named_columns_are_taken():
    found = []
    for store in (None, place()):
        c = Collection([Table("t", columns={"v": Column(3), "w": Column(1, optimizer=Adam())}, store=store)])
        for _ in range(2):
            staged = c.stage({"t": np.arange(3)})
            rows = near(staged.outputs(store and empty_on(c, []))["t"])
            grads = {"v": rows[:, :3] + 1, "w": rows[:, 3:] + 2}
            staged.apply({"t": {name: Far(g) if store else g for name, g in grads.items()}})
        found.append(contents(c))
    assert found[0] == found[1]


@pytest.mark.skipif(not HOST, reason="nothing here is the device's")
def test_ranks_share_tables_on_a_device_by_way_of_the_host():
    def run(store):
        (transport,) = Loopback.group(1)
        c = Sharded(Collection([Table("a", DIM, optimizer=Adam(), store=store)]), transport)
        assert c.device("a") is None
        for i in range(3):
            staged = c.stage({"a": np.arange(5) * i})
            rows = staged.outputs(lambda shape, device: pytest.fail("its rows are the host's"))["a"]
            staged.apply({"a": rows + 1})
        found = contents(c)
        c.close()
        return found

    assert run(place()) == run(None)


@pytest.mark.skipif(not HOST, reason="what crosses over is the same, and the simulator is slow")
def test_nothing_of_a_batch_crosses_over_once_its_rows_are_there(monkeypatch):
    crossed = []
    n, rng = 2000, np.random.default_rng(0)
    tables = [Table(name, DIM, optimizer=Adam(), store=place()) for name in "ab"]
    for table in tables:
        for name in ("send", "fetch"):
            method = getattr(table.memory, name)

            def spy(array, *args, method=method):
                crossed.append(np.asarray(array).nbytes)
                return method(array, *args)

            monkeypatch.setattr(table.memory, name, spy, raising=False)
    c = Collection(tables, {"x": "a", "y": "a", "z": "b"}, stack={"stack": ["x", "z"]})
    for step in range(4):
        if step == 2:  # until then keys and rows come, and what is kept from step to step
            assert crossed
            crossed.clear()
        keys = rng.permutation(N_KEYS)[rng.integers(0, N_KEYS, (3, n))]
        staged = c.stage({f: Far(k) for f, k in zip("xyz", keys, strict=True)})
        staged.fetch()
        outputs = staged.outputs(empty_on(c, []))
        staged.apply({f: Far(np.ones_like(near(rows))) for f, rows in outputs.items()})
    assert max(crossed, default=0) <= 8 * N_KEYS < 4 * n


@pytest.mark.skipif(not HOST, reason="arrays there do not say where they are")
def test_arrays_of_another_device_are_elsewhere():
    class There(Far):
        def __dlpack_device__(self):
            return self.at

    t = Table("t", DIM, store=place())
    array = There(np.zeros(1))
    assert t.is_there(array) and not t.is_there(np.zeros(1)) and not t.is_there([1])
    t.device = "cuda:1"
    for at, there in [((2, 1), True), ((2, 0), False), ((1, 0), False)]:
        array.at = at
        assert t.is_there(array) == there
    t.device = None
    assert not t.is_there(array)
