"""Kernels and the device tier on a CUDA device: what each must move, how long it takes, and what a step takes.

``python bench/gpu.py [--report FILE] [--only PART,...] [--device cuda:0] [--small] [--once NAMES]``; `make gpu` runs
the tests before it. ``--device cpu``: ids and tier on the device's twin in host memory, the same code but for its
kernels. ``--small``: every part in seconds, so that a test can run it, in Numba's simulator too.

The workload is that of dynamicemb's published benchmark: 10 tables of dim 128, Adam, 1,048,576 ids a step drawn by a
Zipf law of 1.05, of which about 350,000 are distinct. All tables' lines are one array here, as the bytes are the same.

- launches: microseconds of the host for a launch, a slice, small copies and waits, and for a step of a small batch of
  resident rows, with and without its waits.
- kernels: bytes that a kernel must move (each row that is named once in, once out), milliseconds by events around
  5 launches (the median of 9 rounds), GB/s, and the share of what a plain copy on the same device reaches. What a call
  waits for is left out.
- step: rows out for all ids, gradients summed by key, Adam; checked against the C kernels.
- ids: a step from ids by the parts of the tier alone, all lines in device memory: dedupe, hold, gather for each id,
  order, sums by key and Adam, stamp, settle.
- tier: the same through `device_cached` over `host_memory`, from ids on the device to the update: all lines in device
  memory, then a cache of as many lines as a batch has distinct keys, then 0.8 of it. Ids, rows and gradients stay on
  the device ("tensors"), or come from and go to NumPy.

--once runs each kernel that one of the names begins once, for a profiler.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from hbkit._ext.segment import segment_sum as c_segment_sum
from hbkit._ext.slabs import Slabs
from hbkit.cuda.batch import Room, missing
from hbkit.cuda.parts import open_parts
from hbkit.embedding import Adam, Table
from hbkit.store import device_cached, host_memory
from hbkit.store.device import Summands

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")
try:
    if SIMULATED:
        raise ImportError("its tensors are in no simulated memory")
    import torch
except ImportError:  # a peer, and the owner of tensors; the kernels need none
    torch = None

ALPHA = 1.05


class Sizes(NamedTuple):
    """Of the workload, and how often it runs."""

    n_ids: int
    n_tables: int
    n_keys: int  # a table
    dim: int
    n_lines: int
    n_slots: int  # of an index of all lines
    batches: int
    warm: int  # steps before those that count
    steps: int  # one after the other
    rounds: int
    times: int  # a round
    n_bytes: int  # of a copy


FULL = Sizes(1_048_576, 10, 3_000_000, 128, 2_000_000, 2**22, 5, 5, 20, 9, 5, 2**29)
SMALL = Sizes(80, 3, 40, 4, 128, 128, 2, 0, 1, 1, 1, 2**12)
HYPER = {
    "sgd": (0, [0.1]),
    "adagrad": (1, [0.1, 1e-8]),
    "rowwise_adagrad": (2, [0.1, 1e-8]),
    "adam": (3, [0.01, 0.1, 0.999, 0.001, 0.03, 1e-8, 1.0]),
}
N_STATE = {"sgd": 0, "adagrad": 1, "rowwise_adagrad": 0, "adam": 2}  # of a row's width; row-wise, one float
# Cache; its lines by the distinct keys of a batch; a step of dynamicemb and of FBGEMM on an H100 80 GB, ms, published.
CASES = (("all", None, 2.19, 1.35), ("a batch", 1.0, 12.3, 14.4), ("0.8 of it", 0.8, 24.3, 15.0))


def draw(rng: np.random.Generator, sizes: Sizes) -> np.ndarray:
    """int64[n_ids]: keys of all tables, table by table."""
    weights = np.cumsum(1.0 / np.arange(1, sizes.n_keys + 1) ** ALPHA)
    ids = np.searchsorted(weights / weights[-1], rng.random(sizes.n_ids))
    return ids + (np.arange(sizes.n_ids) * sizes.n_tables // sizes.n_ids << 32)


def group(inverse: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions by segment in batch order, and where each segment starts."""
    starts = np.concatenate([[0], np.cumsum(np.bincount(inverse, minlength=n))])
    return np.argsort(inverse, kind="stable"), starts.astype(np.int64)


def hyper_of(rule: str) -> np.ndarray:
    """Hyper-parameters as the kernels take them."""
    own = HYPER[rule][1]
    return np.array([*own, *[0] * (12 - len(own))], np.float32)


@contextmanager
def unwaited(device: Any) -> Iterator[None]:
    """Calls only launch: what they would wait for is 0."""
    device.fetch, device.sync = (lambda array, out=None: np.zeros(array.shape, array.dtype)), (lambda: None)
    try:
        yield
    finally:
        del device.fetch, device.sync


def numba_and_stream(device: Any) -> tuple[Any, Any]:
    """Numba CUDA, for events, and the stream of a device as its own."""
    from numba import cuda

    return cuda, 0 if SIMULATED else cuda.external_stream(device._stream.handle)


class Bench:
    """A device, the workload on it, and the report."""

    def __init__(self, report: str | None, device: str, sizes: Sizes) -> None:
        if SIMULATED:  # threads wait for each other at each vote, and would do so for 5 ms
            sys.setswitchinterval(1e-4)
        self.parts, self.sizes, self.name = open_parts(device), sizes, device
        self.device = self.parts.device
        self.real = device != "cpu" and not SIMULATED
        self.cuda, self.stream = numba_and_stream(self.device) if device != "cpu" else (None, 0)
        self.text: list[str] = []
        self.report = report
        self.copy_gbs = 0.0
        self.busy = [self.device.empty((sizes.n_bytes,), np.uint8) for _ in range(2)]
        rng = np.random.default_rng(0)
        self.ids = draw(rng, sizes)
        unique, self.inverse = np.unique(self.ids, return_inverse=True)
        self.n_unique = len(unique)
        self.slots = rng.permutation(sizes.n_lines)[: self.n_unique]
        self.order, self.starts = group(self.inverse, self.n_unique)
        self.rng = rng

    def say(self, line: str = "") -> None:
        """A line of the report."""
        print(line, flush=True)
        self.text.append(line)
        if self.report:
            with open(self.report, "w") as f:
                f.write("\n".join(self.text) + "\n")

    def give(self, array: np.ndarray) -> Any:
        """A copy in device memory: a tensor where PyTorch is at hand, and can be there."""
        if torch is None or (self.real and not torch.cuda.is_available()):
            return self.device.send(array)
        return torch.tensor(array, device="cuda" if self.real else "cpu")

    def wait(self) -> None:
        """Until the device is idle."""
        if self.real:
            self.device._stream.synchronize()

    def ms(self, run: Callable[[], Any]) -> tuple[float, float]:
        """Median milliseconds of a call on the device, and of the host until it returns.

        By events around some calls. The device is given copies to do before, so that the host is ahead of it. In the
        simulator both are the host's.
        """
        far, near, stream = [], [], self.stream
        for i in range(self.sizes.rounds + 1):
            a, b = self.cuda.event(), self.cuda.event()
            for _ in range(16 if self.real else 0):
                self.device.write(*self.busy)
            a.record(stream)
            begin = time.perf_counter()
            with unwaited(self.device):
                for _ in range(self.sizes.times):
                    run()
            end = time.perf_counter()
            b.record(stream)
            b.synchronize()
            if i:
                near.append((end - begin) / self.sizes.times * 1e3)
                far.append(self.cuda.event_elapsed_time(a, b) / self.sizes.times if self.real else near[-1])
        self.device.sync()
        return statistics.median(far), statistics.median(near)

    def machine(self) -> None:
        """The device, the versions, and the speed of plain copies."""
        name = "the twin in host memory" if self.name == "cpu" else "Numba's simulator"
        if self.real:
            gpu, driver = self.cuda.get_current_device(), self.cuda.cudadrv.driver.driver.get_version()
            name = gpu.name.decode() if isinstance(gpu.name, bytes) else gpu.name
            name += f", {gpu.MULTIPROCESSOR_COUNT} multiprocessors, CUDA driver {driver}"
        self.say(f"Measured on: {name}")
        versions = [f"{p} {importlib.metadata.version(p)}" for p in ("numba-cuda", "numpy")]
        self.say(f"{', '.join(versions)}, Python {platform.python_version()}")
        self.say(f"command: python bench/gpu.py {' '.join(sys.argv[1:])}")
        if self.cuda is not None:
            self.copies()
        most = np.diff(self.starts).max()
        self.say(f"workload: {self.sizes.n_ids:,} ids, {self.n_unique:,} distinct, the most frequent {most:,} times")
        self.say()

    def copies(self) -> None:
        """The speed of plain copies."""
        n, (a, b), copy = self.sizes.n_bytes, self.busy, self.device._stream.copy
        self.copy_gbs = 2 * n / self.ms(lambda: copy(b, a))[0] / 1e6
        pinned = self.device.pinned(n // 4)
        pinned[:] = 1
        part = a[: n // 4]
        up, down = self.ms(lambda: copy(part, pinned))[0], self.ms(lambda: copy(pinned, part))[0]
        self.say(
            f"copies: {self.copy_gbs:,.0f} GB/s on the device (read and written), "
            f"{n / 4 / up / 1e6:.1f} GB/s from pinned memory, {n / 4 / down / 1e6:.1f} GB/s to it"
        )

    # --- the host's part --------------------------------------------------------------------------------------

    def launches(self) -> None:
        """What the host does, in microseconds: medians of rounds, after each of which the device comes to an end."""
        from hbkit.cuda.buckets import settle, stamp
        from hbkit.cuda.rows import GATHER
        from hbkit.cuda.rules import N_HYPER, RULES

        device, send, n, dim = self.device, self.device.send, 256, 16
        none, numbers = device.none(np.int64), np.full(n, -1)  # of no line
        ints, pairs, rows = send(numbers), send(np.zeros((n, 2), np.int64)), send(np.zeros((n, dim), np.float32))
        lines, scale, hyper = (send(np.zeros(shape, np.float32)) for shape in ((n, 3 * dim), (n,), (1, N_HYPER)))
        gather, adam, fours = GATHER["float32", True], RULES["adam", "float32", True], (0, 0, dim, 2)
        sums = rows, ints, scale, ints, ints, rows, ints, hyper
        self.say("| call | of the host, µs |")
        self.say("| --- | ---: |")
        for name, call in (
            ("launch of 2 arrays (settle)", lambda: device.launch(settle, n, pairs, ints)),
            ("launch of 4 arrays and a number (stamp)", lambda: device.launch(stamp, n, pairs, ints, ints, ints, 1)),
            (
                "launch of 4 arrays and 4 numbers (gather)",
                lambda: device.launch(gather, n, lines, ints, none, rows, *fours),
            ),
            (
                "launch of 11 arrays and 6 numbers (Adam, sums on the way)",
                lambda: device.launch(adam, n, lines, lines, ints, *sums, 1, 1, *fours),
            ),
            ("slice", lambda: ints[1:9]),
            ("2 KB there", lambda: device.write(ints, numbers)),
            ("2 KB there, into new memory", lambda: send(numbers)),
            ("8 bytes here, with the wait", lambda: device.fetch(ints[:1])),
            ("wait for nothing", device.sync),
        ):
            self.say(f"| {name} | {self.us(call):.2f} |")
        for over in ("the device", "the host"):
            whole, own = self.us_of_step(over == "the device")
            self.say(
                f"| a step of {self.small_ids} ids on {over}, rows resident | {whole:.0f}, {own:.0f} but for waits |"
            )
        self.say()

    def us(self, call: Callable[[], Any]) -> float:
        """Median microseconds of a call, without what it leaves to the device."""
        took, times = [], 3 if self.sizes == SMALL else 100  # fewer than a device takes before it lets the host wait
        for _ in range(10):
            begin = time.perf_counter()
            for _ in range(times):
                call()
            took.append((time.perf_counter() - begin) / times * 1e6)
            self.device.sync()
        return statistics.median(took[1:])

    def us_of_step(self, there: bool) -> tuple[float, float]:
        """Median microseconds of a step through a store's calls, and the same without what the host waits for."""
        n, dim = self.small_ids, 16
        table = Table("t", dim, optimizer=Adam(), store=device_cached(host_memory(), "1MiB", self.name))
        store, ids = table.store, self.rng.integers(0, n, n)
        lease = store.reserve_batch(ids)
        store.create(lease, 1)
        store.release(lease)
        memory, hyper, waited = store.memory, table.optimizer.hyper(2), 0.0
        out, grads = memory.empty((n, dim), np.float32), Summands(memory.send(np.ones((n, dim), np.float32)))
        over, fetch, took = memory.send(ids) if there else ids, memory.fetch, []

        def timed(*args: Any) -> Any:
            nonlocal waited
            begin = time.perf_counter()
            found = fetch(*args)
            waited += time.perf_counter() - begin
            return found

        memory.fetch = timed
        for i in range(self.sizes.warm + self.sizes.steps):
            memory.sync()
            begin, waited = time.perf_counter(), 0.0
            lease = store.reserve_batch(over)
            store.wait(lease)
            store.create(lease, i)
            store.gather(lease, out, lease.inverse)
            store.apply(lease, grads, table.optimizer, hyper, i)
            store.release(lease)
            whole = time.perf_counter() - begin
            took.append((1e6 * whole, 1e6 * (whole - waited)))
        table.close()
        whole, own = (statistics.median(part) for part in zip(*took, strict=True))
        return whole, own

    @property
    def small_ids(self) -> int:
        """Ids of a small batch."""
        return min(1024, self.sizes.n_ids)

    # --- kernels ----------------------------------------------------------------------------------------------

    def width(self, rule: str) -> int:
        """Floats of a line."""
        return self.sizes.dim * (1 + N_STATE[rule]) + (rule == "rowwise_adagrad")

    def lines(self, rule: str, dtype: str = "float32", n_lines: int | None = None) -> Any:
        """Lines of a table, with numbers in them."""
        n_lines, width = n_lines or self.sizes.n_lines, self.width(rule)
        lines = self.parts.lines(self.device, n_lines, width, 4096, self.sizes.dim, dtype)
        for first in range(0, n_lines, 4096):
            at = np.arange(first, min(first + 4096, n_lines))
            lines.scatter(at, np.full((len(at), width), 0.01, np.float32))
        return lines

    def cases(self) -> Any:
        """(name, bytes that must move, call) of each kernel; one table's lines are in memory at a time."""
        yield from self.cases_of_keys()
        from hbkit.cuda import wire
        from hbkit.cuda.device import COOPERATING
        from hbkit.cuda.rows import padded

        send, empty, rng, u, n, dim = (
            self.device.send, self.device.empty, self.rng, self.n_unique, self.sizes.n_ids, self.sizes.dim,
        )  # fmt: skip
        row = 4 * dim
        slots, index, order, starts = (send(a) for a in (self.slots, self.inverse, self.order, self.starts))
        values, sums = (send(rng.standard_normal((k, dim), np.float32)) for k in (n, u))
        each_id, each_key = empty((n, dim), np.float32), empty((u, dim), np.float32)
        splits, pooled = send(np.arange(0, n + 1, 8)), empty((n // 8, dim), np.float32)
        for dtype, item in (("float32", 4), ("bfloat16", 2)):
            lines, held = self.lines("sgd", dtype), u * (8 + item * dim)
            yield f"gather {dtype}, each key", held + u * row, partial(lines.gather, slots, each_key)
            yield f"gather {dtype}, each id", held + n * (8 + row), partial(lines.gather, slots, each_id, index)
            pool = partial(lines.pool, slots, index, splits, pooled)
            yield f"pool {dtype}, lists of 8", held + n * 8 + n // 8 * (8 + row), pool
        for rule, dtype, item in (
            ("sgd", "float32", 4),
            ("adagrad", "float32", 4),
            ("rowwise_adagrad", "float32", 4),
            ("adam", "float32", 4),
            ("adam", "bfloat16", 2),
            ("adam", "float16", 2),
        ):
            lines, after = self.lines(rule, dtype), (hyper_of(rule), slots, 1, 1)
            code, line = HYPER[rule][0], u * (8 + 2 * (item * dim + 4 * (self.width(rule) - dim)))
            yield (f"{rule} {dtype}", line + u * row, partial(lines.apply, code, slots, sums, *after))
            if dtype == "float32":
                if rule == "adam":
                    only = partial(lines.sums, values, order, starts, each_key)
                    yield "segment sums", n * (8 + row) + u * (8 + row), only
                summed = partial(lines.apply_segments, code, slots, values, order, starts, *after)
                yield (f"{rule} {dtype}, sums on the way", line + n * (8 + row) + u * 8, summed)
                del summed
        q, scales = empty((u, dim), np.int8), empty((u,), np.uint16)
        yield (
            "quantize",
            u * (row + dim + 2),
            lambda: self.device.launch(wire.QUANTIZE[True], u * COOPERATING, sums, q, scales),
        )
        yield (
            "dequantize",
            u * (row + dim + 2),
            lambda: self.device.launch(wire.DEQUANTIZE[True], u * COOPERATING, q, scales, each_key),
        )
        out = empty((n // 8, 16), np.int64)
        yield "padded, lists of 8 to 16", n // 8 * (8 + 128), lambda: self.device.launch(padded, n * 2, splits, 1, out)

    def cases_of_keys(self) -> Any:
        """The same of what a step from ids does before and after its rows move.

        Where a key or slot is looked up, sectors of 32 bytes count: of a bucket's digests, of an entry, of metadata.
        """
        n, u, device = self.sizes.n_ids, self.n_unique, self.device
        ids, room = device.send(self.ids), Room(device, n)
        dedupe, order = self.parts.dedupe(device, n), self.parts.order(device, n)
        index = self.parts.index(device, self.sizes.n_slots, u, 1024)
        dedupe(ids, room)
        keys, counts, one = room.keys[:u], room.counts[:u], np.ones(1, np.int64)
        slots = device.empty((u,), np.int64)
        index.settle(index.insert(keys, one).slots)

        def hold() -> None:
            missing(device, index.hold(keys, counts, add=True, slots=slots))
            index.settle(slots)

        def insert() -> None:
            index.insert(keys, counts, add=True)
            index.settle(slots)

        pin = 8 + 32 + 2 * 32 + 8  # key, digests, entry in and out, score
        settle = 8 + 2 * 32
        yield "dedupe", 16 * n + 16 * u, partial(dedupe, ids, room)
        yield "order", 16 * n + 16 * u, partial(order, room, n, u)
        yield "hold, all there; settle", u * (pin + 8 + settle), hold
        yield "insert, all there; settle", u * (pin + 16 + settle), insert
        yield "stamp", u * (8 + 2 * 32 + 2 * 32 + 8), partial(index.stamp, slots, 1, counts)

    def kernels(self) -> None:
        """The table of kernels."""
        self.say("| kernel | must move, MB | ms | GB/s | of a copy's speed | host, ms |")
        self.say("| --- | ---: | ---: | ---: | ---: | ---: |")
        for name, nbytes, run in self.cases():
            took, host = self.ms(run)
            gbs = nbytes / took / 1e6
            self.say(
                f"| {name} | {nbytes / 1e6:,.0f} | {took:.3f} | {gbs:,.0f} | {gbs / self.copy_gbs:.0%} | {host:.3f} |"
            )
        self.say()
        self.peers()

    def peers(self) -> None:
        """What PyTorch's own operations take for the same rows."""
        if torch is None or not (self.real and torch.cuda.is_available()):
            return
        n, dim = self.sizes.n_ids, self.sizes.dim
        table = torch.full((self.sizes.n_lines, dim), 0.01, device="cuda")
        slots, inverse = (torch.as_tensor(a, device="cuda") for a in (self.slots, self.inverse))
        index, grads = slots[inverse], torch.randn(n, dim, device="cuda")
        bags = torch.arange(0, n, 8, device="cuda")
        sums = torch.zeros(self.n_unique, dim, device="cuda")
        self.say("| PyTorch, the same rows | ms |")
        self.say("| --- | ---: |")
        for name, run in (
            ("index_select, each key", lambda: torch.index_select(table, 0, slots)),
            ("index_select, each id", lambda: torch.index_select(table, 0, index)),
            ("embedding_bag, lists of 8", lambda: torch.nn.functional.embedding_bag(index, table, bags, mode="sum")),
            ("index_add_ of gradients (atomic: no order)", lambda: sums.index_add_(0, inverse, grads)),
            ("argsort(stable) of the ids' numbers", lambda: torch.argsort(inverse, stable=True)),
            ("unique(return_inverse) of the ids", lambda: torch.unique(index, return_inverse=True)),
        ):
            self.say(f"| {name} | {torch_ms(run):.3f} |")
        self.say()

    def once(self, name: str) -> None:
        """Run the kernels that a name of `name` begins once each, for a profiler."""
        for case, _, run in self.cases():
            if case.startswith(tuple(name.split(","))):
                run()
                self.device.sync()
                if self.real:
                    self.cuda.profile_start()
                run()
                self.device.sync()
                if self.real:
                    self.cuda.profile_stop()

    # --- one step ---------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Rows out, gradients summed and applied, with all lines in device memory; checked against the C kernels."""
        send, u, n, width = self.device.send, self.n_unique, self.sizes.n_ids, self.width("adam")
        lines, code, hyper = self.lines("adam"), HYPER["adam"][0], hyper_of("adam")
        slots, index, order, starts = (send(a) for a in (self.slots, self.inverse, self.order, self.starts))
        grads = self.rng.standard_normal((n, self.sizes.dim), np.float32)
        values, out = send(grads), self.device.empty((n, self.sizes.dim), np.float32)

        start = self.rng.random((u, width), np.float32)
        slabs, at = Slabs(width), np.arange(u)
        slabs.reserve(u)
        slabs.scatter(at, start)
        lines.scatter(self.slots, start)
        slabs.apply(code, at, c_segment_sum(grads, self.inverse, u), hyper)
        lines.apply_segments(code, slots, values, order, starts, hyper)
        want, found = np.empty_like(start), np.empty_like(start)
        slabs.gather(at, want)
        lines.gather(self.slots, found)
        same = np.array_equal(want.view(np.uint32), found.view(np.uint32))
        self.say(f"Adam of {u:,} lines by {n:,} gradients equals the C kernels bit for bit: {same}")
        assert same

        def both() -> None:
            lines.gather(slots, out, index)
            lines.apply_segments(code, slots, values, order, starts, hyper)

        took, host = self.ms(both)
        self.say(
            "one step of rows, all in device memory (gather for each id, sums by key, Adam): "
            f"{took:.3f} ms on the device, {host:.3f} ms of the host"
        )
        self.say()

    def batches(self) -> list[np.ndarray]:
        """Ids of steps that differ."""
        return [self.ids] + [draw(self.rng, self.sizes) for _ in range(self.sizes.batches - 1)]

    def steps(self, step: Callable[[int], Any]) -> tuple[float, float]:
        """Milliseconds of a step one after the other, by the wall clock, and by the clock of the thread that asks."""
        n = self.sizes.steps
        self.wait()
        begin, own = time.perf_counter(), time.thread_time()
        for i in range(n):
            step(i)
        own = time.thread_time() - own
        self.wait()
        return (time.perf_counter() - begin) / n * 1e3, own / n * 1e3

    def ids_(self) -> None:
        """A step from ids, by the parts of the tier, all lines in device memory."""
        device, n, dim = self.device, self.sizes.n_ids, self.sizes.dim
        batches, n_side, one = self.batches(), 1024, np.ones(1, np.int64)
        index = self.parts.index(device, self.sizes.n_slots, n, n_side)
        for ids in batches:
            index.settle(index.insert(np.unique(ids), one).slots)
        lines = self.lines("adam", n_lines=self.sizes.n_slots + n_side)
        dedupe, order, room = self.parts.dedupe(device, n), self.parts.order(device, n), Room(device, n)
        code, hyper = HYPER["adam"][0], hyper_of("adam")
        here = [device.array(self.give(ids)) for ids in batches]
        values = device.array(self.give(self.rng.standard_normal((n, dim), np.float32)))
        out = device.array(self.give(np.zeros((n, dim), np.float32)))

        def step(i: int) -> None:
            dedupe.begin(here[i % len(here)], room)
            held = index.hold(room.keys, one, room.counts, slots=room.slots, found=room.found, listed=room.listed)
            u = missing(device, held).n_keys
            slots, keys = room.slots[:u], room.keys[:u]
            lines.gather(slots, out, room.inverse)
            order(room, n, u)
            lines.apply_segments(code, slots, values, room.order, room.starts[: u + 1], hyper, keys, 1, i)
            index.stamp(slots, i, room.counts[:u])
            index.settle(slots)

        took = []
        for i in range(self.sizes.warm + self.sizes.rounds):
            self.wait()
            begin = time.perf_counter()
            step(i)
            self.wait()
            took.append(1e3 * (time.perf_counter() - begin))
        alone = statistics.median(took[self.sizes.warm :])
        steady, host = self.steps(step)
        device.sync()
        self.say(
            "one step from ids (dedupe, hold, gather for each id, order, sums by key and Adam, stamp, settle), by the "
            f"wall clock: {alone:.3f} ms alone, {steady:.3f} ms one after the other, of which "
            f"{host:.3f} ms of the host's thread"
        )
        self.say()

    # --- the tier ---------------------------------------------------------------------------------------------

    def tier(self) -> None:
        """A step through the store's calls, for batches that differ; beside what others published for the same."""
        batches = self.batches()
        n_distinct, n_all = max(len(np.unique(ids)) for ids in batches), len(np.unique(np.concatenate(batches)))
        grads = self.rng.standard_normal((self.sizes.n_ids, self.sizes.dim), np.float32)
        self.say(
            "| cache | lines, of distinct ids of a batch | ids, rows, gradients | rows made resident, ms "
            "| rows out, ms | update, ms | a step alone, ms | one after the other, ms | host's thread, ms | hit rate "
            "| dynamicemb, ms | FBGEMM, ms |"
        )
        self.say("| --- | ---: | --- |" + " ---: |" * 9)
        for cache, share, *public in CASES:
            budget = self.budget(2 * n_all if share is None else int(share * n_distinct))
            for tensors in (True, False) if share is None else (True,):
                table = Table(
                    "t",
                    self.sizes.dim,
                    optimizer=Adam(),
                    store=device_cached(host_memory(), budget, self.name),
                    metadata=False,
                )
                n_lines, *figures, hit_rate = self.table(table, batches, grads, tensors)
                table.close()
                self.say(
                    f"| {cache} | {n_lines / n_distinct:.2f} | {'tensors' if tensors else 'NumPy'} | "
                    + " | ".join(f"{ms:.2f}" for ms in figures)
                    + f" | {hit_rate:.0%} | {public[0]} | {public[1]} |"
                )
        self.say()
        self.say(
            "Rows made resident: the batch deduped, its rows found or brought, and pinned. Each of the first four "
            "figures ends with a wait. The public figures are those of their authors' machine, an H100 80 GB."
        )

    def budget(self, n_lines: int) -> int:
        """Bytes with which a store's cache has so many lines, beside its index and buffers."""
        width, dim, n_slots = self.width("adam"), self.sizes.dim, max(32, n_lines // 32 * 32)
        n_side = min(n_slots // 32, 1024)

        def nbytes(batch: int) -> int:
            lines: int = self.parts.lines.nbytes_of(n_slots + n_side, width, batch, dim, "float32")
            return lines + int(self.parts.index.nbytes_of(n_slots, batch, n_side, False))

        batch = 1  # lines of a buffer: the store's are of 16 MiB, or a quarter of the budget
        for _ in range(40):
            batch = max(1, min(2**24 // (4 * width), nbytes(batch) // 4 // (nbytes(2) - nbytes(1))))
        return nbytes(batch)

    def table(self, table: Any, batches: list[np.ndarray], grads: np.ndarray, tensors: bool) -> tuple[float, ...]:
        """Lines of the cache, milliseconds of a step's parts and of a step, and the hit rate."""
        store = table.store
        for i, ids in enumerate(batches):  # all rows exist before
            lease = store.reserve_batch(ids)
            store.create(lease, i)
            store.release(lease)
        out = np.empty_like(grads)
        here = batches
        if tensors:
            grads, out, *here = (self.give(a) for a in (grads, out, *batches))

        def step(i: int, wait: Callable[[], None] = lambda: None) -> list[float]:
            hyper, times = table.optimizer.hyper(i + 1), [time.perf_counter()]
            lease = store.reserve_batch(here[i % len(here)])
            store.fetch(lease)
            wait()
            times.append(time.perf_counter())
            inverse = lease.inverse if tensors else store.memory.fetch(lease.inverse)
            store.gather(lease, out, inverse)
            wait()
            times.append(time.perf_counter())
            given = Summands(grads) if tensors else c_segment_sum(grads, inverse, lease.n_keys)
            store.apply(lease, given, table.optimizer, hyper, i + 1)
            wait()
            times.append(time.perf_counter())
            store.release(lease)
            return [1e3 * (b - a) for a, b in pairwise(times)]

        before = store.stats()
        took = [step(i, self.wait) for i in range(self.sizes.warm + self.sizes.rounds)]
        medians = [statistics.median(part) for part in zip(*took[self.sizes.warm :], strict=True)]
        steady = self.steps(step)
        after = store.stats()
        hits, misses = (after[k] - before[k] for k in ("hits", "misses"))
        return after["cache_lines"], *medians, sum(medians), *steady, hits / (hits + misses)


def torch_ms(run: Callable[[], Any], rounds: int = 9, times: int = 5) -> float:
    """`Bench.ms` on PyTorch's stream."""
    took = []
    for i in range(rounds + 1):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record()
        for _ in range(times):
            run()
        b.record()
        b.synchronize()
        if i:
            took.append(a.elapsed_time(b) / times)
    return statistics.median(took)


def main(argv: list[str] | None = None) -> None:
    """Run the parts that are asked for."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--report", help="also write what is printed to this file")
    ap.add_argument("--only", help="of launches, kernels, step, ids, tier")
    ap.add_argument("--device", default="cuda:0", help="cuda:N, or cpu: ids and tier on the twin")
    ap.add_argument("--small", action="store_true", help="seconds instead of minutes; no figure means anything")
    ap.add_argument("--once", help="run kernels of these names once, for a profiler")
    a = ap.parse_args(argv)
    bench = Bench(a.report, a.device, SMALL if a.small else FULL)
    if a.once:
        bench.once(a.once)
        return
    bench.machine()
    parts = {
        "launches": bench.launches,
        "kernels": bench.kernels,
        "step": bench.step,
        "ids": bench.ids_,
        "tier": bench.tier,
    }
    for part in (a.only or ("ids,tier" if a.device == "cpu" else ",".join(parts))).split(","):
        parts[part]()


if __name__ == "__main__":
    main()
