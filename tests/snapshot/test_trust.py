"""What was committed survives; what is damaged or hostile raises a named error and touches nothing."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3 as _blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hbkit import errors
from hbkit._ext.pool import fail_allocation
from hbkit.embedding import SGD, BloomAdmission, CountAdmission, Table
from hbkit.snapshot import load, log, save, verify
from hbkit.snapshot.files import FileEntry
from hbkit.snapshot.layout import Layout
from hbkit.snapshot.manifest import _HEAD, _MIDDLE, _TAIL, decode
from hbkit.snapshot.places import place_of
from hbkit.snapshot.rows import rows_schema
from hbkit.store.disk import Disk


def blake3(data):
    return _blake3(data).hexdigest()


def table(name="t", **kwargs):
    return Table(name, 2, optimizer=SGD(momentum=0.9), **kwargs)


def train(t, keys, seed=0):
    keys = np.array(list(keys))
    t.lookup(keys, train=True)
    t.update(keys, np.random.default_rng(seed).standard_normal((len(keys), t.dim)))
    return t


def lines(t):
    return [tuple(column.tobytes() for column in chunk) for chunk in t.store.scan()]


def make(path):
    """A small snapshot: a full commit and a delta with erased rows, admission counts, JSON and bytes in the state."""
    t = table(admission=CountAdmission(1))
    save(path, [train(t, range(6))], 1, state={"dense": b"weights", "cursor": {"file": 3}})
    t.store.erase(np.array([2, 4]))
    train(t, [0, 9], seed=1)
    save(path, [t], 2, base="latest", state={"dense": b"weightz", "cursor": None})
    return t


@pytest.fixture
def snapshot(tmp_path):
    make(tmp_path)
    return tmp_path


def reseal(path, change):
    """Rewrite a manifest as someone would who knows how its digest is made."""
    manifest = json.loads(path.read_bytes())["manifest"]
    manifest = change(manifest) or manifest
    body = json.dumps(manifest).encode()
    digest = hashlib.blake2b(body, digest_size=32).hexdigest().encode()
    path.write_bytes(_HEAD + digest + _MIDDLE + body + _TAIL)


def refused(path, kinds=(errors.Corrupt,), damaged=None):
    """verify and load raise one of `kinds`, in one line with a remedy, and a table given to load is as it was.

    Of the first commit, load needs the rows alone.
    """
    if damaged is not None and "c00000001/" in str(damaged) and "rows" not in damaged.name:
        with pytest.raises(kinds) as caught:
            verify(path)
        load(path, [table(admission=CountAdmission(1))])
        return str(caught.value)
    t = train(table(admission=CountAdmission(1)), [70, 71])
    before = lines(t), t.step
    # A manifest that promises a table of another schema is refused by load for that, before any file is read.
    for read, may in ((verify, kinds), (lambda p: load(p, [t]), (*kinds, errors.SchemaMismatch))):
        with pytest.raises(may) as caught:
            read(path)
        assert "\n" not in str(caught.value) and caught.value.remedy and caught.value.place["file"]
    assert (lines(t), t.step) == before
    return str(caught.value)


def test_every_flipped_byte_is_found(snapshot):
    files = [p for p in snapshot.rglob("*") if p.is_file() and p.stat().st_size]
    assert len(files) == 9
    rng, n = random.Random(0), 0
    for path in files:
        data = path.read_bytes()
        for i in range(len(data)):
            with open(path, "r+b") as file:
                file.seek(i)
                file.write(bytes([data[i] ^ 1 << rng.randrange(8)]))
            with pytest.raises(errors.Corrupt):
                verify(snapshot)
            if rng.random() < 0.01:
                refused(snapshot, damaged=path)
            with open(path, "r+b") as file:
                file.seek(i)
                file.write(data[i : i + 1])
            n += 1
    assert n > 5000
    verify(snapshot)


@pytest.fixture
def in_memory(tmp_path):
    """A directory in memory, where the system has such."""
    shm = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=shm if os.path.isdir(shm) else tmp_path) as path:
        yield Path(path)


@pytest.mark.parametrize("bits", [1, pytest.param(8, marks=pytest.mark.slow)], ids=["a bit of each byte", "every bit"])
def test_every_flipped_bit_of_64_kib_is_found(in_memory, bits):
    """By the functions that `verify` and `load` read manifests and other files with; those of all files are compared
    with `verify` itself above.
    """
    rng, n_pad = random.Random(0), 50_000
    t = train(table(admission=CountAdmission(1)), range(40))
    while True:  # what the manifest says of the padding is a part of it
        path = in_memory / str(n_pad)
        save(path, [t], 1, state={"dense": rng.randbytes(n_pad), "cursor": {"file": 3}})
        have = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
        if have == 1 << 16:
            break
        n_pad += (1 << 16) - have
    place = place_of(path)
    manifest, _ = decode(place.manifest("c00000001"), "c00000001", "")
    entries = {path / entry.path: entry for entry in manifest.files}
    n = 0
    for file in [p for p in path.rglob("*") if p.is_file() and p.stat().st_size]:
        with open(file, "r+b") as opened, mmap.mmap(opened.fileno(), 0) as data:
            for i in range(len(data)):
                for bit in range(8) if bits == 8 else [rng.randrange(8)]:
                    data[i] ^= 1 << bit
                    with pytest.raises(errors.Corrupt):
                        if file in entries:
                            place.check(entries[file])
                        else:
                            decode(place.manifest("c00000001"), "c00000001", str(file))
                    data[i] ^= 1 << bit
                    n += 1
    assert n == bits << 16
    verify(path)


def test_every_missing_short_or_long_file_is_found(snapshot):
    for path in [p for p in snapshot.rglob("*") if p.is_file() and p.stat().st_size]:
        data = path.read_bytes()
        for other in (data[:-1], data[: len(data) // 2], b"", data + b"\n"):
            path.write_bytes(other)
            assert path.name in refused(snapshot, damaged=path)
        path.unlink()
        if path.name != "c00000002.json":  # without it, the last commit is the one before
            assert path.name in refused(snapshot, damaged=path)
        path.mkdir()
        refused(snapshot, damaged=path)
        path.rmdir()
        path.write_bytes(data)
    verify(snapshot)


def edit(*keys, to):
    def change(manifest):
        at = manifest
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = to

    return change


T = ("tables", "t")
ROWS = (*T, "rows", 0)
HOSTILE = {
    "parent is itself": edit("parent", to="c00000002"),
    "parent is to come": edit("parent", to="c00000003"),
    "parent leaves": edit("parent", to="../c0001"),
    "parent absent": edit("parent", to="c00000000"),
    "parent none": edit("parent", to=None),
    "commit other": edit("commit", to="c00000001"),
    "path up": edit(*ROWS, "path", to="../../etc/passwd"),
    "path absolute": edit(*ROWS, "path", to="/etc/passwd"),
    "directory other": edit("directory", to="c00000001"),
    "directory up": edit("directory", to="c00000002/../c00000002"),
    "directory odd": edit("directory", to="c00000002-0"),
    "path of another commit": edit(*ROWS, "path", to="c00000001/tables/t/rows-00000.parquet"),
    "path dots": edit(*ROWS, "path", to="c00000002/tables/t/../t/rows-00000.parquet"),
    "path nul": edit(*ROWS, "path", to="c00000002/tables/t/rows\0"),
    "path twice": lambda m: m["tables"]["t"]["rows"].append(m["tables"]["t"]["rows"][0]),
    "state path": edit("state_files", "dense", "path", to="c00000002/state/../../../secret"),
    "state name": lambda m: m["state_files"].update({"..": m["state_files"].pop("dense")}),
    "state twice": edit("state", "dense", to=1),
    "rows absurd": edit(*ROWS, "n_rows", to=2**62),
    "rows fewer": edit(*ROWS, "n_rows", to=1),
    "size absurd": edit(*ROWS, "nbytes", to=2**62),
    "count absurd": edit(*T, "n_rows", to=2**62),
    "count negative": edit(*T, "n_rows", to=-1),
    "count float": edit(*T, "n_rows", to=5.0),
    "count bool": edit(*T, "step", to=True),
    "count huge": edit("step", to=10**4000),
    "dim absurd": edit(*T, "dim", to=2**40),
    "dim zero": edit(*T, "dim", to=0),
    "dim other": edit(*T, "dim", to=3),
    "state width other": edit(*T, "n_state", to=1),
    "since other": edit(*T, "since", to=0),
    "since none": edit(*T, "since", to=None),
    "key type": edit(*T, "key_dtype", to="object"),
    "key type other": edit(*T, "key_dtype", to="uint64"),
    "row type": edit(*T, "dtype", to="O"),
    "optimizer": edit(*T, "optimizer", to={}),
    "admission none": edit(*T, "admission", to=None),
    "erased as rows": lambda m: m["tables"]["t"].update(rows=m["tables"]["t"]["erased"], erased=[]),
    "rows as erased": lambda m: m["tables"]["t"].update(erased=m["tables"]["t"]["rows"], rows=[]),
    "rows left out": edit(*T, "rows", to=[]),
    "erased left out": edit(*T, "erased", to=[]),
    "default text": edit(*T, "default", to="zeros"),
    "default bool": edit(*T, "default", to=True),
    "default not finite": edit(*T, "default", to=10**400),
    "default wide": edit(*T, "default", to=[0.5] * 999),
    "default nameless": edit(*T, "default", to={"std": 1.0}),
    "padding text": edit(*T, "padding_key", to="0"),
    "padding huge": edit(*T, "padding_key", to=2**64),
    "digest": edit(*ROWS, "blake3", to="0" * 63),
    "digest other": edit(*ROWS, "blake3", to="0" * 64),
    "digest none": edit(*ROWS, "blake3", to=None),
    "digests two": edit(*ROWS, "blake2b", to="0" * 64),
    "no tables": lambda m: m.pop("tables"),
    "more": edit("more", to=1),
    "tables a list": edit("tables", to=[]),
    "table a list": edit(*T, to=[1]),
    "files a number": edit(*T, "rows", to=3),
    "version zero": edit("version", to=0),
    "a list": lambda m: [m],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_manifest_raises(snapshot, name):
    reseal(snapshot / "c00000002.json", HOSTILE[name])
    refused(snapshot)


def test_deep_chain_is_read(snapshot):
    """Ten thousand deltas, one upon the other: neither recursion nor a pass over all of them for each."""
    text = json.dumps(json.loads((snapshot / "c00000002.json").read_bytes())["manifest"])
    step = json.loads(text)["tables"]["t"]["step"]
    for i in range(3, 10_003):
        manifest = json.loads(text)
        manifest.update(commit=f"c{i:08d}", directory=f"c{i:08d}", parent=f"c{i - 1:08d}", state_files={})
        manifest["tables"]["t"].update(rows=[], erased=[], since=step, admission=None, admission_files=[])
        body = json.dumps(manifest).encode()
        digest = hashlib.blake2b(body, digest_size=32).hexdigest().encode()
        (snapshot / f"c{i:08d}.json").write_bytes(_HEAD + digest + _MIDDLE + body + _TAIL)
    t = table()
    load(snapshot, [t])
    assert len(t) == 5
    assert len(verify(snapshot)) == 10_002
    reseal(snapshot / "c00000001.json", edit(*T, "n_rows", to=3))
    with pytest.raises(errors.Corrupt, match="c00000001 has 6 rows, its manifest says 3"):
        verify(snapshot)


def test_key_in_two_files_of_a_commit_raises(tmp_path):
    """As several ranks write them: each file's keys ascend, and the files share none."""
    t = train(table(), range(6))
    save(tmp_path, [t], 1)
    path = next(tmp_path.rglob("rows-00000.parquet"))
    for keys, problem in (([6, 7], None), ([-4, 20], None), ([5, 9], "a key is in two files")):
        u = train(table(), keys)
        save(tmp_path / "other", [u], 1)
        other = next((tmp_path / "other").rglob("rows-00000.parquet"))
        (path.parent / "rows-00001.parquet").write_bytes(other.read_bytes())
        entry = entries(other, "c00000001/tables/t/rows-00001.parquet")

        def change(m, entry=entry):
            m["tables"]["t"]["rows"][1:] = [dataclasses.asdict(dataclasses.replace(entry, n_rows=2))]
            m["tables"]["t"]["n_rows"] = 8

        reseal(tmp_path / "c00000001.json", change)
        v = table()
        if problem is None:
            verify(tmp_path)
            load(tmp_path, [v])
            assert len(v) == 8
        else:
            for read in (verify, lambda p, v=v: load(p, [v])):
                with pytest.raises(errors.Corrupt, match=problem):
                    read(tmp_path)
            assert len(v) == 0
        shutil.rmtree(tmp_path / "other")


def test_resealed_manifest_is_read(snapshot):  # or the tests above would say nothing
    reseal(snapshot / "c00000002.json", lambda m: None)
    verify(snapshot)


@pytest.mark.parametrize("body", [b"", b"{", b"nonsense", b"[" * 100_000, b'{"step": NaN}', b"\xff\xfe", b"1" * 5000])
def test_manifest_that_is_no_json_raises(snapshot, body):
    path = snapshot / "c00000002.json"
    digest = hashlib.blake2b(body, digest_size=32).hexdigest().encode()
    for data in (body, _HEAD + digest + _MIDDLE + body + _TAIL):
        path.write_bytes(data)
        assert "c00000002.json" in refused(snapshot)


def test_manifest_of_a_later_format_is_unsupported(snapshot):
    reseal(snapshot / "c00000002.json", edit("version", to=4))
    refused(snapshot, (errors.Unsupported,))


def test_oversized_manifest_raises(snapshot):
    with open(snapshot / "c00000002.json", "r+b") as file:
        file.truncate(1 << 40)  # sparse
    refused(snapshot)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_manifest_with_anything_anywhere_never_crashes(snapshot, data):
    path = snapshot / "c00000002.json"
    original = path.read_bytes()
    junk = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("c00000001"),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=4,
    )

    def change(manifest):
        at = manifest
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            key = data.draw(st.sampled_from(keys))
            if isinstance(at[key], dict | list) and at[key] and data.draw(st.booleans()):
                at = at[key]
            else:
                at[key] = data.draw(junk)
                return

    reseal(path, change)
    t = table(admission=CountAdmission(1))
    for read in (verify, log, lambda p: load(p, [t])):
        with contextlib.suppress(errors.Corrupt, errors.Unsupported, errors.UnknownColumn, errors.SchemaMismatch):
            read(snapshot)
    path.write_bytes(original)


@pytest.mark.parametrize("what", ["rows", "erased", "admission_files"])
def test_hostile_parquet_with_a_right_checksum_never_crashes(snapshot, what):
    manifest = json.loads((snapshot / "c00000002.json").read_bytes())["manifest"]
    path = snapshot / manifest["tables"]["t"][what][0]["path"]
    original, rng, n_refused = path.read_bytes(), random.Random(1), 0
    for _ in range(120):
        data = bytearray(original)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)

        def change(m, data=bytes(data)):
            m["tables"]["t"][what][0]["blake3"] = blake3(data)

        reseal(snapshot / "c00000002.json", change)
        t = train(table(admission=CountAdmission(1)), [70])
        before = lines(t)
        try:
            verify(snapshot)
            load(snapshot, [t])
        except errors.Corrupt:
            assert lines(t) == before
            n_refused += 1
    assert n_refused > 10


@pytest.mark.parametrize("where", ["magic", "gap", "header", "levels", "footer", "bounds"])
def test_own_file_that_is_laid_out_otherwise_raises(tmp_path, where):
    """Other readers go by the footer, hbkit by the layout: a file must say the same to both."""
    t = train(table(), range(6))
    save(tmp_path, [t], 1)
    path = next(tmp_path.rglob("rows-00000.parquet"))
    layout = Layout(rows_schema("int64", 2, 2), 65536)
    group, data = layout.group(6), bytearray(path.read_bytes())
    row = group.columns[3]
    at = {
        "magic": 0,
        "gap": 5,
        "header": group.columns[0].at + 1,
        "levels": row.values - 1,
        "footer": layout.body_nbytes(6) + 3,
        "bounds": data.index(np.int64(5).tobytes(), layout.body_nbytes(6)),
    }[where]
    data[at] ^= 1
    path.write_bytes(data)
    e = entries(path, "")
    reseal(tmp_path / "c00000001.json", lambda m: m["tables"]["t"]["rows"][0].update(blake3=e.blake3))
    u = table()
    for read in (verify, lambda p: load(p, [u])):
        with pytest.raises(errors.Corrupt, match=r"not laid out as it says|footer does not say"):
            read(tmp_path)
    assert len(u) == 0


class Broken:
    """Makes the n-th read of a file fail, and all that follow."""

    def __init__(self, monkeypatch, n):
        self.n, self.met = n, False
        for name in ("preadv", "pread"):
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name)))

    def wrap(self, call):
        def failing(*args):
            self.n -= 1
            if self.n < 0:
                self.met = True
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return call(*args)

        return failing


def tables_to_load():
    """One with rows, one without."""
    a = train(table(admission=CountAdmission(3)), [70, 71, 70, 71, 70, 71])
    a.lookup([5], train=True)  # waits
    return a, table("b")


def state_of(t):
    return lines(t), t.step, None if t.admission is None else {k: v.tolist() for k, v in t.admission.state().items()}


@pytest.mark.parametrize("what", ["reads", "memory"])
def test_load_that_fails_midway_leaves_tables_as_they_were_or_empty_and_named(tmp_path, monkeypatch, what):
    a, b = train(table(admission=CountAdmission(1)), range(300)), train(table("b"), range(200))
    save(tmp_path, [a, b], 1, state={"dense": b"weights"})
    train(a, [0, 9], seed=1)
    save(tmp_path, [a, b], 2, base="latest")
    want, outcomes, n = [state_of(a), state_of(b)], set(), 0
    while True:
        u, v = tables_to_load()
        before, failed = [state_of(u), state_of(v)], None
        with monkeypatch.context() as m:
            fault = Broken(m, n) if what == "reads" else None
            if fault is None:
                fail_allocation(n + 1)
            try:
                load(tmp_path, [u, v])
            except (errors.StorageError, MemoryError) as e:
                failed = e
            left = fail_allocation(0)
            assert (failed is not None) == (left == 0 if fault is None else fault.met)
        if failed is None:
            break
        now = [state_of(u), state_of(v)]
        if "table is empty" in str(failed):
            assert isinstance(failed, errors.StorageError) and failed.place["table"] == "t" and failed.remedy
            assert now[0][0] == [] and now[1] == before[1] and now[0][2] == before[0][2]
            outcomes.add("empty")
        else:
            assert now == before
            outcomes.add("as before")
        u.store.validate()
        load(tmp_path, [u, v])  # and it can be loaded again
        assert [state_of(u)[0], state_of(v)[0]] == [want[0][0], want[1][0]]
        n += 1
    assert [state_of(u)[:2], state_of(v)[:2]] == [w[:2] for w in want]
    assert outcomes == {"as before", "empty"}


def entries(path, name):
    data = path.read_bytes()
    return FileEntry(name, 0, len(data), blake3=blake3(data))


@pytest.mark.parametrize("keys", [[3, 1], [1, 1]])
def test_keys_that_do_not_ascend_raise(tmp_path, keys):
    import pyarrow as pa
    import pyarrow.parquet as pq

    t = train(Table("t", 2, optimizer=SGD()), [1, 3])
    save(tmp_path, [t], 1)
    path = next(tmp_path.rglob("rows-00000.parquet"))
    rows = pq.read_table(path)
    pq.write_table(
        rows.set_column(0, rows.schema.field("key"), pa.array(keys)), path, compression="NONE", use_dictionary=False
    )
    e = entries(path, "")
    reseal(
        tmp_path / "c00000001.json",
        lambda m: m["tables"]["t"]["rows"][0].update(nbytes=e.nbytes, blake3=e.blake3),
    )
    with pytest.raises(errors.Corrupt, match="keys do not ascend"):
        load(tmp_path, [t])


def test_rows_that_the_bytes_cannot_hold_are_not_read(tmp_path):
    """A small file that would unpack into many rows is refused before it is unpacked."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    t = train(Table("t", 2, optimizer=SGD(), admission=BloomAdmission(1, 10)), [1])
    save(tmp_path, [t], 1)
    path = next(tmp_path.rglob("admission-00000.parquet"))
    n = 1_000_000
    pq.write_table(pa.table({"counter": np.zeros(n, np.uint16)}), path, compression="zstd")
    e = entries(path, "")
    assert e.nbytes < n
    reseal(
        tmp_path / "c00000001.json",
        lambda m: m["tables"]["t"]["admission_files"][0].update(n_rows=n, nbytes=e.nbytes, blake3=e.blake3),
    )
    with pytest.raises(errors.Corrupt, match=f"cannot hold {n} rows"):
        verify(tmp_path)


CHILD = """
import sys
import numpy as np
from hbkit.embedding import SGD, Table
from hbkit.snapshot import load, save
path = sys.argv[1]
t = Table("t", 2, optimizer=SGD(momentum=0.9))
n = load(path, [t]).step
print("ready", flush=True)
while True:
    n += 1
    t.lookup(np.arange(n % 50, 60), train=True)
    t.update(np.arange(60), np.full((60, 2), n))
    t.store.erase(np.array([n % 60]))
    save(path, [t], n, base="latest" if n % 5 else None, state={"n": n, "dense": bytes(1000)})
    print(n, flush=True)
"""


def test_killed_writer_leaves_the_last_commit(tmp_path):
    save(tmp_path, [table()], 0)
    rng, leftovers = random.Random(0), 0
    for n in range(40):
        if n >= 5 and leftovers:  # some kill came in the middle of a save
            break
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE)
        assert child.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0.02, 0.12))
        child.send_signal(signal.SIGKILL)
        said = child.stdout.read().split()
        child.stdout.close()
        child.wait()
        last = verify(tmp_path)[-1]
        assert last.step >= int(said[-1] if said else 0)  # what was acknowledged is there
        t = table()
        found = load(tmp_path, [t])
        assert found.step == last.step and len(t) == last.tables["t"]
        committed = {c.id for c in log(tmp_path)}
        names = {p.name for p in tmp_path.iterdir()} - {"LOCK"} - committed - {f"{c}.json" for c in committed}
        leftovers += len(names)
        save(tmp_path, [t], last.step, base="latest")
        committed = {c.id for c in log(tmp_path)}
        assert {p.name for p in tmp_path.iterdir()} == {"LOCK"} | committed | {f"{c}.json" for c in committed}
    assert leftovers


class Fault:
    """Makes the n-th input or output call fail, and all that follow."""

    def __init__(self, monkeypatch, n, code):
        self.n, self.code, self.met = n, code, False
        for name in ("make_directory", "open", "write", "sync", "sync_directory", "rename"):
            monkeypatch.setattr(Disk, name, self.wrap(getattr(Disk, name)))

    def wrap(self, call):
        def failing(*args, **kwargs):
            self.n -= 1
            if self.n < 0:
                self.met = True
                raise OSError(self.code, os.strerror(self.code))
            return call(*args, **kwargs)

        return failing


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_failing_disk_raises_and_leaves_the_former_commit(tmp_path, monkeypatch, code):
    t = make(tmp_path)
    want, n, failures, in_doubt = lines(t), 0, 0, 0
    train(t, [1, 30], seed=3)
    changed = lines(t)
    while True:
        with monkeypatch.context() as m:
            fault = Fault(m, n, code)
            try:
                commit = save(tmp_path, [t], 3, base="latest", state={"b": b"x"})
            except errors.StorageError as e:
                assert e.remedy and os.strerror(code) in str(e)
                failures += 1
                commit = None
        assert (commit is None) == fault.met
        verify(tmp_path)
        u = table(admission=CountAdmission(1))
        found = load(tmp_path, [u])
        # Only when the last fsync of all fails may the new commit be there all the same, and then it is whole.
        assert (found.step, lines(u)) in ((2, want), (3, changed))
        if commit is not None:
            break
        in_doubt += found.step == 3
        n += 1
    assert found.step == 3 and in_doubt <= 1 and failures > 20


def test_full_disk_as_the_system_reports_it(tmp_path):
    """A file size limit stands in for a full disk: the write itself fails, deep inside Parquet's writer."""
    code = (
        "import resource, signal, sys, numpy as np\n"
        "from hbkit import errors\n"
        "from hbkit.embedding import SGD, Table\n"
        "from hbkit.snapshot import save\n"
        "t = Table('t', 2, optimizer=SGD())\n"
        "save(sys.argv[1], [t], 1)\n"
        "t.lookup(np.arange(100_000), train=True)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    save(sys.argv[1], [t], 2)\n"
        "except errors.StorageError as e:\n"
        "    print(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "make room; earlier commits are intact" in done.stdout
    assert [c.step for c in verify(tmp_path)] == [1]
    assert {p.name for p in tmp_path.iterdir()} == {"LOCK", "c00000001", "c00000001.json"}


def test_second_writer_is_told_so(tmp_path):
    t = train(table(), [1])
    entered, go = threading.Event(), threading.Event()
    inner = t.store

    class Slow:
        changes = inner.changes

        def point(self, *args):
            entered.set()
            assert go.wait(30)
            return inner.point(*args)

    t.store = Slow()
    first = threading.Thread(target=save, args=(tmp_path, [t], 1))
    first.start()
    assert entered.wait(30)
    with pytest.raises(errors.Locked, match="another writer"):
        save(tmp_path, [], 2)
    go.set()
    first.join()
    assert save(tmp_path, [], 3) == "c00000002"
    assert [c.step for c in verify(tmp_path)] == [1, 3]


def test_save_leaves_foreign_files_alone(tmp_path):
    (tmp_path / "20240101").mkdir()
    (tmp_path / "20240101" / "data.parquet").write_bytes(b"mine")
    (tmp_path / "notes.json").write_text("{}")
    (tmp_path / "c00000009").mkdir()
    save(tmp_path, [table()], 1)
    save(tmp_path, [table()], 2)
    assert [c.id for c in verify(tmp_path)] == ["c00000001", "c00000002"]
    assert (tmp_path / "20240101" / "data.parquet").read_bytes() == b"mine"
    assert (tmp_path / "c00000009").is_dir() and (tmp_path / "notes.json").exists()


def test_save_where_no_directory_can_be_raises(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(errors.StorageError, match="file"):
            save(path, [], 1)
