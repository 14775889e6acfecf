"""What all caching tiers share, over a home in a dict: nothing that a tier does may show in the rows."""

import threading
import time

import numpy as np
import pytest
from homes import ACTS, OPTIMIZERS, DictPlace, any_table, contents, looking_ahead
from hypothesis import given, settings
from hypothesis import strategies as st

from hbkit import errors
from hbkit.embedding import SGD, Constant, Table
from hbkit.store import host_memory


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    acts=st.lists(st.sampled_from([*ACTS]), min_size=1, max_size=12),
    lines=st.sampled_from([1, 2, 5, 16, 64, 500]),
    policy=st.sampled_from(["lru", "lfu", "tinylfu"]),
    optimizer=st.sampled_from(OPTIMIZERS),
    dim=st.sampled_from([1, 4, 17]),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    metadata=st.booleans(),
    min_count=st.sampled_from([None, 2]),
)
def test_tier_equals_host(seed, acts, lines, policy, optimizer, dim, dtype, metadata, min_count):
    ours, theirs = (
        any_table(store, optimizer, dim, dtype, metadata, min_count)
        for store in (DictPlace(lines, policy), host_memory())
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


@pytest.mark.parametrize("lines", [3, 40, 400])
@pytest.mark.parametrize("window", [0, 1, 2, 7])
def test_tier_lookahead_equals_host(window, lines):
    assert looking_ahead(DictPlace(lines, delay=0.001), window) == looking_ahead(host_memory(), 0)


def test_tier_fetches_while_a_step_runs():
    t = Table("t", 4, store=DictPlace(100, scratch_lines=100))
    t.lookup(np.arange(1000), train=True)
    away = np.arange(900, 950)
    t.store.home.gate.clear()
    request = t.request(away)
    fetching = threading.Thread(target=request.fetch)
    fetching.start()
    while not t.store.home.reading:
        time.sleep(0.001)
    near = np.setdiff1d(t.store._cache.key[t.store._cache.held()], away)
    t.update(near[:10], np.ones((10, 4)))  # does not wait for what it does not need
    assert t.stats()["late_rows"] == 0 and fetching.is_alive()
    threading.Timer(0.02, t.store.home.gate.set).start()
    request.rows()
    fetching.join()
    assert t.stats()["late_rows"] == 50 and t.stats()["waited_s"] > 0.01
    request.close()
    t.store.validate()


def test_tier_a_failing_read_leaves_everything_as_it_was():
    t = Table("t", 4, store=DictPlace(20))
    t.lookup(np.arange(100), train=True)
    want = contents(t.store)
    t.store.home.fail["read"] = errors.StorageError("cannot read rows: test", remedy="none")
    some, ones = np.arange(40, 50), np.ones((10, 4))  # which all find lines
    for use in (
        lambda: t.lookup(np.arange(100)),
        lambda: t.lookup(some, train=True),
        lambda: t.update(some, ones),
        lambda: t.request(np.arange(40, 80)).fetch(),
    ):
        with pytest.raises(errors.StorageError):
            use()
        t.store.validate()
    del t.store.home.fail["read"]
    assert contents(t.store) == want
    t.commit()  # nothing was changed in part


def test_tier_a_failing_write_refuses_the_commit_only_where_a_change_was_cut():
    t = Table("t", 4, store=DictPlace(20))
    t.lookup(np.arange(100), train=True)
    t.store.home.fail["write"] = errors.StorageError("cannot write rows: test", remedy="none")
    with pytest.raises(errors.StorageError):
        t.update(np.arange(100), np.ones((100, 4)))
    with pytest.raises(errors.StorageError, match="in part"):
        t.commit()
    t.store.validate()
    t.lookup(t.store._cache.key[t.store._cache.held()])  # reading goes on


def test_tier_a_failed_creation_makes_nothing():
    t = Table("t", 4, store=DictPlace(20))
    t.lookup(np.arange(10), train=True)
    want = contents(t.store)
    for name, error in (("add", MemoryError("test")), ("write", errors.StorageError("test", remedy="none"))):
        t.store.home.fail[name] = error
        with pytest.raises(type(error)):
            t.lookup(np.arange(50, 150), train=True)
        del t.store.home.fail[name]
        t.store.validate()
        assert contents(t.store) == want


def test_tier_pins_leased_rows_until_released_or_forgotten():
    t = Table("t", 4, store=DictPlace(32))
    t.lookup(np.arange(500), train=True)

    def misses(keys):
        before = t.stats()["misses"]
        t.lookup(keys)
        return t.stats()["misses"] - before

    held = t.request(np.arange(10))
    held.fetch()
    for let_go in (held.close, lambda: None):
        for i in range(10, 400, 10):
            t.lookup(np.arange(i, i + 10))
        assert misses(np.arange(10)) == 0
        let_go()
        held.close()
        held = t.request(np.arange(10))
        held.fetch()
    del held
    for i in range(10, 400, 10):
        t.lookup(np.arange(i, i + 10))
    assert misses(np.arange(10)) > 0
    t.store.validate()


def test_tier_only_changed_rows_are_written_home():
    t = Table("t", 4, store=DictPlace(16))
    t.lookup(np.arange(200), train=True)
    t.commit()
    t.store.home.fail["write"] = AssertionError("a clean row was written")
    for i in range(20):
        t.lookup(np.arange(i * 10, i * 10 + 10))
    t.commit()
    assert t.stats()["evictions"] > 100


def test_tier_threads_look_up_and_update_at_once():
    t = Table("t", 4, optimizer=SGD(lr=1.0), initializer=Constant(0.0), store=DictPlace(40, delay=0.0002))
    t.lookup(np.arange(300), train=True)
    first = t.lookup(np.arange(300))
    failures = []

    def look(seed):
        rng = np.random.default_rng(seed)
        try:
            for _ in range(60):
                keys = rng.integers(0, 300, 30)
                rows = t.lookup(keys)
                moved = first[keys] - rows
                assert (moved == moved[:, :1]).all() and (moved >= -1e-3).all()  # all of a row or none of it
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=look, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    rng = np.random.default_rng(9)
    n = np.zeros(300)
    for _ in range(60):
        keys = rng.integers(0, 300, 30)
        t.update(keys, np.ones((30, 4)))
        np.add.at(n, keys, 1)
    for thread in threads:
        thread.join()
    assert not failures, failures
    t.store.validate()
    assert np.allclose(first - t.lookup(np.arange(300)), n[:, None], atol=1e-3)
