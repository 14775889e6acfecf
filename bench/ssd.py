"""The SSD tier's home beside RocksDB and LMDB: cold and warm random reads, bulk load, write-back, and what they cost.

``python bench/ssd.py DIRECTORY --peers PYTHON [--rows 4000000] [--rounds 8]``

PYTHON is an interpreter with rocksdict and lmdb (peers/setup.sh kv). All contenders hold the same rows, 8 bytes of key
and 512 of line (dim 64 with Adagrad), on one file system, each in a process of its own; they take turns within a round,
and each round begins with another. A figure is the median of the rounds, a ratio the median over rounds of the ratio
within a round. Takes about 2.6 KiB of disk a row while it runs, and deletes it.

``python bench/ssd.py DIRECTORY --scale 50000000`` measures a table of so many rows of dim 16 with Adagrad instead, in a
process of its own: memory by its own count and by the system's, and how long it takes to write, commit and open.

Caveats:

- "ceiling" is the disk's own: 4 KiB, or 8 as hbkit's blocks of such rows have, at random places of hbkit's segment
  files past the system's cache, at the same depth, without looking anything up, verifying or copying.
- Cold means that the contender has closed and opened its files and the system's cache was emptied of them.
- Peers read a batch by as many threads as hbkit keeps reads under way, or fewer where that is faster (both are given);
  RocksDB by MultiGet with asynchronous reads, past the system's cache and not; LMDB by transactions that touch pages
  without the GIL. They have no checksum for each row (RocksDB has one for each block, which is verified; LMDB none).
- A round of write-back updates random rows and ends with all of it durable: hbkit commits, RocksDB syncs its log, LMDB
  commits its transactions. RocksDB's compaction goes on behind that.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

LINE, BATCH, LOAD = 512, 4096, 65_536
DEPTH = 64


def disk_nbytes(path: Path) -> int:
    return sum(p.stat().st_blocks * 512 for p in path.rglob("*") if p.is_file())


def forget(path: Path) -> None:
    """Empty the system's cache of a directory's files."""
    for p in path.rglob("*"):
        if p.is_file():
            fd = os.open(p, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def lines_of(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.frombuffer(rng.bytes(n * LINE), np.uint8).reshape(n, LINE)


def layout() -> Any:
    from hbkit.store.line import Layout

    return Layout("t", 64, np.zeros(64, np.float32), lambda keys: np.zeros((len(keys), 64), np.float32), False)


class Hbkit:
    def __init__(self, path: Path, direct: bool = True) -> None:
        self.path, self.direct = path, direct
        self.open()

    def open(self) -> None:
        from hbkit.store.disk import Disk
        from hbkit.store.home import Home

        self.home = Home(layout(), self.path, disk=Disk(self.direct))

    def close(self) -> None:
        self.home.close()

    def write(self, keys: np.ndarray, lines: np.ndarray) -> None:
        zeros = np.zeros(len(keys), np.uint32)
        self.home.write(keys, lines, zeros, zeros)

    def sync(self) -> None:
        self.home.commit()

    def read(self, keys: np.ndarray) -> Any:
        return self.home.read(keys)[0]

    def stats(self) -> dict[str, Any]:
        return self.home.stats()


class Near(Hbkit):
    """hbkit's store over the same directory, with a cache that holds what is read."""

    def open(self) -> None:
        from hbkit.store.policy import make_policy
        from hbkit.store.ssd import SsdStore

        self.home = SsdStore(layout(), self.path, 2**30, make_policy("lfu"))

    def read(self, keys: np.ndarray) -> Any:
        from hbkit.shuffle.dedupe import dedupe

        unique, inverse, counts = dedupe(keys)
        lease, out = self.home.reserve(unique, counts), np.empty((len(keys), LINE // 4), np.float32)
        self.home.gather(lease, out, inverse)
        self.home.release(lease)
        return out


class Ceiling(Hbkit):
    """Reads blocks of the segments of hbkit's directory, and does nothing with them."""

    def __init__(self, path: Path, size: int) -> None:
        self.size = size
        super().__init__(path)

    def open(self) -> None:
        from hbkit.store.disk import Disk, aligned

        self.disk = Disk()
        paths = sorted(self.path.glob("segment-*"))
        self.handles = [self.disk.open(p, direct=True) for p in paths]
        blocks = np.array([p.stat().st_size // self.size for p in paths])
        self.first = np.cumsum(blocks) - blocks
        self.n = int(blocks.sum())
        self.out = aligned(BATCH * self.size)

    def close(self) -> None:
        for handle in self.handles:
            self.disk.close(handle)

    def read(self, keys: np.ndarray) -> Any:
        block = np.sort(np.random.default_rng(keys[:4]).integers(0, self.n, len(keys)))
        file = np.searchsorted(self.first, block, side="right") - 1
        lengths, out = np.full(len(keys), self.size), self.out[: len(keys) * self.size]
        self.disk.read(np.array(self.handles, np.int32)[file], (block - self.first[file]) * self.size, lengths, out)


class Threaded:
    threads = DEPTH  # that a batch is read by

    def read(self, keys: np.ndarray) -> Any:
        raw = [k.tobytes() for k in keys]
        if self.threads == 1:
            return self.get(raw)
        step = -(-len(raw) // self.threads)
        return list(self.pool.map(self.get, [raw[i : i + step] for i in range(0, len(raw), step)]))

    def stats(self) -> dict[str, Any]:
        return {}


class RocksDB(Threaded):
    def __init__(self, path: Path, direct: bool = True) -> None:
        self.path, self.direct = path, direct
        self.open()

    def open(self) -> None:
        from rocksdict import BlockBasedOptions, Cache, DBCompressionType, Options, Rdict, ReadOptions

        o = Options(raw_mode=True)
        o.create_if_missing(True)
        o.set_compression_type(DBCompressionType.none())
        o.set_use_direct_reads(self.direct)
        o.increase_parallelism(os.cpu_count() or 1)
        o.set_write_buffer_size(64 * 2**20)
        o.set_max_background_jobs(4)
        b = BlockBasedOptions()
        b.set_bloom_filter(10, False)
        b.set_block_cache(Cache(8 * 2**20))
        o.set_block_based_table_factory(b)
        self.db = Rdict(str(self.path), o)
        r = ReadOptions()
        r.set_async_io(True)
        r.fill_cache(False)
        self.db.set_read_options(r)
        self.pool = ThreadPoolExecutor(DEPTH)

    def close(self) -> None:
        self.pool.shutdown()
        self.db.close()

    def get(self, raw: list[bytes]) -> Any:
        return self.db.get(raw)

    def write(self, keys: np.ndarray, lines: np.ndarray) -> None:
        from rocksdict import WriteBatch

        batch = WriteBatch(raw_mode=True)
        data = lines.tobytes()
        for i, k in enumerate(keys):
            batch.put(k.tobytes(), data[i * LINE : (i + 1) * LINE])
        self.db.write(batch)

    def sync(self) -> None:
        self.db.flush_wal(True)

    def settle(self) -> None:
        self.db.flush()
        self.db.compact_range(None, None)


class Lmdb(Threaded):
    def __init__(self, path: Path, direct: bool = False) -> None:
        self.path = path
        self.open()

    def open(self) -> None:
        import lmdb

        how = {"readahead": False, "writemap": True, "map_async": True, "max_readers": 256}
        self.env = lmdb.open(str(self.path), map_size=2**36, **how)
        self.pool = ThreadPoolExecutor(DEPTH)

    def close(self) -> None:
        self.pool.shutdown()
        self.env.close()

    def get(self, raw: list[bytes]) -> Any:
        with self.env.begin() as txn:
            return [txn.get(k) for k in raw]

    def write(self, keys: np.ndarray, lines: np.ndarray) -> None:
        data = lines.tobytes()
        with self.env.begin(write=True) as txn:
            for i, k in enumerate(keys):
                txn.put(k.tobytes(), data[i * LINE : (i + 1) * LINE])

    def sync(self) -> None:
        self.env.sync(True)


KINDS: dict[str, Callable[..., Any]] = {
    "hbkit": Hbkit,
    "near": Near,
    "ceiling": Ceiling,
    "rocksdb": RocksDB,
    "lmdb": Lmdb,
}


def worker(kind: str, path: str, how: str) -> None:
    """Answer lines of JSON with what each took, in seconds."""
    store = KINDS[kind](Path(path), **json.loads(how))
    for line in sys.stdin:
        act, *args = json.loads(line)
        out: Any = None
        if act == "load":  # in random order
            (n,) = args
            rng, took = np.random.default_rng(0), 0.0
            keys = rng.permutation(n)
            for i in range(0, n, LOAD):
                some = np.ascontiguousarray(keys[i : i + LOAD])
                lines = lines_of(rng, len(some))
                begin = time.perf_counter()
                store.write(some, lines)
                took += time.perf_counter() - begin
            begin = time.perf_counter()
            store.sync()
            if hasattr(store, "settle"):
                out_of_load = time.perf_counter() - begin
                store.settle()
                begin = time.perf_counter() - out_of_load
            out = took + time.perf_counter() - begin
        elif act in ("cold", "warm"):
            seed, n, n_batches, store.threads = args
            rng = np.random.default_rng(seed)
            batches = [rng.integers(0, n, BATCH) for _ in range(n_batches)]
            if act == "cold":
                store.close()
                forget(store.path)
                store.open()
                store.read(batches[0][:1])
            else:
                for b in batches:
                    store.read(b)
            begin = time.perf_counter()
            for b in batches:
                store.read(b)
            out = time.perf_counter() - begin
        elif act == "update":
            seed, n, n_batches, _ = args
            rng, took = np.random.default_rng(seed), 0.0
            for _ in range(n_batches):
                keys, lines = np.unique(rng.integers(0, n, BATCH)), lines_of(rng, BATCH)
                begin = time.perf_counter()
                store.write(keys, lines[: len(keys)])
                took += time.perf_counter() - begin
            begin = time.perf_counter()
            store.sync()
            out = took + time.perf_counter() - begin
        elif act == "buffer":  # rows that were just written
            seed, n, n_batches, _ = args
            rng = np.random.default_rng(seed)
            keys = np.unique(rng.integers(0, n, BATCH))
            store.write(keys, lines_of(rng, len(keys)))
            begin = time.perf_counter()
            for _ in range(n_batches):
                store.read(keys)
            out = time.perf_counter() - begin
        elif act == "stats":
            out = {"on_disk": disk_nbytes(store.path), **store.stats()}
        elif act == "close":
            store.close()
            print(json.dumps(out), flush=True)
            return
        print(json.dumps(out, default=str), flush=True)


class Contender:
    """A store in a process of its own, that is opened when it is its turn."""

    def __init__(self, python: str, kind: str, path: Path, **how: Any) -> None:
        args = [python, __file__, "worker", kind, str(path), json.dumps(how)]
        self.process = subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, *act: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(act) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"a contender died while it was asked to {act}")
        return json.loads(answer)

    def close(self) -> None:
        self("close")
        self.process.wait()


def rounds(
    title: str, contenders: dict[str, tuple[Contender, int]], act: str, n: int, n_rounds: int, n_batches: int
) -> None:
    took: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(n_rounds):
        names = list(contenders)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            contender, threads = contenders[name]
            took[name].append(contender(act, i + 1000, n, n_batches, threads))
    print(f"\n{title}")
    base = np.array(took[next(iter(took))])
    for name, t in took.items():
        rate = BATCH * n_batches / np.array(t)
        ratio = np.median(np.array(t) / base)
        print(
            f"  {name:24} {np.median(rate):12,.0f} rows/s  (best {rate.max():12,.0f})   hbkit is {ratio:6.2f} x",
            flush=True,
        )


def rss() -> tuple[float, float]:
    """Memory now and at the most, in MiB."""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    now, most = (int(status[k].split()[0]) / 1024 for k in ("VmRSS", "VmHWM"))
    return now, most


def scale(path: Path, n: int) -> None:
    """One large table: written, a quarter of it updated, and opened again; prints as it goes."""
    from hbkit.store.home import Home
    from hbkit.store.line import Layout

    layout = Layout("t", 16, np.zeros(16, np.float32), lambda keys: np.zeros((len(keys), 16), np.float32), False)
    begin_rss, size, rng = rss()[0], 128, np.random.default_rng(0)
    odd = 0x9E3779B97F4A7C15  # keys are scattered, without an array of them

    def keys_of(first: int, count: int) -> np.ndarray:
        return (np.arange(first, first + count, dtype=np.uint64) * np.uint64(odd)).view(np.int64)

    def tell(what: str, begin: float, home: Any) -> None:
        now, most = (m - begin_rss for m in rss())
        print(
            f"  {what:10} {time.perf_counter() - begin:7.1f} s   counted {home.nbytes / 2**20:7.1f} MiB"
            f" ({home.nbytes / n:5.2f} bytes a row), resident {now:7.1f} MiB, at the most {most:7.1f} MiB",
            flush=True,
        )

    home, begin, zeros = Home(layout, path), time.perf_counter(), np.zeros(LOAD, np.uint32)
    lines = np.frombuffer(rng.bytes(LOAD * size), np.uint8).reshape(LOAD, size)
    for i in range(0, n, LOAD):
        m = min(LOAD, n - i)
        home.write(keys_of(i, m), lines[:m], zeros[:m], zeros[:m])
    tell("write", begin, home)
    begin = time.perf_counter()
    home.commit()
    tell("commit", begin, home)
    begin = time.perf_counter()
    for _ in range(max(1, n // 4 // LOAD)):
        i = int(rng.integers(0, max(1, n - LOAD)))
        m = min(LOAD, n - i)
        home.write(keys_of(i, m), lines[:m], zeros[:m], zeros[:m])
    tell("update", begin, home)
    begin = time.perf_counter()
    home.commit()
    tell("commit", begin, home)
    home.close()
    begin = time.perf_counter()
    home = Home(layout, path)
    tell("open", begin, home)
    begin = time.perf_counter()
    home.commit()
    tell("commit", begin, home)
    home.close()


def main() -> None:
    if sys.argv[1:2] == ["worker"]:
        return worker(*sys.argv[2:])
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--peers")
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--scale", type=int)
    args = parser.parse_args()
    root, n = args.directory / "hbkit-bench-ssd", args.rows
    shutil.rmtree(root, ignore_errors=True)
    for kind in KINDS:
        (root / kind).mkdir(parents=True)
    if args.scale:
        print(f"{args.scale:,} rows of dim 16 with Adagrad")
        try:
            scale(root / "hbkit", args.scale)
        finally:
            shutil.rmtree(root)
        return
    python = {"hbkit": sys.executable, "rocksdb": args.peers, "lmdb": args.peers}
    python = {kind: p for kind, p in python.items() if p}
    try:
        print(f"{n:,} rows of 8 + {LINE} bytes, batches of {BATCH}, {os.cpu_count()} cores")
        print("\nbulk load in random order, synced")
        base = 0.0
        for kind, p in python.items():
            c = Contender(p, kind, root / kind)
            took = c("load", n)
            base = base or took
            print(f"  {kind:24} {n / took:12,.0f} rows/s   hbkit is {took / base:6.2f} x", flush=True)
            c.close()

        def stores(direct: bool, threads: tuple[int, ...]) -> dict[str, tuple[Contender, int]]:
            out = {}
            for kind, p in python.items():
                c = Contender(p, kind, root / kind, direct=direct)
                for t in threads if kind != "hbkit" else (DEPTH,):
                    out[f"{kind}, {t} threads" if kind != "hbkit" else kind] = c, t
            return out

        def close(stores: dict[str, tuple[Contender, int]]) -> None:
            for contender in {id(c): c for c, _ in stores.values()}.values():
                contender.close()

        for direct in (True, False):
            c = stores(direct, (DEPTH, 16))
            for size in (4096, 8192):
                c[f"ceiling, {size} bytes"] = Contender(sys.executable, "ceiling", root / "hbkit", size=size), DEPTH
            how = "past the system's cache" if direct else "by the system's cache"
            rounds(f"cold random rows, {how}", c, "cold", n, args.rounds, args.batches)
            close(c)
        c = stores(False, (1, DEPTH))
        rounds("rows in the system's cache", c, "warm", n, args.rounds, args.batches)
        close(c)
        c = {"hbkit": (Contender(sys.executable, "near", root / "hbkit"), 1)}
        for kind in [k for k in python if k != "hbkit"]:
            c[kind] = Contender(python[kind], kind, root / kind, direct=False), 1
        rounds("rows in hbkit's cache, the peers' in the system's", c, "warm", n, args.rounds, args.batches)
        close(c)
        c = stores(True, (1,))
        rounds("rows just written", c, "buffer", n, args.rounds, args.batches)
        before = {name: x("stats") for name, (x, _) in c.items()}
        n_batches = 3 * n // BATCH // args.rounds  # each row three times
        rounds("write-back of random rows, each round durable", c, "update", n, args.rounds, n_batches)
        for name, (x, _) in c.items():
            s = x("stats")
            now, then = (stats["on_disk"] / (n * (LINE + 8)) for stats in (s, before[name]))
            print(f"  {name:24} space amplification {now:.2f} (before: {then:.2f})")
            if "given_nbytes" in s:
                written, given = (s[k] - before[name][k] for k in ("written_nbytes", "given_nbytes"))
                print(f"  {name:24} write amplification {written / given:.3f}, engine {s['engine']}")
        close(c)
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
