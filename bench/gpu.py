"""Kernels and the device tier on a CUDA device: what each must move, how long it takes, and what a step takes.

``python bench/gpu.py [--report FILE] [--only kernels,step,tier] [--once NAMES]``; `make gpu` runs the tests before it.

The workload is that of dynamicemb's published benchmark: 10 tables of dim 128, Adam, 1,048,576 ids a step drawn by a
Zipf law of 1.05, of which about 350,000 are distinct. All tables' lines are one array here, as the bytes are the same.

- kernels: bytes that a kernel must move (each row that is named once in, once out), milliseconds by events around
  5 launches (the median of 9 rounds), GB/s, and the share of what a plain copy on the same device reaches.
- step: rows out for all ids, gradients summed by key, Adam. Deduping and looking up keys are other kernels.
- tier: `device_cached` over `host_memory` through the store's calls, the index and the policy on the host; all lines in
  device memory, then a cache of one batch's lines, then 0.8 of it. Rows and gradients stay on the device where PyTorch
  is at hand ("tensors"), or come from and go to NumPy.

--once runs each kernel that one of the names begins once, for a profiler.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from hbkit._ext.segment import segment_sum as c_segment_sum
from hbkit._ext.slabs import Slabs
from hbkit.cuda import wire
from hbkit.cuda.dedupe import Dedupe
from hbkit.cuda.device import COOPERATING, Device, simulated
from hbkit.cuda.index import DeviceIndex
from hbkit.cuda.lines import DeviceLines, sum_segments
from hbkit.cuda.rows import padded
from hbkit.embedding import Adam, Table
from hbkit.store import device_cached, host_memory

try:
    import torch
except ImportError:  # a peer, and the owner of tensors; the kernels need none
    torch = None

N_IDS, N_TABLES, N_KEYS, DIM, ALPHA = 1_048_576, 10, 3_000_000, 128, 1.05
N_LINES = 2_000_000
HYPER = {
    "sgd": (0, [0.1]),
    "adagrad": (1, [0.1, 1e-8]),
    "rowwise_adagrad": (2, [0.1, 1e-8]),
    "adam": (3, [0.01, 0.1, 0.999, 0.001, 0.03, 1e-8, 1.0]),
}
N_STATE = {"sgd": 0, "adagrad": DIM, "rowwise_adagrad": 1, "adam": 2 * DIM}
PEERS = """| public figures, H100 80 GB, same workload | dynamicemb | FBGEMM |
| --- | --- | --- |
| all in device memory | 2.19 ms | 1.35 ms |
| a cache of the batch's footprint | 12.3 ms | 14.4 ms |
| 0.8 of it | 24.3 ms | 15.0 ms |
"""


def draw(rng: np.random.Generator) -> np.ndarray:
    """int64[N_IDS]: keys of all tables, table by table."""
    weights = np.cumsum(1.0 / np.arange(1, N_KEYS + 1) ** ALPHA)
    ids = np.searchsorted(weights / weights[-1], rng.random(N_IDS))
    return ids + (np.arange(N_IDS) * N_TABLES // N_IDS << 32)


def group(inverse: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions by segment in batch order, and where each segment starts."""
    starts = np.concatenate([[0], np.cumsum(np.bincount(inverse, minlength=n))])
    return np.argsort(inverse, kind="stable"), starts.astype(np.int64)


def hyper_of(rule: str) -> np.ndarray:
    """Hyper-parameters as the kernels take them."""
    own = HYPER[rule][1]
    return np.array([*own, *[0] * (12 - len(own))], np.float32)


class Bench:
    """A device, the workload on it, and the report."""

    def __init__(self, report: str | None) -> None:
        self.device = Device()
        self.cuda = self.device._cuda
        self.text: list[str] = []
        self.report = report
        self.copy_gbs = 0.0
        self.busy = [self.device.empty((2**29,), np.uint8) for _ in range(2)]
        rng = np.random.default_rng(0)
        self.ids = draw(rng)
        unique, self.inverse = np.unique(self.ids, return_inverse=True)
        self.n_unique = len(unique)
        self.slots = rng.permutation(N_LINES)[: self.n_unique]
        self.order, self.starts = group(self.inverse, self.n_unique)
        self.rng = rng

    def say(self, line: str = "") -> None:
        """A line of the report."""
        print(line, flush=True)
        self.text.append(line)
        if self.report:
            with open(self.report, "w") as f:
                f.write("\n".join(self.text) + "\n")

    def ms(self, run: Callable[[], Any], rounds: int = 9, times: int = 5) -> tuple[float, float]:
        """Median milliseconds of a call on the device, and of the host until it returns.

        By events around `times` calls. The device is given copies to do before, so that the host is ahead of it.
        """
        far, near = [], []
        for i in range(rounds + 1):
            a, b = self.cuda.event(), self.cuda.event()
            for _ in range(16):
                self.busy[0].copy_to_device(self.busy[1], stream=self.device._stream)
            a.record(self.device._stream)
            begin = time.perf_counter()
            for _ in range(times):
                run()
            end = time.perf_counter()
            b.record(self.device._stream)
            b.synchronize()
            if i:
                far.append(self.cuda.event_elapsed_time(a, b) / times)
                near.append((end - begin) / times * 1e3)
        self.device.sync()
        return statistics.median(far), statistics.median(near)

    def machine(self) -> None:
        """The device, the versions, and the speed of plain copies."""
        gpu, driver = self.cuda.get_current_device(), self.cuda.cudadrv.driver.driver.get_version()
        name = gpu.name.decode() if isinstance(gpu.name, bytes) else gpu.name
        self.say(f"Measured on: {name}, {gpu.MULTIPROCESSOR_COUNT} multiprocessors, CUDA driver {driver}")
        self.say(f"numba-cuda {importlib.metadata.version('numba-cuda')}, Python {platform.python_version()}")
        self.say(f"command: python bench/gpu.py {' '.join(sys.argv[1:])}")
        n, (a, b) = 2**29, self.busy
        took = self.ms(lambda: b.copy_to_device(a, stream=self.device._stream))[0]
        self.copy_gbs = 2 * n / took / 1e6
        pinned = self.device.pinned(n // 4)
        pinned[:] = 1
        part = a[: n // 4]
        up = self.ms(lambda: part.copy_to_device(pinned, stream=self.device._stream), 5, 2)[0]
        down = self.ms(lambda: part.copy_to_host(pinned, stream=self.device._stream), 5, 2)[0]
        self.say(
            f"copies: {self.copy_gbs:,.0f} GB/s on the device (read and written), "
            f"{n / 4 / up / 1e6:.1f} GB/s from pinned memory, {n / 4 / down / 1e6:.1f} GB/s to it"
        )
        most = np.diff(self.starts).max()
        self.say(f"workload: {N_IDS:,} ids, {self.n_unique:,} distinct, the most frequent {most:,} times")
        self.say()

    # --- kernels ----------------------------------------------------------------------------------------------

    def lines(self, rule: str, dtype: str = "float32") -> DeviceLines:
        """Lines of a table, with numbers in them."""
        lines = DeviceLines(self.device, N_LINES, DIM + N_STATE[rule], 4096, DIM, dtype)
        if not simulated():
            with self.device._current():
                self.cuda.cudadrv.driver.device_memset(lines.lines, 0x3C, lines.nbytes)  # 0.0115 of float32, bfloat16
        return lines

    def cases(self) -> Any:
        """(name, bytes that must move, call) of each kernel; one table's lines are in memory at a time."""
        send, empty, rng, u, n, row = self.device.send, self.device.empty, self.rng, self.n_unique, N_IDS, 4 * DIM
        slots, index, order, starts = (send(a) for a in (self.slots, self.inverse, self.order, self.starts))
        values, sums = (send(rng.standard_normal((k, DIM), np.float32)) for k in (n, u))
        each_id, each_key = empty((n, DIM), np.float32), empty((u, DIM), np.float32)
        splits, pooled = send(np.arange(0, n + 1, 8)), empty((n // 8, DIM), np.float32)
        for dtype, item in (("float32", 4), ("bfloat16", 2)):
            lines, held = self.lines("sgd", dtype), u * (8 + item * DIM)
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
            code, line = HYPER[rule][0], u * (8 + 2 * (item * DIM + 4 * N_STATE[rule]))
            yield (f"{rule} {dtype}", line + u * row, partial(lines.apply, code, slots, sums, *after))
            if dtype == "float32":
                if rule == "adam":
                    only = partial(sum_segments, self.device, values, order, starts, each_key)
                    yield "segment sums", n * (8 + row) + u * (8 + row), only
                summed = partial(lines.apply_segments, code, slots, values, order, starts, *after)
                yield (f"{rule} {dtype}, sums on the way", line + n * (8 + row) + u * 8, summed)
                del summed
        q, scales = empty((u, DIM), np.int8), empty((u,), np.uint16)
        yield (
            "quantize",
            u * (row + DIM + 2),
            lambda: self.device.launch(wire.QUANTIZE[True], u * COOPERATING, sums, q, scales),
        )
        yield (
            "dequantize",
            u * (row + DIM + 2),
            lambda: self.device.launch(wire.DEQUANTIZE[True], u * COOPERATING, q, scales, each_key),
        )
        out = empty((n // 8, 16), np.int64)
        yield "padded, lists of 8 to 16", n // 8 * (8 + 128), lambda: self.device.launch(padded, n * 2, splits, 1, out)

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
        if torch is None:
            return
        table = torch.full((N_LINES, DIM), 0.01, device="cuda")
        slots, inverse = (torch.as_tensor(a, device="cuda") for a in (self.slots, self.inverse))
        index, grads = slots[inverse], torch.randn(N_IDS, DIM, device="cuda")
        bags = torch.arange(0, N_IDS, 8, device="cuda")
        sums = torch.zeros(self.n_unique, DIM, device="cuda")
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
                self.cuda.profile_start()
                run()
                self.device.sync()
                self.cuda.profile_stop()

    # --- one step ---------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Rows out, gradients summed and applied, with all lines in device memory; checked against the C kernels."""
        send, u = self.device.send, self.n_unique
        lines, code, hyper = self.lines("adam"), HYPER["adam"][0], hyper_of("adam")
        slots, index, order, starts = (send(a) for a in (self.slots, self.inverse, self.order, self.starts))
        grads = self.rng.standard_normal((N_IDS, DIM), np.float32)
        values, out = send(grads), self.device.empty((N_IDS, DIM), np.float32)

        start = self.rng.random((u, 3 * DIM), np.float32)
        slabs, at = Slabs(3 * DIM), np.arange(u)
        slabs.reserve(u)
        slabs.scatter(at, start)
        lines.scatter(self.slots, start)
        slabs.apply(code, at, c_segment_sum(grads, self.inverse, u), hyper)
        lines.apply_segments(code, slots, values, order, starts, hyper)
        want, found = np.empty_like(start), np.empty_like(start)
        slabs.gather(at, want)
        lines.gather(self.slots, found)
        same = np.array_equal(want.view(np.uint32), found.view(np.uint32))
        self.say(f"Adam of {u:,} lines by {N_IDS:,} gradients equals the C kernels bit for bit: {same}")
        assert same

        def both() -> None:
            lines.gather(slots, out, index)
            lines.apply_segments(code, slots, values, order, starts, hyper)

        took, host = self.ms(both)
        self.say(
            "one step of rows, all in device memory (gather for each id, sums by key, Adam): "
            f"{took:.3f} ms on the device, {host:.3f} ms of the host"
        )
        if torch is not None:
            inverse = torch.as_tensor(self.inverse, device="cuda")
            extra = torch_ms(lambda: torch.argsort(inverse, stable=True))
            self.say(f"  and the order of positions by key, by torch.argsort(stable=True): {extra:.3f} ms")
        if torch is not None:
            del lines, values, out
            self.whole(grads)
        self.say()
        self.say(PEERS)

    def whole(self, grads: np.ndarray) -> None:
        """The same from ids: deduped, looked up, rows out, and gradients summed and applied. All on the device."""
        batches = [self.ids] + [draw(self.rng) for _ in range(3)]
        index, dedupe = DeviceIndex(self.device, 2**22, N_IDS), Dedupe(self.device, N_IDS)
        for ids in batches:
            keys = np.unique(ids)
            index.insert(keys, np.ones(len(keys), np.int64))
        lines = DeviceLines(self.device, index.n_slots + 1024, 3 * DIM, 4096, DIM)
        self.cuda.cudadrv.driver.device_memset(lines.lines, 0x3C, lines.nbytes)
        code, hyper = HYPER["adam"][0], hyper_of("adam")
        here = [torch.as_tensor(ids, device="cuda") for ids in batches]
        values, out = torch.as_tensor(grads, device="cuda"), torch.empty(N_IDS, DIM, device="cuda")

        def step(ids: Any) -> None:
            found = dedupe(self.device.array(ids))
            slots = index.find(found.keys)
            lines.gather(slots, out, found.inverse)
            order = torch.argsort(torch.as_tensor(found.inverse, device="cuda"), stable=True)
            starts = torch.zeros(found.n_distinct + 1, dtype=torch.int64, device="cuda")
            torch.cumsum(torch.as_tensor(found.counts, device="cuda"), 0, out=starts[1:])
            lines.apply_segments(code, slots, values, order, starts, hyper)

        took = []
        for i in range(30):
            self.wait()
            begin = time.perf_counter()
            step(here[i % 4])
            self.wait()
            took.append(1e3 * (time.perf_counter() - begin))
        self.device.sync()
        begin = time.perf_counter()
        for i in range(20):
            step(here[i % 4])
        self.wait()
        steady = (time.perf_counter() - begin) / 20 * 1e3
        self.say(
            "one step from ids (dedupe, find, gather for each id, order by torch.argsort, sums by key, Adam), by the "
            f"wall clock: {statistics.median(took[5:]):.3f} ms alone, {steady:.3f} ms one after the other"
        )

    # --- the tier ---------------------------------------------------------------------------------------------

    def tier(self) -> None:
        """The store's calls, for batches that differ."""
        batches = [np.unique(self.ids, return_inverse=True)] + [
            np.unique(draw(self.rng), return_inverse=True) for _ in range(4)
        ]
        groups = [group(inverse, len(keys)) for keys, inverse in batches]
        line = 12 * DIM
        footprint = max(len(keys) for keys, _ in batches) * line
        staging = 2**25
        grads = self.rng.standard_normal((N_IDS, DIM), np.float32)
        self.say(
            "| device tier: cache | rows, gradients | fetch, ms | rows out, ms | update, ms | step, ms | hit rate |"
        )
        self.say("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
        for name, budget in (
            ("all", 2**33),
            ("a batch", footprint + staging),
            ("0.8 of it", int(0.8 * footprint) + staging),
        ):
            for tensors in (True, False) if torch is not None and name == "all" else (torch is not None,):
                table = Table("t", DIM, optimizer=Adam(), store=device_cached(host_memory(), budget), metadata=False)
                for keys, _ in batches:  # all rows exist before
                    lease = table.store.reserve(keys, np.ones(len(keys), np.int64))
                    table.store.create(lease, 0)
                    table.store.release(lease)
                on_gpu = torch.as_tensor(grads, device="cuda") if tensors else None
                out = torch.empty(N_IDS, DIM, device="cuda") if tensors else np.empty((N_IDS, DIM), np.float32)
                took: list[list[float]] = []
                before = table.store.stats()
                for i, (keys, inverse) in enumerate(batches * 2):
                    took.append(self.one(table, i + 1, keys, inverse, groups[i % 5], grads, on_gpu, out))
                after = table.store.stats()
                hits, misses = (after[k] - before[k] for k in ("hits", "misses"))
                medians = [statistics.median(t) for t in zip(*took[2:], strict=True)]
                self.say(
                    f"| {name} | {'tensors' if tensors else 'NumPy'} | "
                    + " | ".join(f"{1e3 * t:.1f}" for t in (*medians, sum(medians)))
                    + f" | {hits / (hits + misses):.0%} |"
                )
                table.close()
                del table
        self.say()
        self.say("fetch: announce the distinct keys and make their rows resident. Keys are deduped and grouped before.")

    def one(
        self, table: Any, step: int, keys: Any, inverse: Any, by: Any, grads: Any, on_gpu: Any, out: Any
    ) -> list[float]:
        """Seconds of a step's parts."""
        store, hyper, times = table.store, table.optimizer.hyper(step), [time.perf_counter()]
        lease = store.reserve(keys, np.ones(len(keys), np.int64))
        store.fetch(lease)
        self.wait()
        times.append(time.perf_counter())
        store.gather(lease, out, inverse)
        self.wait()
        times.append(time.perf_counter())
        if on_gpu is None:
            sums = c_segment_sum(grads, inverse, len(keys))
        else:
            sums = store._device.empty((len(keys), DIM), np.float32)
            sum_segments(store._device, on_gpu, *by, sums)
        store.apply(lease, sums, table.optimizer, hyper, step)
        self.wait()
        times.append(time.perf_counter())
        store.release(lease)
        return [b - a for a, b in pairwise(times)]

    def wait(self) -> None:
        """Until the device is idle."""
        self.cuda.synchronize()


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


def main() -> None:
    """Run the parts that are asked for."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--report", help="also write what is printed to this file")
    ap.add_argument("--only", default="kernels,step,tier")
    ap.add_argument("--once", help="run kernels of these names once, for a profiler")
    a = ap.parse_args()
    bench = Bench(a.report)
    if a.once:
        bench.once(a.once)
        return
    bench.machine()
    for part in a.only.split(","):
        getattr(bench, part)()


if __name__ == "__main__":
    main()
