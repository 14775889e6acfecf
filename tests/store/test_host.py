"""The host store against a dict of lines, through random leases, erasures and scans."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hbkit.embedding import Adagrad, Constant
from hbkit.errors import InvalidArgument, SchemaMismatch
from hbkit.store import host_memory
from hbkit.store.line import Chunk, Layout

DIM = 3
KEYS = st.lists(st.integers(-5, 30), max_size=12, unique=True).map(lambda k: np.array(k, np.int64))
RULE = Adagrad(lr=0.5, initial_accumulator=0.25)


def open_store():
    return host_memory().open(
        Layout("t", DIM, RULE.initial_state(DIM), lambda keys: np.repeat(keys[:, None] / 8, DIM, 1).astype(np.float32))
    )


def new_line(key):
    return [np.float32(key / 8)] * DIM + [np.float32(0.25)] * DIM


class Even:
    """Admits even keys."""

    def admit(self, keys, counts):
        return keys % 2 == 0

    def keep(self):
        pass


class HostAgainstDict(RuleBasedStateMachine):
    """key -> [freq, last_step, line]"""

    def __init__(self):
        super().__init__()
        self.store, self.oracle, self.step = open_store(), {}, 0
        self.ahead = None  # a lease taken earlier, as look-ahead does

    @rule(keys=KEYS)
    def look_ahead(self, keys):
        if self.ahead is None:
            self.ahead = self.store.reserve(keys, np.full(len(keys), 2))

    @rule(data=st.data(), admit=st.booleans())
    def train(self, data, admit):
        lease, self.ahead = self.ahead or self.store.reserve(k := data.draw(KEYS), np.full(len(k), 2)), None
        self.step += 1
        keys = lease.keys.tolist()
        made = self.store.create(lease, self.step, None if admit else Even())
        want_made = 0
        for key in keys:
            if key not in self.oracle and (admit or key % 2 == 0):
                self.oracle[key] = [0, 0, new_line(key)]
                want_made += 1
            if key in self.oracle:
                self.oracle[key][0] += 2
                self.oracle[key][1] = self.step
        assert made == want_made
        rows = np.empty((len(keys), DIM), np.float32)
        self.store.gather(lease, rows)
        assert rows.tolist() == [self.oracle[k][2][:DIM] if k in self.oracle else [0] * DIM for k in keys]
        grads = np.arange(len(keys) * DIM, dtype=np.float32).reshape(-1, DIM) + 1
        ignored = self.store.apply(lease, grads, RULE, RULE.hyper(self.step), self.step)
        assert ignored == sum(k not in self.oracle for k in keys)
        for key, g in zip(keys, grads, strict=True):
            if key in self.oracle:
                line = np.array(self.oracle[key][2], np.float32)
                line[DIM:] += g * g
                line[:DIM] -= np.float32(0.5) * (g / (np.sqrt(line[DIM:]) + np.float32(1e-10)))
                self.oracle[key][2] = line.tolist()
        self.store.release(lease)

    @rule(keys=KEYS)
    def erase(self, keys):
        assert self.store.erase(keys) == sum(self.oracle.pop(k, None) is not None for k in keys.tolist())

    @rule(keys=KEYS)
    def put(self, keys):
        n = len(keys)
        row, state = np.full((n, DIM), 4, np.float32), np.full((n, DIM), 9, np.float32)
        self.store.put(Chunk(keys, np.full(n, 7), np.full(n, self.step), row, state))
        self.oracle.update({k: [7, self.step, [4.0] * DIM + [9.0] * DIM] for k in keys.tolist()})

    @rule(since=st.one_of(st.none(), st.integers(0, 10)))
    def scan(self, since):
        got = {}
        for c in self.store.scan(since):
            for i, key in enumerate(c.key.tolist()):
                got[key] = [int(c.freq[i]), int(c.last_step[i]), [*c.row[i].tolist(), *c.state[i].tolist()]]
        assert list(got) == sorted(got)
        assert got == {k: v for k, v in self.oracle.items() if since is None or v[1] > since}

    @invariant()
    def validate(self):
        self.store.validate()
        assert len(self.store) == len(self.oracle) == self.store.stats()["rows"]


HostAgainstDict.TestCase.settings = settings(max_examples=50, stateful_step_count=30)
TestHostAgainstDict = HostAgainstDict.TestCase


def test_host_scan_spans_chunks():
    store, n = open_store(), 150_000
    lease = store.reserve(np.random.default_rng(0).permutation(n), np.ones(n, np.int64))
    store.create(lease, 1)
    chunks = list(store.scan())
    assert len(chunks) > 1
    assert np.array_equal(np.concatenate([c.key for c in chunks]), np.arange(n))
    assert np.array_equal(np.concatenate([c.row for c in chunks])[:, 0], (np.arange(n) / 8).astype(np.float32))


def test_host_stamps_what_came_after_create_too():
    store, keys, one = open_store(), np.arange(4), np.ones(4, np.int64)
    lease = store.reserve(keys, one)
    store.create(lease, 1, Even())
    late = store.reserve(keys[1:2], one[:1])
    store.create(late, 1)
    grads = np.ones((4, DIM), np.float32)
    assert store.apply(lease, grads, RULE, RULE.hyper(5), 5) == 1  # of another step than the rows were made in
    freq, last_step = store.metadata(np.array([0, 1, 2]))
    assert freq.tolist() == [1, 1, 1] and last_step.tolist() == [5, 5, 5]


def test_host_put_refuses_lines_of_another_width():
    one = np.ones(1, np.int64)
    with pytest.raises(SchemaMismatch, match="table t"):
        open_store().put(Chunk(one, one, one, np.ones((1, DIM + 1), np.float32), np.ones((1, DIM), np.float32)))


def test_host_apply_refuses_grads_that_do_not_fit():
    store = open_store()
    lease = store.reserve(np.arange(4), np.ones(4, np.int64))
    store.create(lease, 1)
    with pytest.raises(InvalidArgument):
        store.apply(lease, np.zeros((3, DIM), np.float32), RULE, RULE.hyper(1), 1)
    assert Constant(1.0)("t", np.arange(2), 2).tolist() == [[1, 1], [1, 1]]
