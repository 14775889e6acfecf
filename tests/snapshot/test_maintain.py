"""Histories that are kept: diff, squash and prune, whatever was saved, and wherever a prune is killed."""

import hashlib
import itertools
import os
import shutil
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from services import s3

import hbkit
from hbkit import errors
from hbkit.embedding import SGD, Adam, BloomAdmission, CountAdmission, Table
from hbkit.snapshot import diff, load, log, prune, save, squash, verify
from hbkit.snapshot.history import History
from hbkit.snapshot.places import place_of
from hbkit.store.line import Chunk

NUMBERS = itertools.count()


def table(name="t", **kwargs):
    return Table(name, 3, **{"optimizer": Adam(), **kwargs})


def train(t, keys, seed=0):
    keys = np.asarray(keys, t.key_dtype)
    t.lookup(keys, train=True)
    t.update(keys, np.random.default_rng(seed).standard_normal((len(keys), t.dim)))
    return t


def lines(t):
    """Everything in a table by key, as bytes."""
    rows = {}
    for chunk in t.store.scan():
        for i, key in enumerate(chunk.key.tolist()):
            rows[key] = b"".join(np.ascontiguousarray(column[i]).tobytes() for column in chunk)
    return rows


def loaded(path, commit=None, **kwargs):
    t = table(**kwargs)
    found = load(path, [t], commit)
    return (
        lines(t),
        found.step,
        found.state,
        t.step,
        t.admission and {k: v.tolist() for k, v in t.admission.state().items()},
    )


def files(path, commit):
    return {p.relative_to(path / commit): p.read_bytes() for p in (path / commit).rglob("*") if p.is_file()}


actions = st.lists(
    st.tuples(st.sampled_from(["train", "erase", "delta", "full", "squash"]), st.lists(st.integers(-8, 8), min_size=1)),
    min_size=6,
    max_size=16,
)


@settings(max_examples=20)
@given(
    actions=actions, admission=st.sampled_from([None, CountAdmission(2), BloomAdmission(2, 50)]), n=st.integers(1, 7)
)
def test_squash_writes_what_a_full_save_would(tmp_path_factory, actions, admission, n):
    path, twin = (tmp_path_factory.mktemp(name) for name in ("squash", "twin"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hbkit.snapshot.rows.CHUNK_ROWS", n)  # row groups that end anywhere
        t = train(table(admission=admission), range(-8, 8, 3))
        save(path, [t], 0)
        for step, (action, keys) in enumerate(actions):
            state = {"cursor": step, "dense": b"%d" % step}
            if action == "train":
                train(t, keys, step)
            elif action == "erase":
                t.store.erase(np.unique(keys))
            else:
                save(path, [t], step, base=None if action == "full" else "latest", state=state)
                full = save(twin, [t], step, state=state)
                if action == "squash":
                    commit = squash(path)
                    assert files(path, commit) == files(twin, full)
                    assert loaded(path, admission=admission) == loaded(twin, full, admission=admission)
                    assert log(path)[-1].parent is None
        verify(path)
    shutil.rmtree(path)
    shutil.rmtree(twin)


def test_squash_of_a_full_commit_is_the_commit(tmp_path):
    commit = save(tmp_path, [train(table(), [1])], 1)
    assert squash(tmp_path) == commit and len(log(tmp_path)) == 1


def test_squash_of_an_older_commit_goes_back_to_it(tmp_path):
    t = train(table(), [1, 2])
    save(tmp_path, [t], 1)
    second = save(tmp_path, [train(t, [2, 3])], 2, base="latest")
    save(tmp_path, [train(t, [1, 4])], 3, base="latest")
    squash(tmp_path, second)
    assert loaded(tmp_path) == loaded(tmp_path, second)
    save(tmp_path, [t], 4, base="latest")  # what the table is now, as a delta to what it was then
    assert lines(t) == loaded(tmp_path)[0]
    verify(tmp_path)


def test_deltas_go_on_from_a_squash(tmp_path):
    t = train(table(), range(500))
    save(tmp_path, [t], 1)
    save(tmp_path, [train(t, [1, 2])], 2, base="latest")
    squash(tmp_path)
    u = table()
    load(tmp_path, [u])
    for seed, saver in enumerate((t, u)):
        save(tmp_path, [train(saver, [seed, 700 + seed], seed)], 3, base="c00000003")
        assert log(tmp_path)[-1].parent == "c00000003"
        assert log(tmp_path)[-1].nbytes < log(tmp_path)[2].nbytes / 3
        assert loaded(tmp_path)[0] == lines(saver)
        again = squash(tmp_path)  # a squash of a squash's delta
        assert loaded(tmp_path)[0] == lines(saver)
        save(tmp_path, [train(saver, [9], seed)], 4, base=again)
        assert log(tmp_path)[-1].parent == again and loaded(tmp_path)[0] == lines(saver)
    verify(tmp_path)


def test_squash_holds_no_table(tmp_path, monkeypatch):
    """Row groups of each file are what is held: so many bytes, however many rows there are."""
    monkeypatch.setattr("hbkit.snapshot.rows.CHUNK_ROWS", 100)
    t = table()
    n = 20_000
    zeros = np.zeros(n, np.int64)
    rows = np.random.default_rng(0).standard_normal((n, 9)).astype(np.float32)
    t.store.put(Chunk(np.arange(n), zeros, zeros, rows[:, :3], rows[:, 3:]))
    save(tmp_path, [t], 1)
    save(tmp_path, [train(t, range(0, n, 50))], 2, base="latest")
    largest = []
    write = hbkit.snapshot.maintain.rows.write_rows

    def watching(draft, path, chunks, *args):
        def seen():
            for chunk in chunks:
                largest.append(len(chunk.key))
                yield chunk

        return write(draft, path, seen(), *args)

    monkeypatch.setattr("hbkit.snapshot.maintain.rows.write_rows", watching)
    squash(tmp_path)
    assert sum(largest) == n and max(largest) <= 200


def test_squash_refuses_what_is_damaged(tmp_path):
    t = train(table(), [1, 2])
    save(tmp_path, [t], 1)
    save(tmp_path, [train(t, [2, 3])], 2, base="latest", state={"dense": b"123"})
    for file in (p for p in tmp_path.rglob("*") if p.is_file() and p.parent != tmp_path):
        good = file.read_bytes()
        file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(errors.Corrupt):
            squash(tmp_path)
        file.write_bytes(good)
    assert len(verify(tmp_path)) == 2
    with pytest.raises(errors.NotFound):
        squash(tmp_path / "no")
    assert not (tmp_path / "no").exists()
    with pytest.raises(errors.NotFound, match="no commit 'c00000009'"):
        squash(tmp_path, "c00000009")


@settings(max_examples=20)
@given(
    actions=actions,
    key_dtype=st.sampled_from(["int64", "uint64", "int32"]),
    pair=st.tuples(st.integers(0), st.integers(0)),
)
def test_diff_names_the_keys_that_differ(tmp_path_factory, actions, key_dtype, pair):
    path = tmp_path_factory.mktemp("diff")
    t = table(key_dtype=key_dtype)
    want = {save(path, [train(t, [1, 2])], 0): lines(t)}
    for step, (action, keys) in enumerate(actions):
        keys = np.unique(np.asarray(keys).astype(key_dtype))
        if action == "train":
            train(t, keys, step)
        elif action == "erase":
            t.store.erase(t.keys(keys))
        else:
            want[save(path, [t], step, base=None if action == "full" else "latest")] = lines(t)
    a, b = (sorted(want)[i % len(want)] for i in pair)
    found = diff(path, a, b)["t"]
    old, new = want[a], want[b]
    expected = (
        sorted(new.keys() - old.keys()),
        sorted(key for key in old.keys() & new.keys() if old[key] != new[key]),
        sorted(old.keys() - new.keys()),
    )
    for have, keys in zip(found, expected, strict=True):
        assert have.dtype == key_dtype
        np.testing.assert_array_equal(have, np.array(keys, np.int64).astype(key_dtype))
    shutil.rmtree(path)


def test_diff_of_other_tables_and_other_widths(tmp_path):
    first = save(tmp_path, [train(table("a"), [1, 2]), train(table("b"), [3])], 1)
    second = save(tmp_path, [train(table("a", optimizer=SGD()), [2, 5]), train(table("c"), [4])], 1)
    found = {name: [keys.tolist() for keys in d] for name, d in diff(tmp_path, first).items()}
    assert found == {"a": [[5], [2], [1]], "b": [[], [], [3]], "c": [[4], [], []]}
    assert [keys.tolist() for keys in diff(tmp_path, second, first)["a"]] == [[1], [2], [5]]
    with pytest.raises(errors.NotFound):
        diff(tmp_path, "c00000003")


def history(path):
    """full, delta, delta, full, delta, squash, delta"""
    t = train(table(), [1, 2, 3])
    commits = [save(path, [t], 1)]
    for step, base in enumerate(("latest", "latest", None, "latest", "squash", "latest")):
        commits.append(squash(path) if base == "squash" else save(path, [train(t, [step])], step, base=base))
    return commits


def test_prune_keeps_the_newest_and_what_they_build_on(tmp_path):
    commits = history(tmp_path)
    before = {commit: loaded(tmp_path, commit) for commit in commits}
    for keep, gone in ((9, []), (5, []), (4, commits[:3]), (4, []), (2, commits[3:5]), (1, [])):
        assert prune(tmp_path, keep) == gone
        commits = [commit for commit in commits if commit not in gone]
        assert [c.id for c in verify(tmp_path)] == commits
        assert {commit: loaded(tmp_path, commit) for commit in commits} == {c: before[c] for c in commits}
        assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == commits


def test_prune_forgets_commits_whose_rows_nobody_needs(tmp_path):
    """Deltas name a parent; where all their tables were written in full, it may go."""
    save(tmp_path, [train(table(), [1])], 1)
    last = save(tmp_path, [train(table(), [2])], 2, base="latest")
    assert prune(tmp_path, 1) == ["c00000001"]
    assert [c.id for c in verify(tmp_path)] == [last]


def test_prune_refuses_bad_arguments(tmp_path):
    for keep in (0, -1, True, 1.5):
        with pytest.raises(errors.InvalidArgument, match="keep at least 1"):
            prune(tmp_path, keep)
    with pytest.raises(errors.NotFound):
        prune(tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_prune_touches_nothing_where_what_it_keeps_is_damaged(tmp_path):
    commits = history(tmp_path)
    (tmp_path / f"{commits[-2]}.json").write_bytes(b"x")
    with pytest.raises(errors.Corrupt):
        prune(tmp_path, 1)
    assert [c for c in commits if (tmp_path / c).is_dir() and (tmp_path / f"{c}.json").exists()] == commits


class Killed(BaseException):
    """As if the process had died."""


def test_prune_killed_anywhere_leaves_whole_commits(tmp_path, monkeypatch):
    commits = history(tmp_path / "whole")
    (tmp_path / "whole" / "c00000002-0123456789abcdef").mkdir()  # somebody died here before
    kept = {commits[5], commits[6]}
    real = {name: getattr(os, name) for name in ("unlink", "rmdir", "fsync", "remove")}
    done = n = 0

    def step(name):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return real[name](*args, **kwargs)

        return call

    while not done:
        path, left = tmp_path / str(n), n
        shutil.copytree(tmp_path / "whole", path)
        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, step(name))
            try:
                prune(path, 2)
                done = True
            except Killed:
                pass
        have = {c.id for c in verify(path)}
        assert kept <= have <= set(commits)
        prune(path, 2)
        assert {c.id for c in verify(path)} == kept
        assert {p.name for p in path.iterdir()} == kept | {f"{c}.json" for c in kept} | {"LOCK"}
        shutil.rmtree(path)
        n += 1
    assert n > 20


def test_prune_beside_a_reader_gives_it_a_whole_commit_or_an_error(tmp_path):
    t = table()
    digests = {}

    def one(step):
        commit = save(tmp_path, [train(t, [step, step + 1])], step, state={"step": step})
        digests[commit] = digest(t)

    def digest(t):
        return hashlib.sha256(repr(sorted(lines(t).items())).encode()).digest()

    one(0)
    stop, whole = threading.Event(), []

    def read():
        while not stop.is_set():
            u = table()
            try:
                found = load(tmp_path, [u], log(tmp_path)[0].id if len(whole) % 2 else "latest")
            except errors.HbkitError:
                pass
            else:
                whole.append((found.commit, found.state, digest(u)))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for step in range(1, 60):
            one(step)
            prune(tmp_path, 1)
    finally:
        stop.set()
        reader.join(60)
    assert not reader.is_alive() and whole
    for commit, state, seen in whole:
        assert digests[commit] == seen and state == {"step": int(commit[1:]) - 1}


def test_prune_waits_for_no_writer_and_for_no_dead_one(tmp_path):
    history(tmp_path)
    (tmp_path / "LOCK").touch()  # of a process that died
    place = place_of(tmp_path)
    with place.lock():
        for call in (prune, squash):
            with pytest.raises(errors.Locked):
                call(tmp_path)
    prune(tmp_path, 1)


@pytest.fixture(params=["s3", "memory"])
def uri(request):
    """An empty place that is no local directory."""
    name = f"maintained/{next(NUMBERS)}"
    if request.param == "memory":
        pytest.importorskip("fsspec")
        return f"memory://{name}"
    return s3(request.getfixturevalue("proxy"), name)


def test_histories_in_buckets_are_kept_as_well(uri):
    commits = history(uri)
    before = {commit: loaded(uri, commit) for commit in commits}
    assert [len(keys) for keys in diff(uri, commits[1])["t"]] == [1, 3, 0]
    assert prune(uri, 4) == commits[:3]
    assert prune(uri, 2) == commits[3:5]
    assert [c.id for c in verify(uri)] == commits[5:]
    assert {commit: loaded(uri, commit) for commit in commits[5:]} == {c: before[c] for c in commits[5:]}
    place = place_of(uri)
    kept = {commit: History(place).find(commit).directory for commit in commits[5:]}
    assert all(entry.endswith(".json") for entry in place.leftovers(kept))
    assert {c.id for c in log(uri)} == set(commits[5:])


def test_slow_writer_does_not_take_the_place_of_a_commit_that_was_removed(proxy, monkeypatch):
    uri = s3(proxy, f"maintained/{next(NUMBERS)}")
    t = train(table(), [1])
    save(uri, [t], 1)
    place = place_of(uri)
    with pytest.raises(errors.Locked, match="another writer has committed c00000002"), place.draft() as draft:
        for step in (2, 3, 4):
            save(uri, [t], step)
        assert len(prune(uri, 1)) == 3
        draft.publish(b"late")
    assert [c.id for c in verify(uri)] == ["c00000004"]
    # What keeps the names is removed once nobody can be that slow.
    monkeypatch.setattr("hbkit.snapshot.bucket.AGE", -10.0)
    assert prune(uri, 1) == []
    assert place.leftovers({"c00000004": History(place).find("c00000004").directory}) == []
    assert save(uri, [t], 5) == "c00000005"
