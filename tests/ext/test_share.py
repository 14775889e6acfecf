"""Calls that several threads share: the same bits for any number of them, in forks, and where there are no more."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbkit._ext import share
from hbkit._ext.index import Index
from hbkit._ext.metadata import Metadata
from hbkit._ext.pool import fail_allocation
from hbkit._ext.segment import Segments, expand, pool
from hbkit._ext.slabs import ROW_DTYPES, Slabs, n_state
from hbkit._ext.together import Together
from hbkit.embedding import Adam, RowWiseAdagrad, Table
from hbkit.errors import InvalidArgument
from hbkit.store.together import Together as Stores

SEED = st.integers(0, 2**32)
DIMS = st.sampled_from([1, 3, 16, 17, 32, 64, 129])
RULES = st.integers(0, 7)
HYPER = np.array([0.05, 0.5, 0.9, 0.1, 0.7, 1e-8, 0.99], np.float32)


@pytest.fixture(scope="module", autouse=True)
def restored():
    before = share.n_threads()
    yield
    share.use(before)


def by_all(run):
    """What ``run()`` gives with one thread in one piece, if 2, 3 and 8 threads with small pieces give the same bits."""
    share.use(1, 1 << 60)
    want = run()
    for n in (1, 2, 3, 8):
        share.use(n, 1)
        for a, b in zip(want, run(), strict=True):
            np.testing.assert_array_equal(
                np.ascontiguousarray(a).view(np.uint8), np.ascontiguousarray(b).view(np.uint8)
            )
    return want


def lines_of(slabs, n):
    out = np.zeros((n, slabs.width), np.float32)
    slabs.read(np.arange(n), out)
    return out


@settings(max_examples=60)
@given(SEED, st.integers(0, 70), DIMS, st.sampled_from(list(ROW_DTYPES)), st.sampled_from([0, 1, 5, 32]))
def test_shared_lines_are_read_and_written_as_by_one(seed, n, dim, dtype, state):
    rng = np.random.default_rng(seed)
    slots, keys = rng.permutation(80)[:n], rng.integers(0, 2**62, n)
    lines, begin = rng.standard_normal((80, dim + state), np.float32), rng.standard_normal(state, np.float32)
    rows, states = np.ascontiguousarray(lines[:n, :dim]), np.ascontiguousarray(lines[:n, dim:])
    some, index = np.where(rng.random(n) < 0.2, -1, slots), rng.integers(0, max(n, 1), 2 * n)
    freq, steps, counts = (rng.integers(0, 2**33, n) for _ in range(3))

    def run():
        slabs = Slabs(dim + state, 1 << 12, dim=dim, row_dtype=dtype)
        slabs.reserve(80)
        slabs.scatter(np.arange(80), lines)
        found = [np.zeros((n, dim + state), np.float32), np.zeros((2 * n, dim), np.float32)]
        slabs.gather(some, found[0])
        slabs.gather(some, found[1], index)
        slabs.write(some, lines[:n])
        found.append(lines_of(slabs, 80))
        slabs.put(slots, rows, states)
        slabs.fill(slots[: n // 2], keys[: n // 2], [("normal", 0, 1, 7, 0, dim)], begin)
        found.append(lines_of(slabs, 80))
        metadata = Metadata()
        metadata.reserve(80)
        metadata.put(np.arange(80), np.zeros(80, np.int64), np.zeros(80, np.int64))
        metadata.put(some, freq, steps)
        found.append(np.array([metadata.stamp(some, 9, counts), metadata.latest]))
        return [*found, *metadata.get(np.arange(80))]

    by_all(run)


@settings(max_examples=60)
@given(SEED, st.integers(1, 200), st.integers(1, 40), DIMS, st.booleans(), st.booleans())
def test_shared_sums_and_lookups_are_those_of_one(seed, n, n_rows, dim, weighted, scaled):
    rng = np.random.default_rng(seed)
    u = int(rng.integers(1, n + 1))
    segment, values = rng.geometric(0.1, n) % u, rng.standard_normal((n, dim), np.float32)
    splits = np.r_[0, np.sort(rng.integers(0, n + 1, n_rows - 1)), n].astype(np.int64)
    weight = rng.standard_normal(n, np.float32) if weighted else None
    scale = rng.standard_normal(n_rows, np.float32) if scaled else None
    keys = np.where(rng.random(n) < 0.3, -segment - 1, segment) * 7919
    rows = rng.standard_normal((u, dim), np.float32)

    def run():
        slabs, index = Slabs(dim, 1 << 12, dim=dim), Index()
        slots = index.find_or_insert(np.arange(u) * 7919)[0]
        slabs.reserve(u)
        slabs.scatter(slots, rows)
        outs = [np.zeros((n_rows, dim), np.float32) for _ in range(3)]
        pool(rows, segment, splits, outs[0], weight, scale)
        slabs.pool(slots, segment, splits, outs[1], weight, scale)
        slabs.lookup_pooled(index, keys, splits, outs[2], weight, scale)
        outs.append(np.zeros((n, dim), np.float32))
        slabs.lookup(index, keys, outs[-1])
        grads = Segments(segment, u).of(values, scale=weight)
        first, last = u // 3, u - u // 4
        return [*outs, grads.sum(), grads.part(first, last).sum(), expand(rows, segment), index.find(keys)]

    by_all(run)


@settings(max_examples=80)
@given(SEED, st.integers(1, 150), DIMS, st.sampled_from(list(ROW_DTYPES)), RULES, st.sampled_from(["sums", "array"]),
       st.sampled_from([0.0, 0.5]))  # fmt: skip
def test_shared_updates_are_those_of_one(seed, n, dim, dtype, rule, kind, clip):
    """Every rule and row type, with gradients to be summed or not, some of which are not finite and left out."""
    rng = np.random.default_rng(seed)
    u = int(rng.integers(1, n + 1))
    segment = np.r_[np.arange(u), rng.geometric(0.1, n - u) % u]
    values = rng.standard_normal((n, dim), np.float32)
    values[rng.random(n) < 0.1] = np.inf
    lines = abs(rng.standard_normal((u, dim + n_state(rule, dim, True)), np.float32))
    slots, keys = np.where(rng.random(u) < 0.2, -1, rng.permutation(u)), rng.integers(0, 2**62, u)
    hyper = np.r_[HYPER, np.zeros(2, np.float32), np.float32(clip)]

    def run():
        slabs = Slabs(lines.shape[1], 1 << 12, dim=dim, row_dtype=dtype)
        slabs.reserve(u)
        slabs.scatter(np.arange(u), lines)
        grads = Segments(segment, u).of(values) if kind == "sums" else values[:u]
        left_out = slabs.apply(rule, slots, grads, hyper, keys, seed=5, step=3, bad="skip")
        return [lines_of(slabs, u), np.array(left_out)]

    by_all(run)


@settings(max_examples=40)
@given(SEED, st.lists(st.tuples(st.integers(1, 4), st.integers(1, 60)), min_size=1, max_size=7), st.booleans(), DIMS)
def test_shared_passes_over_tables_are_those_of_one(seed, sizes, stacked, dim):
    """Tables of several features and sizes, stacked or not; two steps, the second with absent keys."""
    rng = np.random.default_rng(seed)
    if stacked:
        sizes = [(k, 30) for k, _ in sizes]
    keys = [[rng.geometric(0.05, k * n) * 7919 for k, n in sizes] for _ in range(2)]
    n_features = sum(k for k, _ in sizes)
    places = [(0, i * dim) if stacked else (i, 0) for i in range(n_features)]
    rows = [n for k, n in sizes for _ in range(k)]
    shapes = [(30, n_features * dim)] if stacked else [(n, dim) for n in rows]
    grads = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    optimizers = [Adam(lr=0.1) if i % 2 else RowWiseAdagrad(lr=0.1) for i in range(len(sizes))]

    def run():
        tables = [Table(f"t{i}", dim, optimizer=o, dtype="float32") for i, o in enumerate(optimizers)]
        found = []
        for step, batch in enumerate(keys):
            batch = Stores([t.store for t in tables], batch, places, [n for _, n in sizes])
            outs = [np.full(shape, np.nan, np.float32) for shape in shapes]
            if step == 0:
                batch.create(1, [None] * len(tables), outs)
            else:
                batch.gather(outs)
            found += [*outs, np.array(batch.sum(grads))]
            batch.apply(optimizers, [o.hyper(step + 1) for o in optimizers], step + 1)
        for t in tables:
            t.store.validate()
            found += [np.concatenate(column) for column in zip(*t.store.scan(), strict=True)]
        return found

    by_all(run)


def test_shared_passes_of_given_rows_are_those_of_one():
    """Rows that lie elsewhere, and keys that stand for several occurrences."""
    rng = np.random.default_rng(0)
    keys, stands = rng.integers(0, 50, 300), rng.integers(1, 5, 300)
    rows, grads = rng.standard_normal((50, 8), np.float32), rng.standard_normal((300, 8), np.float32)

    def run():
        batch = Together([8], [keys], [(0, 0)], [300])
        out, counted = np.zeros((300, 8), np.float32), Together([8], [keys], [(0, 0)], [300], [stands])
        batch.gather([out], [np.ascontiguousarray(rows[: len(batch.keys[0])])])
        assert batch.sum([grads])
        assert not counted.sum([grads * np.float32(np.inf)])
        return [out, batch.sums()[0], batch.inverse(0), *batch.keys, *batch.counts, *counted.counts]

    by_all(run)


def test_shared_passes_without_memory_change_nothing(shared_by):
    """Whichever allocation fails, in whichever thread: no table has a new row, and the next try has all."""
    shared_by(3)
    rng = np.random.default_rng(0)
    keys = [rng.integers(0, 2**62, 300) for _ in range(4)]
    for nth in range(1, 2000, 5):
        tables = [Table(f"t{i}", 4) for i in range(4)]
        batch = Stores([t.store for t in tables], keys, [(0, 4 * i) for i in range(4)], [300] * 4)
        out = np.zeros((300, 16), np.float32)
        fail_allocation(nth)
        try:
            batch.create(1, [None] * 4, [out])
            failed = False
        except MemoryError:
            failed = True
        came = fail_allocation(0) == 0
        assert failed == came
        for t in tables:
            t.store.validate()
            assert len(t) == (0 if failed else 300)
        if not came:
            break
        batch.create(1, [None] * 4, [out])
        assert [len(t) for t in tables] == [300] * 4 and out.any(1).all()
    else:
        pytest.fail("the last allocation was never reached")


def test_shared_lookups_raise_what_one_unit_finds_wrong(shared_by):
    shared_by(3)
    index, slabs = Index(), Slabs(4, dim=4, chunk_nbytes=1 << 6)
    index.find_or_insert(np.arange(1000))
    slabs.reserve(900)
    with pytest.raises(InvalidArgument, match="outside"):
        slabs.lookup(index, np.arange(1000), np.zeros((1000, 4), np.float32))
    with pytest.raises(InvalidArgument, match="outside"):
        slabs.lookup_pooled(index, np.arange(1000), np.arange(1001), np.zeros((1000, 4), np.float32))


def test_shared_calls_of_many_callers_do_not_mix(shared_by):
    """Callers at once, more than helpers: each gets its own rows."""
    shared_by(3)
    wrong = []

    def call(number):
        slabs, out = Slabs(16, dim=16), np.zeros((500, 16), np.float32)
        slabs.reserve(500)
        for i in range(200):
            lines = np.full((500, 16), 1000 * number + i, np.float32)
            slabs.scatter(np.arange(500), lines)
            slabs.gather(np.arange(500), out)
            if not (out == lines).all():
                wrong.append((number, i))

    callers = [threading.Thread(target=call, args=(number,)) for number in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def python(code, **env):
    """Runs code in a process of its own, from another directory than the checkout's; its output."""
    env = {k: v for k, v in os.environ.items() if k not in ("HBKIT_THREADS", "OMP_NUM_THREADS")} | env
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


SETUP = """
import os, resource, threading, numpy as np
from hbkit._ext import share
from hbkit._ext.slabs import Slabs
slabs, lines = Slabs(16, dim=16), np.arange(16000, dtype=np.float32).reshape(1000, 16)
slabs.reserve(1000)
slabs.scatter(np.arange(1000), lines)
out = np.zeros((1000, 16), np.float32)
def check():
    out[:] = 0
    slabs.gather(np.arange(1000), out)
    return (out == lines).all()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only where processes fork")
def test_forked_children_have_threads_of_their_own():
    """Also while another thread's call is under way in the parent, whose helpers the child does not have."""
    code = """
share.use(3, 1)
stop = threading.Event()
def work():
    mine = np.zeros((1000, 16), np.float32)
    while not stop.is_set():
        slabs.gather(np.arange(1000), mine)
workers = [threading.Thread(target=work) for _ in range(2)]
for w in workers: w.start()
for i in range(30):
    child = os.fork()
    if child == 0:
        os._exit(0 if all(check() for _ in range(20)) and len(os.listdir("/proc/self/task")) == 3 else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
for w in workers: w.join()
print(check())
"""
    assert python(SETUP + code, PYTHONWARNINGS="ignore::DeprecationWarning") == "True"


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_calls_need_no_other_thread():
    """Without memory for a thread's stack none is started, and the caller does it all; later they are."""
    code = """
def n(): return len(os.listdir("/proc/self/task"))
before = n()
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (1 << 20), -1))
share.use(4, 1)
print(check(), n() - before)
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
print(check(), n() - before)
share.use(2, 1)
print(check(), n() - before)
"""
    assert python(SETUP + code).split() == ["True", "0", "True", "3", "True", "3"]


def test_threads_are_as_many_as_the_environment_says():
    code = "from hbkit._ext import share; print(share.n_threads())"
    cpus = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), 16)
    assert python(code) == python(code, OMP_NUM_THREADS="many") == python(code, HBKIT_THREADS="") == str(cpus)
    assert python(code, OMP_NUM_THREADS="1") == "1"
    assert python(code, OMP_NUM_THREADS="3,2") == "3"
    assert python(code, OMP_NUM_THREADS="1", HBKIT_THREADS="5") == "5"
    assert python(code, HBKIT_THREADS="256") == "256"


@pytest.mark.parametrize("value", ["0", "-1", "257", "many", "1.5"])
def test_a_number_of_threads_that_is_none_is_refused(value):
    code = """
try:
    import hbkit._ext.share
except Exception as e:
    print(type(e).__name__, e)
"""
    said = python(code, HBKIT_THREADS=value)
    assert said.startswith("InvalidArgument") and "HBKIT_THREADS" in said and value in said
