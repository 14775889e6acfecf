"""Saving and loading a table: GB/s beside the disk's own, torch.save and np.save; bytes on disk a row.

``python bench/snapshot.py DIR [--rows 8000000] [--dim 32] [--rounds 5]``

DIR is a directory on the disk in question; it needs room for about three copies of the table, and memory for as many.
Contenders take turns in one process, in each round all of them; a ratio is the median over the rounds of the ratio
within a round. Caveats:

- Keys are random and were put in no order; rows and Adagrad state are random bits. The table is in host memory.
- GB are those of keys, metadata, rows and state as arrays (10^9 bytes), for everyone; files are about as large.
- Whoever writes a file flushes it (fsync) before the clock stops: torch.save and np.save write to a file that is then
  flushed. The disk's own speed is the better of two ways of writing blocks of 4 MiB: past the page cache (O_DIRECT),
  and through it with fsync; and of reading, past it and through it.
- Reads are cold: the files were flushed, and their pages are dropped (posix_fadvise, DONTNEED) before each.
- torch.load and np.load give arrays. hbkit gives a table, with an index over its keys, and has checked checksums, key
  order, counts and schema; memory is new in all cases. verify reads and checks the same without making a table.
- A hypervisor takes memory back that was freed, and giving it out again costs more than a load; who pays depends on who
  came before. So before each turn twice the table's memory is touched and freed.
- A hypervisor may cache or throttle the disk; look at the spread. CPU seconds are those of the process.
- Sizes a row of others are computed from what their documents say is written: TFRA's FileSystemSaver, keys (int64) and
  values of each table, and the optimizer's slots are a table; DeepRec's export format, keys, values, freqs and versions
  (int64 each but values) of each variable, and a slot is a variable of its own.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import contest
import numpy as np

BLOCK = 4 << 20
GOALS = {"save / disk": 0.8, "load / disk": 0.8, "save / torch.save": 1.0, "save / np.save": 1.0}
GOALS |= {"load / torch.load": 1.0, "load / np.load": 1.0}


def drop(path: Path) -> None:
    """Take the pages of a file, or of all files below a directory, out of the page cache."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def warm(nbytes: int) -> None:
    """Touch memory and give it back, so that the machine has it."""
    np.empty(nbytes // 8)[:: 4096 // 8] = 1


def write_blocks(path: Path, nbytes: int, flags: int) -> None:
    """The disk's own: the same random block over and over, flushed."""
    block = mmap.mmap(-1, BLOCK)  # aligned, as O_DIRECT wants it
    block.write(os.urandom(BLOCK))
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | flags)
    for _ in range(nbytes // BLOCK):
        os.write(fd, block)
    os.fsync(fd)
    os.close(fd)


def read_blocks(path: Path, flags: int) -> None:
    """The disk's own: one block after another into one place."""
    block = mmap.mmap(-1, BLOCK)
    fd = os.open(path, os.O_RDONLY | flags)
    while os.readv(fd, [block]):
        pass
    os.close(fd)


def make(rows: int, dim: int) -> tuple[object, dict[str, np.ndarray]]:
    """A table, and its contents as arrays."""
    from hbkit.embedding import Adagrad, Table
    from hbkit.store.line import Chunk

    rng = np.random.default_rng(0)
    arrays = {
        "key": rng.permutation(np.unique(rng.integers(-(2**63), 2**63 - 1, rows))),
        "freq": rng.integers(1, 1000, rows),
        "last_step": rng.integers(1, 100_000, rows),
        "row": rng.random((rows, dim), np.float32),
        "state": rng.random((rows, dim), np.float32),
    }
    table = Table("t", dim, optimizer=Adagrad())
    for i in range(0, rows, 65_536):
        table.store.put(Chunk(*(column[i : i + 65_536] for column in arrays.values())))
    table.step = 100_000
    return table, arrays


def contenders(root: Path, table: object, arrays: dict[str, np.ndarray], dim: int) -> dict[str, Callable[[], object]]:
    """What takes turns, in this order: each writes what another reads."""
    import torch

    from hbkit.embedding import Adagrad, Table
    from hbkit.snapshot import load, save, verify

    nbytes = sum(a.nbytes for a in arrays.values())

    def torch_save() -> None:
        with open(root / "torch.pt", "wb") as file:
            torch.save({name: torch.from_numpy(a) for name, a in arrays.items()}, file)
            file.flush()
            os.fsync(file.fileno())

    def np_save() -> None:
        (root / "numpy").mkdir(exist_ok=True)
        for name, a in arrays.items():
            with open(root / "numpy" / f"{name}.npy", "wb") as file:
                np.save(file, a)
                file.flush()
                os.fsync(file.fileno())

    return {
        "disk write, direct": lambda: write_blocks(root / "disk", nbytes, os.O_DIRECT),
        "disk read, direct": lambda: read_blocks(root / "disk", os.O_DIRECT),
        "disk write, cached": lambda: write_blocks(root / "disk", nbytes, 0),
        "disk read, cached": lambda: read_blocks(root / "disk", 0),
        "hbkit save": lambda: save(root / "hbkit", [table], 1),
        "hbkit load": lambda: load(root / "hbkit", [Table("t", dim, optimizer=Adagrad())]),
        "hbkit verify": lambda: verify(root / "hbkit"),
        "torch.save": torch_save,
        "torch.load": lambda: torch.load(root / "torch.pt"),
        "np.save": np_save,
        "np.load": lambda: [np.load(root / "numpy" / f"{name}.npy") for name in arrays],
    }


FILES = {"disk": "disk", "hbkit": "hbkit", "torch": "torch.pt", "np": "numpy"}


def measure(root: Path, rows: int, dim: int, rounds: int) -> None:
    """Print a line for each contender, and all figures as JSON."""
    table, arrays = make(rows, dim)
    nbytes = sum(a.nbytes for a in arrays.values())
    print(f"\n{rows:,} rows, dim {dim} and as much state: {nbytes / 1e9:.2f} GB", flush=True)
    speed: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, run in contenders(root, table, arrays, dim).items():
            path = root / next(file for prefix, file in FILES.items() if name.startswith(prefix))
            if "write" in name or "save" in name:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            else:
                drop(path)
            warm(2 * nbytes)
            wall, process = time.perf_counter(), time.process_time()
            kept = run()
            speed.setdefault(name, []).append(nbytes / (time.perf_counter() - wall) / 1e9)
            cpu.setdefault(name, []).append((time.process_time() - process) / nbytes * 1e9)
            del kept
    per_row = sum(p.stat().st_size for p in (root / "hbkit").rglob("*.parquet")) / rows
    for path in FILES.values():
        shutil.rmtree(root / path) if (root / path).is_dir() else (root / path).unlink()

    for name, values in speed.items():
        each = " ".join(f"{v:.2f}" for v in values)
        print(
            f"{name:20} {statistics.median(values):6.2f} GB/s  {statistics.median(cpu[name]):5.2f} CPU s/GB  ({each})"
        )

    best = {
        way: [max(p) for p in zip(*(speed[f"disk {way}, {how}"] for how in ("direct", "cached")), strict=True)]
        for way in ("write", "read")
    }
    others = {
        "save": {"disk": best["write"], "torch.save": speed["torch.save"], "np.save": speed["np.save"]},
        "load": {"disk": best["read"], "torch.load": speed["torch.load"], "np.load": speed["np.load"]},
    }
    ratios = {
        f"{what} / {other}": statistics.median(m / o for m, o in zip(speed[f"hbkit {what}"], theirs, strict=True))
        for what, group in others.items()
        for other, theirs in group.items()
    }
    for name, ratio in ratios.items():
        print(f"{name:20} {ratio:6.2f}   (goal {GOALS[name]})")
    sizes = {"hbkit": round(per_row, 1), "TFRA": 2 * (8 + 4 * dim), "DeepRec": 2 * (24 + 4 * dim)}
    print("bytes a row          " + ", ".join(f"{name} {n}" for name, n in sizes.items()))
    print(
        json.dumps(
            {
                "rows": rows,
                "dim": dim,
                "GB/s": {n: round(statistics.median(v), 3) for n, v in speed.items()},
                "ratios": {n: round(r, 3) for n, r in ratios.items()},
                "bytes a row": sizes,
            }
        ),
        flush=True,
    )


def main() -> None:
    """A table for each dim."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("directory", type=Path)
    ap.add_argument("--rows", type=int, default=8_000_000)
    ap.add_argument("--dim", default="32,16")
    ap.add_argument("--rounds", type=int, default=5)
    a = ap.parse_args()
    contest.machine(rounds=a.rounds)
    for dim in map(int, a.dim.split(",")):
        measure(a.directory, a.rows, dim, a.rounds)


if __name__ == "__main__":
    main()
