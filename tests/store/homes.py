"""A home of rows in a dict, and a store over it: what a tier does is tested apart from any disk or device."""

import threading
import time

import numpy as np

from hbkit._ext.batch import mixed
from hbkit._ext.slabs import Slabs
from hbkit.store.policy import make_policy
from hbkit.store.tier import TieredStore


class DictHome:
    """`hbkit.store.tier.Home`, a row at a time. `fail` may hold an exception for each of its methods."""

    def __init__(self, layout, delay=0.0):
        self.layout, self.delay, self.fail = layout, delay, {}
        self.rows = {}  # (bytes, freq, last_step), or None where no line came yet
        self.gate = threading.Event()  # reads wait for it
        self.gate.set()
        self.reading, self.kept_columns, self.step = set(), {}, 0

    def _call(self, name):
        if name in self.fail:
            raise self.fail[name]

    def __len__(self):
        return len(self.rows)

    nbytes = 0

    def find(self, keys):
        return np.array([int(k) in self.rows for k in keys], np.bool_)

    def add(self, keys):
        self._call("add")
        assert not self.find(keys).any() and len(np.unique(keys)) == len(keys)
        self.rows.update({int(k): None for k in keys})

    def erase(self, keys):
        self._call("erase")
        assert not self.reading & {int(k) for k in keys}, "erased while it was read"
        return sum(self.rows.pop(int(k), self) is not self for k in keys)

    def read(self, keys):
        self.reading |= {int(k) for k in keys}
        rows = [self.rows[int(k)] for k in keys]
        self.gate.wait()
        if self.delay:
            time.sleep(self.delay)
        self._call("read")
        assert rows == [self.rows[int(k)] for k in keys], "written while it was read"
        self.reading -= {int(k) for k in keys}
        lines = np.frombuffer(b"".join(r[0] for r in rows), np.uint8).reshape(len(keys), self.layout.line_nbytes)
        return lines, np.array([r[1] for r in rows], np.int64), np.array([r[2] for r in rows], np.int64)

    def write(self, keys, lines, freq, last_step):
        self._call("write")
        assert len(np.unique(keys)) == len(keys)
        for i, key in enumerate(keys):
            self.rows[int(key)] = lines[i].tobytes(), int(freq[i]), int(last_step[i])

    def metadata(self, keys):
        rows = [self.rows[int(k)] for k in keys]
        return np.array([r[1] for r in rows], np.int64), np.array([r[2] for r in rows], np.int64)

    def part(self, part):
        keys = np.array(sorted(self.rows), np.int64)
        mix = mixed(keys)
        held = (mix >= np.uint64(part.first)) & (mix <= np.uint64(max(part.last - 1, 0))) & (part.first < part.last)
        return keys[held][np.argsort(mix[held])]

    def in_order(self):
        return iter([np.array(sorted(self.rows), np.int64)])

    def commit(self, keep, latest_step):
        self._call("commit")
        assert None not in self.rows.values(), "a row was never written"
        self.kept_columns, self.step = dict(keep), latest_step
        return "1"

    def kept(self):
        return self.kept_columns

    def latest_step(self):
        return self.step

    def stats(self):
        return {}

    def validate(self):
        pass

    def close(self):
        pass


class DictStore(TieredStore):
    """A tier of `n_lines` over a `DictHome`."""

    tier = "dict"

    def __init__(self, layout, n_lines, policy="lfu", scratch_lines=7, delay=0.0):
        self.n_most = n_lines
        super().__init__(layout, DictHome(layout, delay), make_policy(policy), scratch_lines)

    @property
    def home(self):
        return self._home

    def _capacity(self, n_rows):
        return max(1, self.n_most - n_rows // 50)  # the index takes its share

    def _new_lines(self, n_lines):
        return Slabs(self.layout.width, 256, dim=self.layout.dim, row_dtype=self.layout.dtype)


class DictPlace:
    """`StoreSpec` of `DictStore`."""

    def __init__(self, n_lines, policy="lfu", scratch_lines=7, delay=0.0):
        self.args = n_lines, policy, scratch_lines, delay

    def open(self, layout):
        return DictStore(layout, *self.args)


