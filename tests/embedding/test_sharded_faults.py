"""A rank killed, hung or corrupting at each message in turn: every other ends in time with a named error."""

import threading
import time

import numpy as np
import pytest
from faults import FAULTS, Faulty, Killed, run_ranks

from hbkit.embedding import Collection, Sharded, Table, lookahead
from hbkit.errors import HbkitError, InvalidArgument
from hbkit.shuffle import Loopback

TIMEOUTS = (0.15, 0.6, 2.4)  # a longer one where a busy machine was late before the fault came
SLACK = 1.5  # seconds that a busy machine may take beside the waiting
STEPS = 12


def training(transport):
    """A short training with look-ahead and a reading within; the bytes of what is left."""
    rng = np.random.default_rng(transport.rank)
    c = Sharded(Collection([Table("a", 3), Table("b", 2)]), transport, "int8" if transport.size == 2 else "float32")
    data = [{"a": rng.integers(0, 30, 4), "b": rng.integers(0, 9, (4, 2))} for _ in range(STEPS - transport.rank)]
    with lookahead(data, c, 3) as steps:
        for i, (_, staged) in enumerate(steps):
            staged.apply({f: np.cos(v).astype(np.float32) for f, v in staged.outputs().items()})
            if i == 5:
                c.lookup(data[0])
    rows = [chunk.row.tobytes() for t in c.tables.values() for chunk in t.store.scan()]
    c.close()
    return rows


LAST = 3  # messages of which a rank may be done when another finds out: its results are whole then


def n_messages(size):
    """How many messages a rank sends in it."""
    ends = [Faulty(t, "", -1) for t in Loopback.group(size, 20)]
    assert not [r for r in run_ranks(training, ends) if isinstance(r, BaseException)]
    return min(end.plan.n for end in ends)


def try_fault(timeout, size, fault, at, rank, seed, n, whole):
    """One trial; whether the fault struck, None where the machine was too busy to tell."""
    before = set(threading.enumerate())
    ends = Loopback.group(size, timeout)
    faulty = Faulty(ends[rank], fault, at, seed)
    began = time.monotonic()
    results = run_ranks(training, [faulty if r == rank else t for r, t in enumerate(ends)])
    took = time.monotonic() - began
    trial = f"{fault} by rank {rank} of {size} at message {at}, seed {seed}"
    left = [t for t in threading.enumerate() if t not in before and t.is_alive()]
    assert not left, f"{trial}: {left} are left"
    if not faulty.plan.struck:
        return False if results == whole else None
    late = took >= 2 * timeout + SLACK
    if timeout < TIMEOUTS[-1] and (late or (fault == "hang" and results == whole)):
        return None  # a busy machine: it took long, or the others were as late
    assert not late, f"{trial}: took {took:.2f} s"
    for r, result in enumerate(results):
        named = isinstance(result, HbkitError) and not isinstance(result, InvalidArgument)
        done = at >= n - LAST and result == whole[r]
        assert named or done or (r == rank and isinstance(result, Killed)), f"{trial}: rank {r}: {result!r:.300}"
    assert results != whole, trial
    return True


def run_trials(numbers):
    """Try each fault at each message of each rank, in turn and over again with other seeds: the
    trials of these numbers; the share that struck.
    """
    whole = {size: run_ranks(training, Loopback.group(size, 20)) for size in (2, 3)}
    counts = {size: n_messages(size) for size in whole}
    every = [
        (size, fault, at, rank)
        for size, count in counts.items()
        for at in range(count)
        for fault in FAULTS
        for rank in range(size)
    ]
    struck = 0
    for i in numbers:
        size, *trial = every[i % len(every)]
        tries = (try_fault(t, size, *trial, 1 + 7919 * i, counts[size], whole[size]) for t in TIMEOUTS)
        struck += next(outcome for outcome in tries if outcome is not None)
    return struck / len(numbers)


def test_sharded_ends_in_time_whatever_a_rank_does_at_some_message():
    assert run_trials(range(0, 850, 17)) > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 2000, 250))
def test_sharded_ends_in_time_whatever_a_rank_does_at_any_message(first):
    assert run_trials(range(first, first + 250)) > 0.8
