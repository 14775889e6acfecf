"""The device tier against host memory, bit for bit: in Numba's simulator, and on a real device where there is one.

The simulator is chosen before Numba is imported, so this file runs itself once more in a process of its own.
"""

import importlib.util
import os

import numpy as np
import pytest
from faults import run_ranks

from hbkit import errors
from hbkit.embedding import (
    SGD,
    Adagrad,
    AdagradDecay,
    Adam,
    AdamW,
    Collection,
    Column,
    CountAdmission,
    Ftrl,
    IdleSteps,
    MaxRows,
    RowWiseAdagrad,
    RowWiseAdam,
    Sharded,
    Table,
    lookahead,
)
from hbkit.ragged import Ragged
from hbkit.shuffle import Loopback
from hbkit.store import cached_ssd, device_cached, host_memory
from hbkit.store.base import Chunk

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
FIELDS = ("key", "freq", "last_step", "row", "state")


def has_device() -> bool:
    if SIMULATED:
        return True
    if importlib.util.find_spec("numba_cuda") is None:
        return False
    from numba import cuda

    return cuda.is_available()


on_device = pytest.mark.skipif(not has_device(), reason="no CUDA device: see test_device_tier_in_the_simulator")


@pytest.mark.skipif(SIMULATED, reason="this is the simulator")
def test_device_tier_in_the_simulator(in_simulator):
    in_simulator(__file__)


def contents(store):
    chunks = list(store.scan())
    return [b"".join(np.ascontiguousarray(getattr(c, field)).tobytes() for c in chunks) for field in FIELDS]


def train(table, seed=0, steps=3):
    rng = np.random.default_rng(seed)
    for i in range(steps):
        keys = rng.zipf(1.4, 24) % 60
        table.lookup(keys, train=True)
        table.update(keys, rng.standard_normal((24, table.dim)).astype(np.float32))
        table.lookup(rng.integers(0, 90, 6), train=i == 2)  # counted, but not updated
        table.store.erase(rng.integers(0, 60, 2))
        if i == 1:
            keys = np.arange(100, 104)
            row = rng.random((4, table.dim), np.float32)
            state = rng.random((4, table.store.layout.width - table.dim), np.float32)
            table.store.put(Chunk(keys, keys, np.ones(4, np.int64), row, state))
        table.store.validate()
    table.update(np.arange(60), np.ones((60, table.dim), np.float32))  # an update alone stamps rows too
    return table


OPTIMIZERS = [SGD(), SGD(momentum=0.9), Adagrad(), RowWiseAdagrad(), AdamW(), RowWiseAdam(), Ftrl()]
CASES = [(optimizer, "float32") for optimizer in OPTIMIZERS] + [
    (Adam(), "float16"), (Adam(), "bfloat16"), (SGD(), "float16")
]  # fmt: skip


@on_device
@pytest.mark.parametrize(("optimizer", "dtype"), CASES, ids=[f"{type(o).__name__}-{d}" for o, d in CASES])
def test_device_equals_host(optimizer, dtype):
    if SIMULATED and (type(optimizer), dtype) not in (
        (SGD, "float32"),
        (RowWiseAdagrad, "float32"),
        (Adam, "bfloat16"),
    ):
        pytest.skip("the simulator is slow, and the way is the same for all: tests/cuda has every kernel")
    host = train(Table("t", 5, dtype, optimizer=optimizer))
    want, budget = contents(host.store), 250 + 48 * host.store.layout.width
    place = device_cached(host_memory(), budget, policy="lru")
    ours = train(Table("t", 5, dtype, optimizer=optimizer, store=place))
    s = ours.stats()
    assert s["evictions"] + s["streamed_rows"] > 0 and s["lines_nbytes"] <= budget
    assert contents(ours.store) == want
    ours.commit()
    assert contents(ours.store._home.store) == want  # rows, states and metadata all came down
    ours.store.close()


@on_device
@pytest.mark.parametrize("budget", [1000, "1MiB"])
def test_device_pools_and_trains_a_collection_as_host_does(budget):
    def run(store):
        tables = [Table("t", 8, optimizer=Adam(), store=store), Table("u", 8, optimizer=RowWiseAdagrad(), store=store)]
        both = Collection(tables, {"a": "t", "b": "t", "c": "u"}, {"a": "sum", "b": "mean", "c": None})
        rng, found = np.random.default_rng(0), []
        for _ in range(3):
            lengths = rng.integers(0, 4, (2, 6))
            splits = [np.concatenate([[0], np.cumsum(n)]) for n in lengths]
            batch = {name: Ragged(rng.zipf(1.3, s[-1]) % 50, (s,)) for name, s in zip("ab", splits, strict=True)}
            batch["c"] = rng.integers(0, 40, 6)
            staged = both.stage(batch)
            out = staged.outputs()
            found += [np.asarray(out[name]).tobytes() for name in "abc"]
            staged.apply({name: rng.standard_normal(np.shape(out[name])).astype(np.float32) for name in "abc"})
        found += [part for t in tables for part in contents(t.store)]
        for t in tables:
            t.close()
        return found

    assert run(device_cached(host_memory(), budget, policy="lru")) == run(host_memory())


@on_device
@pytest.mark.parametrize("budget", [1000, "1MiB"], ids=["streams", "resident"])
def test_rows_and_gradients_in_device_memory_stay_there(budget):
    keys, index = np.arange(12), np.array([3, 3, 0, 11, 7])
    grads = np.random.default_rng(0).standard_normal((12, 8)).astype(np.float32)
    found = []
    for place in (host_memory(), device_cached(host_memory(), budget)):
        t = Table("t", 8, optimizer=Adam(), store=place)
        t.lookup(keys, train=True)
        s = t.store
        lease = s.reserve(keys, np.ones(12, np.int64))
        hyper = t.optimizer.hyper(1)
        if place == host_memory():
            s.apply(lease, grads, t.optimizer, hyper, 1)
            out = np.empty((5, 8), np.float32)
            s.gather(lease, out, index)
        else:
            device = s._device
            s.apply(lease, device.send(grads), t.optimizer, hyper, 1)
            far = device.empty((5, 8), np.float32)
            s.gather(lease, far, index)
            out = device.fetch(far)
        s.release(lease)
        found.append((out.tobytes(), contents(s)))
        t.close()
    assert found[0] == found[1]


@on_device
def test_device_over_ssd_reopens(tmp_path):
    want = contents(train(Table("t", 5)).store)
    place = device_cached(cached_ssd(tmp_path, "400KiB"), 1500, policy="tinylfu")
    ours = train(Table("t", 5, store=place))
    ours.commit()
    ours.update([1, 2], np.ones((2, 5)))
    ours.store.close()
    again = Table("t", 5, store=place)
    assert contents(again.store) == want
    again.store.close()


@on_device
def test_device_point_is_the_rows_of_its_instant():
    t = train(Table("t", 5, store=device_cached(host_memory(), 500, policy="lru")))
    store, want, before = t.store, contents(t.store), {int(k) for c in t.store.scan() for k in c.key}
    store.changes.name(store.changes.mark(store.latest_step()), "base")
    point = store.point()
    train(t, seed=1)
    assert b"".join(c.row.tobytes() for c in point.scan()) == want[-2] != contents(store)[-2]
    point.close()
    point = store.point("base")
    chunks = list(store.scan())
    stamped = [k for c in chunks for k in c.key[c.last_step > 4].tolist()]
    assert set(stamped) <= {int(k) for c in point.scan() for k in c.key} and point.changed
    assert before - {int(k) for c in chunks for k in c.key} <= set(point.erased.tolist())
    point.close()
    t.close()


@on_device
def test_device_admission_and_eviction_equal_host():
    def run(store):
        exported, rng = [], np.random.default_rng(0)
        t = Table(
            "t", 5, store=store, admission=CountAdmission(3), default=0.5, padding_key=1,
            eviction=[IdleSteps(3), MaxRows(8)], evict_every=2, on_evict=lambda c: exported.append(c.row.tobytes()),
        )  # fmt: skip
        rows = []
        for _ in range(8):
            keys = rng.zipf(1.4, 24) % 60
            rows.append(t.lookup(keys, train=True).tobytes())
            t.update(keys, rng.standard_normal((24, 5)).astype(np.float32))
            t.store.validate()
        t.evict()
        found = contents(t.store), {k: v.tolist() for k, v in t.admission.state().items()}, t.stats()["ignored_updates"]
        t.close()
        return rows, exported, found

    assert run(device_cached(host_memory(), 500, policy="lru")) == run(host_memory())


@on_device
def test_device_optimizer_without_kernel_is_unsupported():
    t = Table("t", 4, optimizer=AdagradDecay(), store=device_cached(host_memory(), "4KiB"))
    with pytest.raises(errors.Unsupported, match="AdagradDecay"):
        t.lookup([1], train=True)
        t.update([1], np.ones((1, 4)))


@on_device
def test_device_reads_named_columns_but_does_not_update_them():
    columns = {"a": Column(1, optimizer=SGD()), "b": Column(3, optimizer=Adagrad())}
    ours = Table("t", columns=columns, store=device_cached(host_memory(), "4KiB"))
    host = Table("t", columns=columns)
    keys = np.arange(9)
    rows = ours.lookup(keys, train=True)
    assert np.array_equal(rows, host.lookup(keys, train=True))
    with pytest.raises(errors.Unsupported, match=r"named columns.*host_memory"):
        ours.update(keys, {"a": np.ones((9, 1)), "b": np.ones((9, 3))})
    assert np.array_equal(ours.lookup(keys), rows) and ours.step == 0
    ours.store.validate()
    ours.close()


@on_device
def test_device_budget_too_small_says_what_would_do():
    with pytest.raises(errors.BudgetExceeded, match="give at least") as caught:
        Table("t", 64, store=device_cached(host_memory(), 600))
    enough = int(str(caught.value).split("at least ")[1].split()[0])
    assert Table("t", 64, store=device_cached(host_memory(), enough)).stats()["cache_lines"] >= 1


@on_device
def test_device_lost_in_an_update_leaves_what_is_below(monkeypatch):
    t = Table("t", 4, optimizer=Adagrad(), store=device_cached(host_memory(), "8KiB"))
    t.lookup(np.arange(8), train=True)
    t.commit()
    want = contents(t.store._home.store)

    def lost(*args):
        raise errors.DeviceUnavailable("the device failed: it fell off the bus", device="cuda:0", remedy="nvidia-smi")

    with monkeypatch.context() as m:
        m.setattr(t.store._device, "launch", lost)
        with pytest.raises(errors.DeviceUnavailable, match="fell off"):
            t.update(np.arange(4), np.ones((4, 4)))
    with pytest.raises(errors.StorageError, match="only in part"):
        t.commit()
    assert contents(t.store._home.store) == want
    t.close()


@on_device
def test_device_that_does_not_exist_is_unavailable():
    with pytest.raises(errors.DeviceUnavailable, match="cuda:99"):
        Table("t", 4, store=device_cached(host_memory(), device="cuda:99"))


def test_device_name_is_checked():
    with pytest.raises(errors.InvalidArgument, match="tpu:0"):
        Table("t", 4, store=device_cached(host_memory(), device="tpu:0"))


@pytest.mark.skipif(has_device(), reason="there is a CUDA device")
def test_device_absent_is_unavailable_and_names_the_remedy(tmp_path):
    with pytest.raises(errors.DeviceUnavailable, match=r"hbkit\[cuda\].*another store"):
        Table("t", 4, store=device_cached(cached_ssd(tmp_path)))
    assert list(tmp_path.iterdir()) == []  # the store below was not touched


@pytest.mark.skipif(has_device(), reason="there is a CUDA device")
def test_auto_without_a_device_is_the_store_below_and_says_so_once(caplog):
    for name in "tu":
        t = Table(name, 4, store=device_cached(host_memory(), device="auto"))
        assert t.stats()["tier"] == Table("h", 4).stats()["tier"]
    said = [r.message for r in caplog.records if "below the device tier" in r.message]
    assert len(said) == 1 and "hbkit[cuda]" in said[0]


@on_device
def test_auto_with_a_device_is_the_device():
    assert Table("t", 4, store=device_cached(host_memory(), "4KiB", device="auto")).stats()["device"] == "cuda:0"


@on_device
def test_device_tier_of_a_sharded_table_gives_what_memory_gives():
    def act(transport, on_device):
        store = device_cached(host_memory(), cache_budget="64KiB") if on_device else host_memory()
        c = Sharded(Collection([Table("t", 4, optimizer=Adam(lr=0.1), store=store)]), transport, "int8")
        rng = np.random.default_rng(transport.rank)
        for _, staged in lookahead([{"t": rng.integers(0, 90, 20)} for _ in range(4)], c, 2):
            staged.apply({"t": np.cos(staged.outputs()["t"])})
        return contents(c.tables["t"].store)

    want = run_ranks(lambda t: act(t, False), Loopback.group(2, 60))
    # One of the ranks alone: Numba's simulator is not made for several threads.
    assert run_ranks(lambda t: act(t, t.rank == 1), Loopback.group(2, 60)) == want
