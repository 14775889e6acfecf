"""Saving in the background: the commit is that of the instant, training is as if there were no save, failures surface,
and each commit of any interleaving equals one that a twin saved in the foreground."""

import shutil
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbkit import errors
from hbkit._ext import pool
from hbkit.embedding import SGD, Adagrad, Adam, BloomAdmission, Collection, CountAdmission, Ftrl, IdleSteps, Table
from hbkit.snapshot import Saving, load, rows, save, saving, verify
from hbkit.store import cached_ssd, device_cached, host_memory, point
from hbkit.store.line import Chunk


@pytest.fixture(autouse=True, scope="module")
def small():
    """Small parts, so that small tables have many; no rests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(point, "READ_ROWS", 4)
        patch.setattr(rows, "CHUNK_ROWS", 16)
        patch.setattr(saving, "REST", 0)
        yield


class Gate:
    """Holds up the writing of rows, a chunk at a time."""

    def __init__(self, monkeypatch):
        self.reached, self.go, self.left = threading.Event(), threading.Semaphore(0), 0
        self.open, self.failure = False, None
        inner = point.Point._chunk

        def chunk(this, keys):
            if threading.current_thread().name == "hbkit-save":
                self.reached.set()
                while not self.open and not self.go.acquire(timeout=0.01):
                    pass
                if self.failure is not None:
                    raise self.failure
            return inner(this, keys)

        monkeypatch.setattr(point.Point, "_chunk", chunk)


@pytest.fixture
def gate(monkeypatch):
    g = Gate(monkeypatch)
    yield g
    g.open = True


PLACES = {
    "host": lambda path: host_memory(),
    "ssd": lambda path: cached_ssd(path / "rows", "300KiB"),
    "device": lambda path: device_cached(host_memory(), "20KiB", "cpu"),
}


def make(place=None, **kwargs):
    return Table("t", 4, store=place, **{"optimizer": Adagrad(lr=0.1)} | kwargs)


def train(table, keys, seed=0):
    keys = np.array(keys)
    found = table.lookup(keys, train=True)
    table.update(keys, np.random.default_rng(seed).standard_normal((len(keys), table.dim)))
    return found.tobytes()


def contents(table):
    chunks = list(table.store.scan())
    found = [np.concatenate(columns).tobytes() for columns in zip(*chunks, strict=True)] if chunks else []
    counts = None
    if table.admission is not None:
        counts = {name: column.tolist() for name, column in table.admission.state().items()}
    return found, counts, table.step


def tree(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*.*")}


ACTS = ["train", "train", "train", "create", "erase", "put", "evict", "lookup", "full", "delta", "older", "let", "load"]
RULES = [SGD(lr=0.1), SGD(lr=0.1, momentum=0.9), Adagrad(lr=0.1), Adam(), Ftrl(lr=0.1)]


@pytest.mark.parametrize("tier", PLACES)
@settings(max_examples=20)
@given(
    acts=st.lists(
        st.tuples(st.sampled_from(ACTS), st.lists(st.integers(-9, 50), min_size=1, max_size=12)),
        min_size=8, max_size=24,
    ),
    rule=st.sampled_from(RULES), dtype=st.sampled_from(["float32", "bfloat16"]), metadata=st.sampled_from([True, 3, 0]),
    admission=st.sampled_from([None, CountAdmission(2), BloomAdmission(2, 50)]),
)  # fmt: skip
def test_commits_are_those_of_a_twin_saved_in_the_foreground(
    tmp_path_factory, tier, acts, rule, dtype, metadata, admission
):
    """`ours` is saved in the background, while it trains; `twin` is trained alike and saved in the foreground."""
    root = tmp_path_factory.mktemp("background")
    kwargs = {"optimizer": rule, "dtype": dtype, "metadata": bool(metadata), "admission": admission}
    kwargs["eviction"] = [IdleSteps(2)] if metadata else []
    ours, twin = make(PLACES[tier](root), **kwargs), make(**kwargs)
    expected, last = {}, None
    with pytest.MonkeyPatch.context() as patch:
        gate = Gate(patch)
        for n, (act, keys) in enumerate([("train", range(30)), *acts]):
            if act in ("full", "delta", "older", "load") and last is not None:
                gate.open = True
                last.wait()
                gate.open, last = False, None
            base = {"delta": "latest", "older": sorted(expected)[keys[0] % len(expected)] if expected else None}.get(
                act
            )
            if act in ("full", "delta", "older") and (base is None or expected):
                last = save(root / "ours", [ours], n, base=base, background=True, state={"n": n})
                commit = save(root / "twin", [twin], n, base=base, state={"n": n})
                expected[commit] = contents(twin)
                continue
            if act == "load" and expected:
                commit = sorted(expected)[keys[0] % len(expected)]
                for table, where in ((ours, "ours"), (twin, "twin")):
                    load(root / where, [table], commit)
            for table in (ours, twin):
                if act == "train":
                    train(table, keys, n)
                elif act == "create":
                    table.lookup(keys, train=True)
                elif act == "erase":
                    table.store.erase(np.unique(keys))
                elif act == "put":
                    k = np.unique(keys)
                    n_state = table.store.layout.width - 4
                    values = np.full((len(k), 4), n, np.float32), np.full((len(k), n_state), 1, np.float32)
                    table.store.put(Chunk(k, k, np.full(len(k), table.step), *values))
                elif act == "evict":
                    table.evict()
                elif act == "lookup":
                    table.lookup(keys)
            if act == "let":  # some of it is written
                for _ in range(len(keys)):
                    gate.go.release()
        gate.open = True
        if last is not None:
            last.wait()
        assert contents(ours) == contents(twin)
        ours.close()
    if expected:
        assert [c.id for c in verify(root / "ours")] == sorted(expected)
        found, same = make(**kwargs), make(**kwargs)
        for commit, want in expected.items():
            load(root / "ours", [found], commit)
            load(root / "twin", [same], commit)
            assert contents(found) == want == contents(same)
        assert tree(root / "ours") == tree(root / "twin")  # byte for byte
    shutil.rmtree(root)


@pytest.mark.parametrize("tier", PLACES)
def test_training_goes_on_while_a_slow_save_writes(tier, tmp_path, gate):
    ours, alone = make(PLACES[tier](tmp_path)), make()
    for table in (ours, alone):
        train(table, range(100))
    save(tmp_path / "foreground", [ours], 1)
    going = save(tmp_path / "background", [ours], 1, background=True)
    assert isinstance(going, Saving) and gate.reached.wait(30) and not going.done
    got = [train(ours, np.arange(n, n + 60), n) for n in range(40)]
    assert not going.done
    assert got == [train(alone, np.arange(n, n + 60), n) for n in range(40)]
    gate.open = True
    assert going.wait() == "c00000001" and going.done
    assert tree(tmp_path / "foreground") == tree(tmp_path / "background")
    assert contents(ours) == contents(alone)
    assert save(tmp_path / "background", [ours], 2, base="latest") == "c00000002"
    load(tmp_path / "background", [alone])
    assert contents(ours) == contents(alone)
    ours.close()


@pytest.mark.parametrize("tier", PLACES)
def test_threads_that_train_and_look_up_beside_saves(tier, tmp_path, monkeypatch):
    """Nothing is held up on purpose: what is read twice or not at all would show in the chain of deltas."""
    monkeypatch.setattr(point, "READ_ROWS", 64)
    monkeypatch.setattr(point, "MEMORY_NBYTES", 4000)
    table, stop, wrong = make(PLACES[tier](tmp_path)), threading.Event(), []
    train(table, range(900))

    def look():
        while not stop.is_set():
            found = table.lookup(np.arange(0, 1200, 7))
            if not np.isfinite(found).all():
                wrong.append(found)

    reader = threading.Thread(target=look)
    reader.start()
    rng, want = np.random.default_rng(0), {}
    try:
        for n in range(4):
            before = contents(table)
            going = save(tmp_path / "s", [table], n, base="latest" if n else None, background=True)
            while not going.done:
                train(table, rng.integers(0, 1200, 100), n)
                table.store.erase(rng.integers(0, 1200, 5))
            want[going.wait()] = before
    finally:
        stop.set()
        reader.join()
    assert not wrong
    other = make()
    for commit, rows_ in want.items():
        load(tmp_path / "s", [other], commit)
        assert contents(other) == rows_
    table.store.validate()
    table.close()


def test_what_is_set_aside_is_bounded_in_memory(tmp_path, gate, monkeypatch):
    monkeypatch.setattr(point, "MEMORY_NBYTES", 40 * 10)
    table = make()
    train(table, range(500))
    want = contents(table)
    going = save(tmp_path, [table], 1, background=True)
    assert gate.reached.wait(30)
    train(table, range(500), 1)
    aside = getattr(table.store, "below", table.store)._point.aside
    assert len(aside._memory) == 10 and aside._memory.nbytes <= 400
    assert aside._file is not None and len(aside.keys()) == 500
    gate.open = True
    going.wait()
    assert aside._file is None
    other = make()
    load(tmp_path, [other])
    assert contents(other) == want


def test_failure_surfaces_at_the_next_step_once_and_whenever_it_is_waited_for(tmp_path, gate):
    table = make()
    train(table, range(50))
    going = save(tmp_path, [table], 1, background=True)
    assert gate.reached.wait(30)
    gate.failure, gate.open = OSError(28, "No space left on device"), True
    going._over.wait(30)
    before = contents(table)
    with pytest.raises(errors.StorageError, match="No space left"):
        table.lookup([1, 2], train=True)
    assert contents(table) == before  # the step has not begun
    train(table, [1, 2])
    for _ in range(2):
        with pytest.raises(errors.StorageError, match="No space left"):
            going.wait()
    gate.failure = None
    assert not list(tmp_path.glob("c*"))
    save(tmp_path, [table], 2)
    table.close()


@pytest.mark.parametrize("who", ["outputs", "update", "save", "load", "close"])
def test_failure_surfaces_wherever_the_table_is_used_next(tmp_path, gate, who):
    other, table = Table("other", 4), make()
    collection = Collection([other, table], {"f": "other", "g": "t"})
    train(table, range(50))
    save(tmp_path / "good", [table], 1)
    gate.failure, gate.open = ValueError("broken"), True
    going = save(tmp_path / "bad", [table], 1, background=True)
    going._over.wait(30)
    use = {
        "outputs": lambda: collection.stage({"f": np.arange(3), "g": np.arange(3)}).outputs(),
        "update": lambda: table.update([1], np.ones((1, 4))),
        "save": lambda: save(tmp_path / "good", [table], 2),
        "load": lambda: load(tmp_path / "good", [table]),
        "close": table.close,
    }[who]
    with pytest.raises(ValueError, match="broken"):
        use()
    assert len(other) == 0
    if who == "outputs":
        use()  # nothing was left half-way
    table.close()


def test_a_second_save_and_close_wait_for_the_first(tmp_path, gate):
    table, order = make(), []
    train(table, range(50))
    going = save(tmp_path, [table], 1, background=True)
    assert gate.reached.wait(30)

    def second():
        order.append(save(tmp_path, [table], 2, base="latest"))
        table.close()

    thread = threading.Thread(target=second)
    thread.start()
    thread.join(0.2)
    assert thread.is_alive() and not order and not going.done
    gate.open = True
    thread.join(30)
    assert order == ["c00000002"] and going.wait() == "c00000001"
    assert [c.parent for c in verify(tmp_path)] == [None, "c00000001"]


@pytest.mark.parametrize("tier", PLACES)
def test_a_store_that_is_closed_ends_the_save(tier, tmp_path, gate):
    table = make(PLACES[tier](tmp_path))
    train(table, range(50))
    going = save(tmp_path / "s", [table], 1, background=True)
    assert gate.reached.wait(30)
    table.store.close()  # not `Table.close`, which waits
    gate.open = True
    with pytest.raises(errors.Closed, match=r"closed.*table t"):
        going.wait()
    assert not list((tmp_path / "s").glob("c*"))


@pytest.mark.parametrize("tier", PLACES)
def test_no_memory_to_set_aside_fails_the_save_and_not_the_step(tier, tmp_path, gate):
    table, alone = make(PLACES[tier](tmp_path)), make()
    for t in (table, alone):
        train(t, range(50))
    going = save(tmp_path / "s", [table], 1, background=True)
    assert gate.reached.wait(30)
    aside = getattr(table.store, "below", table.store)._point.aside

    def add(*args):
        raise MemoryError("no memory")

    aside.add = add
    assert train(table, range(20), 1) == train(alone, range(20), 1)
    table.commit()  # a device's rows change below when they are written there
    gate.open = True
    with pytest.raises(MemoryError):
        going.wait()
    assert contents(table) == contents(alone)
    table.store.validate()
    save(tmp_path / "s", [table], 2)
    load(tmp_path / "s", [alone])
    assert contents(table) == contents(alone)
    table.close()


def test_any_allocation_that_fails_leaves_the_table_right(tmp_path, gate):
    for nth in range(1, 12):
        table, alone = make(), make()
        for t in (table, alone):
            train(t, range(50))
        before = contents(table)
        going = save(tmp_path / str(nth), [table], 1, background=True)
        assert gate.reached.wait(30)
        pool.fail_allocation(nth)
        try:
            try:
                train(table, range(40, 60), 1)
            finally:
                pool.fail_allocation(0)
            train(alone, range(40, 60), 1)
        except MemoryError:
            pass
        table.store.validate()
        gate.open = True
        try:
            going.wait()
            load(tmp_path / str(nth), [alone])
            assert contents(alone) == before
        except MemoryError:
            pass
        gate.open = False
        gate.reached.clear()
        table.pending = None
        table.close()


def test_steps_that_lookup_and_update_in_turn_are_told_apart_by_saves(tmp_path, gate):
    """A point between the lookup and the update of one step holds what the lookup made and counted."""
    table, keys = make(), np.arange(20)
    train(table, range(50))
    table.lookup(keys, train=True)
    want = contents(table)
    going = save(tmp_path, [table], 1, background=True)
    table.update(keys, np.ones((20, 4)))
    gate.open = True
    going.wait()
    other = make()
    load(tmp_path, [other])
    assert contents(other)[0] == want[0]


def test_rests_end_when_somebody_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "REST", 1e9)
    table = make()
    train(table, range(200))
    going = save(tmp_path, [table], 1, background=True)
    going._over.wait(0.2)
    assert not going.done
    assert going.wait() == "c00000001"
