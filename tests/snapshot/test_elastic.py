"""What was saved is loaded into other tiers, by other ranks, under other names: the same rows, or a named error."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbkit import errors
from hbkit.embedding import SGD, Adagrad, Adam, BloomAdmission, CountAdmission, Table
from hbkit.snapshot import load, log, rows, save, squash, verify
from hbkit.snapshot.history import History
from hbkit.snapshot.manifest import encode, table_directory
from hbkit.snapshot.merge import merged
from hbkit.snapshot.places import place_of
from hbkit.store import cached_ssd, host_memory
from hbkit.store.line import Chunk, Part


def table(name="t", dim=3, **kwargs):
    return Table(name, dim, **{"optimizer": Adam(), **kwargs})


def train(t, keys, seed=0):
    keys = np.asarray(keys, t.key_dtype)
    t.lookup(keys, train=True)
    t.update(keys, np.random.default_rng(seed).standard_normal((len(keys), t.dim)))
    return t


def lines(t):
    """Everything in a table by key, as bytes."""
    found = {}
    for chunk in t.store.scan():
        for i, key in enumerate(chunk.key.tolist()):
            found[key] = b"".join(np.ascontiguousarray(column[i]).tobytes() for column in chunk)
    return found


def save_as_ranks(path, n):
    """The newest commit once more, as n ranks write it: each the rows and counts of its own keys."""
    place = place_of(path)
    history = History(place)
    old = history.find(None)
    with place.draft() as draft:
        tables = {}
        for name, entry in old.tables.items():
            directory = table_directory(draft.directory, name)
            shape = name, entry.key_dtype, entry.dim, entry.n_state
            files, counts = [], []
            for i in range(n):
                part = Part.share(i, n, bits=10)

                def own(part=part, name=name):
                    for chunk in merged(history, history.chain(old, name), name):
                        yield Chunk._make(column[part.has(chunk.key)] for column in chunk)

                files.append(rows.write_rows(draft, f"{directory}/rows-{i:05d}.parquet", own(), *shape))
                for file in entry.admission_files:
                    columns = rows.read_columns(place, file)
                    if "key" in columns:
                        columns = {k: v[part.has(columns["key"])] for k, v in columns.items()}
                    counts.append(rows.write_columns(draft, f"{directory}/admission-{i:05d}.parquet", columns))
            tables[name] = dataclasses.replace(entry, since=None, rows=files, erased=[], admission_files=counts)
        new = dataclasses.replace(
            old, commit=draft.commit, parent=None, tables=tables, directory=draft.directory, state_files={}
        )
        draft.publish(encode(new)[0])
    return draft.commit


TIERS = {
    "host": lambda path: host_memory(),
    "ssd": lambda path: cached_ssd(path / "ssd", "2MiB"),
}


@pytest.mark.parametrize("to", TIERS)
@pytest.mark.parametrize("of", TIERS)
def test_any_tier_loads_what_any_tier_saved(tmp_path, of, to):
    t = table(store=TIERS[of](tmp_path / "of"))
    for seed in range(3):
        train(t, np.random.default_rng(seed).integers(0, 20_000, 8000), seed)
    save(tmp_path / "s", [t], 3)
    train(t, range(100))
    t.store.erase(np.arange(50, 150))
    save(tmp_path / "s", [t], 4, base="latest")
    assert log(tmp_path / "s")[1].parent == "c00000001"
    u = table(store=TIERS[to](tmp_path / "to"))
    train(u, [1, 99_999])
    assert load(tmp_path / "s", [u]).notes == []
    assert lines(u) == lines(t) and u.step == t.step
    assert lines(train(u, range(90, 300), 7)) == lines(train(t, range(90, 300), 7))
    # What was loaded is what a delta goes on from.
    save(tmp_path / "s", [u], 5, base="latest")
    assert log(tmp_path / "s")[2].parent == "c00000002" and log(tmp_path / "s")[2].nbytes < 50_000
    v = table()
    load(tmp_path / "s", [v])
    assert lines(v) == lines(u)
    for each in (t, u, v):
        each.close()


@settings(max_examples=12)
@given(
    saved=st.integers(1, 5),
    ranks=st.integers(1, 5) | st.sampled_from([16, 1500]),
    admission=st.sampled_from([None, CountAdmission(2), BloomAdmission(2, 60)]),
    key_dtype=st.sampled_from(["int64", "uint64", "int32"]),
)
def test_any_number_of_ranks_loads_what_any_number_saved(tmp_path_factory, saved, ranks, admission, key_dtype):
    path = tmp_path_factory.mktemp("ranks")
    t = table(admission=admission, key_dtype=key_dtype)
    keys = np.random.default_rng(0).integers(0, 2**31, 300)
    for part in (keys, keys[:200]):
        train(t, part)
    save(path, [t], 1)
    train(t, keys[100:])
    save(path, [t], 2, base="latest")
    if saved > 1:
        save_as_ranks(path, saved)
        verify(path)
    together, waiting = {}, []
    for i in range(ranks) if ranks < 100 else (0, 7, 1499):
        u = table(admission=admission, key_dtype=key_dtype)
        found = load(path, [u], shard=(i, ranks))
        assert found.step == 2 and u.step == t.step
        mine = lines(u)
        part = Part.share(i, ranks, bits=10)
        assert mine == {key: line for key, line in lines(t).items() if part.has(np.array([key]))[0]}
        assert not together.keys() & mine.keys()
        together |= mine
        if admission is not None:
            waiting.append({name: column.copy() for name, column in u.admission.state().items()})
            # A rank counts its own keys on from where they were.
            own = keys[part.has(t.keys(keys.astype(key_dtype)))]
            v = table(admission=admission, key_dtype=key_dtype)
            load(path, [v])
            assert lines(train(u, own)).keys() == {k for k in lines(train(v, own)) if part.has(np.array([k]))[0]}
    if ranks < 100:
        assert together == lines(t)
        if isinstance(admission, CountAdmission):
            want = t.admission.state()
            have = {name: np.concatenate([w[name] for w in waiting]) for name in want}
            order = np.argsort(have["key"])
            assert all((have[name][order] == want[name]).all() for name in want)
        if isinstance(admission, BloomAdmission):
            np.testing.assert_array_equal(sum(w["counter"] for w in waiting), t.admission.state()["counter"])


def test_squash_and_deltas_of_what_ranks_saved(tmp_path):
    t = train(table(), range(500))
    save(tmp_path, [t], 1)
    save_as_ranks(tmp_path, 3)
    u = table()
    load(tmp_path, [u])
    save(tmp_path, [train(u, [1, 2, 900])], 2, base="latest")
    assert log(tmp_path)[2].nbytes < log(tmp_path)[0].nbytes / 3
    full = save(tmp_path / "twin", [u], 2)
    commit = squash(tmp_path)
    name = "tables/t/rows-00000.parquet"
    assert (tmp_path / commit / name).read_bytes() == (tmp_path / "twin" / full / name).read_bytes()
    verify(tmp_path)


def test_a_shard_is_no_base_for_a_delta(tmp_path):
    t = train(table(), range(100))
    save(tmp_path, [t], 1)
    u = table()
    load(tmp_path, [u], shard=(1, 2))
    save(tmp_path, [train(u, [1])], 2, base="latest")
    verify(tmp_path)
    v = table()
    load(tmp_path, [v])
    assert lines(v) == lines(u) and log(tmp_path)[1].tables == {"t": len(u)}


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0)])
def test_load_refuses_a_shard_that_there_is_not(tmp_path, shard):
    save(tmp_path, [], 1)
    with pytest.raises(errors.InvalidArgument, match="shard"):
        load(tmp_path, [], shard=shard)


def test_tables_are_loaded_by_other_names(tmp_path):
    a, b = train(table("a"), [1, 2, 3]), train(table("b"), [3, 4], 5)
    save(tmp_path, [a, b], 1)
    c = table("c")
    assert load(tmp_path, {"a": c}).notes == []
    assert lines(c) == lines(a)
    # Swapped, their rows are none of the commit's tables of these names, whatever their steps say.
    x, y = table("b"), table("a")
    load(tmp_path, {"a": x, "b": y})
    assert (lines(x), lines(y)) == (lines(a), lines(b))
    for t in (c, x, y):
        train(t, [9])
    save(tmp_path, [c, x, y], 2, base="latest")
    verify(tmp_path)
    found = [table(name) for name in ("c", "b", "a")]
    load(tmp_path, found)
    assert [lines(t) for t in found] == [lines(t) for t in (c, x, y)]


def test_load_refuses_by_name(tmp_path):
    save(tmp_path, [train(table("a"), [1]), train(table("b"), [2])], 1)
    good = train(table("b"), [7])
    before = lines(good)
    for tables, error, text in (
        ({"x": good}, errors.UnknownColumn, "table 'x' is not in commit c00000001.*it has a, b"),
        ([good, table("c")], errors.UnknownColumn, "table 'c' is not in commit"),
        ({"b": good, "a": table("c", dim=4)}, errors.SchemaMismatch, "dim is 4, saved was 3.*table c"),
        ([good, table("a", dtype="float16")], errors.SchemaMismatch, "dtype is float16, saved was float32.*table a"),
        ({"a": good, "b": good}, errors.InvalidArgument, "two tables have one name"),
        ([good, table("b")], errors.InvalidArgument, "two tables have one name"),
    ):
        with pytest.raises(error, match=text):
            load(tmp_path, tables)
        assert lines(good) == before


def test_a_subset_with_other_optimizers_is_loaded(tmp_path):
    a, b = train(table("a"), [1, 2]), train(table("b", optimizer=Adagrad()), [3, 4])
    save(tmp_path, [a, b], 1)
    save(tmp_path, [train(a, [2]), b], 2, base="latest")
    c = table("c", optimizer=SGD())
    notes = load(tmp_path, {"a": c}).notes
    assert notes == ["table c: state of Adam dropped, SGD begins with its initial state"]
    np.testing.assert_array_equal(c.lookup([1, 2]), a.lookup([1, 2]))
    assert len(c) == 2


def test_every_commit_that_is_kept_can_be_gone_back_to(tmp_path):
    t, then = table(), {}
    for step in range(6):
        train(t, [step, step + 1], step)
        then[save(tmp_path, [t], step, base="latest" if step % 3 else None)] = lines(t), t.step
    for commit, (want, step) in then.items():
        load(tmp_path, [t], commit)
        assert (lines(t), t.step) == (want, step)
