"""Admission: exact counts on every tier, a Bloom filter's rate, counters that survive, failures that count nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbkit import snapshot
from hbkit.embedding import (
    SGD,
    Adagrad,
    Adam,
    BloomAdmission,
    Collection,
    CountAdmission,
    Ftrl,
    RowWiseAdagrad,
    RowWiseAdam,
    Table,
    lookahead,
)
from hbkit.errors import InvalidArgument, SchemaMismatch
from hbkit.store import cached_ssd, host_memory

OPTIMIZERS = [SGD(), SGD(momentum=0.9), Adagrad(), RowWiseAdagrad(), Adam(), RowWiseAdam(), Ftrl()]
BATCHES = st.lists(st.lists(st.integers(0, 6), max_size=8), max_size=8)


@pytest.fixture(params=["host", "ssd"], scope="module")
def store(request, tmp_path_factory):
    if request.param == "host":
        return host_memory
    return lambda: cached_ssd(tmp_path_factory.mktemp("rows"), "256KiB")


@settings(max_examples=40)
@given(batches=BATCHES, min_count=st.integers(1, 4), optimizer=st.sampled_from(OPTIMIZERS))
def test_count_admission_admits_at_the_count(store, batches, min_count, optimizer):
    t = Table("t", 3, optimizer=optimizer, store=store(), admission=CountAdmission(min_count), default=9.0)
    seen = {}
    for batch in batches:
        rows = t.lookup(np.array(batch, np.int64), train=True)
        for key in batch:
            seen[key] = seen.get(key, 0) + 1
        assert (rows != 9).all(axis=1).tolist() == [seen[k] >= min_count for k in batch]
        waits = t.lookup([k for k in seen if seen[k] < min_count])
        t.update(batch, np.ones((len(batch), 3)))
        assert (waits == 9).all()
        assert len(t) == sum(n >= min_count for n in seen.values())
    state = t.admission.state()
    assert dict(zip(state["key"].tolist(), state["count"].tolist(), strict=True)) == {
        k: n for k, n in seen.items() if n < min_count
    }
    again = CountAdmission(min_count).open()
    again.load_state(state)
    assert {k: v.tolist() for k, v in again.state().items()} == {k: v.tolist() for k, v in state.items()}
    t.close()


@pytest.mark.parametrize("rule", [CountAdmission(3), BloomAdmission(3, 100)], ids=["count", "bloom"])
def test_admission_resumes_from_a_snapshot_where_it_stopped(tmp_path, store, rule):
    rng = np.random.default_rng(0)
    batches = [rng.zipf(1.4, 60) % 500 for _ in range(20)]

    def step(table, keys):
        table.lookup(keys, train=True)
        table.update(keys, np.cos(np.arange(len(keys) * 3, dtype=np.float32)).reshape(-1, 3))

    def table(place):
        return Table("t", 3, store=place, admission=rule)

    whole, half, rest = table(host_memory()), table(store()), table(store())
    for i, keys in enumerate(batches):
        step(whole, keys)
        if i < 10:
            step(half, keys)
    snapshot.save(tmp_path / "model", [half], half.step)
    snapshot.load(tmp_path / "model", [rest])
    for keys in batches[10:]:
        step(rest, keys)
    for a, b in zip(whole.store.scan(), rest.store.scan(), strict=True):
        for mine, theirs in zip(a, b, strict=True):
            assert np.array_equal(mine, theirs)
    assert {k: v.tolist() for k, v in whole.admission.state().items()} == {
        k: v.tolist() for k, v in rest.admission.state().items()
    }
    half.close()
    rest.close()


@pytest.mark.parametrize("depth", [1, 6])
def test_admission_does_not_depend_on_look_ahead(depth):
    def train(depth):
        rng = np.random.default_rng(1)
        t = Table("t", 4, admission=CountAdmission(2))
        for _, staged in lookahead([{"t": rng.integers(0, 300, 50)} for _ in range(20)], Collection([t]), depth):
            staged.apply({"t": np.sin(staged.outputs()["t"])})
        return [[column.tobytes() for column in chunk] for chunk in t.store.scan()]

    assert train(depth) == train(0)


def test_admission_counts_an_evicted_key_anew():
    t = Table("t", 4, admission=CountAdmission(2))
    t.lookup([1, 1], train=True)
    t.store.erase(np.array([1]))
    t.lookup([1], train=True)
    assert len(t) == 0
    t.lookup([1], train=True)
    assert len(t) == 1


@pytest.mark.parametrize("n", [100, 20_000])
@pytest.mark.parametrize("rate", [0.2, 0.02])
def test_bloom_admission_is_early_at_its_rate(n, rate):
    early, one = [], np.ones(1, np.int64)
    for seed in range(20 if n == 100 else 1):
        admission = BloomAdmission(2, n, rate).open()
        keys = np.random.default_rng(seed).permutation(10 * n)
        admission.admit(keys[:n], np.ones(n, np.int64))
        for key in keys[n : n + 20_000].reshape(-1, 1):
            early.append(admission.admit(key, one).item())
            admission.undo()
    assert (0 if n == 100 else rate * 0.9) <= np.mean(early) < rate * 1.1  # a small filter is larger than it must be


def test_bloom_admission_is_never_late():
    t = Table("t", 4, admission=BloomAdmission(2, 5000))
    keys = np.random.default_rng(0).permutation(20_000)[:5000]
    for part in np.array_split(np.concatenate([keys, keys[::-1]]), 7):
        t.lookup(part, train=True)
    assert len(t) == 5000


def test_bloom_admission_states_its_size():
    rule = BloomAdmission(2, 1_000_000, 0.01)
    assert 9 < 1024 * rule.shard_counters() / 1_000_000 < 11 and rule.n_hashes == 7
    assert rule.open().nbytes == 2 * 1024 * rule.shard_counters()
    assert Table("t", 1, admission=rule).stats()["admission_nbytes"] == rule.open().nbytes


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 70_000)), max_size=40))
def test_bloom_estimates_are_never_low_and_saturate(batches):
    admission, true = BloomAdmission(65_535, 50).open(), {}
    for key, count in batches:
        true[key] = true.get(key, 0) + count
        (admitted,) = admission.admit(np.array([key]), np.array([count]))
        assert admitted or true[key] < 65_535


@pytest.mark.parametrize("rule", [CountAdmission(3), BloomAdmission(3, 1000)], ids=["count", "bloom"])
def test_admission_counts_nothing_where_the_rows_cannot_be_made(rule, monkeypatch):
    t = Table("t", 4, admission=rule)
    t.lookup([1, 1, 2], train=True)

    def state():
        return {k: v.tolist() for k, v in t.admission.state().items()}

    before = state()
    with monkeypatch.context() as m:
        m.setattr(type(t.store), "_inserted", lambda self, keys: (_ for _ in ()).throw(MemoryError("no room")))
        with pytest.raises(MemoryError):
            t.lookup([1, 2, 3, 9, 9, 9], train=True)
    assert state() == before and len(t) == 0
    t.lookup([1, 2, 3], train=True)
    assert len(t) == 1


@pytest.mark.parametrize("rule", [CountAdmission(9), BloomAdmission(9, 30)], ids=["count", "bloom"])
@given(st.lists(st.tuples(st.lists(st.integers(0, 50), unique=True, max_size=30), st.integers(1, 70_000)), max_size=4))
def test_admission_undone_is_as_it_was(rule, batches):
    admission = rule.open()
    for keys, count in batches:
        before = {k: v.tolist() for k, v in admission.state().items()}
        arguments = np.array(keys, np.int64), np.full(len(keys), count)
        admitted = admission.admit(*arguments).tolist()
        admission.undo()
        assert {k: v.tolist() for k, v in admission.state().items()} == before
        assert admission.admit(*arguments).tolist() == admitted
        admission.keep()


@pytest.mark.parametrize(
    "make",
    [
        lambda: CountAdmission(0),
        lambda: CountAdmission(2**32),
        lambda: BloomAdmission(0, 10),
        lambda: BloomAdmission(65_536, 10),
        lambda: BloomAdmission(2, 0),
        lambda: BloomAdmission(2, 10, 0.0),
        lambda: BloomAdmission(2, 10, 1.0),
    ],
)
def test_admission_refuses_what_it_cannot_be(make):
    with pytest.raises(InvalidArgument):
        make()


def test_admission_refuses_counts_of_another_rule():
    with pytest.raises(SchemaMismatch):
        CountAdmission(2).open().load_state(BloomAdmission(2, 10).open().state())
    with pytest.raises(SchemaMismatch):
        BloomAdmission(2, 10).open().load_state(BloomAdmission(2, 10_000).open().state())
