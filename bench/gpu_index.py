"""Keys a second of the device's index, dedupe and order, beside torch and the card's copy bandwidth.

    python bench/gpu_index.py [--slots 27] [--json FILE]      # all cases; needs a CUDA device
    python bench/gpu_index.py --device cpu                    # on its twin in host memory
    python bench/gpu_index.py --small                         # in seconds, for a test; no figure means anything
    ncu --profile-from-start off ... python bench/gpu_index.py --profile      # each kernel once

1 Mi keys a call, rows of 64 float32, 2^27 slots (32 GiB of rows): the setting of HierarchicalKV's public figures. Load
is keys over slots. Two figures a case: the device's time alone (CUDA events around calls that were queued behind a
kernel that waits, their own waits left out), and the wall clock of a call with its launches and its waits. Keys and
scores are in device memory. Medians of 5 rounds over 8 batches, so that no batch is asked for twice in a row.

Beside the device's time stand the bytes that a call must move and the share of a plain copy's speed that this is. Where
access is random, sectors of 32 bytes count: a bucket's digests (of the first, where the key is there; else of both), an
entry; each input and output counts once.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from hbkit.cuda.batch import Placement, Room, missing
from hbkit.cuda.parts import open_parts

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")
try:
    import torch
except ImportError:  # a peer
    torch = None

ODD = np.int64(-7046029254386353131)  # odd, so that i * ODD are distinct keys
# Bytes a key.
FIND, ABSENT, SETTLE = 8 + 32 + 32 + 8, 8 + 2 * 32 + 8, 8 + 2 * 32
HOLD = FIND + 32 + SETTLE
INSERT = FIND + 32 + 16 + 2 * SETTLE  # with stamp
EVICT = 760 + 2 * SETTLE  # the digests of both buckets, all entries of one


class Sizes(NamedTuple):
    """Of the cases, and how often they run."""

    log_slots: int
    n: int  # keys a call
    dim: int
    n_ids: int  # of a batch that is deduped
    n_often: int  # keys of which the uniform batch is drawn
    log_large: int  # slots of the indexes of whole steps
    log_small: int
    batches: int
    rounds: int
    n_bytes: int  # of a copy


FULL = Sizes(27, 1 << 20, 64, 1_050_000, 350_000, 25, 20, 8, 5, 2**31)
SMALL = Sizes(6, 16, 8, 40, 10, 7, 5, 1, 1, 2**12)


def wait_ms(ms: Any, error: Any) -> None:
    """Keep the stream busy, so that what comes after is queued."""
    for _ in range(ms):
        cuda.nanosleep(1_000_000)


wait_ms.signature = "void(int64, int32[::1])"


@contextmanager
def unwaited(device: Any) -> Iterator[None]:
    """Calls only launch: what they would wait for is 0."""
    device.fetch, device.sync = (lambda array, out=None: np.zeros(array.shape, array.dtype)), (lambda: None)
    try:
        yield
    finally:
        del device.fetch, device.sync


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

    def __init__(self, device, sizes):
        if SIMULATED:  # threads wait for each other at each vote, and would do so for 5 ms
            sys.setswitchinterval(1e-4)
        self.parts, self.sizes, self.n = open_parts(device), sizes, sizes.n
        self.device = self.parts.device
        self.on_device = device != "cpu"
        self.real = self.on_device and not SIMULATED
        self.stream = cuda.external_stream(self.device._stream.handle) if self.real else 0
        self.index = self.parts.index(self.device, 1 << sizes.log_slots, self.n, 1024, False)
        self.rng = np.random.default_rng(0)
        self.filled, self.step = 0, 0
        self.figures = {}
        self.copy_gbs = float("inf")

    def device_ms(self, calls):
        """Median device time of a call without its waits; on the twin, and in the simulator, that of the wall clock."""
        if not self.on_device:
            return self.wall_ms(calls)
        took, stream = [], self.stream
        for _ in range(self.sizes.rounds):
            if self.real:
                self.device.launch(wait_ms, 1, 8 + len(calls))
            begin, end = cuda.event(), cuda.event()
            begin.record(stream)
            with unwaited(self.device):
                ms = self.wall_once(calls)
            end.record(stream)
            self.device.sync()
            took.append(cuda.event_elapsed_time(begin, end) / len(calls) if self.real else ms)
        return float(np.median(took))

    def wall_ms(self, calls):
        """Median wall clock of a call with its waits."""
        return float(np.median([self.wall_once(calls) for _ in range(self.sizes.rounds)]))

    def wall_once(self, calls):
        self.device.sync()
        begin = time.perf_counter()
        for call in calls:
            call()
        self.device.sync()
        return (time.perf_counter() - begin) * 1e3 / len(calls)

    def note(self, name, n, device_ms, wall_ms=None, nbytes=None, **more):
        """Print and keep a case: milliseconds, billions of keys a second, bytes that must move."""
        self.figures[name] = dict(n=n, device_ms=device_ms, wall_ms=wall_ms, nbytes=nbytes, **more)
        wall = f"{wall_ms:9.3f} {n / wall_ms / 1e6:7.2f}" if wall_ms else " " * 17
        moved = f"{nbytes / 1e6:7.0f} {nbytes / device_ms / 1e6 / self.copy_gbs:6.0%}" if nbytes else " " * 14
        print(f"{name:44s} {device_ms:9.3f} {n / device_ms / 1e6:7.2f} {moved} {wall}  {more or ''}", flush=True)

    def send(self, i):
        """Batches of keys in device memory."""
        return [self.device.send(key(part)) for part in i.reshape(-1, self.n)]

    def fill(self, load):
        """Insert new keys up to a load, each batch settled, evicting where buckets are full."""
        goal = int(load * (1 << self.sizes.log_slots))
        while self.filled < goal:
            n = min(self.n, goal - self.filled)
            self.step += 1
            self.insert(self.device.send(key(np.arange(self.filled, self.filled + n))), self.scores(n))
            self.filled += n
        self.device.sync()
        return len(self.index) / (1 << self.sizes.log_slots)

    def scores(self, n):
        return self.device.send(np.full(n, self.step, np.int64))

    def insert(self, keys, scores):
        """As a step does that creates: the rows are pinned, changed and let go."""
        slots = self.index.insert(keys, scores, evict=True).slots
        self.index.stamp(slots, self.step)
        self.index.settle(slots)
        return slots

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
        a, b = (self.device.empty((self.sizes.n_bytes // 4,), np.float32) for _ in range(2))
        ms = self.device_ms([lambda: self.device.write(b, a)])
        self.copy_gbs = self.figures["copy_GBps"] = 2 * self.sizes.n_bytes / ms / 1e6
        print(f"copy {self.copy_gbs:.0f} GB/s read and written")

    def finds(self, load, lines):
        """Slots of keys, and their rows."""
        device, x, n = self.device, self.index, self.n
        rows, slots = device.empty((n, self.sizes.dim), np.float32), device.empty((n,), np.int64)
        batches = self.sizes.batches
        for name, keys, nbytes in (
            ("uniform, all there", self.resident(batches), FIND),
            ("Zipf 1.05", self.resident(batches, 1.05), FIND),
            ("none there", self.send(self.filled * 2 + self.rng.permutation(batches * n)), ABSENT),
        ):
            calls = [lambda k=k: x.find(k, slots) for k in keys]
            self.note(f"find, {name}, load {load}", n, self.device_ms(calls), self.wall_ms(calls), n * nbytes)
            if name != "none there":

                def moved(k):
                    x.find(k, slots)
                    lines.gather(slots, rows)

                ms = self.device_ms([lambda k=k: moved(k) for k in keys])
                self.note(f"find + rows out, {name}, load {load}", n, ms, None, n * (nbytes + 8 * self.sizes.dim))

    def holds(self, load):
        """As a step does whose rows are all resident: every key is found, scored, pinned; and settled."""
        x, n, slots = self.index, self.n, self.device.empty((self.n,), np.int64)
        one = np.array([self.step])

        def hold(keys):
            held = x.hold(keys, one, slots=slots)
            missing(self.device, held)
            x.settle(held.slots)

        calls = [lambda k=k: hold(k) for k in self.resident(self.sizes.batches)]
        self.note(f"hold, all there, load {load}", n, self.device_ms(calls), self.wall_ms(calls), n * HOLD)

    def inserts_there(self, load):
        """Every key is found, scored, pinned; stamped and settled."""
        scores = self.scores(self.n)
        calls = [lambda k=k: self.insert(k, scores) for k in self.resident(self.sizes.batches)]
        self.note(
            f"insert, all there, load {load}", self.n, self.device_ms(calls), self.wall_ms(calls), self.n * INSERT
        )

    def fresh(self):
        """Batches of keys that nobody inserted."""
        out = self.send(np.arange(self.filled, self.filled + self.sizes.batches * self.n))
        self.filled += self.sizes.batches * self.n
        return out

    def new_keys(self, load, lines):
        """All new, once a batch: the rounds take batches of their own."""
        n, x = self.n, self.index
        rows = self.device.empty((n, self.sizes.dim), np.float32)

        def with_rows(keys, scores):
            slots = self.insert(keys, scores)
            if self.on_device:  # every victim's row, dirty or not
                x.dirty_victims(Placement(x._placed, n, 0, 0, 0, n))
                lines.gather(slots, rows)
                lines._scatter(slots, rows, lines._parts(self.sizes.dim))

        evict = "insert-and-evict"
        for name, call, nbytes in (
            (evict, self.insert, EVICT),
            (f"{evict} + victims out + rows in", with_rows, EVICT + 24 + 16 * self.sizes.dim),
        ):
            took, walls, rounds = [], [], self.sizes.rounds
            for _ in range(rounds):
                self.step += 1
                scores = self.scores(n)
                keys = self.fresh()
                took.append(self.once_ms([partial(call, k, scores) for k in keys]))
                keys = self.fresh()
                walls.append(self.wall_once([partial(call, k, scores) for k in keys]))
            self.note(f"{name}, all new, load {load}", n, float(np.median(took)), float(np.median(walls)), n * nbytes)

    def once_ms(self, calls):
        """`device_ms` of calls that are made once."""
        sizes, self.sizes = self.sizes, self.sizes._replace(rounds=1)
        try:
            return self.device_ms(calls)
        finally:
            self.sizes = sizes

    def host(self):
        """Where the host's time goes in calls that find everything, and in dedupes."""
        run, room = self.parts.dedupe(self.device, self.n), Room(self.device, self.n)
        there, scores = self.resident(self.sizes.batches), self.scores(self.n)
        for keys in there:
            run(keys, room)
        profile = cProfile.Profile()
        profile.enable()
        for keys in there * self.sizes.rounds:
            run(keys, room)
            self.insert(keys, scores)
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(16)

    def dedupes(self):
        """1.05 M ids, as in dynamicemb's case (Zipf 1.05, about 350 k distinct), uniform and all distinct."""
        n, device, n_keys = self.sizes.n_ids, self.device, 10 * self.sizes.n_ids
        run, order, room = self.parts.dedupe(device, n), self.parts.order(device, n), Room(device, n)
        cases = {
            "Zipf 1.05": lambda: zipf(self.rng, n, n_keys, 1.05),
            f"uniform of {self.sizes.n_often}": lambda: self.rng.integers(0, self.sizes.n_often, n),
            "all distinct": lambda: self.rng.permutation(n) + self.rng.integers(0, 2**40),
            "one key": lambda: np.zeros(n, np.int64),
        }
        for name, draw in cases.items():
            batches = [key(draw()) for _ in range(self.sizes.batches)]
            sent = [device.send(b) for b in batches]
            got = run(sent[0], room)
            self.check(batches[0], got, order)
            u = int(np.mean([len(np.unique(b)) for b in batches]))
            nbytes = 16 * n + 16 * u
            calls = [lambda k=k: run(k, room) for k in sent]
            self.note(f"dedupe, {name}", n, self.device_ms(calls), self.wall_ms(calls), nbytes, distinct=u)
            got = run(sent[0], room)
            calls = [lambda u=got.n_distinct: order(room, n, u)] * len(sent)
            self.note(f"order, {name}", n, self.device_ms(calls), self.wall_ms(calls), nbytes)
            if torch is not None and self.real and torch.cuda.is_available():
                self.peer("torch.unique", name, batches, lambda b: torch.unique(b, False, True, True))
                inverse = device.fetch(got.inverse)
                self.peer("torch.argsort, stable", name, [inverse], lambda b: torch.argsort(b, stable=True))

    def check(self, keys, got, order):
        """Distinct keys, inverse and order are NumPy's."""
        fetch, room = self.device.fetch, got.room
        ascending, firsts, inverse = np.unique(keys, return_index=True, return_inverse=True)
        by_first = np.argsort(firsts)
        inverse = np.argsort(by_first)[inverse]
        assert np.array_equal(fetch(got.keys), ascending[by_first])
        assert np.array_equal(fetch(got.inverse), inverse)
        order(room, got.n, got.n_distinct)
        assert np.array_equal(fetch(room.order)[: got.n], np.argsort(inverse, kind="stable"))

    def peer(self, peer, name, batches, call):
        """What torch takes: by events, without a kernel before."""
        sent = [torch.from_numpy(b).cuda() for b in batches]
        took = []
        for _ in range(self.sizes.rounds):
            torch.cuda.synchronize()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for b in sent:
                call(b)
            end.record()
            torch.cuda.synchronize()
            took.append(begin.elapsed_time(end) / len(sent))
        self.note(f"    {peer}, {name}", len(batches[0]), float(np.median(took)))

    def steps(self):
        """Dedupe, insert-and-evict, stamp and settle of a step of Zipf ids, with room for all and for fewer lines."""
        n, device = self.sizes.n_ids, self.device
        run, room = self.parts.dedupe(device, n), Room(device, n)
        batches = [device.send(key(zipf(self.rng, n, 10 * n, 1.05))) for _ in range(2 * self.sizes.batches)]
        for name, log_slots in (("room for all", self.sizes.log_large), ("room for 2 batches", self.sizes.log_small)):
            x = self.parts.index(device, 1 << log_slots, n, 1024, False)

            def step(keys, x=x):
                self.step += 1
                found = run(keys, room)
                slots = x.insert(found.keys, found.counts, evict=True, add=True).slots
                x.stamp(slots, self.step)
                x.settle(slots)

            for keys in batches:
                step(keys)
            before = x.stats()
            ms = self.wall_ms([lambda k=k: step(k) for k in batches])
            after = x.stats()
            x.validate()
            evicted = (after["n_evicted"] - before["n_evicted"]) / self.sizes.rounds / len(batches)
            self.note(f"step of Zipf ids, {name} (wall)", n, ms, None, n_evicted_a_step=evicted, n_side=after["n_side"])

    def profile(self):
        """Each kernel once, for a profiler; compiled first."""
        device, n = self.device, self.n
        self.fill(1.3)
        run, order, room = self.parts.dedupe(device, n), self.parts.order(device, n), Room(device, n)
        slots = device.empty((n,), np.int64)
        there, one, scores = self.resident(1)[0], np.array([self.step]), self.scores(n)
        mixed = device.send(key(zipf(self.rng, n, 10 * n, 1.05)))
        for profiled in (False, True):
            absent = self.fresh()[0]
            device.sync()
            if profiled and self.real:
                cuda.profile_start()
            self.index.find(there, slots)
            self.index.settle(self.index.hold(there, one, slots=slots).slots)
            self.insert(there, scores)
            self.insert(absent, scores)
            order(room, n, run(mixed, room).n_distinct)
            device.sync()
        if self.real:
            cuda.profile_stop()


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", type=int, help="log2 of the slots")
    parser.add_argument("--keys", type=int, help="log2 of the keys a call")
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or cpu: the twin")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args(argv)
    sizes = SMALL if args.small else FULL
    sizes = sizes._replace(log_slots=args.slots or sizes.log_slots, n=1 << args.keys if args.keys else sizes.n)
    bench = Bench(args.device, sizes)
    if args.profile:
        bench.profile()
        return
    name = cuda.get_current_device().name if bench.real else "no GPU"
    print(f"{name}; {sizes.n} keys a call, 2^{sizes.log_slots} slots")
    head = f"{'':44s} {'device ms':>9s} {'Gkey/s':>7s} {'MB':>7s} {'copy':>6s} {'wall ms':>9s} {'Gkey/s':>7s}"
    print(f"{head}\n  MB: that must move; copy: of a copy's speed")
    if bench.on_device:
        bench.copy()
    bench.dedupes()
    bench.steps()
    lines = bench.parts.lines(bench.device, (1 << sizes.log_slots) + 1024, sizes.dim, 1024, sizes.dim, "float32")
    for load in (0.5, 2.0):
        begin = time.perf_counter()
        held = bench.fill(load)
        print(f"load {load} asked, {held:.3f} held, filled in {time.perf_counter() - begin:.1f} s")
        bench.finds(load, lines)
        bench.holds(load)
        bench.inserts_there(load)
        if load == 2.0:
            bench.new_keys(load, lines)
    bench.host()
    print(bench.index.stats())
    if args.json:
        args.json.write_text(json.dumps(bench.figures, indent=1))


if __name__ == "__main__":
    main()
