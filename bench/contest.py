"""Contenders side by side: a fresh process each, taking turns over several rounds, compared within a round.

Used by `decode.py`, `loaders.py`, `slots.py` and `hybridbackend.py`. What all of their figures share:

- A contender's process makes one pass that is not timed (files come into the page cache, libraries start), then passes
  for a second and at least three; its figure is the best one, since other work on the machine only ever adds time.
- Ratios are taken between contenders of one round, and the median over the rounds is shown, so that a machine that
  slows down between rounds does not decide.
- What a pass makes is allocated in it, and counted; letting go of the last piece is not.
- A peer is the best of the ways of calling it that are listed, in each round anew.
- ``--clock cpu`` takes the CPU time of the whole process for the time. On a machine that others use it is the steadier
  clock for one thread; it says nothing about two.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Figures = dict[str, list[dict[str, float]]]  # contender: what its process printed in each round

_LIMITS = ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "POLARS_MAX_THREADS"]
_LIMITS += ["TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"]


def arguments(doc: str | None, rounds: int = 3) -> argparse.ArgumentParser:
    """A parser with the options that every contest has."""
    ap = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--rounds", type=int, default=rounds)
    ap.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    ap.add_argument("--contender", help=argparse.SUPPRESS)  # how a script calls itself for one contender
    return ap


def best(
    passes: Callable[[], Iterable[Any]], count: Callable[[Any], int], least: int = 3, seconds: float = 1.0
) -> None:
    """In a contender's process: time ``passes()`` from its call to its last piece, and print the best as JSON."""
    n = sum(map(count, passes()))
    wall, cpu, began, k = float("inf"), float("inf"), time.perf_counter(), 0
    while k < least or time.perf_counter() - began < seconds:
        w, c = time.perf_counter(), time.process_time()
        last = deque(passes(), maxlen=1)  # pieces are dropped as the next ones come
        wall, cpu, k = min(wall, time.perf_counter() - w), min(cpu, time.process_time() - c), k + 1
        del last
    print(json.dumps({"n": n, "wall": wall, "cpu": cpu}))


def limit_threads(threads: int) -> None:
    """In a contender's process, before it imports any library: how many threads the libraries may use."""
    os.environ.update(dict.fromkeys(_LIMITS, str(threads)))


def take_turns(commands: Mapping[str, Sequence[str]], rounds: int, cwd: str | None = None) -> Figures:
    """The last line that each contender prints, as JSON, for each round; who fails is named and left out."""
    figures: Figures = {name: [] for name in commands}
    for r in range(rounds):
        names = list(figures)
        for name in names[r % len(names) :] + names[: r % len(names)]:
            done = subprocess.run(commands[name], cwd=cwd, capture_output=True, text=True)
            if done.returncode == 0:
                figures[name].append(json.loads(done.stdout.splitlines()[-1]))
            else:
                why = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
                print(f"{name} is left out: {why[-1][:150]}", file=sys.stderr)
                del figures[name]
    if not figures:
        raise SystemExit("no contender is left")
    counts = {name: figure[0]["n"] for name, figure in figures.items() if "n" in figure[0]}
    if len(set(counts.values())) > 1:
        raise SystemExit(f"contenders disagree on how many values there are: {counts}")
    return figures


def itself(python: str, script: str, contender: str, *options: str) -> list[str]:
    """The command by which a script runs one of its contenders, under any interpreter."""
    return [python, str(Path(script).resolve()), "--contender", contender, *options]


def median(figures: Figures, name: str, clock: str) -> float:
    """A contender's time, the median over the rounds."""
    return statistics.median(f[clock] for f in figures[name])


def ratio(figures: Figures, ours: str, peers: Sequence[str], clock: str) -> float:
    """How many times as long the fastest peer of a round takes, the median over the rounds."""
    rounds = zip(figures[ours], *(figures[p] for p in peers if p in figures), strict=True)
    return statistics.median(min(p[clock] for p in others) / us[clock] for us, *others in rounds)


def machine(**more: Any) -> None:
    """Print a JSON line that says where the figures come from."""
    cpu = platform.processor()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = info.read_text().splitlines()
        cpu = next((s.split(":")[1].strip() for s in lines if s.startswith("model name")), cpu)
    print(json.dumps({"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version(), **more}))


def versions(python: str, names: Sequence[str]) -> dict[str, str]:
    """Versions of the distributions that an interpreter has."""
    code = (
        "import importlib.metadata as m, json, sys; have = {d.name: d.version for d in m.distributions()}; "
        "print(json.dumps({n: have[n] for n in sys.argv[1:] if n in have}))"
    )
    return json.loads(subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=True).stdout)
