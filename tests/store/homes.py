"""A home of rows in a dict, and a store over it: what a tier does is tested apart from any disk or device. And acts on
tables, for tests that hold one tier against another."""

import threading
import time

import numpy as np

from hbkit._ext.batch import mixed
from hbkit._ext.slabs import Slabs
from hbkit.embedding import (
    SGD,
    Adagrad,
    Adam,
    Collection,
    CountAdmission,
    Ftrl,
    IdleSteps,
    MaxRows,
    RowWiseAdagrad,
    RowWiseAdam,
    Table,
    lookahead,
)
from hbkit.embedding.table import Request
from hbkit.store.line import Chunk
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

    def drop(self, keys):
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
            self.step = max(self.step, int(last_step[i]))

    def metadata(self, keys):
        rows = [self.rows[int(k)] for k in keys]
        return np.array([r[1] for r in rows], np.int64), np.array([r[2] for r in rows], np.int64)

    def keys(self, part):
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

    def _new_lines(self):
        return Slabs(self.layout.width, 256, dim=self.layout.dim, row_dtype=self.layout.dtype)


class DictPlace:
    """`StoreSpec` of `DictStore`."""

    def __init__(self, n_lines, policy="lfu", scratch_lines=7, delay=0.0):
        self.args = n_lines, policy, scratch_lines, delay

    def open(self, layout):
        return DictStore(layout, *self.args)


OPTIMIZERS = [SGD(), SGD(momentum=0.9), Adagrad(), RowWiseAdagrad(), Adam(), RowWiseAdam(), Ftrl()]
FIELDS = ("key", "freq", "last_step", "row", "state")


def contents(store, since=None):
    """Everything a store holds, as bytes."""
    chunks = list(store.scan(since))
    return [b"".join(np.ascontiguousarray(getattr(c, field)).tobytes() for c in chunks) for field in FIELDS]


def step(table, rng, n_keys=200, n=60):
    """One random training batch; the bytes that it read."""
    keys = rng.zipf(1.4, n) % n_keys
    rows = table.lookup(keys, train=True)
    table.update(keys, rng.standard_normal((n, table.dim)).astype(np.float32))
    return rows.tobytes()


def put(table, rng):
    keys = rng.permutation(400)[:50] - 100
    row, state = rng.random((50, table.dim)), rng.random((50, table.store.layout.width - table.dim))
    table.store.put(Chunk(keys, keys + 100, np.full(50, table.step), row, state))


def give(table, rng):
    keys, lines = rng.permutation(400)[:50] - 100, rng.random((50, table.store.layout.width)).astype(np.float32)
    table.store.write(keys, lines, keys + 100, np.full(50, table.step))


def ahead(table, rng):
    """Batches reserved and some fetched before the first is used; one is closed unused, one is forgotten."""
    batches = [rng.integers(0, 300, 30) for _ in range(5)]
    known = rng.random() < 0.5  # to the window
    requests = [Request(table, [table.part(b)], ahead=known) for b in batches]
    for r in requests[1:4]:
        r.fetch()
    read = []
    for r in requests[:3]:
        r.create(True, table.step + 1)
        rows = r.rows()
        read.append(rows.tobytes())
        grads = rng.standard_normal((len(r.inverse), table.dim)).astype(np.float32)
        r.update(grads + rows[r.inverse], None, None, table.step + 1)
        table.step += 1
        r.close()
    requests[4].close()
    return read


ACTS = {
    "step": step,
    "lookup": lambda t, rng: t.lookup(rng.integers(0, 500, 20)).tobytes(),
    "counted": lambda t, rng: t.lookup(rng.integers(0, 500, 20), train=True).tobytes(),
    "update": lambda t, rng: t.update(rng.integers(0, 500, 20), np.ones((20, t.dim), np.float32)),
    "nonfinite": lambda t, rng: t.update(rng.integers(0, 200, 9), np.where(rng.random((9, t.dim)) < 0.1, np.nan, 1)),
    "big": lambda t, rng: step(t, rng, 3000, 900),
    "ahead": ahead,
    "give": give,
    "erase": lambda t, rng: t.store.erase(np.concatenate([rng.integers(0, 300, 20)] * 2)),
    "evict": lambda t, rng: t.evict(),
    "put": put,
    "commit": lambda t, rng: t.commit() and None,
}


def any_table(store, optimizer, dim, dtype, metadata, min_count):
    """A table with as much going on as one can have."""
    return Table(
        "t", dim, dtype=dtype, optimizer=optimizer, store=store, padding_key=3, default=0.25, nonfinite="skip",
        admission=CountAdmission(min_count) if min_count else None, metadata=metadata,
        eviction=[IdleSteps(3), MaxRows(2000)] if metadata else (),
    )  # fmt: skip


def looking_ahead(store, window):
    """Train with look-ahead: what was read, and what is there in the end."""
    rng = np.random.default_rng(3)
    tables = [Table("a", 8, store=store), Table("b", 4, optimizer=Adam(), store=store)]
    c = Collection(tables, {"x": "a", "y": "b", "z": "b"})
    batches = [{f: rng.zipf(1.3, 100) % 400 for f in "xyz"} for _ in range(30)]
    seen = []
    for _, staged in lookahead(batches, c, window):
        out = staged.outputs()
        seen.append([v.tobytes() for v in out.values()])
        staged.apply({f: np.sin(v) for f, v in out.items()})
    found = [contents(t.store) for t in tables]
    for t in tables:
        t.store.validate()
        t.close()
    return seen, found
