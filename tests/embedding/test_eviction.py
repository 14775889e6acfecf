"""Eviction: each rule against a naive twin, the same rows in one sweep or step by step, and what is exported."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbkit._ext.batch import mixed
from hbkit.embedding import SGD, Collection, CountAdmission, IdleSteps, L2Below, MaxRows, Table
from hbkit.errors import InvalidArgument
from hbkit.store import cached_ssd, host_memory
from hbkit.store.line import Chunk, Part


def table(**kw):
    return Table("t", 4, **{"optimizer": SGD(lr=1.0), **kw})


def put(t, n, seed=0):
    """n rows with random metadata and norms."""
    rng = np.random.default_rng(seed)
    keys = rng.integers(-(2**63), 2**63 - 1, n)
    row = rng.normal(size=(n, 4)).astype(np.float32)
    chunk = Chunk(keys, rng.integers(0, 5, n), rng.integers(0, 9, n), row, np.zeros((n, 0), np.float32))
    t.store.put(chunk)
    return chunk


def keys_of(t):
    return sorted(k for c in t.store.scan() for k in c.key.tolist())


def test_eviction_by_idleness_and_by_norm():
    t = table(eviction=[IdleSteps(2)])
    for keys in ([1, 2], [2, 3], [2], [2]):
        t.lookup(np.array(keys), train=True)
        t.update(np.array(keys), np.zeros((len(keys), 4)))
    assert t.evict() == 1 and len(t) == 2
    assert not t.lookup(np.array([1])).any() and t.lookup(np.array([3])).any()
    t = table(eviction=[L2Below(10.0)])
    t.lookup(np.array([1, 2]), train=True)
    t.update(np.array([1]), np.full((1, 4), 100.0))
    assert t.evict() == 1 and t.lookup(np.array([1])).any() and not t.lookup(np.array([2])).any()
    assert t.stats()["evicted_rows"] == 1


@settings(max_examples=30)
@given(
    st.integers(0, 3000),
    st.one_of(st.integers(1, 40), st.integers(500, 2600)),
    st.sampled_from(["frequency", "last_step"]),
)
def test_max_rows_keeps_the_highest_of_each_group(n, limit, score):
    rule = MaxRows(limit, score)
    t = table(eviction=[rule])
    chunk = put(t, n)
    t.evict()
    bits = rule.group_bits
    assert limit < 512 or 256 <= limit / 2**bits < 512
    groups = {}
    for key, freq, last_step, mix in zip(*(c.tolist() for c in (*chunk[:3], mixed(chunk.key))), strict=True):
        item = (freq, last_step, key) if score == "frequency" else (last_step, freq, key)
        groups.setdefault(mix >> (64 - bits), []).append(item)
    want = []
    for g, items in groups.items():
        quota = limit // 2**bits + (g < limit % 2**bits)
        want += [item[2] for item in sorted(items)[max(0, len(items) - quota) :]]
    assert keys_of(t) == sorted(want)
    assert len(t) <= limit and (bits or len(t) == min(n, limit))
    t.store.validate()


def test_max_rows_spans_the_chunks_of_a_scan():
    t = table(eviction=[MaxRows(100_000)])
    put(t, 250_000)
    assert t.evict() == 150_000 and len(t) == 100_000


@pytest.mark.parametrize("n", [1, 7, 100, 5000])
@pytest.mark.parametrize(
    "rules", [[IdleSteps(4)], [L2Below(1.5)], [MaxRows(1000)], [IdleSteps(6), L2Below(0.5), MaxRows(700)]]
)
def test_eviction_by_parts_equals_one_sweep(n, rules):
    one, parts = table(eviction=rules), table(eviction=rules)
    put(one, 4000)
    put(parts, 4000)
    gone = [parts.evict(9, (i, n)) for i in range(n)]
    assert sum(gone) == one.evict(9) > 0 and keys_of(parts) == keys_of(one)
    assert parts.evict(9) == 0
    if n == 7 and not isinstance(rules[-1], MaxRows):  # whose few groups are not divided
        assert max(gone) < 2 * min(gone)


@given(st.integers(1, 50), st.integers(0, 64))
def test_part_shares_cover_all_keys_once(n, bits):
    parts = [Part.share(i, n, bits) for i in range(n)]
    assert parts[0].first == 0 and parts[-1].last == 2**64
    for a, b in pairwise(parts):
        assert a.last == b.first and a.last % 2 ** (64 - bits) == 0


@pytest.mark.parametrize("place", ["host", "ssd"])
def test_eviction_every_n_steps_looks_at_a_part_and_does_not_depend_on_the_tier(place, tmp_path):
    store = host_memory() if place == "host" else cached_ssd(tmp_path, "1MiB")
    t, exported = table(store=store, eviction=[IdleSteps(3)], evict_every=5, on_evict=lambda c: exported.append(c)), []
    looked, part = [], t.store.part

    def counting(*args):
        chunks = list(part(*args))
        looked.append(sum(len(c.key) for c in chunks))
        return chunks

    t.store.part = counting
    t.lookup(np.arange(1000), train=True)
    t.update(np.arange(1000), np.ones((1000, 4)))
    rows = {k: r.tolist() for k, r in zip(range(1000), t.lookup(np.arange(1000)), strict=True)}
    for _ in range(8):
        t.update(np.arange(500), np.zeros((500, 4)))
    # Idle at step 5, so gone at steps 5 to 9, a fifth each.
    assert keys_of(t) == list(range(500)) and len(exported) == 5
    assert max(looked) < 300
    for chunk in exported:
        assert (chunk.freq == 1).all() and (chunk.last_step == 1).all() and chunk.state.shape == (len(chunk.key), 0)
        assert [rows[k] for k in chunk.key.tolist()] == chunk.row.tolist()
    assert sorted(k for c in exported for k in c.key.tolist()) == list(range(500, 1000))
    t.close()


def test_eviction_whose_export_fails_leaves_the_rows():
    def refuse(chunk):
        raise OSError("no space")

    t = table(eviction=[MaxRows(2)], on_evict=refuse)
    t.lookup(np.arange(5), train=True)
    with pytest.raises(OSError, match="no space"):
        t.evict()
    assert len(t) == 5


def test_eviction_runs_in_the_steps_of_a_collection():
    tables = [Table(n, 4, eviction=[IdleSteps(1)], evict_every=1, admission=CountAdmission(1)) for n in "ab"]
    c = Collection(tables)
    for step in range(4):
        staged = c.stage({"a": np.array([step, 9]), "b": np.array([step, step + 1])})
        staged.outputs()
        staged.apply({f: np.ones((2, 4), np.float32) for f in "ab"})
    assert keys_of(tables[0]) == [2, 3, 9] and keys_of(tables[1]) == [2, 3, 4]


def test_eviction_refuses_what_it_cannot_be():
    for make in (
        lambda: IdleSteps(0),
        lambda: MaxRows(0),
        lambda: MaxRows(5, "age"),
        lambda: table(eviction=[IdleSteps(1)]).evict(part=(2, 2)),
        lambda: table(eviction=[IdleSteps(1)]).evict(part=(-1, 2)),
    ):
        with pytest.raises(InvalidArgument):
            make()
