"""The home of rows on disk against a dictionary; what it refuses, and what it costs."""

import contextlib
import json
import os
import random
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from powerless import MemoryDisk

from hbkit import errors
from hbkit._ext.blocks import Blocks
from hbkit._ext.places import Places
from hbkit.store import home as module
from hbkit.store import log
from hbkit.store.disk import Disk, aligned
from hbkit.store.home import Home
from hbkit.store.line import Layout, Part


def layout(dim=4, n_state=4, metadata=True, dtype="float32"):
    return Layout(
        "t", dim, np.zeros(n_state, np.float32), lambda keys: np.zeros((len(keys), dim)), metadata, None, dtype
    )


def records(rng, n, size):
    return rng.integers(0, 256, (n, size), np.uint8), *rng.integers(0, 2**32, (2, n), np.uint32)


class Twin:
    """A home and a dictionary that get the same."""

    def __init__(self, path, layout, **how):
        self.path, self.layout, self.how = path, layout, how
        self.size = layout.line_nbytes
        self.rows, self.committed = {}, {}
        self.home = Home(layout, path, **how)

    def write(self, keys, rng):
        keys = np.unique(keys)
        rng.shuffle(keys)
        new = records(rng, len(keys), self.size)
        self.home.write(keys, *new)
        for key, *row in zip(keys.tolist(), *new, strict=True):
            self.rows[key] = [x.tobytes() for x in row]

    def add(self, keys, rng):
        keys = np.setdiff1d(keys, np.array(list(self.rows), np.int64))
        self.home.add(keys)
        assert self.home.find(keys).all() and not self.home.written(keys).any()
        if rng.random() < 0.5:
            assert self.home.erase(keys) == len(keys)
        else:
            self.write(keys, rng)

    def erase(self, keys):
        assert self.home.erase(keys) == sum(self.rows.pop(k, None) is not None for k in set(keys.tolist()))

    def commit(self):
        self.home.commit({"count": np.array([len(self.rows)])})
        self.committed = dict(self.rows)

    def reopen(self):
        self.home.close()
        self.home = Home(self.layout, self.path, **self.how)
        self.rows = dict(self.committed)
        if self.home.n_commits:
            assert self.home.kept()["count"].tolist() == [len(self.rows)]

    def check(self):
        keys = np.array(list(self.rows), np.int64)
        found = self.home.read(keys)
        assert [[x.tobytes() for x in row] for row in zip(*found, strict=True)] == list(self.rows.values())
        for have, want in zip(self.home.metadata(keys), found[1:], strict=True):
            assert np.array_equal(have, want)
        assert sorted(self.home.keys().tolist()) == sorted(self.rows) and len(self.home) == len(self.rows)
        self.home.validate()


ACTS = ("write", "write", "write", "add", "erase", "commit", "reopen")


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    acts=st.lists(st.sampled_from(ACTS), min_size=1, max_size=25),
    n=st.sampled_from([3, 60, 900]),
    line=st.sampled_from([(1, 0), (4, 4), (300, 300)]),
    metadata=st.booleans(),
    tail=st.sampled_from([1, 2**40]),
    space=st.sampled_from([1.0, 1.8]),
)
def test_home_is_a_dictionary(seed, acts, n, line, metadata, tail, space):
    rng = np.random.default_rng(seed)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(module, "LEAST_TAIL_NBYTES", tail)
        m.setattr(module, "TAIL", 0)
        m.setattr(module, "PART_ROWS", 50)
        m.setattr(module, "SPACE", space)
        m.setattr(module, "SWEEP", 40)
        m.setattr(log, "SPARE_NBYTES", 0)
        how = {"buffer_nbytes": 8192, "segment_nbytes": 16_384, "disk": MemoryDisk()}
        twin = Twin(Path("/t"), layout(*line, metadata=metadata), **how)
        for act in acts:
            keys = rng.integers(-n, n, n)
            if act in ("commit", "reopen"):
                getattr(twin, act)()
            elif act == "erase":
                twin.erase(keys[: n // 3])
            else:
                getattr(twin, act)(keys, rng)
            twin.check()
        twin.home.verify()
        twin.home.close()


@pytest.mark.parametrize("ring", [True, False])
@pytest.mark.parametrize("direct", [True, False])
def test_home_reads_the_same_by_every_engine(tmp_path, ring, direct):
    disk = Disk(direct, ring)
    twin = Twin(tmp_path, layout(16, 16), disk=disk, buffer_nbytes=2**19, segment_nbytes=2**20)
    rng = np.random.default_rng(0)
    twin.write(np.arange(30_000), rng)
    twin.write(rng.integers(0, 30_000, 5000), rng)
    twin.commit()
    twin.check()
    s = twin.home.stats()
    assert s["engine"] == ("io_uring" if ring and Disk().engine == "io_uring" else "threads")
    assert s["reads"] >= 10 and s["direct"] <= direct and s["waiting"] == 0
    twin.reopen()
    twin.check()
    twin.home.close()


def test_home_read_of_an_absent_key_is_an_error(tmp_path):
    home = Home(layout(), tmp_path)
    home.add(np.array([1]))
    for key in (1, 2):
        with pytest.raises(errors.InvalidArgument):
            home.read(np.array([key]))
    with pytest.raises(errors.InvalidArgument, match="no line yet"):
        home.commit()
    home.close()
    with pytest.raises(errors.Closed):
        home.read(np.array([1]))


def test_home_keeps_columns_of_some_dtypes_alone(tmp_path):
    home = Home(layout(), tmp_path)
    for bad in (np.zeros(3), np.zeros((2, 2), np.int64), np.zeros(2, object)):
        with pytest.raises(errors.InvalidArgument, match="kept"):
            home.commit({"x": bad})
    keep = {"a": np.arange(3), "b": np.arange(5, dtype=np.uint16), "c": np.zeros(0, np.int64)}
    home.commit(keep)
    home.close()
    home = Home(layout(), tmp_path)
    assert {k: (v.dtype.str, v.tolist()) for k, v in home.kept().items()} == {
        k: (v.dtype.str, v.tolist()) for k, v in keep.items()
    }
    home.close()


def test_home_has_one_writer(tmp_path):
    home = Home(layout(), tmp_path)
    with pytest.raises(errors.Locked, match="LOCK"):
        Home(layout(), tmp_path)
    home.close()
    home.close()
    Home(layout(), tmp_path).close()


def test_home_of_other_lines_is_a_schema_mismatch(tmp_path):
    twin = Twin(tmp_path, layout())
    twin.write(np.arange(10), np.random.default_rng(0))
    twin.commit()
    twin.home.close()
    for other in (layout(5), layout(4, 3), layout(dtype="float16", n_state=6)):
        with pytest.raises(errors.SchemaMismatch, match="table t"):
            Home(other, tmp_path)
    twin.reopen()
    twin.check()
    twin.home.close()


def test_home_metadata_may_be_held_later(tmp_path):
    twin = Twin(tmp_path, layout(metadata=False))
    twin.write(np.arange(100), np.random.default_rng(0))
    twin.commit()
    twin.layout = layout()
    twin.reopen()
    twin.check()
    twin.home.close()


def test_home_leaves_no_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "OPEN_FILES", 4)
    before = len(os.listdir("/proc/self/fd"))
    disk = Disk()
    for _ in range(2):
        twin = Twin(tmp_path, layout(), buffer_nbytes=4096, segment_nbytes=4096, disk=disk)
        twin.write(np.arange(2000), np.random.default_rng(0))
        twin.commit()
        twin.check()
        assert len(list(tmp_path.glob("segment-*"))) > 8
        assert len(os.listdir("/proc/self/fd")) <= before + 16
        twin.write(np.arange(2000), np.random.default_rng(0))
        twin.home.close()
    del disk, twin
    assert len(os.listdir("/proc/self/fd")) == before


def test_home_reads_beside_writes_and_compaction(tmp_path):
    n = 4000
    twin = Twin(tmp_path, layout(16, 0), buffer_nbytes=2**14, segment_nbytes=2**16)
    home, keys = twin.home, np.arange(n)

    def lines(version):
        out = np.empty((n, 64), np.uint8)
        out[:] = (keys[:, None] * 7 + version) % 251
        return out, np.full(n, version, np.uint32), np.arange(n, dtype=np.uint32)

    home.write(keys, *lines(0))
    failed, done = [], threading.Event()

    def reader(seed):
        rng = np.random.default_rng(seed)
        try:
            while not done.is_set():
                some = rng.permutation(n)[:500]
                got, version, last = home.read(some)
                assert (got == ((some * 7 + version) % 251)[:, None]).all() and (last == some).all()
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=reader, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    rng = np.random.default_rng(9)
    for version in range(1, 120):
        some = rng.random(n) < 0.3
        home.write(keys[some], *(a[some] for a in lines(version)))
        if version % 10 == 0:
            home.commit()
    done.set()
    for t in threads:
        t.join()
    assert not failed
    assert home.stats()["compacted_segments"] > 5
    home.validate()
    home.close()


def test_home_close_waits_for_reads(tmp_path):
    for _ in range(5):
        twin = Twin(tmp_path, layout(60, 60, metadata=False), buffer_nbytes=2**16)
        keys, closed, found = np.arange(20_000), threading.Event(), []
        twin.write(keys, np.random.default_rng(0))
        twin.commit()
        want = twin.home.read(keys)[0]

        def reader(home=twin.home, keys=keys, found=found):
            with contextlib.suppress(errors.Closed):
                while True:
                    found.append(home.read(keys)[0])

        thread = threading.Thread(target=reader)
        thread.start()
        closed.wait(0.02)
        twin.home.close()
        thread.join()
        assert all(np.array_equal(f, want) for f in found)


def test_home_space_and_writes_stay_bounded(tmp_path):
    rng = np.random.default_rng(0)
    home = Home(layout(64, 64), tmp_path, buffer_nbytes=2**17, segment_nbytes=2**19)
    n, zeros = 20_000, np.zeros((500, 512), np.uint8)
    for first in range(0, n, 500):
        home.write(np.arange(first, first + 500), zeros, *np.zeros((2, 500), np.uint32))
    begin, worst = home.stats(), 0.0
    for i in range(250):
        home.write(rng.permutation(n)[:500], zeros, *np.zeros((2, 500), np.uint32))
        if i % 5 == 4:
            home.commit()
            worst = max(worst, home.stats()["space_amplification"])
    end = home.stats()
    written, given_ = (end[k] - begin[k] for k in ("written_nbytes", "given_nbytes"))
    assert worst <= 2.2 and written / given_ <= 1.7  # the index checkpoints of so small a table weigh more
    on_disk = sum(p.stat().st_size for p in tmp_path.glob("*.hb?"))
    assert on_disk == end["disk_nbytes"]
    home.verify()
    home.close()


def test_home_erased_rows_leave_nothing_once_a_checkpoint_knows(tmp_path, monkeypatch):
    twin = Twin(tmp_path, layout(), buffer_nbytes=8192)
    twin.write(np.arange(3000), np.random.default_rng(0))
    twin.commit()
    twin.erase(np.arange(3000))
    twin.commit()
    assert twin.home.stats()["disk_nbytes"] > 0  # the tail tells that they are gone
    twin.reopen()
    twin.check()
    monkeypatch.setattr(module, "LEAST_TAIL_NBYTES", 0)
    twin.commit()
    twin.commit()
    assert twin.home.stats()["disk_nbytes"] <= 8192
    twin.reopen()
    twin.check()
    twin.home.close()


def test_home_compaction_of_the_tail_keeps_erased_rows_erased(tmp_path, monkeypatch):
    for name, value in (("TAIL", 0), ("LEAST_TAIL_NBYTES", 1), ("SPACE", 1.1)):
        monkeypatch.setattr(module, name, value)
    twin = Twin(tmp_path, layout(), buffer_nbytes=8192, segment_nbytes=8192)
    rng = np.random.default_rng(0)
    twin.write(np.arange(3000), rng)
    twin.commit()
    monkeypatch.setattr(module, "LEAST_TAIL_NBYTES", 2**40)
    for i in range(30):
        twin.erase(np.arange(200 + 40 * i, 240 + 40 * i))
        for _ in range(5):
            twin.write(np.arange(150), rng)
        twin.commit()
        if i % 10 == 9:
            assert twin.home.stats()["compacted_segments"] > 2
            twin.reopen()
            twin.check()
    twin.home.close()


def test_home_commit_costs_what_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TAIL", 2)
    home = Home(layout(16, 16), tmp_path)
    n = 100_000
    home.write(np.arange(n), np.zeros((n, 128), np.uint8), *np.zeros((2, n), np.uint32))
    keep = {"counts": np.arange(100_000)}
    home.commit(keep)
    before = home.stats()["written_nbytes"]
    for i in range(10):
        home.write(np.arange(i, i + 10), np.ones((10, 128), np.uint8), *np.zeros((2, 10), np.uint32))
        home.commit(keep)
    assert home.stats()["written_nbytes"] - before < 10 * 10_000
    home.close()
    home = Home(layout(16, 16), tmp_path)
    assert home.stats()["read_nbytes"] <= 10 * 4096  # the tail alone
    assert len(home) == n and home.n_commits == 11 and home.kept()["counts"].tolist() == keep["counts"].tolist()
    home.close()


def test_home_full_disk_is_seen_ahead(tmp_path, monkeypatch):
    class Small(Disk):
        left = 2**40

        def free(self, path):
            return self.left

    disk = Small()
    twin = Twin(tmp_path, layout(), disk=disk, buffer_nbytes=8192)
    rng = np.random.default_rng(0)
    twin.write(np.arange(1000), rng)
    twin.commit()
    disk.left = log.SPARE_NBYTES
    want = dict(twin.rows)
    with pytest.raises(errors.StorageError, match="free some space"):
        twin.write(np.arange(500, 3000), rng)
    twin.rows = want
    twin.check()
    with pytest.raises(errors.StorageError, match="free some space"):
        twin.home.commit()
    disk.left = 2**40
    twin.check()
    twin.commit()  # what failed has left no trace
    twin.reopen()
    twin.check()
    twin.home.close()


def test_home_disk_budget_holds(tmp_path):
    home = Home(layout(), tmp_path, buffer_nbytes=8192, disk_budget=100_000)
    with pytest.raises(errors.StorageError, match="disk_budget of more than 100000 bytes"):
        home.write(np.arange(10_000), np.zeros((10_000, 32), np.uint8), *np.zeros((2, 10_000), np.uint32))
    assert len(home) == 0 and sum(p.stat().st_size for p in tmp_path.iterdir()) <= 100_000
    home.close()


def filled(path, **how):
    """A directory with a checkpoint, a tail, several segments and something kept."""
    twin = Twin(path, layout(), buffer_nbytes=8192, segment_nbytes=8192, **how)
    rng = np.random.default_rng(3)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(module, "LEAST_TAIL_NBYTES", 1)
        m.setattr(module, "TAIL", 0)
        twin.write(np.arange(700), rng)
        twin.commit()
    twin.write(np.arange(600, 800), rng)
    twin.erase(np.arange(0, 90, 3))
    twin.commit()
    twin.home.close()
    return twin


def open_and_read(twin):
    home = Home(layout(), twin.path)
    try:
        home.validate()
        home.verify()
        found = home.read(np.sort(home.keys()))
        return len(home), *(x.tobytes() for x in found)
    finally:
        home.close()


def test_home_any_flipped_byte_is_named(tmp_path):
    twin = filled(tmp_path)
    want, rng = open_and_read(twin), random.Random(0)
    names = sorted(p for p in tmp_path.iterdir() if p.name != "LOCK")
    assert {p.name.split("-")[0] for p in names} == {"segment", "index", "kept", "manifest.json"}
    for path in names:
        good = path.read_bytes()
        for at in {0, len(good) - 1, *(rng.randrange(len(good)) for _ in range(40))}:
            path.write_bytes(good[:at] + bytes([good[at] ^ (1 << rng.randrange(8))]) + good[at + 1 :])
            with pytest.raises(errors.Corrupt) as caught:
                open_and_read(twin)
            assert caught.value.place["file"] == path
            offset = caught.value.place["offset"]
            assert offset == at // 4096 * 4096 if path.name.startswith("segment") else 0 <= offset <= at
        path.write_bytes(good)
    assert open_and_read(twin) == want


def test_home_read_names_the_flipped_block(tmp_path):
    twin = filled(tmp_path)
    home = Home(layout(), tmp_path)
    keys, caught = home.keys(), 0
    for path in tmp_path.glob("segment-*"):
        good = path.read_bytes()
        for block in range(len(good) // 4096):
            path.write_bytes(
                good[: block * 4096 + 100] + bytes([good[block * 4096 + 100] ^ 1]) + good[block * 4096 + 101 :]
            )
            with contextlib.suppress(errors.Corrupt):
                home.read(keys)
                continue
            with pytest.raises(errors.Corrupt) as e:
                home.read(keys)
            assert e.value.place == {"file": path, "offset": block * 4096}
            caught += 1
        path.write_bytes(good)
    assert caught > 3
    assert np.array_equal(home.read(keys)[0], home.read(keys)[0])
    home.close()
    assert twin.rows


def test_home_block_in_another_place_is_noticed(tmp_path):
    twin = filled(tmp_path)
    path = next(p for p in sorted(tmp_path.glob("segment-*")) if p.stat().st_size >= 8192)
    good = path.read_bytes()
    for bad in (good[4096:8192] + good[:4096] + good[8192:], good[:4096] * 2 + good[8192:]):
        path.write_bytes(bad)
        with pytest.raises(errors.Corrupt, match=path.name):
            open_and_read(twin)
    path.write_bytes(good)
    other = next(p for p in sorted(tmp_path.glob("segment-*")) if p != path)
    path.write_bytes(other.read_bytes()[:4096] + good[4096:])
    with pytest.raises(errors.Corrupt, match=path.name):
        open_and_read(twin)


def test_home_truncated_or_missing_files_are_corrupt(tmp_path):
    twin = filled(tmp_path)
    want = open_and_read(twin)
    for path in sorted(p for p in tmp_path.iterdir() if p.name not in ("LOCK", "manifest.json")):
        good = path.read_bytes()
        for bad in (good[:-1], b"", None):
            if bad is None:
                path.unlink()
            else:
                path.write_bytes(bad)
            with pytest.raises(errors.Corrupt, match=path.name):
                open_and_read(twin)
        path.write_bytes(good)
    assert open_and_read(twin) == want


def test_home_hostile_manifests_raise(tmp_path):
    twin = filled(tmp_path)
    path = tmp_path / "manifest.json"
    good = json.loads(path.read_bytes().split(b"\n")[0])

    def attempt(manifest):
        body = json.dumps(manifest).encode()
        path.write_bytes(body + b"\n" + module._check(body).encode() + b"\n")
        with pytest.raises((errors.Corrupt, errors.SchemaMismatch, errors.Unsupported)):
            open_and_read(twin)

    for key, value in good.items():
        for bad in (None, -1, "x", [], {}, 2**62, 1.5, True, [[1]], [[-1, 0, 1]], [[0, 0, 2**19]]):
            if bad != value and key != "table" and not (key == "voids" and bad == []):
                attempt({**good, key: bad})
        if key != "table":
            attempt({k: v for k, v in good.items() if k != key})
    for inner in ("checkpoint", "kept"):
        for key in good[inner]:
            for bad in (-1, "x", "../../x", {"a": ["<i8", 2**39]}, {"a": ["O", 1]}, [[0, 7]], 2**61):
                attempt({**good, inner: {**good[inner], key: bad}})
    attempt({**good, "n_rows": good["n_rows"] + 1})
    attempt({**good, "segments": good["segments"][:-1]})
    attempt([])
    for junk in (b"", b"\n\n", b"{}", os.urandom(100)):
        path.write_bytes(junk)
        with pytest.raises(errors.Corrupt):
            open_and_read(twin)


@pytest.mark.parametrize("n", [0, 1, 40, 5000])
@pytest.mark.parametrize("spread", [1, 2**40])
def test_home_keys_come_in_order(tmp_path, monkeypatch, n, spread):
    monkeypatch.setattr(module, "PART_ROWS", 300)
    monkeypatch.setattr(module, "SORTED_ROWS", 100)
    home, keys = Home(layout(), tmp_path), np.arange(-(n // 2), n - n // 2) * spread
    keys = np.union1d(keys, np.array([-(2**63), 2**63 - 1], np.int64)[: min(n, 2)])
    home.add(keys)
    pieces = list(home.in_order())
    assert np.array_equal(np.concatenate([keys[:0], *pieces]), keys)
    assert max(map(len, pieces), default=0) <= 400
    home.close()


def test_home_keys_come_by_parts(tmp_path):
    twin = Twin(tmp_path, layout())
    twin.write(np.arange(5000), np.random.default_rng(0))
    parts = [twin.home.keys(Part.share(i, 7)) for i in range(7)]
    assert np.array_equal(np.concatenate(parts), twin.home.keys())
    assert sorted(np.concatenate(parts).tolist()) == list(range(5000))
    twin.home.close()


# --- the parts ------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**32), st.lists(st.sampled_from(["put", "drop"]), max_size=30), st.sampled_from([5, 300, 20_000])
)
def test_places_is_a_dictionary(seed, acts, n):
    rng, places, want = np.random.default_rng(seed), Places(), {}
    for act in acts:
        keys = rng.integers(-n, n, n)
        if act == "put":
            to = rng.integers(0, 2**32, n)
            before = places.put(keys, to)
            for k, t, b in zip(keys.tolist(), to.tolist(), before.tolist(), strict=True):
                assert want.get(k, -1) == b
                want[k] = t
        else:
            before = places.drop(keys)
            for k, b in zip(keys.tolist(), before.tolist(), strict=True):
                assert want.pop(k, -1) == b
        places.validate()
        assert len(places) == len(want)
        every = np.arange(-n, n)
        assert places.find(every).tolist() == [want.get(k, -1) for k in every.tolist()]
    assert sorted(places.part(0, 2**64 - 1).tolist()) == sorted(want)


@pytest.mark.parametrize("bad", [-1, 2**32])
def test_places_refuses_what_does_not_fit(bad):
    with pytest.raises(errors.InvalidArgument):
        Places().put(np.array([1]), np.array([bad]))


@pytest.mark.parametrize("size", [1, 4, 20, 128, 512, 1000, 2048, 4060, 4064, 4080, 5000, 100_000])
def test_blocks_give_back_what_was_filled(size):
    blocks = Blocks(size, 77)
    assert (
        blocks.block_nbytes % 4096 == 0
        and blocks.filled == blocks.per_block * blocks.record_nbytes / blocks.block_nbytes
    )
    assert blocks.filled > (0.85 if size < 2100 else 0.7)
    rng = np.random.default_rng(0)
    n = 2 * blocks.per_block + 1
    keys, (lines, freq, last) = rng.integers(-(2**63), 2**63 - 1, n), records(rng, n, size)
    buffer = np.zeros(4 * blocks.block_nbytes, np.uint8)
    blocks.fill(buffer, 0, keys, freq, last, lines)
    blocks.fill(buffer, n, keys[:1], freq[:1], last[:1], None)
    blocks.seal(buffer, 4, 5, 6)
    bad, *found = blocks.parse(buffer, 4, 5, 6)
    assert bad == -1 and np.array_equal(found[0][:n], keys) and np.array_equal(found[3], np.arange(n + 1))
    assert np.flatnonzero(found[4]).tolist() == [n]
    assert blocks.parse(buffer, 4, 5, 7)[0] == 0 and Blocks(size, 78).parse(buffer, 4, 5, 6)[0] == 0
    out, f, s = np.zeros_like(lines), np.zeros_like(freq), np.zeros_like(last)
    at = np.arange(n)
    where = np.full(n, 5), 6 + at // blocks.per_block
    assert blocks.take(buffer, at, *where, keys, at, f, s, out) == -1
    assert np.array_equal(out, lines) and np.array_equal(f, freq) and np.array_equal(s, last)
    for byte in rng.integers(0, blocks.block_nbytes, 50).tolist():
        buffer[blocks.block_nbytes + byte] ^= 1
        assert blocks.take(buffer, at, *where, keys, at, f, s, out) == blocks.per_block
        assert blocks.parse(buffer, 4, 5, 6)[0] == 1
        buffer[blocks.block_nbytes + byte] ^= 1


def test_disk_names_the_read_that_failed(tmp_path):
    path = Path(tmp_path) / "x"
    path.write_bytes(bytes(10_000))
    for ring in (True, False):
        disk = Disk(ring=ring)
        handle = disk.open(path)
        n, out = 200, np.empty(200 * 64, np.uint8)
        handles, lengths = np.full(n, handle, np.int32), np.full(n, 64)
        disk.read(handles, np.arange(n) * 40, lengths, out)
        offsets = np.arange(n) * 40
        offsets[150] = 9_990  # a short read, then the end
        with pytest.raises(OSError) as caught:
            disk.read(handles, offsets, lengths, out)
        assert caught.value.request == 150
        handles[20] = 999
        with pytest.raises(OSError, match="Bad file descriptor") as caught:
            disk.read(handles, np.arange(n) * 40, lengths, out)
        assert caught.value.request == 20
        handles[20] = handle
        disk.read(handles, np.arange(n) * 40, lengths, out)  # and it goes on
        disk.close(handle)


def test_disk_goes_on_after_signals_and_short_writes(tmp_path, monkeypatch):
    real, disk = os.pwrite, Disk()
    data = np.random.default_rng(0).integers(0, 256, 2**22, np.uint8)
    handle = disk.open(tmp_path / "x", create=True)
    with monkeypatch.context() as m:
        m.setattr(os, "pwrite", lambda fd, part, at: real(fd, part[: len(part) // 2 + 1], at))
        disk.write(handle, data, 0)
    signals = []
    old = signal.signal(signal.SIGALRM, lambda *_: signals.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        for direct in (False, True):
            reader = disk.open(tmp_path / "x", direct=direct)
            for _ in range(10):
                out = aligned(len(data))
                n = len(data) // 4096
                disk.read(np.full(n, reader, np.int32), np.arange(n) * 4096, np.full(n, 4096), out)
                assert np.array_equal(out, data)
            disk.close(reader)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    disk.close(handle)
    assert signals
