"""A transport that fails at its n-th message, and ranks as threads to try it on."""

import threading
import time

import numpy as np

FAULTS = ("kill", "hang", "corrupt", "truncate")


class Killed(BaseException):
    """Stands for SIGKILL: nothing that the rank does after it reaches anyone."""


class Faulty:
    """A rank's end that does `fault` at message number `at`, counted over all its channels.

    "kill": the rank is gone, and tells nobody. "hang": it does not answer for one and a half timeouts.
    "corrupt": a bit of what it sends is flipped. "truncate": the last byte that it sends is missing.

    Attributes
    ----------
    plan : Plan
        ``plan.struck`` says whether it came to that.
    """

    def __init__(self, inner, fault, at, seed=0, plan=None):
        self.inner, self.plan = inner, plan or Plan(fault, at, seed)
        self.rank, self.size, self.timeout = inner.rank, inner.size, inner.timeout

    def all_to_all(self, data, counts, expected=None):
        data, counts = self._strike(np.array(data), np.array(counts))
        return self.inner.all_to_all(data, counts, expected)

    def all_gather(self, data):
        data, _ = self._strike(np.frombuffer(data, np.uint8).copy(), np.array([len(data)]))
        return self.inner.all_gather(data.tobytes())

    def split(self):
        self.plan.alive()
        return Faulty(self.inner.split(), "", 0, plan=self.plan)

    def abort(self, reason):
        self.plan.alive()
        self.inner.abort(reason)

    def close(self):
        if not self.plan.dead:
            self.inner.close()

    def _strike(self, data, counts):
        plan = self.plan
        plan.alive()
        with plan.lock:
            now, plan.n = plan.n == plan.at, plan.n + 1
        if not now:
            return data, counts
        if plan.fault == "kill":
            plan.struck = plan.dead = True
            raise Killed
        if plan.fault == "hang":
            plan.struck = True
            time.sleep(1.5 * self.timeout)
        elif len(data):
            plan.struck = True
            if plan.fault == "corrupt":
                data[plan.seed % len(data)] ^= 1 << plan.seed // 7 % 8
            else:
                data, counts = data[:-1], counts.copy()
                counts[np.flatnonzero(counts)[-1]] -= 1
        return data, counts


class Plan:
    """What the channels of a faulty rank share."""

    def __init__(self, fault, at, seed):
        self.fault, self.at, self.seed = fault, at, seed
        self.n, self.dead, self.struck, self.lock = 0, False, False, threading.Lock()

    def alive(self):
        if self.dead:
            raise Killed


def run_ranks(act, transports, patience=120.0):
    """``act(transport)`` in a thread a rank: what each returned or raised. AssertionError where one never ends."""
    results = [None] * len(transports)

    def run(i):
        try:
            results[i] = act(transports[i])
        except BaseException as e:
            results[i] = e

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(transports))]
    for t in threads:
        t.start()
    end = time.monotonic() + patience
    for t in threads:
        t.join(max(0.0, end - time.monotonic()))
    assert not any(t.is_alive() for t in threads), "a rank hangs"
    return results
