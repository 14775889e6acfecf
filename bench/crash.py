"""Kill a process that writes and commits, again and again, and see what is there afterwards.

``python bench/crash.py DIRECTORY [--kills 1000] [--seed 0] [--seconds 0.1]``

Each child opens the table, and writes, erases and commits until SIGKILL meets it at a random moment, which may be in
the opening, in compaction or in a commit. The parent then opens it: everything must verify, and the rows must be those
of the last commit that the child reported, or of the one it was making. A kill leaves the system's cache as it is, so
this says nothing about power loss; tests/store/test_faults.py does.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import numpy as np

from hbkit.store import home as module
from hbkit.store.home import Home
from hbkit.store.line import Layout

LAYOUT = Layout("t", 30, np.zeros(30, np.float32), lambda keys: np.zeros((len(keys), 30), np.float32))
SIZE, N_KEYS = 240, 3000


def opened(path: Path) -> Home:
    return Home(LAYOUT, path, buffer_nbytes=16_384, segment_nbytes=65_536)


def act(i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What is written, and which keys are erased after that, between commits i and i + 1."""
    rng = np.random.default_rng(i)
    keys = np.unique(rng.integers(0, N_KEYS, rng.integers(1, 600)))
    return keys, rng.integers(0, 256, (len(keys), SIZE), np.uint8), *np.full((1, len(keys)), i, np.uint32), keys[::9]


def child(path: Path, pipe: int) -> None:
    home = opened(path)
    while True:
        keys, lines, last_step, gone = act(home.n_commits)
        home.write(keys, lines, last_step, last_step)
        home.erase(gone)
        os.write(pipe, b"%d\n" % int(home.commit()))


def kills(path: Path, n: int, seed: int, seconds: float) -> int:
    """Kill `n` children, each so many seconds after some commits or less; how many commits there were, none lost."""
    module.LEAST_TAIL_NBYTES, module.TAIL = 300_000, 1  # checkpoints too
    rng, rows, done = random.Random(seed), {}, 0
    for _ in range(n):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(reader)
                child(path, writer)
            finally:
                os._exit(1)  # nothing of the parent's may run here
        os.close(writer)
        with os.fdopen(reader) as f:
            reported = [f.readline() for _ in range(rng.randrange(3))]
            time.sleep(rng.random() * seconds)
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            assert os.WIFSIGNALED(status), "the child failed"
            reported += f.readlines()
        home = opened(path)
        at_least = int(reported[-1]) if reported else done
        assert at_least <= home.n_commits <= at_least + 1, "a commit was lost"
        for i in range(done, home.n_commits):
            keys, lines, last_step, gone = act(i)
            rows.update(zip(keys.tolist(), zip(lines, last_step, strict=True), strict=True))
            for k in gone.tolist():
                del rows[k]
        done = home.n_commits
        home.validate()
        home.verify()
        keys = np.array(sorted(rows), np.int64)
        assert np.array_equal(np.sort(home.keys()), keys)
        found = home.read(keys)
        assert all(
            np.array_equal(found[0][j], rows[k][0]) and found[2][j] == rows[k][1] for j, k in enumerate(sorted(rows))
        )
        home.close()
    return done


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.1)
    args = parser.parse_args()
    path = Path(tempfile.mkdtemp(dir=args.directory))
    try:
        n = kills(path, args.kills, args.seed, args.seconds)
    finally:
        shutil.rmtree(path)
    print(f"{args.kills} kills, {n} commits, none lost")


if __name__ == "__main__":
    main()
