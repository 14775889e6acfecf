"""What is saved comes back bit for bit: rows, state, frequencies, admission, steps, from full and delta commits."""

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hbkit
from hbkit import errors
from hbkit.embedding import (
    SGD,
    Adagrad,
    Adam,
    AdamW,
    BloomAdmission,
    Constant,
    CountAdmission,
    Ftrl,
    RowWiseAdagrad,
    RowWiseAdam,
    Table,
)
from hbkit.snapshot import load, log, save, verify
from hbkit.store.line import Chunk

OPTIMIZERS = [
    SGD(lr=0.1),
    SGD(lr=0.1, momentum=0.9),
    Adagrad(lr=0.1),
    RowWiseAdagrad(lr=0.1),
    Adam(),
    AdamW(),
    RowWiseAdam(),
    Ftrl(lr=0.1),
]
ADMISSIONS = [None, CountAdmission(2), BloomAdmission(2, 50)]
RANGES = {"int64": (-(2**63), 2**63 - 1), "uint64": (0, 2**64 - 1), "int32": (-(2**31), 2**31 - 1)}


def lines(table):
    """Everything in a table, as bytes: NaNs of any kind included."""
    chunks = list(table.store.scan())
    columns = zip(*chunks, strict=True) if chunks else [[np.zeros(0)]] * 5
    return [np.ascontiguousarray(np.concatenate(list(c))).tobytes() for c in columns]


def waiting(table):
    if table.admission is None:
        return None
    return {name: column.tolist() for name, column in table.admission.state().items()}


@st.composite
def tables(draw, name="t"):
    """A table's arguments."""
    return {
        "name": name,
        "dim": draw(st.integers(1, 9)),
        "key_dtype": draw(st.sampled_from(list(RANGES))),
        "optimizer": draw(st.sampled_from(OPTIMIZERS)),
        "admission": draw(st.sampled_from(ADMISSIONS)),
    }


@st.composite
def trained(draw, name):
    """A table's arguments, and batches of its keys."""
    kwargs = draw(tables(name))
    low, high = RANGES[kwargs["key_dtype"]]
    key = st.integers(low, high) | st.integers(max(low, -3), 3) | st.sampled_from([low, high])
    return kwargs, draw(st.lists(st.lists(key, min_size=1, max_size=20), max_size=4))


def train(table, batches, seed=0):
    rng = np.random.default_rng(seed)
    for batch in batches:
        keys = np.array(batch, table.key_dtype)
        table.lookup(keys, train=True)
        table.update(keys, rng.standard_normal((len(keys), table.dim)))
    return table


@settings(max_examples=20)
@given(a=trained("a"), b=trained("näme/ly".replace("/", "%2F ")), step=st.integers(0, 2**63 - 1))
def test_save_then_load_gives_the_same_bits(tmp_path_factory, a, b, step):
    path = tmp_path_factory.mktemp("snapshot") / "made" / "here"
    saved = [train(Table(**kwargs), batches) for kwargs, batches in (a, b)]
    commit = save(path, saved, step)
    fresh = [train(Table(**kwargs), [[1, 2, 3]]) for kwargs, _ in (b, a)][::-1]  # what they held goes
    found = load(path, fresh)
    assert (found.commit, found.step, found.state, found.notes) == (commit, step, {}, [])
    for t, u in zip(saved, fresh, strict=True):
        assert lines(t) == lines(u)
        assert waiting(t) == waiting(u)
        assert t.step == u.step
        u.store.validate()
    # Training goes on as it would have.
    for t, u, (_, batches) in zip(saved, fresh, (a, b), strict=True):
        assert lines(train(t, batches, seed=1)) == lines(train(u, batches, seed=1))
    assert [c.id for c in verify(path)] == [commit]
    shutil.rmtree(path)


@settings(max_examples=15)
@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=6, max_size=6), freq=st.integers(-(2**63), 2**63 - 1))
def test_save_keeps_every_float_bit(tmp_path_factory, bits, freq):
    path = tmp_path_factory.mktemp("snapshot")
    values = np.array(bits, np.uint32).view(np.float32).reshape(1, 6)
    one = np.array([7], np.int64)
    t, u = (Table("t", 3, optimizer=Adagrad()) for _ in range(2))
    t.store.put(Chunk(one, np.array([freq]), one, values[:, :3], values[:, 3:]))
    save(path, [t], 0)
    load(path, [u])
    assert lines(t) == lines(u)
    shutil.rmtree(path)


actions = st.lists(
    st.tuples(
        st.sampled_from(["train", "lookup", "erase", "full", "delta", "older", "reload"]),
        st.lists(st.integers(-8, 8), min_size=1, max_size=8),
    ),
    min_size=6,
    max_size=16,
)


@settings(max_examples=20)
@given(kwargs=tables(), actions=actions)
def test_chains_of_deltas_equal_full_saves(tmp_path_factory, kwargs, actions):
    path = tmp_path_factory.mktemp("chain")
    kwargs["key_dtype"] = "int64"
    t, expected = train(Table(**kwargs), [range(-8, 9, 2)] * 2), {}

    def keep(commit):
        expected[commit] = lines(t), waiting(t), t.step

    keep(save(path, [t], 0))
    for n, (action, keys) in enumerate(actions):
        k = np.array(keys)
        if action == "train":
            train(t, [keys], seed=n)
        elif action == "lookup":
            t.lookup(k, train=True)
        elif action == "erase":
            t.store.erase(np.unique(k))
        elif action == "full":
            keep(save(path, [t], n))
        elif action == "delta":
            keep(save(path, [t], n, base="latest"))
        elif action == "older":
            keep(save(path, [t], n, base=sorted(expected)[keys[0] % len(expected)]))
        elif action == "reload":  # go back to some commit, in another table: history branches
            t = Table(**kwargs)
            load(path, [t], commit=sorted(expected)[keys[0] % len(expected)])
    assert [c.id for c in log(path)] == sorted(expected)
    verify(path)
    u = Table(**kwargs)
    for commit, state in expected.items():
        load(path, [u], commit)
        assert (lines(u), waiting(u), u.step) == state
    shutil.rmtree(path)


def test_delta_holds_only_what_changed(tmp_path):
    t = train(Table("t", 4), [range(1000)])
    save(tmp_path, [t], 1)
    train(t, [range(5)])
    t.store.erase(np.arange(990, 1000))
    commit = save(tmp_path, [t], 2, base="latest")
    full, delta = log(tmp_path)
    assert (delta.parent, delta.tables, delta.step) == (full.id, {"t": 990}, 2)
    assert delta.nbytes < full.nbytes / 10
    files = hbkit.parquet.read_columns(tmp_path / commit / "tables" / "t" / "rows-00000.parquet")
    assert files["key"].tolist() == list(range(5))
    # In a process that loaded the commit it is a delta as well.
    u = Table("t", 4)
    load(tmp_path, [u])
    save(tmp_path, [train(u, [[3]])], 3, base="latest")
    assert log(tmp_path)[-1].nbytes < full.nbytes / 10


def test_delta_against_a_commit_the_table_never_was_is_written_in_full(tmp_path):
    t = train(Table("t", 4), [[1, 2, 3], [4]])
    first = save(tmp_path, [t], 2)
    save(tmp_path, [train(t, [[1]] * 3)], 5)
    u = Table("t", 4)
    load(tmp_path, [u], commit=first)
    train(u, [[1]] * 3, seed=5)  # the same steps and frequencies as in the newest commit, but other rows
    save(tmp_path, [u], 5, base="latest")
    v = Table("t", 4)
    load(tmp_path, [v])
    assert lines(v) == lines(u)


def test_delta_is_right_where_steps_began_anew(tmp_path):
    """A collection made after a load counts its steps from 0: rows are stamped below what the base has."""
    t = train(Table("t", 4), [range(6)] * 5)
    save(tmp_path, [t], 5)
    t.step = 0
    train(t, [[0, 1], *[[2, 3]] * 6], seed=1)
    t.store.erase(np.array([5]))
    save(tmp_path, [t], 12, base="latest")
    u = Table("t", 4)
    load(tmp_path, [u])
    assert lines(u) == lines(t)
    assert hbkit.parquet.File(next((tmp_path / "c00000002").rglob("rows-*"))).n_rows == 4


def test_delta_takes_up_and_drops_tables(tmp_path):
    a, b = (train(Table(name, 2), [[1, 2]]) for name in "ab")
    save(tmp_path, [a], 1)
    save(tmp_path, [a, b], 2, base="latest")
    save(tmp_path, [b], 3, base="latest")
    save(tmp_path, [a, b], 4, base="latest")
    verify(tmp_path)
    c, d = Table("a", 2), Table("b", 2)
    load(tmp_path, [c, d])
    assert (lines(c), lines(d)) == (lines(a), lines(b))
    with pytest.raises(errors.UnknownColumn, match=r"'a' is not in commit c00000003.*it has b"):
        load(tmp_path, [c], commit="c00000003")


def test_saved_bytes_depend_on_the_rows_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("hbkit.snapshot.rows.CHUNK_ROWS", 7)

    class Store:
        """The same rows in chunks of other sizes."""

        def __init__(self, inner, size):
            self.inner, self.size, self.changes = inner, size, inner.changes

        def point(self, *args):
            point = self.inner.point(*args)
            scan = point.scan

            def pieces():
                for chunk in scan():
                    for i in range(0, len(chunk.key), self.size):
                        yield Chunk._make(column[i : i + self.size] for column in chunk)

            point.scan = pieces
            return point

    keys = np.random.default_rng(0).permutation(100)
    found = []
    for n, order in enumerate((keys, keys[::-1])):
        t = Table("t", 3, initializer=Constant(0.5), admission=CountAdmission(1))
        for key in order:
            t.lookup([key], train=True)
        t.store = Store(t.store, 1 + n * 9)
        commit = save(tmp_path / str(n), [t], 0)
        found.append({p.name: p.read_bytes() for p in (tmp_path / str(n)).rglob("*.*")})
        groups = hbkit.parquet.File(tmp_path / str(n) / commit / "tables" / "t" / "rows-00000.parquet").row_group_rows
        assert groups == [7] * 14 + [2]
    assert found[0] == found[1]


def test_empty_tables_and_no_tables_round_trip(tmp_path):
    save(tmp_path, [Table("t", 4)], 0)
    t = train(Table("t", 4), [[1, 2]])
    load(tmp_path, [t])
    assert len(t) == 0 and t.step == 0
    save(tmp_path, [], 9, state={"only": "state"})
    assert load(tmp_path, []).state == {"only": "state"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**200), 2**200) | st.floats(-1e300, 1e300) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(lambda n: n[0] != ".")


@settings(max_examples=30)
@given(state=st.dictionaries(names, json_values | st.binary(max_size=50), max_size=4))
def test_state_comes_back_as_it_was_given(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("state")
    save(path, [], 0, state=state)
    assert load(path, []).state == state
    shutil.rmtree(path)


@pytest.mark.parametrize(
    "value", [(1, 2), {1: 2}, float("nan"), float("inf"), {1}, np.float32(1), {"a": b"x"}, object()]
)
def test_state_that_json_would_change_is_refused(tmp_path, value):
    with pytest.raises(errors.InvalidArgument, match="'x' does not survive JSON"):
        save(tmp_path, [], 0, state={"x": value})


@pytest.mark.parametrize("name", ["", ".", "..", ".x", "x" * 300, "\ud800", 3])
def test_state_name_that_is_no_file_name_is_refused(tmp_path, name):
    with pytest.raises(errors.InvalidArgument, match="file name"):
        save(tmp_path, [], 0, state={name: b""})


@pytest.mark.parametrize(
    ("kwargs", "saved"),
    [({"dim": 5}, "dim is 5, saved was 4"), ({"key_dtype": "int32"}, "key_dtype is int32, saved was int64")],
)
def test_load_refuses_another_schema_by_name(tmp_path, kwargs, saved):
    save(tmp_path, [train(Table("t", 4), [[1]])], 0)
    other = train(Table(**({"name": "t", "dim": 4} | kwargs)), [[2]])
    before = lines(other)
    with pytest.raises(errors.SchemaMismatch, match=f"{saved}.*table t"):
        load(tmp_path, [other])
    assert lines(other) == before


@pytest.mark.parametrize("optimizer", [SGD(), SGD(momentum=0.9), Ftrl(), Adam()], ids=str)
def test_load_drops_another_optimizers_state_and_says_so(tmp_path, optimizer):
    t = train(Table("t", 4, optimizer=Adagrad(lr=0.1)), [[1, 2, 3]])
    save(tmp_path, [t], 0)
    u = Table("t", 4, optimizer=optimizer)
    notes = load(tmp_path, [u]).notes
    assert len(notes) == 1 and "table t: state of Adagrad dropped" in notes[0]
    (have,), (want,) = u.store.scan(), t.store.scan()
    for column in ("key", "freq", "last_step", "row"):
        np.testing.assert_array_equal(getattr(have, column), getattr(want, column))
    np.testing.assert_array_equal(have.state, np.tile(optimizer.initial_state(4), (3, 1)))
    # Its state is none of the saved commit's: a delta against it would be wrong.
    save(tmp_path, [u], 1, base="latest")
    v = Table("t", 4, optimizer=optimizer)
    assert load(tmp_path, [v]).notes == []
    assert lines(v) == lines(u)


def test_load_keeps_state_when_only_the_rate_changes(tmp_path):
    t = train(Table("t", 4, optimizer=Adagrad(lr=0.1)), [[1, 2, 3]])
    save(tmp_path, [t], 0)
    u = Table("t", 4, optimizer=Adagrad(lr=0.2))
    assert load(tmp_path, [u]).notes == []
    assert lines(u) == lines(t)


def test_load_of_another_admission_is_refused_or_noted(tmp_path):
    t = Table("t", 4, admission=BloomAdmission(2, 100))
    s = Table("s", 4, admission=CountAdmission(3))
    for table in (t, s):
        table.lookup([1, 1, 2], train=True)
    save(tmp_path, [t, s], 0)
    good = Table("s", 4, admission=CountAdmission(3))
    good.lookup([9], train=True)
    for admission in (CountAdmission(2), BloomAdmission(2, 5000)):
        before = waiting(good)
        with pytest.raises(errors.SchemaMismatch):
            load(tmp_path, [good, Table("t", 4, admission=admission)])
        assert waiting(good) == before
    assert "BloomFilter left out" in load(tmp_path, [Table("t", 4)]).notes[0]
    save(tmp_path, [Table("t", 4)], 0)
    assert "CountFilter begins anew" in load(tmp_path, [Table("t", 4, admission=CountAdmission(2))]).notes[0]


def test_load_names_what_is_not_there(tmp_path):
    for read in (verify, log, lambda p: load(p, [])):
        with pytest.raises(errors.NotFound, match="there is no snapshot"):
            read(tmp_path / "no")
    with pytest.raises(errors.NotFound, match="there is no snapshot"):
        save(tmp_path, [], 0, base="latest")
    save(tmp_path, [Table("a", 1), Table("b", 1)], 0)
    with pytest.raises(errors.NotFound, match=r"no commit 'c00000007'.*there are c00000001 to c00000001"):
        load(tmp_path, [], commit="c00000007")
    with pytest.raises(errors.UnknownColumn, match=r"table 'x' is not in commit.*it has a, b"):
        load(tmp_path, [Table("x", 1)])


@pytest.mark.parametrize("call", [lambda p: save(p, [], 0), lambda p: load(p, []), verify, log])
def test_unknown_services_are_unsupported_by_name(call):
    with pytest.raises(errors.Unsupported, match="nowhere://bucket/model"):
        call("nowhere://bucket/model")


def test_save_refuses_bad_arguments(tmp_path):
    with pytest.raises(errors.InvalidArgument, match="one name"):
        save(tmp_path, [Table("t", 1), Table("t", 2)], 0)
    for step in (-1, 1.5, True, 2**63):
        with pytest.raises(errors.InvalidArgument, match="step"):
            save(tmp_path, [], step)
    t = Table("t", 1, key_dtype="int32")
    t.store.put(Chunk(*(np.array([2**40]),) * 3, np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32)))
    with pytest.raises(errors.SchemaMismatch, match="does not fit int32"):
        save(tmp_path, [t], 0)
