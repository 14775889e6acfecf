"""The cache of near lines, its policies and the window of announced batches: against naive twins, and on traces."""

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbkit._ext.cache import History, Sketch, Tuner
from hbkit.errors import InvalidArgument
from hbkit.store import LFU, LRU, Policy, TinyLFU, cached_ssd
from hbkit.store import cache as cache_module
from hbkit.store.cache import LINE_NBYTES, NEVER, Cache, Window, as_nbytes
from hbkit.store.policy import FIXED_NBYTES, HALF_LIVES, make_policy

BIG = 2**62  # keys are any 64 bits


def ints(*values):
    return np.array(values, np.int64)


@numba.njit
def _note(worth, lines, now):
    for line in lines:
        if line >= 0:
            worth[line] = now


class Returning(Policy):
    """A user's policy: keys used once go first, then the longest unused. The example of Policy's docstring."""

    def __init__(self, n_lines):
        self.worth, self.now = np.zeros(n_lines), 0.0

    def on_access(self, keys, lines):
        self.now += 1
        _note(self.worth, lines, self.now)

    def on_insert(self, keys, lines):
        self.worth[lines] = 0


@numba.njit
def _greatest(key, lines, n):
    return lines[np.argsort(-key[lines])[:n]]


class Greatest(Policy):
    """A user's policy that chooses for itself: the greatest keys go first, and smaller ones are admitted."""

    def __init__(self, n_lines):
        self.key = np.zeros(n_lines, np.int64)

    nbytes = 8

    def on_access(self, keys, lines):
        keys[:] = lines[:] = -7  # what it is given is its own

    def on_insert(self, keys, lines):
        self.key[lines] = keys
        keys[:] = lines[:] = -7

    def victims(self, lines, n):
        chosen = _greatest(self.key, lines, n)
        lines[:] = -7
        return chosen

    def admit(self, keys, lines, others, their_lines):
        assert np.array_equal(self.key[lines], keys) and np.array_equal(self.key[their_lines], others)
        lines[:] = their_lines[:] = -7
        return keys < others


ALL = {"lru": LRU, "lfu": LFU, "tinylfu": TinyLFU, "returning": Returning, "greatest": Greatest}


@given(
    seed=st.integers(0, 2**32),
    n_lines=st.sampled_from([1, 2, 7, 64, 300]),
    region=st.sampled_from([5, 64, 1 << 16]),
    policy=st.sampled_from(list(ALL)),
    share_pinned=st.sampled_from([0.0, 0.3, 1.0]),
    share_known=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_cache_is_a_dict_of_lines(seed, n_lines, region, policy, share_pinned, share_known):
    rng = np.random.default_rng(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "REGION", region)
        cache, twin = Cache(n_lines, ALL[policy]), {}
        for _ in range(12):
            keys = (rng.permutation(3 * n_lines + 5)[: rng.integers(0, n_lines + 20)] - n_lines) * (BIG // 1000)
            lines = cache.find(keys)
            assert lines.tolist() == [twin.get(k, -1) for k in keys.tolist()]
            cache.access(keys, lines)
            held = np.array(sorted(twin.values()), np.int64)
            cache.pins[held] = rng.random(len(held)) < share_pinned
            cache.next_use[held] = np.where(rng.random(len(held)) < share_known, rng.integers(0, 99, len(held)), NEVER)
            cache.dirty[held] = rng.random(len(held)) < 0.5
            new = keys[lines < 0]
            n = int(rng.integers(0, len(new) + 1))
            victims = cache.victims(n)
            loose = held[cache.pins[held] == 0]
            unknown = loose[cache.next_use[loose] == NEVER]
            assert len(victims) == len(np.unique(victims)) == min(n, len(loose))
            assert np.isin(victims, loose).all()
            # Known ones go only when no other is left, the farthest first.
            known = victims[cache.next_use[victims] != NEVER]
            assert len(known) == max(0, n - len(unknown)) - (n - len(victims))
            farthest = np.sort(cache.next_use[loose[cache.next_use[loose] != NEVER]])[::-1]
            assert np.array_equal(np.sort(cache.next_use[known])[::-1], farthest[: len(known)])
            cache.validate()
            if rng.random() < 0.8:  # else writing home failed
                cache.remove(victims)
                twin = {k: line for k, line in twin.items() if line not in set(victims.tolist())}
            room = n_lines - len(twin)
            got = cache.insert(new[:room])
            free = np.setdiff1d(np.arange(n_lines), list(twin.values()))
            assert sorted(got.tolist()) == free[: len(got)].tolist()  # the lowest
            assert not cache.dirty[got].any() and not cache.pins[got].any() and (cache.next_use[got] == NEVER).all()
            twin.update(zip(new.tolist(), got.tolist(), strict=False))
            assert len(cache) == len(twin) and cache.key[got].tolist() == new[:room].tolist()
            some = rng.permutation(list(twin.values()))[: rng.integers(0, 3)].astype(np.int64)
            cache.remove(some)
            twin = {k: line for k, line in twin.items() if line not in set(some.tolist())}
            cache.validate()


@pytest.mark.parametrize("policy", list(ALL))
def test_cache_counts_its_memory(policy):
    for n_lines in (10_000, 300_000):
        cache = Cache(n_lines, ALL[policy])
        for keys in np.random.default_rng(0).permutation(2**20)[:n_lines].reshape(2, -1):
            cache.insert(keys << 42)
        assert cache.nbytes <= n_lines * LINE_NBYTES + FIXED_NBYTES + 65_536


def test_cache_refuses_what_is_not_so():
    cache = Cache(4, LRU)
    cache.insert(ints(1, 2, 3))
    for keys, match in ((ints(4, 5), "2 keys for 1 free lines"), (ints(3), "near already")):
        with pytest.raises(InvalidArgument, match=match):
            cache.insert(keys)
    with pytest.raises(InvalidArgument, match="free already"):
        cache.remove(ints(3))
    with pytest.raises(InvalidArgument, match="at least one"):
        Cache(0, LRU)
    assert len(cache) == 3
    cache.validate()


def filled(n_lines, policy, keys=None):
    cache = Cache(n_lines, policy)
    keys = np.arange(n_lines) if keys is None else keys
    cache.access(keys, np.full(n_lines, -1))
    cache.insert(keys)
    return cache


def use(cache, *keys):
    keys = ints(*keys)
    cache.access(keys, cache.find(keys))


def test_lru_evicts_the_longest_unused():
    cache = filled(5, LRU)
    for key in (3, 1, 4, 0):
        use(cache, key)
    assert cache.key[cache.victims(3)].tolist() == [2, 3, 1]


def test_lfu_evicts_the_rarest_and_forgets():
    cache = filled(5, LFU)
    for key in (1, 1, 1, 1, 1, 1, 1, 1, 0, 2, 2, 3):
        use(cache, key)
    assert cache.key[cache.victims(3)].tolist() == [4, 0, 3]
    for _ in range(5 * int(max(HALF_LIVES)) * 5):  # five half-lives or more, of keys that are not near
        cache.access(ints(99), ints(-1))
    for key in (0, 2, 3, 4):
        use(cache, key)
    assert cache.key[cache.victims(1)].tolist() == [1]


def test_lfu_remembers_keys_that_left():
    cache = filled(4, LFU)
    for _ in range(3):
        use(cache, 0)
    cache.remove(cache.find(ints(0)))
    cache.access(ints(0), ints(-1))
    cache.insert(ints(0))
    use(cache, 1)
    assert 0 not in cache.key[cache.victims(3)]


def test_history_keeps_the_frequent_and_survives_wrapping():
    history, worth, line = History(64), np.zeros(1), ints(0)
    for now in (3.0, 5000.25, 123456.75):
        for key in range(1000, 1400):  # many times what it holds
            history.access(ints(key), ints(-1), worth, now)
            for _ in range(2):
                history.access(ints(7), ints(-1), worth, now)
        history.take(ints(7), line, worth, now)
        assert abs(worth[0] - now - np.log2(800)) < 0.2
        history.take(ints(7), line, worth, now)
        assert worth[0] == now  # it moved
        worth[0] = now - 1000
        history.put(ints(7), line, worth, now)


def test_victims_are_nearly_the_least_of_a_large_cache(monkeypatch):
    monkeypatch.setattr(cache_module, "REGION", 4096)
    cache = filled(40_000, LRU)
    cache.policy.worth[:] = np.random.default_rng(0).permutation(40_000)
    victims = cache.victims(2000)
    assert np.mean(cache.policy.worth[victims] < 2000 * 1.3) > 0.9


def test_tinylfu_admits_what_was_seen_more_often():
    cache = filled(4, TinyLFU)
    for _ in range(3):
        use(cache, 0, 1, 2, 3)
    cache.remove(cache.find(ints(3)))
    cache.policy.worth[:] += 1
    cache._newcomer[:] = False
    cache.access(ints(50), ints(-1))
    cache.insert(ints(50))
    assert cache.key[cache.victims(1)].tolist() == [50]  # not the longest unused, which was seen more often
    cache.remove(cache.find(ints(50)))
    for _ in range(9):
        cache.access(ints(51), ints(-1))
    cache.insert(ints(51))
    assert cache.key[cache.victims(1)].tolist() != [51]


def test_sketch_never_underestimates_before_it_halves_and_then_forgets():
    sketch, rng, seen = Sketch(3000, 30_000), np.random.default_rng(0), np.zeros(3000, int)
    for _ in range(9):
        some = rng.permutation(3000)[:1000]
        sketch.add(some)
        seen[some] += 1
    estimate = sketch.estimate(np.arange(3000))
    assert (estimate >= seen).all() and np.mean(estimate == seen) > 0.7
    for _ in range(40):
        sketch.add(rng.integers(10_000, BIG, 3000))
    assert sketch.estimate(np.arange(3000)).mean() < 9


def test_tuner_follows_what_gives_hits():
    rng, tuner = np.random.default_rng(0), Tuner(1000, HALF_LIVES, 4)
    law = np.cumsum(np.arange(1, 20_001) ** -1.05)
    for _ in range(40):  # the same keys are the popular ones for ever
        keys = np.searchsorted(law, rng.random(1000) * law[-1])
        best = tuner.access(keys, 1000)
    assert best > 4
    for i in range(40):  # keys come in bursts and never again
        keys = rng.integers(0, 600, 1000) + 600 * i
        best = tuner.access(keys, 1000)
    assert best < 4


def answering(**methods):
    return type("Rogue", (Returning,), methods)


def _raise(*_):
    raise RuntimeError("no luck")


@pytest.mark.parametrize(
    ("methods", "match"),
    [
        ({"on_access": _raise}, "Rogue.on_access raised RuntimeError: no luck"),
        ({"on_insert": _raise}, "Rogue.on_insert raised"),
        ({"on_remove": _raise}, "Rogue.on_remove raised"),
        ({"victims": _raise}, "Rogue.victims raised"),
        ({"victims": lambda self, lines, n: lines[:0]}, r"Rogue.victims gave no int64\[2\]"),
        ({"victims": lambda self, lines, n: lines[:n].astype(float)}, "Rogue.victims gave no int64"),
        ({"victims": lambda self, lines, n: lines[:n].tolist()}, "Rogue.victims gave no int64"),
        ({"victims": lambda self, lines, n: lines[:n] * 0 + lines[0]}, "one twice"),
        ({"victims": lambda self, lines, n: lines[:n] + 10**12}, "not offered"),
        ({"victims": lambda self, lines, n: lines[:n] * 0 - 1}, "not offered"),
        ({"victims": lambda self, lines, n: np.arange(n)}, "perhaps a pinned one"),
        ({"worth": property(lambda self: np.zeros(3), lambda self, w: None)}, "Rogue"),
        (
            {"worth": property(lambda self: "no", lambda self, w: None), "on_insert": lambda *_: None, "nbytes": 0},
            "worth",
        ),
        ({"admit": lambda self, keys, *_: keys}, r"Rogue.admit gave no bool\[2\]"),
        ({"admit": _raise}, "Rogue.admit raised"),
        ({"nbytes": 10**9}, "holds 1000000000 bytes"),
        ({"__init__": _raise}, "raised RuntimeError"),
    ],
)
def test_cache_names_a_policy_that_misbehaves(methods, match):
    cache = None
    with pytest.raises(InvalidArgument, match=match):
        cache = Cache(8, answering(**methods))
        cache.insert(np.arange(8))
        cache.access(np.arange(8), np.arange(8))
        cache.pins[1] = 1
        cache.remove(cache.victims(2))
    if cache is not None:
        cache.validate()
        assert len(cache) in (0, 8)


def test_cache_refuses_worth_that_is_no_number():
    cache = filled(8, Returning)
    cache.policy.worth[3] = np.nan
    with pytest.raises(InvalidArgument, match="worth of line 3 is not a number"):
        cache.victims(2)
    with pytest.raises(InvalidArgument, match="made no Policy"):
        Cache(8, lambda n: object())


# --- the window -------------------------------------------------------------------------------------------------


@given(batches=st.lists(st.sets(st.integers(-6, 6)), max_size=12), order=st.randoms(), ahead=st.integers(1, 12))
def test_window_knows_the_next_use(batches, order, ahead):
    window, open_batches = Window(), {}

    def release(number):
        keys = open_batches.pop(number)
        later = [n for n in sorted(open_batches) if n > number]
        want = [next((n for n in later if k in open_batches[n]), NEVER) for k in keys]
        assert window.release(number).tolist() == want
        window.validate()

    for i, keys in enumerate(batches):
        keys = [k * (BIG // 6) for k in keys]
        assert window.announce(np.array(keys, np.int64)) == i
        open_batches[i] = keys
        window.validate()
        while len(open_batches) > ahead:
            release(order.choice([min(open_batches), *open_batches]))
    while open_batches:
        release(order.choice(sorted(open_batches)))
    for number in (-1, 0, len(batches)):
        with pytest.raises(InvalidArgument, match="not announced"):
            window.release(number)


def test_window_takes_memory_for_what_is_announced_alone():
    window = Window()
    for i in range(300):
        window.announce(np.arange(i * 1000, i * 1000 + 3000))
        if i >= 8:
            window.release(i - 8)
    assert window.nbytes < 64 * 9 * 3000


# --- on traces --------------------------------------------------------------------------------------------------


def zipf(n_keys, n_batches, batch, drift=0, seed=0):
    rng = np.random.default_rng(seed)
    weight = np.cumsum(1 / np.arange(1, n_keys + 1) ** 1.05)
    for i in range(n_batches):
        rank = np.searchsorted(weight / weight[-1], rng.random(batch))
        yield np.unique((rank + i * drift) % n_keys)


def hit_rate(trace, n_lines, policy, ahead=0):
    """Hits of a cache that keeps `n_lines` from batch to batch, over batches of distinct keys."""
    batches = list(trace)
    cache, window, hits = Cache(n_lines + max(map(len, batches)), ALL[policy]), Window(), 0
    for i in range(-ahead, len(batches)):
        if i + ahead < len(batches):
            soon = batches[i + ahead]
            number, lines = window.announce(soon), cache.find(soon)
            near = lines[lines >= 0]
            cache.next_use[near] = np.minimum(cache.next_use[near], number)
        if i >= 0:
            lines = cache.find(batches[i])
            cache.access(batches[i], lines)
            missed = lines < 0
            hits += len(lines) - np.count_nonzero(missed)
            lines[missed] = cache.insert(batches[i][missed])
            cache.next_use[lines] = window.release(i)
            cache.remove(cache.victims(max(0, len(cache) - n_lines)))
    return hits / sum(map(len, batches))


def test_frequency_beats_recency_and_knowledge_beats_both():
    trace = list(zipf(50_000, 300, 200))
    rates = {p: hit_rate(trace, 512, p) for p in ("lfu", "tinylfu", "lru", "greatest")}
    assert rates["greatest"] > rates["lfu"] > rates["tinylfu"] > rates["lru"]  # the greatest keys are the rarest
    ahead = [hit_rate(trace, 512, "lfu", ahead) for ahead in (0, 4, 16)]
    assert ahead[0] < ahead[1] < ahead[2]


def test_frequency_follows_drift():
    trace = list(zipf(50_000, 600, 200, drift=1))
    rates = {p: hit_rate(trace, 512, p) for p in ("lru", "lfu")}
    assert rates["lfu"] > rates["lru"]


def test_make_policy_by_name_or_class():
    assert make_policy("lru") is LRU and make_policy(Returning) is Returning
    with pytest.raises(InvalidArgument, match="lfu, lru, tinylfu"):
        make_policy("clock")
    with pytest.raises(InvalidArgument):
        cached_ssd("x", policy="clock")


def test_as_nbytes():
    assert [as_nbytes(b) for b in (5, "5", "1.5KiB", "2 GiB", "1B")] == [5, 5, 1536, 2**31, 1]
    for bad in ("", "GiB", "2GB", 0, -1, "0MiB", None, "1e9"):
        with pytest.raises(InvalidArgument, match="budget"):
            as_nbytes(bad)
