"""Keys a second of the device's index and dedupe, beside torch.unique and the card's copy bandwidth.

    python -m bench.gpu_index [--slots 27] [--json FILE]      # all cases; needs a CUDA device
    ncu --profile-from-start off ... python -m bench.gpu_index --profile      # each kernel once

1 Mi keys a call, rows of 64 float32, 2^27 slots (32 GiB of rows): the setting of HierarchicalKV's public figures. Load
is keys over slots. Two figures a case: the device's time alone (CUDA events around calls that were queued behind a
kernel that waits), and the wall clock of a call with its launches and its one wait for the counts. Keys and scores are
in device memory. Medians of 5 rounds over 8 batches, so that no batch is asked for twice in a row.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import time
from pathlib import Path

import numpy as np
from numba import cuda

from hbkit.cuda import dedupe, index
from hbkit.cuda.dedupe import Dedupe
from hbkit.cuda.device import Device
from hbkit.cuda.index import COUNTERS, EVICTED_CLEAN, EVICTED_DIRTY, WARP, DeviceIndex, Placement
from hbkit.cuda.lines import SCATTER, DeviceLines, fours, shift_of

N = 1 << 20
DIM = 64
IDS = 1_050_000
LARGE, SMALL = 25, 20
BATCHES = 8
ROUNDS = 5
ODD = np.int64(-7046029254386353131)  # odd, so that i * ODD are distinct keys


def wait_ms(ms, error):
    """Keep the stream busy, so that what comes after is queued."""
    for _ in range(ms):
        cuda.nanosleep(1_000_000)


def key(i):
    """The i-th key."""
    with np.errstate(over="ignore"):
        return i.astype(np.int64) * ODD


def zipf(rng, n, n_keys, a):
    """n draws of 0..n_keys-1 by a power law of exponent a."""
    top = n_keys ** (1 - a) - 1
    return np.minimum((top * rng.random(n) + 1) ** (1 / (1 - a)) - 1, n_keys - 1).astype(np.int64)


class Bench:
    """Cases on one device, and what they took."""

    def __init__(self, log_slots, n):
        self.device, self.n = Device(), n
        self.index = DeviceIndex(self.device, 1 << log_slots, n)
        self.rng = np.random.default_rng(0)
        self.filled, self.step = 0, 0
        self.slots = self.index._flat[:n]  # where the index notes a batch's slots
        self.figures = {}

    def device_ms(self, calls):
        """Median device time of a call; `calls` only launch."""
        took = []
        stream = self.device._stream
        for _ in range(ROUNDS):
            self.device.launch(wait_ms, 1, 8 + len(calls))
            begin, end = cuda.event(), cuda.event()
            begin.record(stream)
            for call in calls:
                call()
            end.record(stream)
            self.device.sync()
            took.append(cuda.event_elapsed_time(begin, end) / len(calls))
        return float(np.median(took))

    def wall_ms(self, calls):
        """Median wall clock of a call that ends with a wait."""
        took = []
        for _ in range(ROUNDS):
            self.device.sync()
            begin = time.perf_counter()
            for call in calls:
                call()
            self.device.sync()
            took.append((time.perf_counter() - begin) * 1e3 / len(calls))
        return float(np.median(took))

    def note(self, name, n, device_ms, wall_ms=None, **more):
        """Print and keep a case: milliseconds and billions of keys a second."""
        self.figures[name] = dict(n=n, device_ms=device_ms, wall_ms=wall_ms, **more)
        wall = f"{wall_ms:9.3f} {n / wall_ms / 1e6:7.2f}" if wall_ms else " " * 17
        print(f"{name:44s} {device_ms:9.3f} {n / device_ms / 1e6:7.2f} {wall}  {more or ''}", flush=True)

    def send(self, i):
        """Batches of keys in device memory."""
        return [self.device.send(key(part)) for part in i.reshape(-1, self.n)]

    def fill(self, load):
        """Insert new keys up to a load, each batch settled, evicting where buckets are full."""
        goal = int(load * self.index.n_slots)
        while self.filled < goal:
            n = min(self.n, goal - self.filled)
            keys = self.device.send(key(np.arange(self.filled, self.filled + n)))
            self.step += 1
            self.index.settle(self.index.insert(keys, self.scores(n), evict=True).slots, dirty=True)
            self.filled += n
        self.device.sync()
        return len(self.index) / self.index.n_slots

    def scores(self, n):
        return self.device.send(np.full(n, self.step, np.int64))

    def probe_and_place(self, keys, scores):
        """The launches of `insert` without its wait; and `settle`."""
        x, device = self.index, self.device
        rest = (x._placed, x._lists, x._turn * (COUNTERS // 2))
        x._turn ^= 1
        device.launch(index.probe, self.n, x._digests, x._searched, keys, scores, 0, *rest)
        device.launch(index.place, min(self.n, index.PLACERS) * WARP, x._bytes, x._entries, keys, scores, 1, *rest)
        x.settle(self.slots, dirty=True)

    def insert(self, keys, scores):
        x = self.index
        x.settle(x.insert(keys, scores, evict=True).slots, dirty=True)

    def resident(self, n_batches, a=None):
        """Batches of keys that are there: distinct and uniform, or Zipf over the newest, with repeats."""
        batches, found = [], np.empty(0, np.int64)
        while len(batches) < n_batches:
            if a is None:
                i = self.rng.integers(0, self.filled, self.n)
            else:
                i = self.filled - 1 - zipf(self.rng, self.n, self.filled, a)
            slots = self.device.fetch(self.index.find(self.device.send(key(i))))
            found = np.concatenate([found, i[slots >= 0]])
            if a is None:
                found = self.rng.permutation(np.unique(found))
            if len(found) >= self.n:
                batches.append(self.device.send(key(found[: self.n])))
                found = found[self.n :]
        return batches

    def copy(self):
        """The card's copy bandwidth, GB/s read and written."""
        a, b = self.device.empty((2**29,), np.float32), self.device.empty((2**29,), np.float32)
        stream = self.device._stream
        ms = self.device_ms([lambda: b.copy_to_device(a, stream=stream)])
        self.figures["copy_GBps"] = 2 * a.nbytes / ms / 1e6
        print(f"copy {self.figures['copy_GBps']:.0f} GB/s read and written")

    def finds(self, load, lines):
        device, x = self.device, self.index
        rows = device.empty((self.n, DIM), np.float32)
        slots = device.empty((self.n,), np.int64)
        absent = self.send(self.filled * 2 + self.rng.permutation(BATCHES * self.n))
        for name, batches in (
            ("uniform, all there", self.resident(BATCHES)),
            ("Zipf 1.05", self.resident(BATCHES, 1.05)),
            ("none there", absent),
        ):
            calls = [lambda k=k: device.launch(index.find, self.n, x._digests, x._searched, k, slots) for k in batches]
            self.note(
                f"find, {name}, load {load}",
                self.n,
                self.device_ms(calls),
                self.wall_ms([lambda k=k: x.find(k, slots) for k in batches]),
            )
            if name != "none there":

                def moved(k):
                    device.launch(index.find, self.n, x._digests, x._searched, k, slots)
                    lines.gather(slots, rows)

                calls = [lambda k=k: moved(k) for k in batches]
                self.note(f"find + rows out, {name}, load {load}", self.n, self.device_ms(calls))

    def inserts_there(self, load):
        """Every key is found, scored, pinned and settled."""
        scores, there = self.scores(self.n), self.resident(BATCHES)
        ms = self.device_ms([lambda k=k: self.probe_and_place(k, scores) for k in there])
        wall = self.wall_ms([lambda k=k: self.insert(k, scores) for k in there])
        self.note(f"insert, all there, load {load}", self.n, ms, wall)

    def fresh(self):
        """Batches of keys that nobody inserted."""
        out = self.send(np.arange(self.filled, self.filled + BATCHES * self.n))
        self.filled += BATCHES * self.n
        return out

    def new_keys(self, load, lines):
        """All new, once a batch: the rounds take batches of their own."""
        device, x = self.device, self.index
        rows = device.empty((self.n, DIM), np.float32)
        rows_in = (
            SCATTER["float32"],
            self.n << shift_of(DIM),
            lines.lines,
            self.slots,
            rows,
            *(0, 0, DIM, shift_of(DIM), fours(DIM, DIM, 0, 0, DIM)),
        )
        took = {"insert-and-evict": [], "insert-and-evict + victims out + rows in": []}
        stream = device._stream
        for _ in range(ROUNDS):
            for name in took:
                batches = self.fresh()
                self.step += 1
                scores = self.scores(self.n)
                device.launch(wait_ms, 1, 16)
                begin, end = cuda.event(), cuda.event()
                begin.record(stream)
                for k in batches:
                    self.probe_and_place(k, scores)
                    if "rows" in name:
                        x.positions(Placement(x._flat, self.n, 0, 0, 0), EVICTED_CLEAN, EVICTED_DIRTY, self.n)
                        lines.gather(self.slots, rows)
                        device.launch(*rows_in)
                end.record(stream)
                device.sync()
                took[name].append(cuda.event_elapsed_time(begin, end) / len(batches))
        walls = []
        for _ in range(ROUNDS):
            batches = self.fresh()
            self.step += 1
            scores = self.scores(self.n)
            walls.append(self.wall_once(lambda k, scores=scores: self.insert(k, scores), batches))
        for name, ms in took.items():
            wall = float(np.median(walls)) if "rows" not in name else None
            self.note(f"{name}, all new, load {load}", self.n, float(np.median(ms)), wall)

    def host(self):
        """Where the host's time goes in calls that find everything, and in dedupes."""
        run, there, scores = Dedupe(self.device, self.n), self.resident(BATCHES), self.scores(self.n)
        for keys in there:
            run(keys)
        profile = cProfile.Profile()
        profile.enable()
        for keys in there * 5:
            run(keys)
            self.insert(keys, scores)
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(16)

    def wall_once(self, call, batches):
        self.device.sync()
        begin = time.perf_counter()
        for k in batches:
            call(k)
        self.device.sync()
        return (time.perf_counter() - begin) * 1e3 / len(batches)

    def dedupes(self):
        """1.05 M ids, as in dynamicemb's case (Zipf 1.05, about 350 k distinct), uniform and all distinct."""
        n, device = IDS, self.device
        run = Dedupe(device, n)
        cases = {
            "Zipf 1.05": lambda: zipf(self.rng, n, 10_000_000, 1.05),
            "uniform of 350 k": lambda: self.rng.integers(0, 350_000, n),
            "all distinct": lambda: self.rng.permutation(n) + self.rng.integers(0, 2**40),
            "one key": lambda: np.zeros(n, np.int64),
        }
        for name, draw in cases.items():
            batches = [key(draw()) for _ in range(BATCHES)]
            n_distinct = int(np.mean([len(np.unique(b)) for b in batches]))
            sent = [device.send(b) for b in batches]
            got = run(sent[0])
            ascending, firsts, inverse = np.unique(batches[0], return_index=True, return_inverse=True)
            order = np.argsort(firsts)
            assert (device.fetch(got.keys) == ascending[order]).all()
            assert (device.fetch(got.inverse) == np.argsort(order)[inverse]).all()
            ms = self.device_ms([lambda k=k: self.dedupe_launches(run, k) for k in sent])
            self.note(f"dedupe, {name}", n, ms, self.wall_ms([lambda k=k: run(k) for k in sent]), distinct=n_distinct)
            self.torch_unique(name, batches)

    def dedupe_launches(self, run, keys):
        """The launches of a dedupe without its wait."""
        n, device, tiles = keys.size, self.device, index.TILES * WARP
        cells, firsts, numbers, totals = run._cells, run._firsts, run._numbers, run._totals
        device.launch(dedupe.claim, n, keys, run._table, cells)
        device.launch(dedupe.first_of, tiles, n, run._table, cells, firsts, run._counts, totals)
        device.launch(dedupe.number, tiles, keys, run._table, cells, firsts, totals, numbers, run._keys)
        device.launch(dedupe.spread, min(n, dedupe.SPREADERS), n, firsts, numbers, run._inverse, run._counts)

    def torch_unique(self, name, batches):
        """The peer: sorted distinct keys, inverse and counts."""
        try:
            import torch
        except ImportError:
            return
        sent = [torch.from_numpy(b).cuda() for b in batches]
        took = []
        for _ in range(ROUNDS):
            torch.cuda.synchronize()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for b in sent:
                torch.unique(b, return_inverse=True, return_counts=True)
            end.record()
            torch.cuda.synchronize()
            took.append(begin.elapsed_time(end) / len(sent))
        self.note(f"    torch.unique, {name}", len(batches[0]), float(np.median(took)))

    def steps(self):
        """Dedupe, insert-and-evict, settle of a step of 1.05 M Zipf ids, with room for all and for fewer lines."""
        n, device = IDS, self.device
        run = Dedupe(device, n)
        batches = [device.send(key(zipf(self.rng, n, 10_000_000, 1.05))) for _ in range(2 * BATCHES)]
        for name, n_slots in (("room for all", 1 << LARGE), ("room for 2 batches", 1 << SMALL)):
            x = DeviceIndex(device, n_slots, n)

            def step(keys, x=x):
                self.step += 1
                found = run(keys)
                x.settle(x.insert(found.keys, found.counts, evict=True, add=True).slots, dirty=True)

            for keys in batches:
                step(keys)
            before = x.stats()
            ms = self.wall_ms([lambda k=k: step(k) for k in batches])
            after = x.stats()
            x.validate()
            evicted = (after["n_evicted"] - before["n_evicted"]) / ROUNDS / len(batches)
            self.note(f"step of Zipf ids, {name} (wall)", n, ms, None, n_evicted_a_step=evicted, n_side=after["n_side"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", type=int, default=27, help="log2 of the slots")
    parser.add_argument("--keys", type=int, default=20, help="log2 of the keys a call")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    bench = Bench(args.slots, 1 << args.keys)
    device, n = bench.device, bench.n
    print(f"{cuda.get_current_device().name}; {n} keys a call, {bench.index.n_slots} slots")
    if args.profile:
        bench.fill(1.3)
        run, slots = Dedupe(device, n), device.empty((n,), np.int64)
        there, absent = bench.resident(1)[0], bench.fresh()[0]
        scores = bench.scores(n)
        mixed = device.send(key(zipf(bench.rng, n, 10_000_000, 1.05)))
        for profiled in (False, True):  # compiled first
            if profiled:
                absent = bench.fresh()[0]
                device.sync()
                cuda.profile_start()
            device.launch(index.find, n, bench.index._digests, bench.index._searched, there, slots)
            bench.probe_and_place(there, scores)
            bench.probe_and_place(absent, scores)
            bench.dedupe_launches(run, mixed)
            device.sync()
        cuda.profile_stop()
        return
    print(f"{'':44s} {'device ms':>9s} {'Gkey/s':>7s} {'wall ms':>9s} {'Gkey/s':>7s}")
    bench.copy()
    bench.dedupes()
    bench.steps()
    lines = DeviceLines(device, bench.index.n_slots + 1024, DIM, 1024)
    for load in (0.5, 2.0):
        begin = time.perf_counter()
        held = bench.fill(load)
        print(f"load {load} asked, {held:.3f} held, filled in {time.perf_counter() - begin:.1f} s")
        bench.finds(load, lines)
        bench.inserts_there(load)
        if load == 2.0:
            bench.new_keys(load, lines)
    bench.host()
    print(bench.index.stats())
    if args.json:
        args.json.write_text(json.dumps(bench.figures, indent=1))


if __name__ == "__main__":
    main()
