"""The SSD tier against host memory, bit for bit; and what survives crashes, full disks and flipped bytes."""

import contextlib
import errno
import gc
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbkit import errors
from hbkit.embedding import (
    SGD,
    Adagrad,
    Adam,
    BloomAdmission,
    Collection,
    CountAdmission,
    Ftrl,
    IdleSteps,
    RowWiseAdagrad,
    RowWiseAdam,
    Table,
    lookahead,
)
from hbkit.store import cached_ssd, host_memory, segments, ssd
from hbkit.store.base import Chunk
from hbkit.store.policy import make_policy
from hbkit.store.ssd import SsdStore

OPTIMIZERS = [SGD(), SGD(momentum=0.9), Adagrad(), RowWiseAdagrad(), Adam(), RowWiseAdam(), Ftrl()]
FIELDS = ("key", "freq", "last_step", "row", "state")


class Tiny:
    """A store with a cache of a few lines and segments of a few rows."""

    def __init__(self, path, lines, policy="lfu", segment_nbytes=2000, budget=2**20):
        self.args = Path(path), budget, policy, lines, segment_nbytes

    def open(self, layout):
        path, budget, policy, lines, segment_nbytes = self.args
        return SsdStore(layout, path / layout.table, budget, make_policy(policy), lines, segment_nbytes)


def contents(store) -> list[bytes]:
    """Everything a store holds, as bytes."""
    chunks = list(store.scan())
    return [b"".join(np.ascontiguousarray(getattr(c, field)).tobytes() for c in chunks) for field in FIELDS]


def step(table, rng, n_keys=200, n=60):
    """One random training batch."""
    keys = rng.zipf(1.4, n) % n_keys
    table.lookup(keys, train=True)
    table.update(keys, rng.standard_normal((n, table.dim)).astype(np.float32))


def ahead(table, rng):
    """Three batches reserved before the first is used, the last never used."""
    batches = [rng.integers(0, 300, 30) for _ in range(3)]
    requests = [table.request(b) for b in batches]
    for r in requests[:2]:
        r.create(True, table.step + 1)
        rows = r.rows()
        grads = rng.standard_normal((len(r.inverse), table.dim)).astype(np.float32)
        r.update(grads + rows[r.inverse], None, None, table.step + 1)
        table.step += 1
        r.close()
    del requests


def put(table, rng):
    keys = rng.permutation(400)[:50] - 100
    row, state = rng.random((50, table.dim)), rng.random((50, table.store.layout.width - table.dim))
    table.store.put(Chunk(keys, keys + 100, np.full(50, table.step), row, state))


ACTS = {
    "step": step,
    "lookup": lambda t, rng: t.lookup(rng.integers(0, 500, 20)),
    "update": lambda t, rng: t.update(rng.integers(0, 500, 20), np.ones((20, t.dim), np.float32)),
    "big": lambda t, rng: step(t, rng, 3000, 900),
    "ahead": ahead,
    "erase": lambda t, rng: t.store.erase(np.concatenate([rng.integers(0, 300, 20)] * 2)),
    "evict": lambda t, rng: t.evict(),
    "put": put,
    "commit": lambda t, rng: t.commit(),
}


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    acts=st.lists(st.sampled_from([*ACTS, "reopen", "crash"]), min_size=1, max_size=12),
    lines=st.sampled_from([1, 2, 5, 16, 64, None]),
    policy=st.sampled_from(["lru", "lfu", "tinylfu"]),
    optimizer=st.sampled_from(OPTIMIZERS),
    dim=st.sampled_from([1, 4, 17]),
    min_count=st.sampled_from([None, 2]),
)
def test_ssd_equals_host(tmp_path_factory, seed, acts, lines, policy, optimizer, dim, min_count):
    path = tmp_path_factory.mktemp("rows")

    def table(store):
        admission = CountAdmission(min_count) if min_count else None
        return Table("t", dim, optimizer=optimizer, store=store, admission=admission, eviction=[IdleSteps(3)])

    ours, theirs = table(Tiny(path, lines, policy)), table(host_memory())
    mine, other = np.random.default_rng(seed), np.random.default_rng(seed)
    for act in acts:
        if act in ("reopen", "crash"):
            ours.commit()
            if act == "crash":  # what comes after a commit leaves no trace
                step(ours, np.random.default_rng(0))
            ours.store.close()
            ours = table(Tiny(path, lines, policy))
            ours.step = theirs.step
        else:
            got, want = ACTS[act](ours, mine), ACTS[act](theirs, other)
            assert act == "commit" or np.array_equal(got, want)
        ours.store.validate()
    assert contents(ours.store) == contents(theirs.store)
    assert len(ours) == len(theirs)
    if min_count:
        mine, other = ours.admission.state(), theirs.admission.state()
        assert {k: v.tolist() for k, v in mine.items()} == {k: v.tolist() for k, v in other.items()}
    assert [c.key.tolist() for c in ours.store.scan(since=2)] == [c.key.tolist() for c in theirs.store.scan(since=2)]
    ours.commit()
    ours.store.validate()
    assert ours.store.verify() == len(theirs)
    assert contents(ours.store) == contents(theirs.store)
    ours.store.close()


@pytest.mark.parametrize("window", [0, 1, 5])
def test_ssd_lookahead_equals_host(tmp_path, window):
    def train(store):
        rng = np.random.default_rng(3)
        tables = [Table("a", 8, store=store), Table("b", 4, optimizer=Adam(), store=store)]
        c = Collection(tables, {"x": "a", "y": "b", "z": "b"})
        batches = [{f: rng.zipf(1.3, 100) % 400 for f in "xyz"} for _ in range(30)]
        losses = []
        for _, staged in lookahead(batches, c, window):
            out = staged.outputs()
            losses.append([v.tobytes() for v in out.values()])
            staged.apply({f: np.sin(v) for f, v in out.items()})
        found = [contents(t.store) for t in tables]
        for t in tables:
            t.store.close()
        return losses, found

    assert train(Tiny(tmp_path, 40)) == train(host_memory())


def table_of(store, name="t", dim=4, optimizer=None):
    return Table(name, dim, optimizer=optimizer or Adagrad(), store=store)


def trained(store, steps=5, **how):
    t = table_of(store, **how)
    rng = np.random.default_rng(1)
    for _ in range(steps):
        step(t, rng)
    return t


def test_ssd_cached_ssd_reopens_by_its_public_name(tmp_path):
    t = trained(cached_ssd(tmp_path, host_budget="1MiB", policy="tinylfu"))
    assert t.commit() == "1"
    want = contents(t.store)
    t.store.close()
    again = table_of(cached_ssd(str(tmp_path), host_budget=2**20))
    assert contents(again.store) == want == contents(trained(host_memory()).store)
    assert again.stats()["rows"] == len(again) and again.commit() == "2"
    again.store.close()


def test_ssd_batch_larger_than_the_cache_streams(tmp_path):
    t, h = table_of(Tiny(tmp_path, 4)), table_of(host_memory())
    for table in (t, h):
        rng = np.random.default_rng(0)
        for _ in range(3):
            step(table, rng, 5000, 4000)
    assert t.stats()["streamed_rows"] > 1000 and t.stats()["cache_lines"] == 4
    assert contents(t.store) == contents(h.store)
    t.store.close()


def test_ssd_pins_leased_rows_until_released(tmp_path):
    t = table_of(Tiny(tmp_path, 32))
    keys = np.arange(500)
    t.lookup(keys, train=True)
    store, ones = t.store, np.ones(10, np.int64)
    lease = store.reserve(keys[:10], ones)
    for i in range(10, 400, 10):
        store.release(store.reserve(keys[i : i + 10], ones))
    hits = t.stats()["hits"]
    store.release(store.reserve(keys[:10], ones))
    assert t.stats()["hits"] == hits + 10  # still there
    store.release(lease)
    store.release(lease)
    for i in range(10, 400, 10):
        store.release(store.reserve(keys[i : i + 10], ones))
    hits = t.stats()["hits"]
    store.reserve(keys[:10], ones)
    assert t.stats()["hits"] < hits + 10
    store.close()


def test_ssd_everything_pinned_streams(tmp_path):
    t, h = table_of(Tiny(tmp_path, 16)), table_of(host_memory())
    held = []
    for table in (t, h):
        rng = np.random.default_rng(5)
        for _ in range(10):
            step(table, rng)
            held.append(table.request(rng.integers(0, 200, 50)))
    t.store.validate()
    assert contents(t.store) == contents(h.store)
    t.store.close()


def test_ssd_second_writer_is_locked_out(tmp_path):
    t = trained(cached_ssd(tmp_path, "1MiB"))
    with pytest.raises(errors.Locked, match="LOCK"):
        table_of(cached_ssd(tmp_path, "1MiB"))
    other = table_of(cached_ssd(tmp_path, "1MiB"), name="other")  # a table of its own
    other.store.close()
    t.store.close()
    table_of(cached_ssd(tmp_path, "1MiB")).store.close()


def test_ssd_closed_store_says_so(tmp_path):
    t = trained(cached_ssd(tmp_path, "1MiB"))
    t.store.close()
    t.store.close()
    for use in (t.commit, t.stats, lambda: t.lookup([1]), lambda: list(t.store.scan())):
        with pytest.raises(errors.Closed):
            use()


def test_ssd_other_dim_or_state_is_a_schema_mismatch(tmp_path):
    t = trained(cached_ssd(tmp_path, "1MiB"))
    t.commit()
    t.store.close()
    for how in ({"dim": 5}, {"optimizer": SGD()}):
        with pytest.raises(errors.SchemaMismatch, match="table t"):
            table_of(cached_ssd(tmp_path, "1MiB"), **how)
    table_of(cached_ssd(tmp_path, "1MiB")).store.close()  # the failures left no lock


def test_ssd_put_of_other_width_is_a_schema_mismatch(tmp_path):
    t = table_of(cached_ssd(tmp_path, "1MiB"))
    zeros = np.zeros(1, np.int64)
    with pytest.raises(errors.SchemaMismatch):
        t.store.put(Chunk(zeros, zeros, zeros, np.zeros((1, 5), np.float32), np.zeros((1, 4), np.float32)))
    t.store.close()


def test_ssd_budget_too_small_says_what_would_do(tmp_path):
    with pytest.raises(errors.BudgetExceeded, match="give at least"):
        table_of(cached_ssd(tmp_path, 1000))
    t = table_of(cached_ssd(tmp_path, "100KiB"))
    keys = np.arange(100_000)
    t.lookup(keys[:500], train=True)
    t.commit()
    with pytest.raises(errors.BudgetExceeded) as caught:
        t.lookup(keys, train=True)
    assert len(t) == 500
    t.lookup(keys[:600], train=True)  # the store goes on
    t.store.validate()
    assert t.commit() == "2"
    t.store.close()
    enough = int(re.search(r"at least (\d+) bytes", str(caught.value))[1])
    t = table_of(cached_ssd(tmp_path, enough))
    t.lookup(keys, train=True)
    t.store.validate()
    assert len(t) == len(keys)
    t.store.close()


@pytest.mark.parametrize("policy", ["lru", "lfu", "tinylfu"])
def test_ssd_budget_holds_while_the_table_grows(tmp_path, policy):
    t = table_of(cached_ssd(tmp_path, "600KiB", policy))
    rng, lines = np.random.default_rng(0), []
    for _ in range(30):
        t.lookup(rng.integers(0, 10**6, 200), train=True)
        t.store.validate()  # asserts the budget
        lines.append(t.stats()["cache_lines"])
    assert lines == sorted(lines, reverse=True) and lines[0] > lines[-1] > 0
    t.store.close()


def test_ssd_stats_count_what_happened(tmp_path):
    t = table_of(cached_ssd(tmp_path, "1MiB"))
    t.lookup([1, 2, 3], train=True)
    t.lookup([1, 2, 3])
    t.lookup([7])
    t.update([9], np.ones((1, 4)))
    t.commit()
    s = t.stats()
    assert (s["rows"], s["hits"], s["misses"], s["evictions"], s["ignored_updates"]) == (3, 3, 0, 0, 1)
    assert s["hit_rate"] == 1.0 and s["commits"] == 1 and s["read_nbytes"] == 0
    assert s["written_nbytes"] == s["disk_nbytes"] == 3 * (8 * 4 + 16)
    t.store.close()


def test_ssd_only_dirty_rows_are_written_back(tmp_path):
    t = table_of(Tiny(tmp_path, 16))
    t.lookup(np.arange(200), train=True)
    t.commit()
    written = t.stats()["written_nbytes"]
    for i in range(20):
        t.lookup(np.arange(i * 10, i * 10 + 10))
    t.commit()
    assert t.stats()["evictions"] > 100 and t.stats()["written_nbytes"] == written
    t.store.close()


def test_ssd_dead_segments_go_and_space_stays_bounded(tmp_path):
    t = table_of(Tiny(tmp_path, 16))
    rng = np.random.default_rng(0)
    for i in range(60):
        step(t, rng)
        if i % 7 == 0:
            t.commit()
    t.commit()
    live = len(t) * (8 * 4 + 16)
    assert t.stats()["written_nbytes"] > 5 * live
    assert t.stats()["disk_nbytes"] <= 2 * live + 2000
    on_disk = sum(p.stat().st_size for p in (tmp_path / "t").glob("segment-*"))
    assert on_disk == t.stats()["disk_nbytes"]
    assert len(list((tmp_path / "t").glob("index-*"))) == 1
    t.store.close()


def test_ssd_leaves_no_open_files(tmp_path):
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        t = trained(Tiny(tmp_path, 16), steps=20)
        t.commit()
        t.store.close()
    assert len(os.listdir("/proc/self/fd")) == before
    t = trained(Tiny(tmp_path, 16))
    del t
    gc.collect()  # an abandoned table lets go of its lock
    table_of(Tiny(tmp_path, 16)).store.close()
    assert len(os.listdir("/proc/self/fd")) == before


def committed(path, steps=5):
    """A directory with one commit in which every record lives."""
    t = table_of(Tiny(path, 16, segment_nbytes=10_000))
    for chunk in trained(host_memory(), steps).store.scan():
        t.store.put(chunk)
    t.commit()
    t.store.close()
    return path / "t"


def read_all(path):
    t = table_of(Tiny(path, 16))
    try:
        return t.store.verify(), contents(t.store)
    finally:
        t.store.close()


def test_ssd_any_flipped_byte_is_named(tmp_path):
    directory = committed(tmp_path)
    want = read_all(tmp_path)
    rng = random.Random(0)
    for path in sorted(p for p in directory.iterdir() if p.name != "LOCK"):
        good = path.read_bytes()
        for at in {0, len(good) - 1, *(rng.randrange(len(good)) for _ in range(25))}:
            path.write_bytes(good[:at] + bytes([good[at] ^ (1 << rng.randrange(8))]) + good[at + 1 :])
            with pytest.raises(errors.Corrupt) as caught:
                read_all(tmp_path)
            assert caught.value.place["file"] == path
            offset, size = caught.value.place["offset"], 8 * 4 + 16
            if path.name.startswith("segment"):
                assert offset == at // size * size
            else:
                assert 0 <= offset <= at
        path.write_bytes(good)
    assert read_all(tmp_path) == want


def test_ssd_truncated_or_missing_files_are_corrupt(tmp_path):
    directory = committed(tmp_path)
    for path in sorted(p for p in directory.iterdir() if p.name not in ("LOCK", "manifest.json")):
        good = path.read_bytes()
        for bad in (good[:-1], b"", None):
            if bad is None:
                path.unlink()
            else:
                path.write_bytes(bad)
            with pytest.raises(errors.Corrupt, match=path.name):
                read_all(tmp_path)
        path.write_bytes(good)
    read_all(tmp_path)


def test_ssd_hostile_manifests_raise(tmp_path):
    from hbkit.store.ssd import _check

    directory = committed(tmp_path)
    path = directory / "manifest.json"
    good = json.loads(path.read_bytes().split(b"\n")[0])

    def attempt(manifest):
        body = json.dumps(manifest).encode()
        path.write_bytes(body + b"\n" + _check(body).encode() + b"\n")
        with pytest.raises((errors.Corrupt, errors.BudgetExceeded, errors.SchemaMismatch, errors.Unsupported)):
            read_all(tmp_path)

    for key, value in good.items():
        for bad in (None, -1, "x", [], {}, 2**61, 1.5):
            if bad != value and not (key == "commit" and bad == 2**61) and key not in ("table",):
                attempt({**good, key: bad})
        if key != "table":
            attempt({k: v for k, v in good.items() if k != key})
    attempt({**good, "n_rows": good["n_rows"] + 1})
    attempt({**good, "per_segment": good["per_segment"] - 1})
    attempt({**good, "index": {"file": "../../x", "checks": good["index"]["checks"]}})
    attempt([])
    for junk in (b"", b"\n\n", b"{}", os.urandom(100)):
        path.write_bytes(junk)
        with pytest.raises(errors.Corrupt):
            read_all(tmp_path)


class Fault:
    """Makes the N-th call of the system calls that write fail, once or for ever."""

    CALLS = ("pwrite", "fsync", "replace", "open", "unlink")

    def __init__(self, monkeypatch, n, code, once=True):
        self.left, self.fired = n, False
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self._wrap(getattr(os, name), code, once))

    def _wrap(self, real, code, once):
        def call(*args, **kwargs):
            self.left -= 1
            if self.left == 0 or (self.left < 0 and not once):
                self.fired = True
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        return call


@pytest.mark.parametrize("once", [True, False], ids=["once", "forever"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["full", "eio"])
def test_ssd_a_failing_call_never_costs_a_commit(tmp_path, monkeypatch, code, once):
    def run(path, fault):
        """Train and commit; contents at each commit, and whether a call failed."""
        done, failed = [], None
        try:
            t = table_of(Tiny(path, 16))
        except errors.StorageError as e:
            return done, e
        try:
            rng = np.random.default_rng(0)
            for i in range(6):
                step(t, rng, 60, 30)
                if i % 2:
                    t.commit()
                    done.append(contents(t.store))
        except errors.StorageError as e:
            failed = e
            t.store.validate()
            contents(t.store)  # reading goes on
            with contextlib.suppress(errors.StorageError):
                for _ in range(4):  # so does training, which must not delete what a commit needs
                    t.update(np.arange(60), np.ones((60, 4), np.float32))
        finally:
            t.store.close()
        return done, failed

    states = [contents(table_of(host_memory()).store), *run(tmp_path / "whole", None)[0]]
    n, hit = 0, True
    while hit:
        n += 1 if once and code == errno.EIO else 4
        path = tmp_path / str(n)
        with monkeypatch.context() as m:
            fault = Fault(m, n, code, once)
            done, failed = run(path, fault)
            hit = fault.fired
        assert (failed is not None) or not hit or once
        if failed is not None:
            assert os.strerror(code) in str(failed) or "in part" in str(failed)
            assert failed.place.get("file") is not None
        t = table_of(Tiny(path, 16))
        t.store.validate()
        t.store.verify()
        # The commit that failed may exist: it does once its manifest is in place.
        assert contents(t.store) in states[len(done) : len(done) + 2]
        step(t, np.random.default_rng(9))
        t.commit()
        t.store.close()
    assert n > 40


def test_ssd_full_disk_during_an_update_refuses_the_commit(tmp_path, monkeypatch):
    t = trained(Tiny(tmp_path, 4))
    t.commit()
    want = contents(t.store)
    with monkeypatch.context() as m:
        Fault(m, 3, errno.ENOSPC, once=False)
        with pytest.raises(errors.StorageError, match=r"segment-.*free some space"):
            for _ in range(10):
                step(t, np.random.default_rng(2))
    with pytest.raises(errors.StorageError, match="only in part"):
        t.commit()
    assert len(t.lookup([1, 2, 3])) == 3
    t.store.close()
    assert read_all(tmp_path)[1] == want


def test_ssd_commit_on_a_full_disk_may_be_tried_again(tmp_path, monkeypatch):
    t = trained(Tiny(tmp_path, None))
    want = contents(t.store)
    with monkeypatch.context() as m:
        Fault(m, 1, errno.ENOSPC)
        with pytest.raises(errors.StorageError):
            t.commit()
    t.commit()
    t.store.close()
    assert read_all(tmp_path)[1] == want


CHILD = """
import sys
from pathlib import Path
import numpy as np
from hbkit.embedding import Adagrad, Table
from hbkit.store.policy import make_policy
from hbkit.store.ssd import SsdStore
class Tiny:
    def open(self, layout):
        return SsdStore(layout, Path(sys.argv[1]) / layout.table, 2**20, make_policy("lfu"), 64, 20_000)
t = Table("t", 4, optimizer=Adagrad(), store=Tiny())
print("ready", flush=True)
i = t.stats()["commits"]
while True:
    rng = np.random.default_rng(i)
    keys = rng.zipf(1.3, 300) % 1000
    t.step = i
    t.lookup(keys, train=True)
    t.update(keys, rng.standard_normal((300, 4)).astype(np.float32))
    t.commit()
    i += 1
"""


def test_ssd_last_commit_survives_kill(tmp_path):
    rng = random.Random(0)
    host, done = table_of(host_memory()), 0
    for _ in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path)],
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert child.stdout.readline() == b"ready\n"
        time.sleep(rng.random() / 3)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        t = table_of(Tiny(tmp_path, 64))
        n = t.stats()["commits"]
        while done < n:
            r = np.random.default_rng(done)
            keys = r.zipf(1.3, 300) % 1000
            host.step = done
            host.lookup(keys, train=True)
            host.update(keys, r.standard_normal((300, 4)).astype(np.float32))
            done += 1
        t.store.validate()
        assert t.store.verify() == len(host)
        assert contents(t.store) == contents(host.store)
        t.store.close()
    assert done > 0


def test_segments_read_is_coalesced(tmp_path, monkeypatch):
    s = segments.Segments(tmp_path, 4, 1000, {})
    keys = np.arange(2500)
    lines = np.random.default_rng(0).random((2500, 4), np.float32)
    at = s.append(keys, lines)
    calls = []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda *a: calls.append(a) or real(*a))
    order = np.random.default_rng(1).permutation(2500)
    assert np.array_equal(s.read(at[order], keys[order]), lines[order])
    assert len(calls) == 3  # one a segment
    with pytest.raises(errors.Corrupt, match="segment-00000001"):
        s.read(at[1000:1001], keys[:1])  # the line of another key
    s.close()


def test_ssd_failed_sync_after_the_rename_keeps_both_commits(tmp_path, monkeypatch):
    t = table_of(Tiny(tmp_path, 16, segment_nbytes=200))
    keys = np.arange(100)
    t.lookup(keys, train=True)
    t.commit()
    t.update(keys, np.ones((100, 4), np.float32))
    want = contents(t.store)
    real, syncs = ssd.sync_directory, []

    def second_fails(path):
        syncs.append(path)
        if len(syncs) == 2:
            raise errors.StorageError("planted", file=path)
        real(path)

    monkeypatch.setattr(ssd, "sync_directory", second_fails)
    with pytest.raises(errors.StorageError, match="planted"):
        t.commit()
    for _ in range(3):
        t.update(keys, np.ones((100, 4), np.float32))
    t.store.close()
    assert read_all(tmp_path) == (100, want)


def test_segments_keep_few_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr(segments, "OPEN_FILES", 4)
    s = segments.Segments(tmp_path, 4, 2, {})
    keys = np.arange(100)
    at = s.append(keys, np.ones((100, 4), np.float32))
    s.sync()
    s.read(at, keys)
    s.read(at, keys)
    assert len(s._files) <= 6
    s.close()


@pytest.mark.parametrize("rule", [CountAdmission(3), BloomAdmission(3, 100)], ids=["count", "bloom"])
def test_ssd_keeps_the_counts_of_admission(tmp_path, rule):
    def table(admission=rule):
        return Table("t", 4, store=Tiny(tmp_path, 5), admission=admission)

    def state(t):
        return {k: v.tolist() for k, v in t.admission.state().items()}

    t = table()
    t.lookup([1, 1, 2, 3, 3, 3], train=True)
    t.commit()
    want = state(t)
    t.lookup([1, 2], train=True)  # after the commit: leaves no trace
    t.close()
    t = table()
    assert state(t) == want and len(t) == 1
    t.lookup([1], train=True)
    assert len(t) == 2
    t.commit()
    t.close()
    assert len(list((tmp_path / "t").glob("kept-*"))) == 1
    with pytest.raises(errors.SchemaMismatch):
        table(BloomAdmission(3, 10_000))
    table().close()  # the lock was let go
    table(None).close()
    path = next((tmp_path / "t").glob("kept-*"))
    data = bytearray(path.read_bytes())
    for broken in (data[:-1], bytes([data[0] ^ 1]) + data[1:]):
        path.write_bytes(broken)
        with pytest.raises(errors.Corrupt, match="kept"):
            table()
    path.unlink()
    with pytest.raises(errors.Corrupt, match="missing"):
        table()


@pytest.mark.parametrize("n", [40, 300, 5000, 90_000])
def test_ssd_budget_has_room_for_the_index(tmp_path, n):
    t = table_of(cached_ssd(tmp_path, host_budget=n * 100 + 300_000), dim=2)
    for keys in np.array_split(np.random.default_rng(0).integers(-(2**63), 2**63 - 1, n), 7):
        t.lookup(keys, train=True)
        t.store.validate()  # which holds all memory against the budget
    t.store.erase(keys)
    t.store.validate()
    t.close()
