"""A point against a copy made at its instant, while the store goes on: any tier, all rows or those changed since a
mark, in memory or in a file."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbkit.embedding import SGD, Adagrad, Adam, Ftrl, IdleSteps, Table
from hbkit.store import cached_ssd, device_cached, host_memory
from hbkit.store import point as points
from hbkit.store.line import Chunk

DIM = 3
FEW = {
    "host": lambda path: host_memory(),
    "ssd": lambda path: cached_ssd(path, "300KiB"),
    "device": lambda path: device_cached(host_memory(), "12KiB", "cpu"),
}
RULES = [SGD(lr=0.1), Adagrad(lr=0.1), Adam(), Ftrl(lr=0.1)]


def held(chunks):
    """Rows as they are, by key."""
    found = {}
    for c in chunks:
        assert list(c.key) == sorted(set(c.key)) and not found.keys() & set(c.key.tolist())
        assert not found or max(found) < c.key[0]
        for i, key in enumerate(c.key.tolist()):
            found[key] = int(c.freq[i]), int(c.last_step[i]), c.row[i].tobytes(), c.state[i].tobytes()
    return found


def put(table, keys, value=4.0):
    n, n_state = len(keys), table.store.layout.width - table.dim
    row, state = np.full((n, table.dim), value, np.float32), np.full((n, n_state), 9, np.float32)
    table.store.put(Chunk(keys, np.full(n, 7), np.full(n, table.step), row, state))


def give(table, keys, value):
    """As a tier above gives rows back."""
    n, width = len(keys), table.store.layout.width
    table.store.write(keys, np.full((n, width), value, np.float32), np.full(n, 7), np.full(n, table.step))


def act(table, action, keys, seed):
    """One act; the keys that it may have changed."""
    keys = np.array(keys)
    if action == "train":
        table.lookup(keys, train=True)
        table.update(keys, np.random.default_rng(seed).standard_normal((len(keys), table.dim)))
    elif action == "create":
        table.lookup(keys, train=True)
    elif action == "update":
        table.update(keys, np.ones((len(keys), table.dim)))
    elif action == "erase":
        table.store.erase(np.unique(keys))
    elif action == "put":
        put(table, np.unique(keys), seed)
    elif action == "give":
        give(table, np.unique(keys), seed)
    elif action == "evict":
        before = set(held(table.store.scan()))
        table.evict()
        return before - set(held(table.store.scan()))
    elif action == "again":  # steps began anew
        table.step = 0
        return set()
    elif action == "lookup":
        table.lookup(keys)
        return set()
    return set(keys.tolist())


ACTS = ["train", "train", "create", "update", "erase", "put", "give", "evict", "again", "lookup"]
acts = st.lists(
    st.tuples(st.sampled_from([*ACTS, "read", "read"]), st.lists(st.integers(-9, 40), min_size=1, max_size=12)),
    max_size=14,
)


@pytest.mark.parametrize("tier", FEW)
@settings(max_examples=40)
@given(
    before=acts, between=acts, during=acts, rule=st.sampled_from(RULES), dtype=st.sampled_from(["float32", "bfloat16"]),
    metadata=st.booleans(), delta=st.booleans(), memory=st.sampled_from([1, 200, 10**6]), cached=st.booleans(),
)  # fmt: skip
def test_a_point_is_the_rows_of_its_instant(
    tmp_path_factory, monkeypatch_module, tier, before, between, during, rule, dtype, metadata, delta, memory, cached
):
    monkeypatch_module.setattr(points, "READ_ROWS", 3)
    monkeypatch_module.setattr(points, "MEMORY_NBYTES", memory)
    path = tmp_path_factory.mktemp("rows")
    table = Table(
        "t", DIM, optimizer=rule, dtype=dtype, metadata=metadata, store=FEW[tier](path),
        eviction=[IdleSteps(2)] if metadata else [],
    )  # fmt: skip
    if tier == "ssd" and not cached:
        table.store._limit = 2  # most rows are at home
        table.store._shrink(2)
    for n, (action, keys) in enumerate(before):
        act(table, action, keys, n)
    store, base, touched = table.store, held(table.store.scan()), set()
    store.changes.name(store.changes.mark(store.latest_step()), "base")
    for n, (action, keys) in enumerate(between):
        touched |= act(table, action, keys, n)
    want = held(store.scan())
    point = store.point("base" if delta else None, lambda: table.step, path)
    assert (point.kept, point.n_rows, point.changed) == (table.step, len(want), delta and metadata)
    reader, chunks = point.scan(), []
    for n, (action, keys) in enumerate(during):
        if action == "read":
            chunks += [c for c in [next(reader, None)] if c is not None]
        else:
            act(table, action, keys, n)
        store.validate()
    chunks += reader
    point.close()
    got = held(chunks)
    if point.changed:
        assert {k for k in want if want[k] != base.get(k)} <= got.keys() <= touched
        assert base.keys() - want.keys() <= set(point.erased.tolist()) <= touched - want.keys()
        got = {k: row for k, row in (base | got).items() if k not in point.erased.tolist()}
    assert got == want
    store.point().close()  # the next one need not wait
    table.close()


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_lines_of_keys_that_are_given_twice_are_set_aside_once(tmp_path, monkeypatch):
    """Whoever erases a key twice in one call must not shift its neighbours in the file."""
    monkeypatch.setattr(points, "MEMORY_NBYTES", 12)
    aside = points.Aside(1, tmp_path)
    keys = np.array([1, 5, 5, 2, 5, 3])
    aside.add(keys, keys, keys, keys.astype(np.float32)[:, None])
    freq, last_step, lines = aside.read(aside.find(np.array([1, 2, 3, 5])))
    assert freq.tolist() == last_step.tolist() == lines[:, 0].tolist() == [1, 2, 3, 5]
    aside.close()
