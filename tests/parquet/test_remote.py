"""Files behind an S3 server that fails: the bytes of the local file, or a named error in time."""

import random
import re
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from time import time_ns

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from services import FAULTS, direct, s3, s3fs

from hbkit import errors
from hbkit.data import Dataset
from hbkit.parquet import File, fetch, list_files, list_modified, open_source, source
from hbkit.parquet.footer import read_footer

N_BYTES = 3_000_000


@pytest.fixture(scope="module")
def here(service, tmp_path_factory):
    """A directory, whose files lie in the bucket as well."""
    here = tmp_path_factory.mktemp("bucket")
    rng = np.random.default_rng(0)
    (here / "bytes").write_bytes(rng.bytes(N_BYTES))
    for i in range(2):
        n = 20_000
        table = {f"c{j}": rng.integers(0, 1 << 60, n) for j in range(8)}
        table["list"] = [list(range(k % 5)) for k in range(n)]
        pq.write_table(pa.table(table), here / f"{i}.parquet", row_group_size=5000)
    pafs.copy_files(str(here), "bucket/d", destination_filesystem=direct(service))
    return here


@pytest.fixture
def proxy(proxy, here):
    """The files are there."""
    return proxy


@pytest.fixture(params=[s3, s3fs])
def uri(request, proxy):
    return lambda key: request.param(proxy, key)


def asked(proxy):
    """The ranges of the requests, without those of three bytes at most, which chance may add (see source.py)."""
    bounds = [(r, *map(int, r[6:].split("-"))) for _, _, r, _ in proxy.log if r]
    return sorted(r for r, first, last in bounds if last - first > 2)


def some_ranges(seed, n=40):
    random_ = random.Random(seed)
    begins = [random_.randrange(N_BYTES) for _ in range(n)]
    return [(b, random_.choice((0, 1, 100, 70_000, 300_000)) % (N_BYTES - b + 1)) for b in begins]


@given(st.lists(st.tuples(st.integers(0, 5_000_000), st.integers(1, 20_000_000)), max_size=20))
def test_coalesce_blocks_hold_their_ranges(ranges):
    blocks, where = fetch.coalesce(ranges)
    assert blocks == sorted(blocks) and set(where) == set(range(len(blocks)))
    for (offset, nbytes), w in zip(ranges, where, strict=True):
        assert blocks[w][0] <= offset and offset + nbytes <= sum(blocks[w])
    for w, (_, nbytes) in enumerate(blocks):
        assert nbytes <= max([fetch.LARGEST] + [r[1] for r, v in zip(ranges, where, strict=True) if v == w])


def test_read_gives_the_bytes_in_the_order_asked(uri, here):
    data = (here / "bytes").read_bytes()
    remote = open_source(uri("d/bytes"))
    ranges = some_ranges(0)
    for (offset, nbytes), view in zip(ranges, remote.read(ranges), strict=True):
        assert view.readonly and view == data[offset : offset + nbytes]
    assert remote.read([]) == []
    with pytest.raises(errors.Corrupt, match="outside"):
        remote.read([(N_BYTES - 1, 2)])
    assert remote.stats()["n_retries"] == 0
    remote.close()
    with pytest.raises(errors.Corrupt, match="outside"):
        remote.read([(0, 1)])


def test_read_coalesces_and_splits(uri, proxy, monkeypatch):
    monkeypatch.setattr(fetch, "LARGEST", 500_000)
    remote = open_source(uri("d/bytes"))
    before = remote.stats()
    proxy.log.clear()
    views = remote.read([(10_000 * i, 5000) for i in range(20)])
    assert asked(proxy) == ["bytes=0-194999"]
    assert len({id(v.obj) for v in views}) == 1  # slices of one body
    proxy.log.clear()
    [view] = remote.read([(100_000, 1_200_000)])
    assert asked(proxy) == [
        "bytes=100000-599999",
        "bytes=1100000-1299999",
        "bytes=600000-1099999",
    ]
    proxy.log.clear()
    remote.read([(2_000_000, 10_000), (100_000, 10)])  # a small one takes its surroundings along
    assert asked(proxy) == ["bytes=100000-104095", "bytes=2000000-2009999"]
    counts = {k: v - before[k] for k, v in remote.stats().items()}
    assert counts == {"n_requests": 6, "n_retries": 0, "n_bytes": 195_000 + 1_200_000 + 10_000 + 4096}
    assert len(view) == 1_200_000


def test_requests_run_side_by_side(uri, proxy):
    remote = open_source(uri("d/bytes"))
    proxy.reset()
    together = threading.Barrier(2)

    def fault(n, method):
        proxy.lock.release()  # the proxy holds it while it asks
        try:
            together.wait(10)
        finally:
            proxy.lock.acquire()

    proxy.fault = fault
    remote.read([(300_000 * i, 10) for i in range(8)])
    assert not together.broken and len(asked(proxy)) == 8


def test_footer_takes_one_request(uri, proxy, here):
    remote = open_source(uri("d/0.parquet"))
    proxy.log.clear()
    read_footer(remote)
    File(remote)
    assert len(asked(proxy)) == 1


def test_footer_larger_than_the_tail_takes_one_more(uri, proxy, monkeypatch):
    monkeypatch.setattr(source, "TAIL", 100)
    remote = open_source(uri("d/0.parquet"))
    proxy.log.clear()
    read_footer(remote)
    read_footer(remote)
    assert len(asked(proxy)) == 2


def test_tails_are_kept_of_few_files(proxy, monkeypatch):
    monkeypatch.setattr(source, "N_TAILS", 2)
    files = [open_source(s3(proxy, "d/bytes")) for _ in range(5)]
    for remote in files:
        remote.read([(N_BYTES - 8, 8)])
    assert [remote._tail is not None for remote in files] == [False] * 3 + [True] * 2


@pytest.mark.parametrize("seed", range(3))
def test_read_survives_faults(uri, proxy, hasty, here, seed):
    data = (here / "bytes").read_bytes()
    proxy.fail_some(seed)
    began = time.monotonic()
    try:
        remote = open_source(uri("d/bytes"))
        for k in range(3):
            ranges = some_ranges(10 * seed + k, 8)
            views = remote.read(ranges)
            assert all(v == data[o : o + n] for (o, n), v in zip(ranges, views, strict=True))
    except errors.StorageError as e:  # six failures in a row
        assert "bucket/d/bytes" in str(e) and "last cause" in str(e)
    assert time.monotonic() - began < 5 * fetch.DEADLINE  # opening, and three reads
    assert any(fault for *_, fault in proxy.log)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_repeated(proxy, hasty, here, fault):
    data = (here / "bytes").read_bytes()
    remote = open_source(s3(proxy, "d/bytes"))
    proxy.reset()
    proxy.fault = lambda n, method: fault if n == 0 else None
    assert remote.read([(1000, 100_000)])[0] == data[1000:101_000]
    # libcurl repeats a request of its own accord when the server closed a connection that it had kept open
    assert remote.stats()["n_retries"] >= (fault != "reset")
    proxy.reset()
    proxy.fault = lambda n, method: fault if n == 0 else None
    assert open_source(s3(proxy, "d/bytes")).nbytes == N_BYTES


@pytest.mark.parametrize("fault", FAULTS)
def test_read_gives_up_in_time(uri, proxy, hasty, monkeypatch, fault):
    remote = open_source(uri("d/bytes"))
    monkeypatch.setattr(fetch, "DEADLINE", 1.2)
    proxy.fail_all(fault)
    retries, began = remote.stats()["n_retries"], time.monotonic()
    with pytest.raises(
        errors.StorageError, match=r"last cause: .*bucket/d/bytes.*, bytes 5\.\.50005, attempts \d"
    ) as e:
        remote.read([(5, 50_000)])
    assert remote.stats()["n_retries"] - retries == e.value.place["attempts"] - 1
    if fault != "cut":  # which does not cut what has no body
        with pytest.raises(errors.StorageError, match="last cause"):
            open_source(s3(proxy, "d/bytes") if fault == "short" else uri("d/0.parquet")).read([(0, 10)])
    assert time.monotonic() - began < 30  # generous: half the least that would be had without limits
    proxy.reset()
    monkeypatch.setattr(fetch, "DEADLINE", 15.0)
    assert len(remote.read([(5, 10)])[0]) == 10  # stuck calls keep nobody else from reading


@pytest.mark.parametrize(
    "status, error", [("404", errors.NotFound), ("403", errors.StorageError), ("400", errors.StorageError)]
)
def test_what_cannot_get_better_is_raised_at_once(uri, proxy, status, error):
    remote = open_source(uri("d/bytes"))
    proxy.reset()
    proxy.fail_all(status)
    with pytest.raises(error, match="bucket/d/bytes"):
        remote.read([(5, 10)])
    assert asked(proxy).count("bytes=5-4100") == 1
    with pytest.raises(error):
        open_source(uri("d/bytes"))


def test_nothing_there_is_not_found(uri):
    with pytest.raises(errors.NotFound):
        open_source(uri("d/nothing"))


def test_eight_threads_read_through_faults(proxy, hasty, here):
    data = (here / "bytes").read_bytes()
    remote = open_source(s3(proxy, "d/bytes"))
    proxy.fail_some(7)

    def read(seed):
        ranges = some_ranges(seed, 6)
        return all(v == data[o : o + n] for (o, n), v in zip(ranges, remote.read(ranges), strict=True))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(16)))
    assert remote.stats()["n_retries"] > 0


def test_native_file_reads_through_faults(uri, proxy, hasty, here):
    data = (here / "bytes").read_bytes()
    remote = open_source(uri("d/bytes"))
    proxy.fail_some(3, faults=("503", "cut"))
    file = remote.file
    assert file.size() == N_BYTES and file.read_at(100, 50) == data[50:150]
    file.seek(0)
    assert file.read() == data
    assert pq.read_table(open_source(uri("d/0.parquet")).file).equals(pq.read_table(here / "0.parquet"))
    proxy.fail_all("503")
    with pytest.raises(errors.StorageError, match="last cause"):
        remote.file.read_at(10, 5)


def test_row_group_error_is_the_sources_own(proxy):
    file = File(s3(proxy, "d/0.parquet"))
    proxy.reset()
    proxy.fail_all("503")
    with pytest.raises(errors.StorageError, match=r"last cause.*attempts"):
        file.read_arrow(1, list(file.schema))
    ranges = asked(proxy)
    assert max(map(ranges.count, ranges)) == fetch.ATTEMPTS  # and not once more to name a column


@pytest.mark.parametrize("seed", range(2))
def test_dataset_through_faults_gives_the_local_batches(uri, proxy, hasty, here, seed):
    local = Dataset.from_parquet([here / "0.parquet", here / "1.parquet"]).batch(3000)
    proxy.fail_some(seed)
    paths = [uri("d/0.parquet"), uri("d/1.parquet")]
    remote = Dataset.from_parquet(paths).batch(3000)
    n = 0
    for a, b in zip(local, remote, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if name == "list":
                assert np.array_equal(a[name].row_splits, b[name].row_splits)
            x, y = (v[name].values if name == "list" else v[name] for v in (a, b))
            assert np.array_equal(x, y)
        n += 1
    assert n == 14 and any(fault for *_, fault in proxy.log)


def test_directory_is_listed(proxy):
    names = list_files(s3(proxy, "d"))
    assert [re.sub(r"\?.*", "", n) for n in names] == ["s3://bucket/d/0.parquet", "s3://bucket/d/1.parquet"]


def test_threads_end_and_a_stalled_request_does_not_hold_up_exit(proxy):
    script = f"""
        import threading, time
        from hbkit import errors
        from hbkit.parquet import fetch, open_source
        source = open_source({s3(proxy, "d/bytes")!r})
        source.read([(300_000 * i, 10) for i in range(9)])
        for _ in range(100):
            time.sleep(0.05)
            if threading.active_count() == 1:
                break
        else:
            raise SystemExit("threads are left")
        print("ready", flush=True)
        input()
        fetch.TIMEOUT, fetch.DEADLINE = 0.2, 0.5
        try:
            source.read([(5, 10)])
        except errors.StorageError:
            print("gave up", flush=True)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline() == "ready\n"
        proxy.fail_all("stall")
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline() == "gave up\n"
        assert child.wait(30) == 0
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


def test_fork_gets_threads_of_its_own():
    # in a fresh process: the libraries loaded here do not all bear a fork
    script = """
        import os
        from hbkit.parquet import fetch
        assert fetch.run([fetch.Job(lambda: 1)] * 1, "x") == [1]
        fetch._pool._n_threads = fetch.WORKERS  # as if all were busy
        child = os.fork()
        if child == 0:
            os._exit(fetch.run([fetch.Job(lambda: 7)], "x")[0])
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    """
    subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(script)], check=True, timeout=60)


def test_a_late_answer_is_as_good_as_any(monkeypatch):
    monkeypatch.setattr(fetch, "TIMEOUT", 0.05)
    monkeypatch.setattr(fetch, "BACKOFF", 0.0)
    monkeypatch.setattr(fetch, "WORKERS", 1)
    calls, go = [], threading.Event()

    def call():
        calls.append(None)
        if len(calls) == 1:
            go.wait(10)
            return "late"
        go.set()
        time.sleep(5)
        return "second"

    job = fetch.Job(call)
    assert fetch.run([job], "x") == ["late"]
    assert job.n_attempts >= 2


def test_memory_file_system_needs_no_service():
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.pipe("/remote/x", bytes(range(256)) * 1000)
    try:
        remote = open_source("memory://remote/x")
        assert remote.read([(256, 3)])[0] == b"\0\1\2"
        with pytest.raises(errors.InvalidArgument, match="directory"):
            open_source("memory://remote")
        memory.pipe("/remote/x", b"shorter")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fetch, "BACKOFF", 0.0)
            with pytest.raises(errors.StorageError, match="last cause: the answer has 0 of 4096 bytes"):
                remote.read([(256, 3)])
    finally:
        memory.rm("/remote", recursive=True)


@pytest.mark.parametrize(
    "key", ["d", "d/0.parquet", "d/k=1/*.parquet", "d/a%20b.parquet", "d//x", "d/", "", "d/a b", "d/ü"]
)
@pytest.mark.parametrize("user", ["", "some:one@"])
def test_s3_uri_means_what_it_means_to_pyarrow(proxy, key, user):
    text = s3(proxy, key).replace("s3://", "s3://" + user)
    try:
        client, inner = pafs.FileSystem.from_uri(text)
    except pa.ArrowInvalid:
        return
    for repeats in False, True:
        assert source.resolve(text, repeats) == (client, inner)


@given(st.binary(min_size=1, max_size=40), st.integers(0, 40))
def test_native_body_shorter_than_asked_is_seen(data, missing):
    """A file that, as pyarrow's on S3, leaves the end of the buffer alone and says nothing of it."""
    whole = max(len(data) - missing, 0)

    class Fake:
        def open_input_file(self, path):
            return self

        def size(self):
            return len(data)

        def get_stream(self, offset, nbytes):
            self.offset = offset
            return self

        def readinto(self, body):
            n = max(min(whole - self.offset, body.size), 0)
            body[:n] = np.frombuffer(data, np.uint8)[self.offset : self.offset + n]
            return body.size

        def close(self):
            pass

    read_at, nbytes, _ = source._open(Fake(), "x")
    got = bytes(read_at(0, nbytes))
    assert len(got) < nbytes or got == data
    assert not (missing and len(got) == nbytes)


def test_directory_is_listed_with_times(uri):
    found = list_modified(uri("d"))
    assert sorted(name for _, name in found) == list_files(uri("d")) and found == sorted(found) and len(found) == 2
    # fsspec's file systems do not tell pyarrow
    assert all(0 < time_ns() - time < 3600e9 if "s3://" in name else time == 0 for time, name in found)
    assert list_modified(uri("nothing-here")) == []
