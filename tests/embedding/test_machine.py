"""A table against a dict, through insert, lookup, update, erase, evict and grow, over memory and over disk."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hbkit._ext.batch import mixed
from hbkit.embedding import SGD, CountAdmission, IdleSteps, L2Below, MaxRows, Normal, Table
from hbkit.ragged import Dictionary
from hbkit.store import host_memory
from hbkit.store.policy import make_policy
from hbkit.store.ssd import SsdStore

DIM, PADDING, DEFAULT, LIMIT = 2, 7, [0.5, -0.5], 12
INITIAL = Normal(0, 1, seed=3)
KEYS = st.lists(st.one_of(st.integers(0, 20), st.sampled_from([-(2**63), 2**63 - 1])), max_size=14)


def key_array(keys):
    return np.array(keys, np.int64)


def score(item):
    """What MaxRows compares: frequency, last step, key."""
    key, (freq, last_step, _) = item
    return freq, last_step, key


class TableAgainstDict(RuleBasedStateMachine):
    """key -> [freq, last_step, row]; waiting: key -> count"""

    def open_store(self):
        return host_memory()

    @initialize(
        min_count=st.integers(1, 3),
        rules=st.lists(st.sampled_from([IdleSteps(3), L2Below(0.5), MaxRows(LIMIT)]), max_size=3),
        every=st.integers(1, 3),
        scheduled=st.booleans(),
    )
    def open(self, min_count, rules, every, scheduled):
        self.min_count, self.rules, self.every = min_count, rules, every if scheduled and rules else None
        self.rows, self.waiting, self.gone = {}, {}, []
        self.step, self.ahead = 0, None
        self.table = Table(
            "t",
            DIM,
            initializer=INITIAL,
            optimizer=SGD(lr=1.0),
            store=self.open_store(),
            admission=CountAdmission(min_count),
            eviction=rules,
            padding_key=PADDING,
            default=DEFAULT,
            evict_every=self.every,
            on_evict=lambda chunk: self.gone.extend(chunk.key.tolist()),
        )

    def read(self, key):
        return [0.0] * DIM if key == PADDING else self.rows[key][2].tolist() if key in self.rows else DEFAULT

    def count(self, keys):
        """What a training lookup does."""
        for key in {k for k in keys if k != PADDING}:
            n = keys.count(key)
            if key not in self.rows:
                self.waiting[key] = self.waiting.get(key, 0) + n
                if self.waiting[key] < self.min_count:
                    continue
                del self.waiting[key]
                self.rows[key] = [0, 0, INITIAL("t", key_array([key]), DIM)[0]]
            self.rows[key][0] += n
            self.rows[key][1] = self.step + 1

    def updated(self, keys, grads):
        self.step += 1
        for key in set(keys):
            if key in self.rows:
                self.rows[key][1] = self.step
                total = sum(g for k, g in zip(keys, grads, strict=True) if k == key)
                self.rows[key][2] = self.rows[key][2] - total
        if self.every:
            self.evicted(self.step % self.every, self.every)

    def evicted(self, i, n):
        """Rules in turn; with MaxRows all keys are one group here, which the first part sees."""
        mix = dict(zip(self.rows, mixed(key_array(list(self.rows))).tolist(), strict=True))
        if any(isinstance(r, MaxRows) for r in self.rules):
            i, n = (0, 1) if i == 0 else (0, 0)
        within = {k: v for k, v in self.rows.items() if n and -(-(i << 64) // n) <= mix[k] < -(-((i + 1) << 64) // n)}
        before = set(within)
        for r in self.rules:
            if isinstance(r, IdleSteps):
                within = {k: v for k, v in within.items() if self.step - v[1] <= r.n}
            elif isinstance(r, L2Below):
                norms = {k: np.square(v[2], dtype=np.float64).sum() for k, v in within.items()}
                within = {k: v for k, v in within.items() if norms[k] >= r.threshold**2}
            else:
                within = dict(sorted(within.items(), key=score)[max(0, len(within) - r.n) :])
        gone = before - set(within)
        for key in gone:
            del self.rows[key]
        assert set(self.gone) == gone
        assert len(self.gone) == len(gone)
        self.gone.clear()

    @rule(keys=KEYS, train=st.booleans())
    def lookup(self, keys, train):
        got = self.table.lookup(key_array(keys), train)
        if train:
            self.count(keys)
        assert got.tolist() == [self.read(k) for k in keys]

    @rule(data=st.data(), entries=st.lists(st.integers(0, 20), min_size=1, max_size=6), train=st.booleans())
    def lookup_by_dictionary(self, data, entries, train):
        codes = data.draw(st.lists(st.integers(0, len(entries) - 1), max_size=12))
        got = self.table.lookup(Dictionary(key_array(entries), np.array(codes, np.uint32)), train)
        keys = [entries[c] for c in codes]
        if train:
            self.count(keys)
        assert got.tolist() == [self.read(k) for k in keys]

    @rule(keys=KEYS, seed=st.integers(0, 99))
    def update(self, keys, seed):
        grads = np.random.default_rng(seed).integers(-3, 4, (len(keys), DIM)).astype(np.float32)
        self.table.update(key_array(keys), grads)
        self.updated(keys, grads)

    @rule(keys=KEYS)
    def look_ahead(self, keys):
        if self.ahead is None:
            self.ahead = keys, self.table.request(key_array(keys))

    @rule(seed=st.integers(0, 99))
    def train_what_was_looked_ahead(self, seed):
        if self.ahead is not None:
            (keys, request), self.ahead = self.ahead, None
            request.create(True, self.step + 1)
            rows = request.rows()
            self.count(keys)
            assert rows[request.inverse].tolist() == [self.read(k) for k in keys]
            grads = np.random.default_rng(seed).integers(-3, 4, (len(keys), DIM)).astype(np.float32)
            request.update(grads, None, None, self.step + 1)
            request.close()
            self.table.advance(self.step + 1)
            self.updated(keys, grads)

    @rule(keys=KEYS)
    def erase(self, keys):
        assert self.table.store.erase(key_array(keys)) == sum(self.rows.pop(k, None) is not None for k in set(keys))

    @rule(i=st.integers(0, 2), n=st.integers(1, 3))
    def evict(self, i, n):
        before = len(self.rows)
        got = self.table.evict(part=(i % n, n))
        self.evicted(i % n, n)
        assert got == before - len(self.rows)

    @rule(first=st.integers(30, 60), n=st.integers(50, 200))
    def grow(self, first, n):
        keys = list(range(first, first + n))
        self.table.lookup(key_array(keys), train=True)
        self.count(keys)

    @invariant()
    def same(self):
        t = self.table
        t.store.validate()
        found = {}
        for c in t.store.scan():
            columns = (c.key.tolist(), c.freq.tolist(), c.last_step.tolist(), c.row.tolist())
            found.update({key: rest for key, *rest in zip(*columns, strict=True)})
        assert list(found) == sorted(found)
        assert found == {k: [freq, last_step, row.tolist()] for k, (freq, last_step, row) in self.rows.items()}
        waiting = t.admission.state()
        assert dict(zip(waiting["key"].tolist(), waiting["count"].tolist(), strict=True)) == self.waiting
        assert t.step == self.step
        assert len(t) == len(self.rows)

    def teardown(self):
        self.table.close()


class SsdAgainstDict(TableAgainstDict):
    """With a cache of five lines and segments of few rows."""

    def open_store(self):
        self.path = Path(tempfile.mkdtemp())
        machine = self

        class Tiny:
            def open(self, layout):
                return SsdStore(layout, machine.path / layout.table, 2**20, make_policy("lru"), None, 5, 8192)

        return Tiny()

    @rule()
    def commit(self):
        self.table.commit()

    def teardown(self):
        super().teardown()
        shutil.rmtree(self.path)


TestTableAgainstDict = TableAgainstDict.TestCase
TestTableAgainstDict.settings = settings(max_examples=80, stateful_step_count=30)
TestSsdAgainstDict = SsdAgainstDict.TestCase
TestSsdAgainstDict.settings = settings(max_examples=15, stateful_step_count=20)
