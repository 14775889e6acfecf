"""The device tier against host memory, bit for bit: its twin in host memory at real sizes, Numba's simulator at small
ones, and a real device where there is one.

The simulator is chosen before Numba is imported, so this file runs itself once more in a process of its own; and once
more on devices of a driver in software, at real sizes.
"""

import gc
import importlib.util
import os
import sys
import threading
from contextlib import closing

import numpy as np
import pytest
import soft
from faults import run_ranks
from homes import ACTS, OPTIMIZERS, DictPlace, any_table, contents, looking_ahead
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hbkit import errors
from hbkit.embedding import (
    SGD,
    Adagrad,
    AdagradDecay,
    Adam,
    AdamW,
    Collection,
    Column,
    Constant,
    CountAdmission,
    IdleSteps,
    MaxRows,
    RowWiseAdagrad,
    RowWiseAdam,
    Sharded,
    Table,
    lookahead,
)
from hbkit.embedding.table import Request
from hbkit.ragged import Ragged
from hbkit.shuffle import Loopback
from hbkit.snapshot import load, save
from hbkit.store import cached_ssd, device_cached, host_memory
from hbkit.store.device import Summands
from hbkit.store.line import Chunk, Part

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
if SIMULATED:  # threads wait for each other at each vote, and would do so for 5 ms
    sys.setswitchinterval(1e-4)
SOFT = soft.driver is not None  # CUDA's driver is one in software
LANES = {"cpu": "cpu", "cudasim": "cuda:0", "soft": "cuda:0", "cuda": "cuda:0"}


def missing(lane):
    """Why a lane can't run in this process, or None."""
    if (lane == "cudasim") != SIMULATED:
        return "the simulator runs in a process of its own"
    if (lane == "soft") != SOFT:
        return "the software driver has a process of its own"
    if importlib.util.find_spec("numba") is None:
        return "Numba is not installed"
    if lane == "cuda":
        from numba import cuda

        return None if cuda.is_available() else "no CUDA device"
    return None


def lane_of(request):
    """The lane's device; lanes are skipped by name where they are not there."""
    why = missing(request.param)
    if why:
        pytest.skip(f"lane {request.param}: {why}")
    return LANES[request.param]


@pytest.fixture(scope="module", params=LANES)
def device(request):
    """Of every lane, for tests that the simulator, which is slow, runs too: what kernels do lies in tests/cuda."""
    return lane_of(request)


@pytest.fixture(scope="module", params=["cpu", "soft", "cuda"])
def fast(request):
    """As `device`, without the simulator."""
    return lane_of(request)


# Tests that are too large for the simulator, and need no device.
on_twin = pytest.mark.skipif(missing("cpu") is not None, reason=f"lane cpu: {missing('cpu')}")


@pytest.mark.slow  # more than 20 s
def test_device_tier_in_the_simulator(in_simulator):
    in_simulator(__file__)


def test_device_tier_on_soft_devices(on_soft_devices):
    on_soft_devices(__file__)


def least(device, below=None, **settings):
    """Bytes of the smallest budget for a table of these settings."""
    with pytest.raises(errors.BudgetExceeded, match="give at least") as caught:
        Table("t", store=device_cached(host_memory(), 1, device), **settings)
    return int(str(caught.value).split("at least ")[1].split()[0])


def cached(device, times=1.0, below=None, policy="lfu", **settings):
    """A place over host memory, with so many times the least budget for a table of these settings."""
    return device_cached(below or host_memory(), int(least(device, **settings) * times), device, policy)


def train(table, seed=0, steps=3, n=40, n_keys=99):
    rng = np.random.default_rng(seed)
    for i in range(steps):
        keys = rng.zipf(1.1, n) % n_keys
        table.lookup(keys, train=True)
        table.update(keys, rng.standard_normal((n, table.dim)).astype(np.float32))
        table.lookup(rng.integers(0, n_keys * 3 // 2, 6), train=i == 2)  # counted, but not updated
        table.store.erase(rng.integers(0, n_keys, 2))
        if i == 1:
            keys = np.arange(100, 104)
            row = rng.random((4, table.dim), np.float32)
            state = rng.random((4, table.store.layout.width - table.dim), np.float32)
            table.store.put(Chunk(keys, keys, np.ones(4, np.int64), row, state))
        table.store.validate()
    table.update(np.arange(n_keys), np.ones((n_keys, table.dim), np.float32))  # an update alone stamps rows too
    return table


CASES = [(optimizer, "float32") for optimizer in [*OPTIMIZERS, AdamW(), RowWiseAdam()]] + [
    (Adam(), "float16"), (Adam(), "bfloat16"), (SGD(), "float16")
]  # fmt: skip


@pytest.mark.parametrize(("optimizer", "dtype"), CASES, ids=[f"{type(o).__name__}-{d}" for o, d in CASES])
def test_device_equals_host(optimizer, dtype, device):
    if SIMULATED and (type(optimizer), dtype) != (Adam, "bfloat16"):
        pytest.skip("the simulator is slow, and the way is the same for all: tests/cuda has every kernel")
    host = train(Table("t", 5, dtype, optimizer=optimizer))
    place = cached(device, policy="lru", dim=5, dtype=dtype, optimizer=optimizer)
    ours = train(Table("t", 5, dtype, optimizer=optimizer, store=place))
    s = ours.stats()
    held = sum(s[f"{of}_nbytes"] for of in ("index", "metadata", "lines", "buffer"))
    assert s["evictions"] + s["streamed_rows"] > 0 and held <= place.cache_budget
    assert contents(ours.store) == contents(host.store)
    ours.commit()
    assert contents(ours.store.below) == contents(host.store)  # rows, states and metadata all came down
    ours.store.close()


@on_twin
@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    acts=st.lists(st.sampled_from([*ACTS]), min_size=1, max_size=12),
    times=st.sampled_from([1.0, 1.3, 3.0, 20.0]),
    below=st.sampled_from([None, 3, 100]),
    policy=st.sampled_from(["lru", "lfu"]),
    optimizer=st.sampled_from(OPTIMIZERS),
    dim=st.sampled_from([1, 4, 17]),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    metadata=st.booleans(),
    min_count=st.sampled_from([None, 2]),
)
def test_device_any_acts_equal_host(seed, acts, times, below, policy, optimizer, dim, dtype, metadata, min_count):
    place = cached(
        "cpu", times, below and DictPlace(below), policy, dim=dim, dtype=dtype, optimizer=optimizer, metadata=metadata
    )
    ours, theirs = (any_table(store, optimizer, dim, dtype, metadata, min_count) for store in (place, host_memory()))
    mine, other = np.random.default_rng(seed), np.random.default_rng(seed)
    for act in acts:
        assert ACTS[act](ours, mine) == ACTS[act](theirs, other)
        ours.store.validate()
    assert contents(ours.store) == contents(theirs.store)
    assert len(ours) == len(theirs) and ours.store.latest_step() == theirs.store.latest_step()
    keys = ["ignored_updates", "skipped_updates", "evicted_rows"]
    assert [ours.stats()[k] for k in keys] == [theirs.stats()[k] for k in keys]
    assert contents(ours.store, since=2) == contents(theirs.store, since=2)


# --- any calls of a store -----------------------------------------------------------------------------------------

N_KEYS, DIM = 200, 4
OPTIMIZER = Adam(lr=0.1)


def far(store, array):
    """An array in the device's memory, which is no NumPy array."""
    return Far(store.memory.send(array))


class Far:
    """What tells an array in the twin's memory from one of the host's, as a tensor would be told."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __array__(self, dtype=None, copy=None):
        return self.array

    def __len__(self):
        return len(self.array)


class Calls(RuleBasedStateMachine):
    """Calls of a device store in any order, each beside the same of a store in host memory."""

    below = staticmethod(host_memory)

    def tables(self, times, policy, dtype, metadata):
        kind = {"dim": DIM, "dtype": dtype, "optimizer": OPTIMIZER, "metadata": metadata}
        place = cached("cpu", times, self.below(), policy, **kind)
        return [Table("t", store=store, **kind).store for store in (place, host_memory())]

    @initialize(
        times=st.sampled_from([1.0, 1.5, 3.0, 30.0]),
        policy=st.sampled_from(["lfu", "lru"]),
        dtype=st.sampled_from(["float32", "bfloat16"]),
        metadata=st.booleans(),
        seed=st.integers(0, 2**32),
    )
    def begin(self, times, policy, dtype, metadata, seed):
        self.ours, self.theirs = self.tables(times, policy, dtype, metadata)
        self.rng, self.step, self.leases, self.points = np.random.default_rng(seed), 1, [], []

    def some(self, n):
        return self.rng.integers(0, N_KEYS, n)

    @rule(n=st.sampled_from([0, 1, 20, 60, 150]), raw=st.booleans(), ahead=st.booleans(), padded=st.booleans())
    def reserve(self, n, raw, ahead, padded):
        batch = self.some(n)
        keys, inverse, counts = first_seen(batch)
        padding = int(np.flatnonzero(keys == 7)[0]) if padded and 7 in keys else -1
        if raw:
            given = batch if n % 2 else far(self.ours, batch)
            ours = self.ours.reserve_batch(given, 7 if padded else None, ahead)
            assert np.array_equal(self.ours.memory.fetch(ours.inverse), inverse)
        else:
            ours = self.ours.reserve(keys, counts, padding, ahead)
        assert np.array_equal(ours.keys, keys) and np.array_equal(ours.counts, counts) and ours.padding == padding
        self.leases.append((ours, self.theirs.reserve(keys, counts, padding), inverse))

    def lease(self, i):
        return self.leases[i % len(self.leases)]

    held = precondition(lambda self: self.leases)
    which = st.integers(0, 9)

    @held
    @rule(i=which, wait=st.booleans())
    def fetch(self, i, wait):
        (self.ours.wait if wait else self.ours.fetch)(self.lease(i)[0])

    @held
    @rule(i=which, admit=st.booleans())
    def create(self, i, admit):
        ours, theirs, _ = self.lease(i)
        made = [s.create(lease, self.step, Every() if admit else None)
                for s, lease in ((self.ours, ours), (self.theirs, theirs))]  # fmt: skip
        assert made[0] == made[1]

    @held
    @rule(i=which, by=st.sampled_from(["key", "position", "state"]), there=st.booleans())
    def gather(self, i, by, there):
        ours, theirs, inverse = self.lease(i)
        width = self.ours.layout.width if by == "state" else DIM
        n, index = (len(inverse), inverse) if by == "position" else (len(theirs.keys), None)
        want, out = np.empty((2, n, width), np.float32)
        self.theirs.gather(theirs, want, index)
        self.ours.gather(ours, Far(out) if there else out, index)
        assert out.tobytes() == want.tobytes()
        assert np.array_equal(ours.slots < 0, theirs.slots < 0)

    @held
    @rule(i=which, there=st.booleans(), weighted=st.booleans())
    def pool(self, i, there, weighted):
        ours, theirs, inverse = self.lease(i)
        splits = np.append(np.arange(0, len(inverse), 7), len(inverse))
        weight = self.rng.random(len(inverse), np.float32) if weighted else None
        want, out = np.empty((2, len(splits) - 1, DIM), np.float32)
        self.theirs.pool(theirs, inverse, splits, want, weight)
        self.ours.pool(ours, inverse, splits, Far(out) if there else out, weight)
        assert out.tobytes() == want.tobytes()

    @held
    @rule(i=which, how=st.sampled_from(["host", "there", "summands"]), skip=st.booleans(), scaled=st.booleans())
    def apply(self, i, how, skip, scaled):
        from hbkit._ext.segment import Segments

        ours, theirs, inverse = self.lease(i)
        values = self.rng.standard_normal((len(inverse) + 3, DIM)).astype(np.float32)
        rows = self.rng.integers(0, len(values), len(inverse))
        scale = self.rng.random(len(inverse), np.float32) if scaled else None
        if skip:
            values[self.rng.random(values.shape) < 0.01] = np.nan
        grads = Segments(inverse, len(theirs.keys)).of(values, rows, scale)
        sums = grads.sum()
        if how == "host":
            mine = grads if scaled else sums
        elif how == "there" or ours.inverse is None:
            mine = far(self.ours, sums)
        else:
            mine = Summands(far(self.ours, values), rows, scale)
        hyper = OPTIMIZER.hyper(self.step)
        ignored = self.theirs.apply(theirs, sums, OPTIMIZER, hyper, self.step, skip)
        assert self.ours.apply(ours, mine, OPTIMIZER, hyper, self.step, skip) == ignored

    @held
    @rule(i=which, forget=st.booleans())
    def release(self, i, forget):
        i %= len(self.leases)
        ours, theirs, _ = self.leases.pop(i)
        if not forget:
            self.ours.release(ours)
            self.ours.release(ours)
        self.theirs.release(theirs)
        del ours
        gc.collect(0)

    @rule()
    def next_step(self):
        self.step += 1

    @rule(n=st.sampled_from([1, 9, 60]))
    def erase(self, n):
        keys = self.some(n)
        assert self.ours.erase(keys) == self.theirs.erase(keys)

    @rule(n=st.sampled_from([1, 9, 60]), give=st.booleans())
    def put(self, n, give):
        keys = np.unique(self.some(n))
        lines = self.rng.integers(-8, 8, (len(keys), self.ours.layout.width)).astype(np.float32)
        freq, last_step = self.rng.integers(0, 9, len(keys)), np.full(len(keys), self.step)
        for s in (self.ours, self.theirs):
            if give:
                s.write(keys, lines, freq, last_step)
            else:
                s.put(Chunk(keys, freq, last_step, lines[:, :DIM], lines[:, DIM:]))

    @rule()
    def ask(self):
        keys = np.arange(N_KEYS)
        has = self.theirs.has(keys)
        assert np.array_equal(self.ours.has(keys), has)
        for mine, others in zip(self.ours.metadata(keys[has]), self.theirs.metadata(keys[has]), strict=True):
            assert np.array_equal(mine, others)

    @rule(since=st.sampled_from([None, 1, 3]))
    def scan(self, since):
        assert contents(self.ours, since) == contents(self.theirs, since)

    @rule(i=st.integers(0, 2), rows=st.booleans())
    def part(self, i, rows):
        mine, others = (
            [b"".join(np.ascontiguousarray(a).tobytes() for a in column) for column in zip(*chunks, strict=True)]
            for chunks in ([c for c in s.part(Part.share(i, 3), rows) if len(c.key)] for s in (self.ours, self.theirs))
        )
        assert mine == others

    @rule()
    def commit(self):
        self.ours.commit()
        if getattr(self, "path", None) is None:
            assert contents(self.ours.below) == contents(self.theirs)

    @precondition(lambda self: not self.points)
    @rule()
    def point(self):
        self.points = [s.point() for s in (self.ours, self.theirs)]

    @precondition(lambda self: self.points)
    @rule()
    def read_point(self):
        read = [
            [b"".join(np.ascontiguousarray(c).tobytes() for c in column) for column in zip(*p.scan(), strict=True)]
            for p in self.points
        ]
        assert read[0] == read[1] and self.points[0].n_rows == self.points[1].n_rows
        for p in self.points:
            p.close()
        self.points = []

    @invariant()
    def right(self):
        self.ours.validate()
        assert len(self.ours) == len(self.theirs) and self.ours.latest_step() == self.theirs.latest_step()
        index = self.ours._index
        pins = np.zeros(self.ours._n_lines, np.int64)
        for ours, _, _ in self.leases:
            if ours.far is not None:
                lines = self.ours._near(ours)
                np.add.at(pins, lines[lines >= 0], 1)
        _, slots = index.contents()
        assert np.array_equal(index._words[slots] >> 48, pins[slots]), "pins are miscounted"

    def teardown(self):
        if hasattr(self, "ours"):
            assert contents(self.ours) == contents(self.theirs)
            stats = ("ignored_updates", "skipped_updates")
            assert [self.ours.stats()[k] for k in stats] == [self.theirs.stats()[k] for k in stats]
            for ours, _, _ in self.leases:
                self.ours.release(ours)
            self.ours.close()


class Every:
    """Admits every second key, and must be told what becomes of it."""

    def admit(self, keys, counts):
        return keys % 2 == 0

    def keep(self):
        pass

    def undo(self):
        raise AssertionError("nothing has failed")


def first_seen(batch):
    """Distinct keys in the order of first occurrence, each position's, and how often each occurs."""
    keys, first, inverse, counts = np.unique(batch, return_index=True, return_inverse=True, return_counts=True)
    order = np.argsort(first)
    number = np.empty(len(order), np.int64)
    number[order] = np.arange(len(order))
    return keys[order], number[inverse], counts[order]


class CallsOverCache(Calls):
    """Over a store that caches itself."""

    below = staticmethod(lambda: DictPlace(40))


for _calls in (Calls, CallsOverCache):
    _calls.TestCase.settings = settings(max_examples=25, stateful_step_count=30)
TestCalls = on_twin(Calls.TestCase)
TestCallsOverCache = on_twin(CallsOverCache.TestCase)


# --- whole tables -------------------------------------------------------------------------------------------------


@on_twin
@pytest.mark.parametrize("times", [1.0, 4.0, 30.0])
@pytest.mark.parametrize("window", [0, 1, 2, 7])
def test_device_lookahead_equals_host(window, times):
    assert looking_ahead(cached("cpu", times, dim=8), window) == looking_ahead(host_memory(), 0)


@pytest.mark.parametrize("times", [1.0, 30.0], ids=["streams", "resident"])
def test_device_pools_and_trains_a_collection_as_host_does(times, fast):
    def run(store):
        tables = [Table("t", 8, optimizer=Adam(), store=store), Table("u", 8, optimizer=RowWiseAdagrad(), store=store)]
        both = Collection(tables, {"a": "t", "b": "t", "c": "u"}, {"a": "sum", "b": "mean", "c": None})
        rng, found = np.random.default_rng(0), []
        for _ in range(3):
            lengths = rng.integers(0, 4, (2, 16))
            splits = [np.concatenate([[0], np.cumsum(n)]) for n in lengths]
            batch = {name: Ragged(rng.zipf(1.1, s[-1]) % 90, (s,)) for name, s in zip("ab", splits, strict=True)}
            batch["c"] = rng.integers(0, 40, 16)
            staged = both.stage(batch)
            out = staged.outputs()
            found += [np.asarray(out[name]).tobytes() for name in "abc"]
            staged.apply({name: rng.standard_normal(np.shape(out[name])).astype(np.float32) for name in "abc"})
        found += [part for t in tables for part in contents(t.store)]
        for t in tables:
            t.close()
        return found

    assert run(cached(fast, times, policy="lru", dim=8, optimizer=Adam())) == run(host_memory())


@pytest.mark.parametrize("times", [1.0, 30.0], ids=["streams", "resident"])
def test_rows_and_gradients_in_device_memory_stay_there(times, device):
    keys, index = np.arange(40), np.array([3, 3, 0, 11, 7])
    batch = np.random.default_rng(1).permutation(np.concatenate([keys, keys[:9]]))
    grads = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
    values = np.random.default_rng(0).standard_normal((49, 8)).astype(np.float32)
    found = []
    for place in (host_memory(), cached(device, times, dim=8, optimizer=Adam())):
        t = Table("t", 8, optimizer=Adam(), store=place)
        t.lookup(keys, train=True)
        t.update(batch[:1], np.ones((1, 8), np.float32))
        s, out = t.store, np.empty((5, 8), np.float32)
        lease = s.reserve(keys, np.ones(40, np.int64))
        hyper = t.optimizer.hyper(1)
        if place == host_memory():
            s.apply(lease, grads, t.optimizer, hyper, 2)
            s.gather(lease, out, index)
            s.release(lease)
            t.update(batch, values)
        else:
            memory = s.memory
            s.apply(lease, Far(memory.send(grads)) if device == "cpu" else memory.send(grads), t.optimizer, hyper, 2)
            there = memory.empty((5, 8), np.float32)
            s.gather(lease, Far(there) if device == "cpu" else there, index)
            out = memory.fetch(there)
            s.release(lease)
            lease = s.reserve_batch(memory.send(batch))
            assert s.all_finite(memory.send(values)) and not s.all_finite(memory.send(values * np.float32(np.inf)))
            s.apply(lease, Summands(memory.send(values)), t.optimizer, t.optimizer.hyper(2), 2)
            assert np.array_equal(lease.keys[memory.fetch(lease.inverse)], batch)
            s.release(lease)
        found.append((out.tobytes(), contents(s)))
        t.close()
    assert found[0] == found[1]


def test_device_over_ssd_reopens(tmp_path, fast):
    want = contents(train(Table("t", 5)).store)
    place = cached(fast, 1.5, cached_ssd(tmp_path, "400KiB"), "lru", dim=5)
    ours = train(Table("t", 5, store=place))
    ours.commit()
    ours.update([1, 2], np.ones((2, 5)))
    ours.store.close()
    again = Table("t", 5, store=place)
    assert contents(again.store) == want
    again.store.close()


@on_twin
def test_device_without_metadata_reopens_at_its_latest_step(tmp_path):
    place = cached("cpu", 1.5, cached_ssd(tmp_path, "400KiB"), dim=5, metadata=False)
    for step in (0, 3):
        t = Table("t", 5, store=place, metadata=False)
        assert t.step == step
        for _ in range(3):
            t.lookup(np.arange(40), train=True)
            t.update(np.arange(40), np.ones((40, 5)))
        t.store.erase(np.arange(40))  # no row shows the step any more
        t.commit()
        t.close()


@on_twin
@pytest.mark.parametrize("times", [1.0, 3.0])
def test_device_saves_deltas_that_load_elsewhere(tmp_path, times):
    kind = {"dim": 5, "optimizer": Adagrad()}
    host = Table("t", **kind)
    ours = Table("t", store=cached("cpu", times, **kind), **kind)
    for i in range(3):
        for t, path in ((host, tmp_path / "host"), (ours, tmp_path / "ours")):
            train(t, seed=i)
            save(path, [t], t.step, base="latest" if i else None)
    again = Table("t", store=cached("cpu", times, **kind), **kind)
    load(tmp_path / "host", [again])
    load(tmp_path / "ours", [host])
    assert contents(again.store) == contents(host.store) == contents(ours.store)
    train(again, seed=7)
    train(host, seed=7)
    assert contents(again.store) == contents(host.store)


@pytest.mark.parametrize("over", ["host", "device"])
def test_device_step_of_resident_rows_is_a_few_launches(device, over, monkeypatch):
    if device == "cpu":
        pytest.skip("lane cpu: nothing is launched")
    t = Table("t", 8, optimizer=Adam(), store=device_cached(host_memory(), "40KiB", device))
    batch = np.array([5, 3, 5, 9, 1, 3, 3])
    t.lookup(batch, train=True)
    store, memory, calls = t.store, t.store.memory, {"launch": 0, "fetch": 0}
    keys, out = memory.send(batch), memory.empty((7, 8), np.float32)
    grads = Summands(memory.send(np.ones((7, 8), np.float32)))

    def counted(name, call):
        def count(*args):
            calls[name] += 1
            return call(*args)

        monkeypatch.setattr(memory, name, count)

    for name in calls:
        counted(name, getattr(memory, name))
    lease = store.reserve_batch(keys if over == "device" else batch)
    store.wait(lease)
    store.create(lease, 2)
    store.gather(lease, out, lease.inverse)
    store.apply(lease, grads, t.optimizer, t.optimizer.hyper(2), 2)
    store.release(lease)
    # dedupe 4, hold, stamp, gather, order 3 to 5, sums, update, settle; how many are distinct, and how many are missing
    assert calls["launch"] <= 14 and calls["fetch"] == 1


def test_device_batch_moves_no_more_than_its_missing_keys(fast, monkeypatch):
    n, new = 90, 3
    t = Table("t", 8, optimizer=Adam(), store=device_cached(host_memory(), "40KiB", fast))
    t.lookup(np.arange(n), train=True)
    store, memory, moved = t.store, t.store.memory, []
    keys = memory.send(np.arange(n + new))

    def spy(name):
        call = getattr(memory, name)

        def move(array, *args):
            moved.append(np.dtype(array.dtype).itemsize * int(np.prod(array.shape)))
            return call(array, *args)

        monkeypatch.setattr(memory, name, move)

    spy("fetch")
    if fast != "cpu":  # whose `fetch` calls it
        spy("send")
    lease = store.reserve_batch(keys)
    assert moved == [12, 16 * new]  # how many; and which, with their counts
    assert store.create(lease, 2) == new
    store.release(lease)
    # Counts; positions, keys and slots of what is missing, some of them for each of its steps; and nothing of the rest.
    assert max(moved) <= 8 * 3 * new and sum(moved) < 8 * n
    t.close()


def test_device_point_is_the_rows_of_its_instant(fast):
    t = train(Table("t", 5, store=cached(fast, policy="lru", dim=5)))
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


def test_device_admission_and_eviction_equal_host(fast):
    def run(store):
        exported, rng = [], np.random.default_rng(0)
        t = Table(
            "t", 5, store=store, admission=CountAdmission(2), default=0.5, padding_key=1,
            eviction=[IdleSteps(3), MaxRows(50)], evict_every=2, on_evict=lambda c: exported.append(c.row.tobytes()),
        )  # fmt: skip
        rows = []
        for _ in range(8):
            keys = rng.zipf(1.1, 60) % 90
            rows.append(t.lookup(keys, train=True).tobytes())
            t.update(keys, rng.standard_normal((60, 5)).astype(np.float32))
            t.store.validate()
        t.evict()
        found = contents(t.store), {k: v.tolist() for k, v in t.admission.state().items()}, t.stats()["ignored_updates"]
        t.close()
        return rows, exported, found

    assert run(cached(fast, policy="lru", dim=5)) == run(host_memory())


def test_device_eviction_by_metadata_moves_no_lines(fast, monkeypatch):
    n = 90
    t = Table("t", 8, store=device_cached(host_memory(), "40KiB", fast), eviction=[IdleSteps(2)])
    for step, keys in enumerate((np.arange(n), np.arange(n // 2), np.arange(n // 2), np.arange(9, n // 2))):
        t.lookup(keys, train=True)
        t.update(keys, np.ones((len(keys), 8), np.float32))
        if step == 0:
            t.commit()  # some are below, but older
    memory, fetch, fetched = t.store.memory, t.store.memory.fetch, []

    def spy(array, out=None):
        fetched.append(np.dtype(array.dtype).itemsize * int(np.prod(array.shape)))
        return fetch(array, out)

    def moved(*args):
        raise AssertionError("a line left the device")

    with monkeypatch.context() as m:
        m.setattr(memory, "fetch", spy)
        m.setattr(t.store._lines, "depart", moved)
        assert t.evict(part=(0, 2)) + t.evict(part=(1, 2)) == n // 2
    # Keys and metadata of what is dirty; slots of the victims; and, on a device, how many there are.
    counts = [a for a in fetched if fast != "cpu" and a == fetched[0]]
    assert sum(fetched) - sum(counts) <= 24 * (n // 2) + 8 * n // 2
    assert len(t) == n - n // 2 and not t.store.has(np.arange(n // 2, n)).any()
    t.store.validate()
    t.close()


def test_device_tier_of_a_sharded_table_gives_what_memory_gives(fast):
    def act(transport, on_device):
        store = device_cached(host_memory(), "64KiB", fast) if on_device else host_memory()
        c = Sharded(Collection([Table("t", 4, optimizer=Adam(lr=0.1), store=store)]), transport, "int8")
        rng = np.random.default_rng(transport.rank)
        for _, staged in lookahead([{"t": rng.integers(0, 90, 20)} for _ in range(4)], c, 2):
            staged.apply({"t": np.cos(staged.outputs()["t"])})
        return contents(c.tables["t"].store)

    want = run_ranks(lambda t: act(t, False), Loopback.group(2, 60))
    # One of the ranks alone: Numba's simulator is not made for several threads.
    assert run_ranks(lambda t: act(t, t.rank == 1), Loopback.group(2, 60)) == want


# --- pins, policies, threads --------------------------------------------------------------------------------------


def misses(table, keys):
    before = table.stats()["misses"]
    table.lookup(keys)
    return table.stats()["misses"] - before


@on_twin
def test_device_pins_leased_rows_until_released_or_forgotten():
    t = Table("t", 4, store=cached("cpu", 3.0, dim=4))
    t.lookup(np.arange(2000), train=True)
    held = t.request(np.arange(10))
    held.fetch()
    for let_go in (held.close, lambda: None):
        for i in range(10, 1500, 10):
            t.lookup(np.arange(i, i + 10))
        assert misses(t, np.arange(10)) == 0
        let_go()
        held.close()
        held = t.request(np.arange(10))
        held.fetch()
    del held
    for i in range(10, 1900, 10):
        t.lookup(np.arange(i, i + 10))
    assert misses(t, np.arange(10)) > 0
    t.store.validate()


@on_twin
def test_device_keeps_what_is_used_most_or_last():
    often, rest = np.arange(40), np.arange(1000, 3000)
    for policy, stay in (("lfu", often), ("lru", rest[-20:])):
        t = Table("t", 4, store=cached("cpu", 4.0, policy=policy, dim=4))
        t.lookup(np.concatenate([often, rest]), train=True)
        for _ in range(20):
            t.lookup(often)
        for i in range(0, 400, 20):
            t.lookup(rest[-400 + i :][:20])
        assert misses(t, stay) <= 2
        t.close()


@on_twin
def test_device_keys_of_announced_batches_stay():
    t = Table("t", 4, store=cached("cpu", 10.0, policy="lru", dim=4))
    t.lookup(np.arange(3000), train=True)
    soon = np.arange(60)
    t.lookup(soon)
    here = soon[t.store._find(soon) >= 0]  # most of them
    lease = t.store.reserve(soon, np.ones(60, np.int64), ahead=True)
    for i in range(100, 2000, 20):
        t.lookup(np.arange(i, i + 20))
    lost = np.count_nonzero(t.store._find(here) < 0)
    assert len(here) > 50 and lost < 6  # a bucket may have more of them than it can keep
    t.store.release(lease)
    t.lookup(soon)
    forgotten = t.store.reserve(soon, np.ones(60, np.int64), ahead=True)
    del forgotten
    for i in range(100, 2000, 20):
        t.lookup(np.arange(i, i + 20))
    assert misses(t, soon) > 30  # nobody wants them any more


@on_twin
def test_device_batch_that_pins_all_streams_until_pins_are_gone():
    t = Table("t", 4, store=cached("cpu", 3.0, dim=4))
    n = t.stats()["cache_lines"]
    t.lookup(np.arange(4 * n), train=True)
    first, second = (t.request(np.arange(i * 2 * n, (i + 1) * 2 * n)) for i in range(2))
    first.fetch()
    second.fetch()
    assert t.stats()["side_rows"] > 0
    first.close()
    second.wait()  # which brings what found no line before
    assert np.count_nonzero(second._lease.slots < 2**40) > n // 2
    second.close()
    t.lookup(np.arange(5))
    t.lookup(np.arange(n, n + 5))
    assert t.stats()["side_rows"] == 0 and t.stats()["streamed_rows"] > 0
    t.store.validate()


@on_twin
def test_device_only_changed_rows_are_written_below():
    t = Table("t", 4, store=cached("cpu", 2.0, DictPlace(50), dim=4))
    t.lookup(np.arange(400), train=True)
    t.commit()
    t.store.below.write = None  # none may be
    for i in range(20):
        t.lookup(np.arange(i * 20, i * 20 + 20))
    assert t.stats()["evictions"] > 300
    t.commit()


@on_twin
def test_device_steps_go_on_while_rows_are_fetched():
    t = Table("t", 4, store=cached("cpu", 8.0, DictPlace(10), dim=4))
    t.lookup(np.arange(1000), train=True)
    near = np.arange(10)
    t.lookup(near)
    away, home = np.setdiff1d(np.arange(900, 990), t.store._index.contents()[0]), t.store.below.home
    home.gate.clear()
    request = t.request(away)
    fetching = threading.Thread(target=request.fetch)
    fetching.start()
    while not home.reading:
        pass
    before = t.lookup(near)
    t.update(near, np.ones((10, 4)))  # needs nothing that is not there
    assert fetching.is_alive() and (t.lookup(near) < before).all()
    threading.Timer(0.02, home.gate.set).start()
    request.rows()
    fetching.join()
    assert t.stats()["late_rows"] >= len(away) and t.stats()["waited_s"] > 0.01
    request.close()
    t.store.validate()


@on_twin
@pytest.mark.parametrize(("new", "waits"), [(0, 2), (5, 3)], ids=["resident", "absent"])
def test_device_steps_go_on_while_a_batch_ahead_waits_for_the_device(new, waits, monkeypatch):
    t = Table("t", 4, store=cached("cpu", 8.0, dim=4))
    near = np.arange(40)
    t.lookup(near, train=True)
    fetch, arrived, passed = t.store.memory.fetch, threading.Semaphore(0), threading.Semaphore(0)

    def slow(array, out=None):
        if threading.current_thread() is fetching:
            arrived.release()
            assert passed.acquire(timeout=30)
        return fetch(array, out)

    monkeypatch.setattr(t.store.memory, "fetch", slow)
    found = []

    def ahead():
        found.append(Request(t, [np.arange(40 + new)], ahead=True))
        found[0].fetch()

    fetching = threading.Thread(target=ahead)
    fetching.start()
    for _ in range(waits):  # for how many keys there are, how many are missing, and which
        assert arrived.acquire(timeout=30)
        before = t.lookup(near)
        t.update(near, np.ones((40, 4)))
        assert (t.lookup(near) < before).all()
        passed.release()
    fetching.join(30)
    assert not fetching.is_alive() and np.array_equal(found[0].rows()[:40], t.lookup(near))
    fetching = threading.Thread(target=lambda: found.append(t.store.all_finite(np.ones((3, 4), np.float32))))
    fetching.start()
    assert arrived.acquire(timeout=30)
    t.lookup(near)  # as rows of another batch may come, while gradients are waited for
    passed.release()
    fetching.join(30)
    assert found[1] is True
    found[0].close()
    t.store.validate()


@on_twin
@pytest.mark.parametrize("below", ["host", "cache"])
@pytest.mark.parametrize("times", [1.0, 4.0])
def test_device_threads_look_up_and_update_at_once(times, below):
    store = cached("cpu", times, {"host": host_memory(), "cache": DictPlace(40, delay=0.0002)}[below], dim=4)
    t = Table("t", 4, optimizer=SGD(lr=1.0), initializer=Constant(0.0), store=store)
    t.lookup(np.arange(300), train=True)
    failures, going = [], threading.Event()
    going.set()

    def beside(act):
        def run():
            rng = np.random.default_rng(0)
            try:
                while going.is_set():
                    act(rng)
            except BaseException as e:
                failures.append(e)

        return threading.Thread(target=run)

    def look(rng):
        rows = t.lookup(rng.integers(0, 300, 30))
        assert (rows == rows[:, :1]).all() and (rows <= 0).all()  # all of a row or none of it

    def ahead(rng):
        requests = [t.request(rng.integers(0, 300, 30)) for _ in range(4)]
        for r in requests:
            r.fetch()
        for r in requests[:3]:
            r.close()

    def others(rng):  # keys that come and go
        keys = rng.integers(1000, 1100, 30)
        t.lookup(keys, train=True)
        t.store.erase(keys[:10])
        t.commit()

    def point(rng):
        with closing(t.store.point()) as p:
            for c in p.scan():
                assert (c.row == c.row[:, :1]).all()

    def look_at_others(rng):
        t.lookup(rng.integers(1000, 1100, 60))

    threads = [beside(act) for act in (look, ahead, ahead, others, look_at_others, point)]
    for thread in threads:
        thread.start()
    rng, n = np.random.default_rng(9), np.zeros(300)
    for _ in range(40):
        keys = rng.integers(0, 300, 30)
        t.update(keys, np.ones((30, 4)))
        np.add.at(n, keys, 1)
    going.clear()
    for thread in threads:
        thread.join()
    assert not failures, failures
    t.store.validate()
    assert np.array_equal(t.lookup(np.arange(300)), np.repeat(-n[:, None], 4, axis=1))
    t.close()


@pytest.mark.parametrize("budget", ["16KiB", "100KiB"], ids=["streams", "resident"])
def test_device_batches_come_ahead_in_threads_while_steps_and_evictions_go_on(budget, fast):
    def run(store, depth):
        t = Table("t", 8, optimizer=Adam(lr=0.1), store=store, eviction=[IdleSteps(4)], evict_every=3)
        rng = np.random.default_rng(0)
        for _, staged in lookahead([{"t": rng.zipf(1.2, 300) % 400} for _ in range(8)], Collection([t]), depth):
            staged.apply({"t": np.cos(staged.outputs()["t"])})
        found = contents(t.store)
        t.close()
        return found

    want = run(host_memory(), 0)
    assert run(device_cached(host_memory(), budget, fast), 4) == want


@on_twin
def test_device_deep_lookahead_of_several_threads_equals_host():
    def run(store):
        t = Table("t", 4, optimizer=Adam(), store=store)
        rng, read = np.random.default_rng(4), []
        batches = [rng.zipf(1.2, 80) % 500 for _ in range(24)]
        requests = [t.request(b) for b in batches]
        threads = [threading.Thread(target=lambda i=i: [r.fetch() for r in requests[i::3]]) for i in range(3)]
        for thread in threads:
            thread.start()
        for r in requests:
            r.wait()
            r.create(True, t.step + 1)
            rows = r.rows()
            read.append(rows.tobytes())
            r.update(np.sin(rows[r.inverse]), None, None, t.step + 1)
            t.step += 1
            r.close()
        for thread in threads:
            thread.join()
        t.store.validate()
        return read, contents(t.store)

    want = run(host_memory())
    for times in (1.0, 3.0, 10.0):
        for below in (host_memory(), DictPlace(30, delay=0.0005)):
            assert run(cached("cpu", times, below, dim=4, optimizer=Adam())) == want


# --- failures -----------------------------------------------------------------------------------------------------

WRONG = errors.StorageError("cannot do it: test", remedy="none")


@on_twin
def test_device_a_failing_read_below_leaves_everything_as_it_was():
    t = Table("t", 4, store=cached("cpu", 2.0, DictPlace(5), dim=4))
    t.lookup(np.arange(400), train=True)
    want = contents(t.store)
    t.store.below.home.fail["read"] = WRONG
    away = np.setdiff1d(np.arange(400), t.store._index.contents()[0])
    for use in (
        lambda: t.lookup(np.arange(400)),
        lambda: t.lookup(away[:20], train=True),
        lambda: t.update(away[:20], np.ones((20, 4))),
        lambda: t.request(away).fetch(),
    ):
        with pytest.raises(errors.StorageError, match="cannot do it"):
            use()
        t.store.validate()
    del t.store.below.home.fail["read"]
    assert contents(t.store) == want
    t.commit()  # nothing was changed in part


def refusing(monkeypatch, store, *names, error):
    """Within, calls of the store below raise."""

    def refuse(*args):
        raise error

    context = monkeypatch.context()
    with context as m:
        for name in names:
            m.setattr(store.below, name, refuse)
        yield


@on_twin
@pytest.mark.parametrize("error", [WRONG, MemoryError("test")], ids=["disk", "memory"])
def test_device_victims_that_the_store_below_refuses_get_their_lines_back(error, monkeypatch):
    ours, host = (Table("t", 4, store=store) for store in (cached("cpu", 2.0, dim=4), host_memory()))
    for t in (ours, host):
        t.lookup(np.arange(300), train=True)
    for use in (
        lambda away: ours.request(away[:20]).fetch(),
        lambda away: ours.lookup(away),
        lambda away: ours.store.create(ours.request(np.arange(300, 400))._lease, 9),
        lambda away: list(ours.store.scan()),
        lambda away: ours.commit(),
    ):
        here = np.sort(ours.store._index.contents()[0])
        away = np.setdiff1d(np.arange(300), here)
        for t in (ours, host):
            t.update(here, np.ones((len(here), 4)))  # all that is near is dirty
        for _ in refusing(monkeypatch, ours.store, "write", error=error):
            with pytest.raises(type(error)):
                use(away)
            gc.collect()
            ours.store.validate()
        assert len(ours) == 300 and contents(ours.store) == contents(host.store)


@on_twin
@pytest.mark.parametrize("name", ["create", "write"])
def test_device_a_failed_creation_makes_and_counts_nothing(name, monkeypatch):
    class Counting(Every):
        undone = 0

        def undo(self):
            self.undone += 1

    ours, host = (Table("t", 4, store=store) for store in (cached("cpu", 2.0, dim=4), host_memory()))
    for t in (ours, host):
        t.lookup(np.arange(10), train=True)
    keys, admission = np.arange(100, 600), Counting()
    for _ in refusing(monkeypatch, ours.store, name, error=MemoryError("test")):
        lease = ours.store.reserve(keys, np.ones(500, np.int64))
        with pytest.raises(MemoryError):
            ours.store.create(lease, 1, admission)
        ours.store.release(lease)
        ours.store.validate()
    assert admission.undone == 1
    assert contents(ours.store) == contents(host.store) and len(ours) == 10
    ours.commit()


@on_twin
def test_device_a_failing_write_refuses_the_commit_only_where_a_change_was_cut():
    t = Table("t", 4, store=cached("cpu", 2.0, dim=4))
    t.lookup(np.arange(300), train=True)
    apply = t.store.below.apply

    def failing(*args):
        raise WRONG

    t.store.below.apply = failing
    with pytest.raises(errors.StorageError):
        t.update(np.arange(300), np.ones((300, 4)))
    t.store.below.apply = apply
    with pytest.raises(errors.StorageError, match="in part"):
        t.commit()
    t.store.validate()
    t.lookup(np.arange(300))  # reading goes on


def test_device_lost_in_an_update_leaves_what_is_below(monkeypatch, device):
    t = Table("t", 4, optimizer=Adagrad(), store=device_cached(host_memory(), "16KiB", device))
    t.lookup(np.arange(8), train=True)
    t.commit()
    want = contents(t.store.below)

    def lost(*args, **kwargs):
        raise errors.DeviceUnavailable("the device failed: it fell off the bus", device="cuda:0", remedy="nvidia-smi")

    with monkeypatch.context() as m:
        lease = t.request(np.arange(4))
        lease.fetch()
        at = t.store._lines if device == "cpu" else t.store.memory
        for name in ("apply", "apply_segments") if device == "cpu" else ("launch",):
            m.setattr(at, name, lost)
        with pytest.raises(errors.DeviceUnavailable, match="fell off"):
            lease.update(np.ones((4, 4), np.float32), None, None, 2)
    lease.close()
    with pytest.raises(errors.StorageError, match="only in part"):
        t.commit()
    assert contents(t.store.below) == want
    t.close()


@pytest.mark.parametrize("times", [1.0, 8.0])
def test_device_updates_named_columns_as_host_does(times, fast):
    kind = {"columns": {"a": Column(1, optimizer=SGD()), "b": Column(3, optimizer=AdagradDecay())}}
    ours, host = Table("t", store=cached(fast, times, **kind), **kind), Table("t", **kind)
    keys = np.arange(40)
    for t in (ours, host):
        t.lookup(keys, train=True)
        t.update(keys, {"a": np.ones((40, 1)), "b": np.full((40, 3), 0.5)})
    assert contents(ours.store) == contents(host.store)
    ours.close()


def test_device_budget_too_small_says_what_would_do(device):
    enough = least(device, dim=64)
    assert Table("t", 64, store=device_cached(host_memory(), enough, device)).stats()["cache_lines"] >= 32
    with pytest.raises(errors.BudgetExceeded):
        Table("t", 64, store=device_cached(host_memory(), enough - 1, device))


def test_device_does_not_take_a_batch_by_position_that_it_has_not_deduped(device):
    t = Table("t", 4, store=device_cached(host_memory(), "16KiB", device))
    t.lookup([1], train=True)
    lease = t.store.reserve(np.array([1]), np.array([1]))
    with pytest.raises(errors.InvalidArgument, match="reserve_batch"):
        t.store.apply(lease, Summands(np.ones((1, 4), np.float32)), t.optimizer, t.optimizer.hyper(1), 1)
    t.store.release(lease)


def test_device_that_is_closed_says_so(device):
    t = Table("t", 4, store=device_cached(host_memory(), "16KiB", device))
    request = t.request([1, 2])
    t.close()
    t.close()
    request.close()
    for use in (
        lambda: t.lookup([1]),
        t.store.stats,
        t.commit,
        lambda: t.store.scan(),
        lambda: t.store.has(np.ones(1, np.int64)),
    ):
        with pytest.raises(errors.Closed, match="table t"):
            use()


def test_device_that_does_not_exist_is_unavailable(device):
    if device == "cpu":
        pytest.skip("lane cpu: there is always one")
    with pytest.raises(errors.DeviceUnavailable, match="cuda:99"):
        Table("t", 4, store=device_cached(host_memory(), device="cuda:99"))


@pytest.mark.parametrize(("device", "policy", "what"), [("tpu:0", "lfu", "tpu:0"), ("cpu", "tinylfu", "lfu, lru")])
def test_device_name_and_policy_are_checked(device, policy, what):
    with pytest.raises(errors.InvalidArgument, match=what):
        Table("t", 4, store=device_cached(host_memory(), device=device, policy=policy))


without = pytest.mark.skipif(None in map(missing, ("cudasim", "soft", "cuda")), reason="there is a CUDA device")


@without
def test_device_absent_is_unavailable_and_names_the_remedy(tmp_path):
    with pytest.raises(errors.DeviceUnavailable, match=r"hbkit\[cuda\].*another store"):
        Table("t", 4, store=device_cached(cached_ssd(tmp_path)))
    assert list(tmp_path.iterdir()) == []  # the store below was not touched


@without
def test_auto_without_a_device_is_the_store_below_and_says_so_once(caplog):
    for name in "tu":
        t = Table(name, 4, store=device_cached(host_memory(), device="auto"))
        assert t.stats()["tier"] == Table("h", 4).stats()["tier"]
    said = [r.message for r in caplog.records if "below the device tier" in r.message]
    assert len(said) == 1 and "hbkit[cuda]" in said[0]


def test_auto_with_a_device_is_the_device(device):
    if device == "cpu":
        pytest.skip("lane cpu: it is asked for by its name")
    assert Table("t", 4, store=device_cached(host_memory(), "16KiB", device="auto")).stats()["device"] == "cuda:0"
