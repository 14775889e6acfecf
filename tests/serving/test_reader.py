"""Lookups in a snapshot are the table's own, before and after a hot swap, from any thread."""

import hashlib
import json
import shutil
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbkit import Ragged, errors
from hbkit.embedding import (
    SGD,
    Adagrad,
    Collection,
    Constant,
    CountAdmission,
    Normal,
    Table,
    TruncatedNormal,
    Uniform,
)
from hbkit.embedding.initializers import Initializer
from hbkit.serving import Reader
from hbkit.serving import reader as reader_module
from hbkit.snapshot import history as history_module
from hbkit.snapshot import load, save, squash
from hbkit.snapshot.manifest import _HEAD, _MIDDLE, _TAIL
from hbkit.store.line import Chunk


def reseal(path, change):
    """Rewrite a manifest, digest and all."""
    manifest = json.loads(path.read_bytes())["manifest"]
    change(manifest)
    body = json.dumps(manifest).encode()
    path.write_bytes(_HEAD + hashlib.blake2b(body, digest_size=32).hexdigest().encode() + _MIDDLE + body + _TAIL)


def train(t, keys, seed=0):
    keys = np.array(list(keys), t.key_dtype)
    t.lookup(keys, train=True)
    t.update(keys, np.random.default_rng(seed).standard_normal((len(keys), t.dim)))
    return t


KEYS = {
    "int64": st.integers(-(2**63), 2**63 - 1) | st.integers(-5, 5),
    "uint64": st.integers(0, 2**64 - 1) | st.integers(0, 5),
    "int32": st.integers(-(2**31), 2**31 - 1) | st.integers(-5, 5),
}


@settings(max_examples=15)
@given(data=st.data(), key_dtype=st.sampled_from(list(KEYS)), dim=st.integers(1, 9))
def test_lookup_is_the_tables_own(tmp_path_factory, data, key_dtype, dim):
    path = tmp_path_factory.mktemp("served")
    t = Table("t", dim, key_dtype=key_dtype)
    batches = data.draw(st.lists(st.lists(KEYS[key_dtype], min_size=1, max_size=20), min_size=1, max_size=4))
    asked = data.draw(st.lists(KEYS[key_dtype], max_size=20)) + [key for batch in batches for key in batch]
    for n, batch in enumerate(batches):
        train(t, batch, seed=n)
        t.store.erase(t.keys(np.array(batch[: n % 3], key_dtype)))
        save(path, [t], n, base="latest" if n else None)
    keys = np.array(asked, key_dtype)
    with Reader(path) as reader:
        rows = reader.lookup("t", keys)
        assert rows.dtype == np.float32 and rows.shape == (len(keys), dim)
        assert rows.tobytes() == t.lookup(keys).tobytes()
        assert (reader.tables, reader.step, reader.commit) == (("t",), len(batches) - 1, f"c{len(batches):08d}")
    shutil.rmtree(path)


DEFAULTS = [0.25, [1.0, 2.0, -3.0], Normal(0.5, 1, seed=9), Uniform(0, 1), TruncatedNormal(0, 2, seed=-3), Constant(7)]


@pytest.mark.parametrize("default", DEFAULTS, ids=str)
@pytest.mark.parametrize("key_dtype", KEYS)
def test_absent_keys_read_the_default_wherever_rows_are_read(tmp_path, default, key_dtype):
    options = {"key_dtype": key_dtype, "default": default, "padding_key": 3, "admission": CountAdmission(2)}
    t = Table("t", 3, **options)
    lists = Ragged(np.array([1, 3, 9, 9, 4], key_dtype), (np.array([0, 2, 2, 5]),))
    for step in range(3):  # the first commit is whole, the others are deltas
        train(t, [1, 1, 2, 4 + step, 4 + step, 7], seed=step)
        t.store.erase(t.keys(np.array([4], key_dtype)))
        save(tmp_path, [t], step, base="latest" if step else None)
        keys = np.array([0, 1, 2, 3, 4, 5, 6, 100, 3, 0], key_dtype)
        want = t.lookup(keys)
        absent = ~np.isin(keys, [1, 2, 3, 5, 6, 7] if step > 1 else [1, 2, 3, 5, 7] if step else [1, 3])
        drawn = default("t", keys.astype(np.int64), 3) if isinstance(default, Initializer) else np.float32(default)
        assert np.array_equal(want[absent], np.broadcast_to(drawn, want.shape)[absent])
        assert not want[keys == 3].any()
        with Reader(tmp_path) as reader:
            assert np.array_equal(reader.lookup("t", keys), want)
        again = Table("t", 3, **options)
        load(tmp_path, [again])
        assert np.array_equal(again.lookup(keys), want)
        for pooling in ("sum", "mean", None):
            got, same = (Collection([x], pooling=pooling).lookup({"t": lists})["t"] for x in (t, again))
            rows = t.lookup(lists.values)
            if pooling is None:
                assert np.array_equal(got.values[got.mask], rows) and np.array_equal(same.values, got.values)
            else:
                each = np.stack([rows[:2].sum(0), np.zeros(3), rows[2:].sum(0)])
                divisor = np.array([[2], [1], [3]]) if pooling == "mean" else 1
                assert np.allclose(got, each / divisor) and np.array_equal(same, got)


def test_snapshots_of_version_1_are_read_with_zeros(tmp_path):
    save(tmp_path, [train(Table("t", 2, default=0.5, padding_key=1), [1, 2])], 0)

    def older(manifest):
        del manifest["tables"]["t"]["default"], manifest["tables"]["t"]["padding_key"]
        manifest["version"] = 1

    reseal(tmp_path / "c00000001.json", older)
    rows = Reader(tmp_path).lookup("t", [2, 3, 1])
    assert rows[0].any() and not rows[1:].any()


class Own(Initializer):
    """Of a user's."""


@pytest.mark.parametrize(
    ("default", "error"),
    [
        ({"name": "Own"}, errors.Unsupported),
        ({"name": "Normal"}, errors.Corrupt),
        ({"name": "Normal", "mean": 0, "std": "1", "seed": 0}, errors.Corrupt),
        ({"name": "Normal", "mean": 0, "std": 1, "seed": 0.5}, errors.Corrupt),
        ({"name": "Constant", "value": 10**400}, errors.Corrupt),
        ({"name": "Constant", "value": True}, errors.Corrupt),
    ],
)
def test_reader_refuses_defaults_that_it_cannot_draw(tmp_path, default, error):
    save(tmp_path, [Table("t", 2, default=Own())], 0)
    with pytest.raises(errors.Unsupported, match="'Own'"):
        Reader(tmp_path)

    def change(manifest):
        manifest["tables"]["t"]["default"] = default

    reseal(tmp_path / "c00000001.json", change)
    with pytest.raises(error, match=r"table 't'|table t"):
        Reader(tmp_path)


def test_lookup_returns_the_callers_own(tmp_path):
    save(tmp_path, [train(Table("t", 2), [1])], 0)
    reader = Reader(tmp_path)
    first = reader.lookup("t", [1, 2])
    want = first.copy()
    first[:] = 7
    np.testing.assert_array_equal(reader.lookup("t", [1, 2]), want)
    assert not want[1].any() and want[0].any()


BAD_KEYS = [[1.5], ["a"], [[1, 2]], 3, [True], np.zeros(2, np.float32), None]


@pytest.mark.parametrize("keys", BAD_KEYS, ids=repr)
def test_bad_keys_raise_as_the_table_does(tmp_path, keys):
    t = train(Table("t", 2), [1])
    save(tmp_path, [t], 0)
    said = []
    for where in (lambda: t.lookup(keys), lambda: Reader(tmp_path).lookup("t", keys)):
        with pytest.raises(errors.InvalidArgument) as caught:
            where()
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert Reader(tmp_path).lookup("t", []).shape == (0, 2)


@pytest.mark.parametrize("key", [2**31, -(2**31) - 1])
def test_key_that_does_not_fit_raises(tmp_path, key):
    save(tmp_path, [train(Table("t", 2, key_dtype="int32"), [1])], 0)
    with pytest.raises(errors.InvalidArgument, match="int32"):
        Reader(tmp_path).lookup("t", [key])


def test_unknown_table_names_those_there_are(tmp_path):
    save(tmp_path, [Table("user", 2), Table("item", 2)], 0)
    with pytest.raises(errors.UnknownColumn, match=r"no table 'usr'.*tables are item, user"):
        Reader(tmp_path).lookup("usr", [1])


def test_closed_reader_raises(tmp_path):
    save(tmp_path, [Table("t", 2)], 0)
    with Reader(tmp_path) as reader:
        pass
    reader.close()
    for use in (lambda: reader.lookup("t", [1]), lambda: reader.tables, lambda: reader.step, reader.refresh):
        with pytest.raises(errors.Closed):
            use()


def test_no_snapshot_raises(tmp_path):
    with pytest.raises(errors.NotFound, match="there is no snapshot"):
        Reader(tmp_path / "no")


def test_refresh_takes_the_newest_commit_and_its_tables(tmp_path):
    t = train(Table("t", 2), [1])
    save(tmp_path, [t], 1)
    reader = Reader(tmp_path)
    assert not reader.refresh()
    train(t, [1, 2])
    other = train(Table("other", 3, optimizer=SGD()), [5])
    save(tmp_path, [t, other], 2, base="latest")
    assert reader.tables == ("t",) and not reader.lookup("t", [2]).any()
    assert reader.refresh() and not reader.refresh()
    assert (reader.tables, reader.step) == (("other", "t"), 2)
    np.testing.assert_array_equal(reader.lookup("t", [1, 2]), t.lookup([1, 2]))
    np.testing.assert_array_equal(reader.lookup("other", [5]), other.lookup([5]))


def test_refresh_that_fails_keeps_the_commit(tmp_path):
    t = train(Table("t", 2), [1])
    save(tmp_path, [t], 1)
    reader, want = Reader(tmp_path), t.lookup([1])
    commit = save(tmp_path, [train(t, [1])], 2)
    path = tmp_path / commit / "tables" / "t" / "rows-00000.parquet"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"!")
    with pytest.raises(errors.Corrupt, match="checksum"):
        reader.refresh()
    np.testing.assert_array_equal(reader.lookup("t", [1]), want)
    assert reader.step == 1
    with pytest.raises(errors.Corrupt, match="checksum"):
        Reader(tmp_path)
    path.write_bytes(data)
    assert reader.refresh() and reader.step == 2


EVENTS = st.lists(
    st.tuples(st.sampled_from(["train", "erase", "delta", "full", "refresh"]), st.sets(st.integers(0, 30)))
)


@settings(max_examples=15)
@given(events=EVENTS, default=st.sampled_from([0.0, 0.5, Normal(0, 1, seed=1)]), room=st.integers(1, 20))
def test_refreshed_reader_is_as_a_new_one(tmp_path_factory, events, default, room):
    path = tmp_path_factory.mktemp("served")
    t = train(Table("t", 3, default=default, padding_key=4), [1, 2])
    save(path, [t], 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader_module, "STEP", room)  # so that room has to be made
        reader, keys = Reader(path), np.arange(31)
        for n, (event, some) in enumerate([*events, ("delta", ()), ("refresh", ())]):
            if event == "train":
                train(t, some, n)
            elif event == "erase":
                t.store.erase(np.array(sorted(some), np.int64))
            elif event == "refresh":
                reader.refresh()
                with Reader(path) as new:
                    assert reader.lookup("t", keys).tobytes() == new.lookup("t", keys).tobytes()
                    assert (reader.commit, reader.step) == (new.commit, new.step)
            else:
                save(path, [t], n, base="latest" if event == "delta" else None)
        assert reader.lookup("t", keys).tobytes() == t.lookup(keys).tobytes()
    shutil.rmtree(path)


def test_refresh_reads_the_new_deltas_alone(tmp_path, monkeypatch):
    t, u = train(Table("t", 4), range(1000)), Table("u", 2)
    save(tmp_path, [t, u], 0)
    monkeypatch.setattr(reader_module, "STEP", 64)
    reader, paths, read = Reader(tmp_path), [], history_module.rows.read_rows
    monkeypatch.setattr(
        history_module.rows, "read_rows", lambda place, entry, t: paths.append(entry.path) or read(place, entry, t)
    )
    for n in range(1, 31):  # in all more rows than there is room for at first
        train(t, range(n, n + 100), n)
        save(tmp_path, [t, u], n, base="latest")
        assert n % 3 or reader.refresh()
        assert n % 3 or np.array_equal(reader.lookup("t", range(1200)), t.lookup(range(1200)))
    assert len(paths) == 2 * 30 and not any(p.startswith("c00000001/") for p in paths)
    assert len(reader._held.tables["t"]._lines) < 2000
    squash(tmp_path)  # the same rows: there is nothing to read
    paths.clear()
    assert reader.refresh() and not paths
    assert np.array_equal(reader.lookup("t", range(1200)), t.lookup(range(1200)))


def test_a_delta_that_does_not_make_its_rows_is_refused(tmp_path):
    t = train(Table("t", 4), range(10))
    save(tmp_path, [t], 0)
    reader, want = Reader(tmp_path), t.lookup(range(20))
    commit = save(tmp_path, [train(t, [3, 11])], 1, base="latest")

    def change(manifest):
        manifest["tables"]["t"]["n_rows"] = 10

    reseal(tmp_path / f"{commit}.json", change)
    with pytest.raises(errors.Corrupt, match="make 11 rows"):
        reader.refresh()
    assert np.array_equal(reader.lookup("t", range(20)), want)
    reseal(tmp_path / f"{commit}.json", lambda manifest: manifest["tables"]["t"].update(n_rows=11))
    assert reader.refresh() and np.array_equal(reader.lookup("t", range(20)), t.lookup(range(20)))


@pytest.mark.parametrize("base", [None, "latest"])
def test_lookups_during_refresh_read_one_commit_each(tmp_path, base):
    """Every row of commit n holds n: a lookup that mixed commits would show two numbers."""
    keys = np.arange(20_000)
    t = Table("t", 4, optimizer=Adagrad(), initializer=Constant(0))

    def commit(n):
        full = np.full((len(keys), 4), n, np.float32)
        t.store.put(Chunk(keys, keys, np.full(len(keys), n), full, full))
        t.step = n
        save(tmp_path, [t], n, base=base if n > 1 else None)

    commit(1)
    reader, seen, failed, done = Reader(tmp_path), set(), [], threading.Event()

    def look():
        last = 0.0
        try:
            while not done.is_set():
                rows = reader.lookup("t", keys)
                assert (rows == rows[0, 0]).all() and rows[0, 0] >= last
                last = rows[0, 0]
                seen.add(float(last))
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    for n in range(2, 8):
        commit(n)
        assert reader.refresh()
    np.testing.assert_array_equal(reader.lookup("t", [3]), [[7] * 4])
    done.set()
    for thread in threads:
        thread.join()
    assert not failed and len(seen) > 1


def test_reader_of_a_named_commit_stays_there(tmp_path):
    t = Table("user", 2)
    rows = []
    for step in range(3):
        t.lookup([1], train=True)
        t.update([1], [[1.0, 2.0]])
        save(tmp_path, [t], step, base="latest" if step else None)
        rows.append(t.lookup([1]))
    for n, commit in enumerate(("c00000001", "c00000002", "latest")):
        with Reader(tmp_path, commit) as reader:
            assert reader.step == n and not reader.refresh()
            np.testing.assert_array_equal(reader.lookup("user", [1]), rows[n])
    with pytest.raises(errors.NotFound, match="no commit 'c00000004'"):
        Reader(tmp_path, "c00000004")
