"""The device tier against host memory, bit for bit: its twin in host memory at real sizes, Numba's simulator at small
ones, and a real device where there is one.

The simulator is chosen before Numba is imported, so this file runs itself once more in a process of its own.
"""

import gc
import importlib.util
import os
import threading
from contextlib import closing

import numpy as np
import pytest
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
from hbkit.snapshot import load, save
from hbkit.store import cached_ssd, device_cached, host_memory
from hbkit.store.base import Chunk
from hbkit.store.device import Summands

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
LANES = {"cpu": "cpu", "cudasim": "cuda:0", "cuda": "cuda:0"}


def missing(lane):
    """Why a lane can't run in this process, or None."""
    if (lane == "cudasim") != SIMULATED:
        return "the simulator runs in a process of its own"
    if importlib.util.find_spec("numba") is None:
        return "Numba is not installed"
    if lane == "cuda":
        from numba import cuda

        return None if cuda.is_available() else "no CUDA device"
    return None


@pytest.fixture(scope="module", params=LANES)
def device(request):
    """The lane's device; lanes are skipped by name where they are not there."""
    why = missing(request.param)
    if why:
        pytest.skip(f"lane {request.param}: {why}")
    return LANES[request.param]


# Tests that are too large for the simulator, and need no device.
on_twin = pytest.mark.skipif(missing("cpu") is not None, reason=f"lane cpu: {missing('cpu')}")


@pytest.mark.skipif(SIMULATED, reason="this is the simulator")
def test_device_tier_in_the_simulator(in_simulator):
    in_simulator(__file__)


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
    if SIMULATED and (type(optimizer), dtype) not in ((RowWiseAdagrad, "float32"), (Adam, "bfloat16")):
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
def test_device_any_acts_equal_host(
    seed, acts, times, below, policy, optimizer, dim, dtype, metadata, min_count
):
    place = cached(
        "cpu", times, below and DictPlace(below), policy, dim=dim, dtype=dtype, optimizer=optimizer, metadata=metadata
    )
    ours, theirs = (
        any_table(store, optimizer, dim, dtype, metadata, min_count) for store in (place, host_memory())
    )
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
        read = [[b"".join(np.ascontiguousarray(c).tobytes() for c in chunk) for chunk in p.scan()] for p in self.points]
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
            if ours.fetched:
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
