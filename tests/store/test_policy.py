"""Policies and the cache under them: against naive twins, and against each other on traces."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbkit.errors import InvalidArgument
from hbkit.store import LFU, LRU, Policy, TinyLFU, cached_ssd
from hbkit.store.cache import LINE_NBYTES, WAYS, Cache, as_nbytes
from hbkit.store.policy import HALF_LIFE, META, make_policy


def metas(rows):
    """META[1, n] of (key, used, count, pinned)."""
    return np.array([rows], META)


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 50), st.integers(0, 9), st.booleans()), min_size=1))
def test_victim_is_the_least_of_those_not_pinned(rows):
    free = [i for i, r in enumerate(rows) if not r[3]]
    if free:
        oldest = min(free, key=lambda i: rows[i][1])
        rarest = min(free, key=lambda i: (rows[i][2], rows[i][1]))
        for policy, want in ((LRU(9), oldest), (TinyLFU(9), oldest), (LFU(9), rarest)):
            got = int(policy.victim(metas(rows))[0])
            assert not rows[got][3] and rows[got][1] == rows[want][1]


def test_lfu_counts_halve_with_age():
    policy = LFU(10)
    period = HALF_LIFE * 10
    old, new = np.zeros(1, META), np.zeros(1, META)
    for now in range(8):
        policy.on_access(old, now)
    assert old["count"] == 8
    for now in range(3 * period, 3 * period + 2):
        policy.on_access(new, now)
    # Three periods later eight uses weigh one, and lose against two.
    assert policy.victim(np.concatenate([new, old])[None])[0] == 1
    policy.on_access(old, 3 * period + 5)
    assert old["count"] == 2


def test_tinylfu_admits_what_was_seen_more_often():
    policy = TinyLFU(100)
    often, rare, never = (np.array([(k, 0, 0, False)], META) for k in (1, 2, 3))
    for now in range(5):
        policy.on_access(often, now)
    policy.on_access(rare, 9)
    assert policy.admit(often, rare) and not policy.admit(rare, often)
    assert policy.admit(rare, never) and not policy.admit(never, never)


def test_tinylfu_forgets():
    policy = TinyLFU(64)
    hot = np.array([(1, 0, 0, False)], META)
    for now in range(50):
        policy.on_access(hot, now)
    rng = np.random.default_rng(0)
    for _ in range(200):
        others = np.zeros(64, META)
        others["key"] = rng.integers(10, 10**9, 64)
        policy.on_access(others, 99)
    assert policy._estimate(np.array([1]))[0] < 25


def test_tinylfu_sketch_never_underestimates_before_it_halves():
    policy = TinyLFU(1000)
    rng = np.random.default_rng(0)
    seen = np.zeros(3000, int)
    for _ in range(9):
        some = np.zeros(1000, META)
        some["key"] = rng.permutation(3000)[:1000]
        policy.on_access(some, 1)
        seen[some["key"]] += 1
    estimate = policy._estimate(np.arange(3000)).astype(int)
    assert (estimate >= seen).all() and np.mean(estimate == seen) > 0.5


class Fifo(Policy):
    """A policy of the user's own."""

    def __init__(self, n_lines):
        pass

    def on_access(self, meta, now):
        meta["used"] = np.where(meta["count"] == 0, now, meta["used"])
        meta["count"] = 1

    def victim(self, metas):
        return np.where(metas["pinned"], 2**62, metas["used"]).argmin(axis=1)


class Rogue(Fifo):
    def victim(self, metas):
        return metas["pinned"].argmax(axis=1)


ALL = {"lru": LRU, "lfu": LFU, "tinylfu": TinyLFU, "fifo": Fifo}


@given(
    seed=st.integers(0, 2**32),
    n_lines=st.sampled_from([1, 2, 7, 16, 64, 100]),
    policy=st.sampled_from(list(ALL)),
    share_pinned=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_cache_plans_distinct_unpinned_lines(seed, n_lines, policy, share_pinned):
    rng = np.random.default_rng(seed)
    cache = Cache(n_lines, ALL[policy])
    next_owner = 0
    for _ in range(20):
        used = np.flatnonzero(cache.owner >= 0)
        pinned = (rng.random(cache.n_lines) < share_pinned) & (cache.owner >= 0)
        if len(used):
            cache.touch(rng.permutation(used)[: rng.integers(0, len(used) + 1)])
        n = int(rng.integers(0, 40))
        newcomers = cache.newcomers(np.arange(next_owner, next_owner + n))
        n_free = int(np.count_nonzero(cache.owner < 0))
        slots = cache.plan(newcomers, pinned.copy())
        found = slots[slots >= 0]
        assert len(np.unique(found)) == len(found) and not pinned[found].any()
        if policy != "tinylfu":  # all that can have a place get one
            assert len(found) == min(n, n_free + int(np.count_nonzero((cache.owner >= 0) & ~pinned)))
        assert np.count_nonzero(slots >= 0) >= min(n, n_free)
        cache.take(found, newcomers[slots >= 0], np.arange(next_owner, next_owner + n)[slots >= 0], dirty=False)
        next_owner += n
        cache.validate()
        used = np.flatnonzero(cache.owner >= 0)
        cache.drop(rng.permutation(used)[: rng.integers(0, 3)])
        cache.validate()
    assert cache.nbytes <= cache.n_lines * LINE_NBYTES


def test_cache_fills_from_the_lowest_line():
    cache = Cache(64, LRU)
    for first in (0, 10):
        new = cache.newcomers(np.arange(first, first + 10))
        slots = cache.plan(new, np.zeros(64, bool))
        cache.take(slots, new, np.arange(first, first + 10), dirty=False)
        assert slots.tolist() == list(range(first, first + 10))


def test_cache_refuses_a_policy_that_chooses_pinned_lines():
    cache = Cache(16, Rogue)
    new = cache.newcomers(np.arange(16))
    cache.take(cache.plan(new, np.zeros(16, bool)), new, np.arange(16), dirty=False)
    with pytest.raises(InvalidArgument, match="Rogue"):
        cache.plan(cache.newcomers(np.arange(20, 21)), np.arange(16) == 3)


def hit_rate(trace, n_lines, policy):
    """Hits of a cache over batches of distinct keys."""
    cache, where, hits, asked = Cache(n_lines, ALL[policy]), {}, 0, 0
    for keys in trace:
        slots = np.array([where.get(k, -1) for k in keys.tolist()])
        cache.touch(slots[slots >= 0])
        missed = keys[slots < 0]
        hits, asked = hits + len(keys) - len(missed), asked + len(keys)
        pinned = np.zeros(cache.n_lines, bool)
        pinned[slots[slots >= 0]] = True
        new = cache.newcomers(missed)
        slots = cache.plan(new, pinned)
        for k, s in zip(missed.tolist(), slots.tolist(), strict=True):
            if s >= 0:
                where.pop(int(cache.owner[s]), None)
                where[k] = s
        cache.take(slots[slots >= 0], new[slots >= 0], missed[slots >= 0], dirty=False)
    return hits / asked


def zipf(n_keys, n_batches, batch, drift=0, seed=0):
    rng = np.random.default_rng(seed)
    weight = np.cumsum(1 / np.arange(1, n_keys + 1) ** 1.05)
    for i in range(n_batches):
        rank = np.searchsorted(weight / weight[-1], rng.random(batch))
        yield np.unique((rank + i * drift) % n_keys)


def test_frequency_beats_recency_on_a_skewed_trace():
    rates = {p: hit_rate(zipf(50_000, 300, 200), 512, p) for p in ALL}
    assert rates["lfu"] > rates["lru"] > rates["fifo"]
    assert rates["tinylfu"] > rates["lru"]


def test_aged_frequency_follows_drift():
    rates = {p: hit_rate(zipf(50_000, 600, 200, drift=1), 512, p) for p in ("lru", "lfu")}
    assert rates["lfu"] > 0.9 * rates["lru"]


def test_make_policy_by_name_or_class():
    assert make_policy("lru") is LRU and make_policy(Fifo) is Fifo
    with pytest.raises(InvalidArgument, match="lfu, lru, tinylfu"):
        make_policy("clock")
    with pytest.raises(InvalidArgument):
        cached_ssd("x", policy="clock")


def test_as_nbytes():
    assert [as_nbytes(b) for b in (5, "5", "1.5KiB", "2 GiB", "1B")] == [5, 5, 1536, 2**31, 1]
    for bad in ("", "GiB", "2GB", 0, -1, "0MiB", None, "1e9"):
        with pytest.raises(InvalidArgument, match="budget"):
            as_nbytes(bad)


def test_cache_smaller_than_a_bucket_uses_all_its_lines():
    assert [Cache(n, LRU).n_lines for n in (1, 3, WAYS, WAYS + 1, 40)] == [1, 3, 16, 16, 32]
