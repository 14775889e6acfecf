"""Sharded over loopback ranks: one rank's results whatever their number, and the same bits at every run."""

import random
import threading
import time

import numpy as np
import pytest
from faults import run_ranks

import hbkit
from hbkit import Ragged
from hbkit.embedding import (
    SGD,
    Adagrad,
    Adam,
    AdamW,
    BloomAdmission,
    Collection,
    Column,
    CountAdmission,
    Ftrl,
    IdleSteps,
    MaxRows,
    Normal,
    RowWiseAdagrad,
    RowWiseAdam,
    SequenceOutput,
    Sharded,
    Table,
    lookahead,
)
from hbkit.errors import Closed, Corrupt, InvalidArgument, SchemaMismatch, TransportError
from hbkit.shuffle import WIRES, Loopback, row_nbytes
from hbkit.store import cached_ssd

FEATURES = {"user": "user", "items": "item", "last": "item", "history": "item", "wide": "both"}
POOLING = {"items": "mean", "history": None}


def tables(optimizer=None, **more):
    optimizer = optimizer or SGD(lr=0.5)
    columns = {"linear": Column(1, Normal(seed=5), SGD(lr=0.1)), "rest": Column(3)}
    return [
        Table("user", 4, optimizer=optimizer, initializer=Normal(0, 1, seed=1), **more),
        Table("item", 3, optimizer=optimizer, initializer=Normal(0, 1, seed=2), padding_key=0, default=0.5, **more),
        Table("both", optimizer=optimizer, columns=columns, **more),
    ]


def batches(n=10, rows=24, seed=0, keys=40):
    """Global batches: scalars, a list, a dense sequence, and a weight a row."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        m = rows if i < n - 1 else rows // 2 + 1
        splits = np.concatenate([[0], np.cumsum(rng.integers(0, 4, m))])
        out.append(
            {
                "user": rng.integers(0, keys, m),
                "items": Ragged(rng.integers(-3, keys, splits[-1]), splits),
                "last": rng.integers(0, keys, m),
                "history": rng.integers(0, keys, (m, 3)),
                "wide": rng.integers(0, keys, m),
                "weight": rng.integers(1, 4, m).astype(np.float32),
            }
        )
    return out


def part(batch, rank, size):
    """A rank's rows: uneven parts, that are the whole batch end to end."""
    n = len(batch["user"])
    cuts = [0, *sorted(random.Random(n).choices(range(n + 1), k=size - 1)), n]
    return {name: column[cuts[rank] : cuts[rank + 1]] for name, column in batch.items()}


class Prepared:
    """As an adapter prepares a batch."""

    def __init__(self, batch):
        self.weight = batch["weight"] if "weight" in batch else np.zeros(0, np.float32)


def loss_gradient(out, weight):
    """Of the weighted mean over rows of a smooth function of all outputs: the gradient of each."""
    with np.errstate(invalid="ignore"):
        w = weight / weight.sum(dtype=np.float64)
    grads = {}
    for feature, value in out.items():
        v = value.values if isinstance(value, SequenceOutput) else value
        g = np.zeros_like(v)
        g[: len(w)] = np.cos(2 * v[: len(w)]) * w.reshape(-1, *[1] * (v.ndim - 1))
        grads[feature] = g
    return grads


def rows_of(collection):
    """(key, row, state, frequency, last step) of each table, to the bit."""
    return {
        name: {
            k: (row, state, freq, last)
            for c in table.store.scan()
            for k, freq, last, row, state in zip(
                c.key.tolist(), c.freq.tolist(), c.last_step.tolist(), c.row, c.state, strict=True
            )
        }
        for name, table in collection.tables.items()
    }


def train(
    size, data, make=tables, wire="float32", depth=3, start=None, left_out=(), jitter=False, placement=None, of=part
):
    """Rows of all tables after training on `data`, a list of global batches, with so many ranks."""

    def act(transport):
        whole = Collection(make(), FEATURES, POOLING)
        for name, rows in (start or {}).items():
            fill(whole.tables[name], rows, transport)
        c = Sharded(whole, transport, wire, placement)
        mine = (of(b, transport.rank, size) for b in data)
        mine = (b for b in mine if b is not None)
        with lookahead(mine, c, depth, prepare=Prepared) as steps:
            for prepared, staged in steps:
                grads = loss_gradient(staged.outputs(), prepared.weight)
                staged.apply({f: g for f, g in grads.items() if f not in left_out})
        rows = rows_of(c)
        c.close()
        return rows

    ends = Loopback.group(size, timeout=20)
    results = run_ranks(act, [Jitter(t) for t in ends] if jitter else ends)
    return merged(results)


def merged(results):
    for r in results:
        if isinstance(r, BaseException):
            raise r
    whole = {name: {} for name in results[0]}
    for rows in results:
        for name, some in rows.items():
            assert not whole[name].keys() & some.keys(), "two ranks hold one key"
            whole[name] |= some
    return whole


def fill(table, rows, transport):
    """Put the rows that this rank owns."""
    keys = np.array(sorted(rows), np.int64)
    keys = keys[hbkit.shuffle.owner(keys, transport.size) == transport.rank]
    if len(keys):
        row, state, freq, last = zip(*(rows[k] for k in keys.tolist()), strict=True)
        table.store.put(hbkit.store.line.Chunk(keys, np.array(freq), np.array(last), np.array(row), np.array(state)))
    table.step = max(last for *_, last in rows.values())


class Jitter:
    """A transport whose calls take a random time."""

    def __init__(self, inner):
        self.inner = inner
        self.rank, self.size, self.timeout = inner.rank, inner.size, inner.timeout
        self.abort, self.close = inner.abort, inner.close

    def all_to_all(self, *args):
        time.sleep(random.random() * 0.003)
        return self.inner.all_to_all(*args)

    def all_gather(self, data):
        return self.inner.all_gather(data)

    def split(self):
        return Jitter(self.inner.split())


def assert_close(a, b, relative=1e-5):
    for name in b:
        assert a[name].keys() == b[name].keys()
        for k, (row, state, freq, last) in b[name].items():
            assert a[name][k][2:] == (freq, last)
            for x, y in ((a[name][k][0], row), (a[name][k][1], state)):
                assert np.abs(x - y).max(initial=0) <= relative * np.abs(y).max(initial=1e-3)


def assert_same(a, b):
    for name in b:
        assert a[name].keys() == b[name].keys()
        for k, (row, state, freq, last) in b[name].items():
            assert a[name][k][2:] == (freq, last)
            assert a[name][k][0].tobytes() == row.tobytes() and a[name][k][1].tobytes() == state.tobytes()


def unsharded(data, make=tables, left_out=()):
    """What one rank alone makes of it, without any of this."""
    c = Collection(make(), FEATURES, POOLING)
    for batch, staged in lookahead(data, c, 2):
        grads = loss_gradient(staged.outputs(), batch["weight"])
        staged.apply({f: g for f, g in grads.items() if f not in left_out})
    return rows_of(c)


def test_sharded_by_one_rank_is_the_collection_to_the_bit():
    assert_same(train(1, batches()), unsharded(batches()))


def test_sharded_sgd_agrees_over_100_steps_for_any_number_of_ranks():
    data = batches(100)
    want = unsharded(data)
    for size in (2, 3, 4):
        assert_close(train(size, data), want)


@pytest.mark.parametrize(
    "optimizer",
    [SGD(lr=0.1, momentum=0.9), Adagrad(), RowWiseAdagrad(), Adam(), AdamW(), RowWiseAdam(), Ftrl()],
    ids=repr,
)
def test_sharded_optimizers_agree_over_one_step_from_equal_state(optimizer):
    def make():
        return tables(optimizer)

    start, step = train(1, batches(5, seed=1), make), batches(2, seed=2)[:1]
    want = train(1, step, make, start=start)
    for size in (2, 3, 4):
        assert_close(train(size, step, make, start=start), want)


@pytest.mark.parametrize("wire", WIRES)
def test_sharded_runs_of_one_size_agree_to_the_bit(wire, tmp_path):
    homes = iter(range(100))
    lock = threading.Lock()

    def on_disk():
        with lock:
            home = tmp_path / str(next(homes))
        return tables(Adam(lr=0.1), store=cached_ssd(home, host_budget="360KiB"))

    def in_memory():
        return tables(Adam(lr=0.1))

    data = batches(12, rows=200, keys=2000)
    first = train(3, data, in_memory, wire)
    assert_same(train(3, data, in_memory, wire, depth=0, jitter=True), first)
    assert_same(train(3, data, in_memory, wire, depth=8, jitter=True), first)
    assert_same(train(3, data, on_disk, wire, depth=8), first)


@pytest.mark.parametrize("size", [2, 3])
def test_sharded_unequal_data_is_the_global_batches_mean(size):
    """Rank 0 has three batches more, of which the last is short; the last rank has none at all."""

    def dealt(batch, rank, n):
        i = next(i for i, b in enumerate(data) if b is batch)
        if i >= len(data) - 3:
            return batch if rank == 0 else None
        return None if rank == n - 1 else part(batch, rank, n - 1)

    data = batches(9)
    assert_close(train(size, data, of=dealt), unsharded(data))


@pytest.mark.parametrize("size", [2, 3])
def test_sharded_counts_admits_and_evicts_as_one_rank(size):
    def make():
        return [
            Table(
                "user", 4, optimizer=SGD(lr=0.5), admission=CountAdmission(4), eviction=[IdleSteps(3)], evict_every=2
            ),
            Table("item", 3, optimizer=SGD(lr=0.5), admission=BloomAdmission(3, 5000), padding_key=0),
            Table("both", 4, optimizer=SGD(lr=0.5), eviction=[MaxRows(1024)], evict_every=3),
        ]

    data = batches(20, keys=3000) + batches(20, keys=300)
    want = unsharded(data, make)
    assert 0 < len(want["user"]) < 300 and want["item"]
    assert_close(train(size, data, make), want)


@pytest.mark.parametrize("left_out", [("last",), ("items", "last", "history"), ("user", "wide")])
def test_sharded_features_without_a_gradient_leave_their_rows(left_out):
    def make():
        return tables(SGD(lr=0.1, momentum=0.9))

    data = batches(6)
    assert_close(train(3, data, make, left_out=left_out), unsharded(data, make, left_out))


def test_sharded_table_on_one_rank_agrees_too():
    data = batches(10)
    assert_close(train(3, data, placement={"user": 2, "both": 0}), unsharded(data))


@pytest.mark.parametrize("sizes", [(2, 3), (3, 1), (1, 4)])
def test_sharded_goes_on_from_a_snapshot_with_another_number_of_ranks(sizes, tmp_path):
    data, before, after = batches(8), *sizes

    def first(transport):
        c = Sharded(Collection(tables(), FEATURES, POOLING), transport)
        for prepared, staged in lookahead([part(b, transport.rank, before) for b in data[:5]], c, 3, prepare=Prepared):
            staged.apply(loss_gradient(staged.outputs(), prepared.weight))
        hbkit.snapshot.save(tmp_path, list(c.tables.values()), c.step, group=transport)

    def second(transport):
        whole = Collection(tables(), FEATURES, POOLING)
        hbkit.snapshot.load(tmp_path, list(whole.tables.values()), shard=(transport.rank, after))
        c = Sharded(whole, transport)
        for prepared, staged in lookahead([part(b, transport.rank, after) for b in data[5:]], c, 3, prepare=Prepared):
            staged.apply(loss_gradient(staged.outputs(), prepared.weight))
        return rows_of(c)

    assert run_ranks(first, Loopback.group(before, 20)) == [None] * before
    assert_close(merged(run_ranks(second, Loopback.group(after, 20))), unsharded(data))


@pytest.mark.parametrize("left_out", [(), ("last",)])
def test_sharded_batches_held_for_one_update_are_as_one_ranks(left_out):
    def accumulate(collection, data):
        held = []
        with lookahead(data, collection, 3, prepare=Prepared) as steps:
            for i, (prepared, staged) in enumerate(steps):
                grads = loss_gradient(staged.outputs(), prepared.weight)
                grads = {f: g for f, g in grads.items() if f not in left_out or i % 3}
                if i % 3 == 2:
                    staged.apply(grads, held)
                    held = []
                else:
                    staged.hold()
                    held.append((staged, grads))
        return rows_of(collection)

    def act(transport):
        mine = [part(b, transport.rank, transport.size) for b in data]
        return accumulate(Sharded(Collection(tables(), FEATURES, POOLING), transport), mine)

    data = batches(9)
    want = accumulate(Collection(tables(), FEATURES, POOLING), data)
    assert_close(merged(run_ranks(act, Loopback.group(3, 20))), want)


@pytest.mark.parametrize("wire", ["float16", "bfloat16", "int8"])
def test_sharded_narrow_wires_come_near(wire):
    data = batches(20)
    got, want = train(2, data, wire=wire), unsharded(data)
    assert_close(got, want, 0.1)
    with pytest.raises(AssertionError):
        assert_close(got, want, 1e-6)  # something was rounded


def test_sharded_reads_what_one_rank_reads_and_makes_nothing():
    data, seen = batches(3), batches(2, seed=9, keys=80)
    one = Collection(tables(), FEATURES, POOLING)
    for batch, staged in lookahead(data, one, 2):
        staged.apply(loss_gradient(staged.outputs(), batch["weight"]))
    start = rows_of(one)
    want = one.lookup(seen[0])

    def act(transport):
        whole = Collection(tables(), FEATURES, POOLING)
        for name, rows in start.items():
            fill(whole.tables[name], rows, transport)
        c = Sharded(whole, transport)
        out = c.lookup(part(seen[0], transport.rank, transport.size))
        again = []
        for _, staged in lookahead([part(b, transport.rank, transport.size) for b in seen], c, 4, train=False):
            again.append(staged.outputs())
            staged.close()
        for f in out:
            a, b = (o[f].values if f == "history" else o[f] for o in (out, again[0]))
            assert np.array_equal(a, b)
        assert len(again) == 2 and c.step == 3
        return out, sum(len(t) for t in c.tables.values())

    results = run_ranks(act, Loopback.group(3, 20))
    assert sum(n for _, n in results) == sum(map(len, start.values()))
    for f in FEATURES:
        if f == "history":
            assert np.array_equal(np.concatenate([o[f].values for o, _ in results]), want[f].values)
        else:
            assert np.array_equal(np.concatenate([o[f] for o, _ in results]), want[f])


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [3, 40, 41])
def test_sharded_delivers_every_row_once(size, n, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"user": pa.array(range(n)), "y": pa.array([0.5] * n)}), path, row_group_size=7)

    def act(transport):
        c = Sharded(Collection([Table("user", 2)]), transport)
        ds = hbkit.data.Dataset.from_parquet(str(path), shard=(transport.rank, size)).shuffle(3, 16).batch(4)
        seen, steps = [], 0
        for batch, staged in lookahead(ds.batches(), c, 4):
            out = staged.outputs()["user"]
            assert len(out) == len(batch["user"])
            seen += batch["user"].tolist()
            staged.apply({"user": np.zeros_like(out)})
            steps += 1
        return seen, steps, len(c.tables["user"])

    results = run_ranks(act, Loopback.group(size, 20))
    assert sorted(k for seen, _, _ in results for k in seen) == list(range(n))
    assert len({steps for _, steps, _ in results}) == 1 and sum(rows for *_, rows in results) == n


# --- misuse, and what one rank raises ----------------------------------------------------------------------------


def plain(transport, **more):
    return Sharded(Collection([Table("user", 2, optimizer=SGD(lr=1.0))]), transport, **more)


def some(n=6, rows=5):
    return [{"user": np.arange(i, i + rows)} for i in range(n)]


def test_sharded_settings_that_differ_are_shown_as_a_diff_on_every_rank():
    def act(t):
        return Sharded(Collection([Table("user", 2 + (t.rank == 1), admission=CountAdmission(2 + t.rank))]), t)

    for error in run_ranks(act, Loopback.group(3, 5)):
        assert isinstance(error, SchemaMismatch)
        assert "ranks 0 and 1 differ" in str(error) and "-dim of table user: 2" in str(error)
        assert "+dim of table user: 3" in str(error) and "CountAdmission(min_count=3)" in str(error)
    for error in run_ranks(lambda t: plain(t, wire="int8" if t.rank else "float32"), Loopback.group(2, 5)):
        assert isinstance(error, SchemaMismatch) and "+wire: int8" in str(error)
    with pytest.raises(InvalidArgument, match="no wire"):
        plain(Loopback.group(1)[0], wire="int4")
    with pytest.raises(InvalidArgument, match="placement"):
        plain(Loopback.group(1)[0], placement={"user": 1})


@pytest.mark.parametrize("depth", [0, 1, 8])
def test_sharded_data_that_raises_on_one_rank_ends_all_at_that_step(depth):
    def broken(rank):
        for i, batch in enumerate(some()):
            if rank == 1 and i == 3:
                raise Corrupt("a page's checksum differs", file="part-7.parquet", remedy="write it again")
            yield batch

    def act(t):
        c, steps = plain(t), 0
        try:
            with lookahead(broken(t.rank), c, depth) as pairs:
                for _, staged in pairs:
                    staged.apply({"user": np.ones_like(staged.outputs()["user"])})
                    steps += 1
        except Exception as e:
            return steps, e
        return steps, None

    before = threading.active_count()
    results = run_ranks(act, Loopback.group(3, 5))
    assert [steps for steps, _ in results] == [3, 3, 3] and threading.active_count() == before
    assert isinstance(results[1][1], Corrupt)
    for rank in (0, 2):
        error = results[rank][1]
        assert isinstance(error, TransportError) and error.place["peer"] == 1
        assert "rank 1 failed" in str(error) and "part-7.parquet" in str(error)


def test_sharded_gradient_that_is_not_finite_updates_nothing_anywhere_and_training_goes_on():
    def act(t):
        c = plain(t)
        before, errors = None, []
        for i, (_, staged) in enumerate(lookahead(some(), c, 2)):
            out = staged.outputs()["user"]
            grad = np.full_like(out, np.nan if i == 2 and t.rank == 1 else 0.1)
            before = rows_of(c)
            try:
                staged.apply({"user": grad})
            except Exception as e:
                errors.append(e)
                assert_same(rows_of(c), before)
                staged.close()
        return errors, c.step

    (a, steps), (b, _) = run_ranks(act, Loopback.group(2, 5))
    assert steps == 5 and isinstance(a[0], TransportError) and "training diverged" in str(a[0])
    assert len(a) == len(b) == 1 and isinstance(b[0], InvalidArgument)


def test_sharded_nonfinite_skip_passes_over_the_key_on_its_owner():
    def act(t):
        c = Sharded(Collection([Table("user", 2, nonfinite="skip")]), t, "int8")
        staged = c.stage({"user": np.arange(4)})
        grad = np.ones_like(staged.outputs()["user"])
        grad[2] = np.inf if t.rank else 1
        staged.apply({"user": grad})
        return c.stats()["user"]["skipped_updates"]

    assert sum(run_ranks(act, Loopback.group(2, 5))) == 1


def test_sharded_may_stop_early_and_look_ahead_again():
    def act(t):
        c = plain(t)
        for depth in (0, 3, 8):
            with lookahead(some(20), c, depth) as steps:
                for i, (_, staged) in enumerate(steps):
                    staged.apply({"user": np.ones_like(staged.outputs()["user"])})
                    if i == 4:
                        break
        lookahead(some(20), c, 2).close()  # not one was taken
        n = sum(1 for _, staged in lookahead(some(), c, 4) if staged.close() is None)
        assert n == 6 and c.step == 15
        return len(c._ahead)

    before = threading.active_count()
    assert run_ranks(act, Loopback.group(2, 5)) == [1, 1] and threading.active_count() == before


def test_sharded_evaluates_within_a_training_that_looks_ahead():
    def act(t):
        c, read = plain(t), []
        for _, staged in lookahead(some(), c, 8):
            staged.apply({"user": np.ones_like(staged.outputs()["user"])})
            for _, other in lookahead(some(2), c, 4, train=False):
                read.append(other.outputs()["user"])
                other.close()
            read.append(c.lookup({"user": np.arange(4)})["user"])
        return np.concatenate(read)

    a, b = run_ranks(act, Loopback.group(2, 5))
    assert np.array_equal(a, b)


def test_sharded_ranks_that_do_different_things_find_out():
    def act(t):
        c = plain(t)
        staged = [s for _, s in lookahead(some(2), c, 2)]
        staged[t.rank].outputs()  # rank 1 passes over a batch

    for error in run_ranks(act, Loopback.group(2, 2)):
        assert isinstance(error, TransportError) and "this rank is at rows of round" in str(error)

    def closes(t):
        c = plain(t)
        with lookahead(some(9), c, 2) as steps:
            for _, staged in steps:
                staged.close()
                if t.rank:
                    break

    error, none = run_ranks(closes, Loopback.group(2, 2))
    assert none is None and "rank 1 has closed its look-ahead" in str(error)

    def reads(t):
        return [s.close() for _, s in lookahead(some(), plain(t), 2, train=t.rank == 0)]

    assert all("looks ahead with train=" in str(e) for e in run_ranks(reads, Loopback.group(2, 2)))


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_sharded_error_within_with_reaches_the_others_at_once(error):
    def act(t):
        c = plain(t)
        with lookahead(some(9), c, 2) as steps:
            for i, (_, staged) in enumerate(steps):
                if t.rank == 1 and i == 2:
                    raise error("disk on fire")
                staged.apply({"user": np.ones_like(staged.outputs()["user"])})

    began = time.monotonic()
    first, second = run_ranks(act, Loopback.group(2, 30))
    assert time.monotonic() - began < 15 and isinstance(second, error)
    assert isinstance(first, TransportError) and f"rank 1: {error.__name__}: disk on fire" in str(first)


def test_sharded_misuse_is_refused():
    def act(t):
        c = plain(t)
        staged = c.stage({"user": np.arange(3)})
        with pytest.raises(Closed):
            staged.apply({})
        staged.close()
        with pytest.raises(Closed):
            staged.outputs()
        return staged.share, staged.transport is t

    assert run_ranks(act, Loopback.group(2, 5)) == [(0.5, True)] * 2


@pytest.mark.parametrize("wire", WIRES)
def test_sharded_counts_what_it_sends(wire):
    dim, n = 8, 100

    def act(t):
        c = Sharded(Collection([Table("t", dim)], {"a": "t"}), t, wire)
        staged = c.stage({"a": np.arange(n)})
        staged.apply({"a": np.ones_like(staged.outputs()["a"])})
        return c.stats()["t"], c.traffic(), len(c.tables["t"])

    results = run_ranks(act, Loopback.group(2, 5))
    for (stats, traffic, mine), (_, _, others) in zip(results, results[::-1], strict=True):
        assert mine + others == n
        assert stats["sent_keys_nbytes"] == 9 * others
        assert stats["sent_rows_nbytes"] == mine * row_nbytes(dim, wire)
        assert stats["sent_gradients_nbytes"] == others * row_nbytes(dim, wire)
        assert stats["sent_scales_nbytes"] == (n * 2 if wire == "int8" else 0)
        header = 48
        assert traffic["rows_nbytes"] == max(stats["sent_rows_nbytes"], 160) + header
        assert traffic["gradients_nbytes"] == stats["sent_gradients_nbytes"] + (others + 7) // 8 + header
        assert traffic["keys_nbytes"] == 4 + stats["sent_keys_nbytes"] + header
        assert [traffic[f"{kind}_messages"] for kind in ("keys", "rows", "gradients")] == [1, 1, 1]


def test_sharded_feedback_bounds_what_rounding_adds_up_to():
    """A gradient whose small column is far below a step of int8: what was left out is sent later."""
    grad, steps, keys = np.array([1.0, 0.001], np.float32), 100, {"user": np.arange(60)}

    def act(t, feedback):
        c, starts = Sharded(Collection([Table("user", 2, optimizer=SGD(lr=1.0))]), t, "int8", feedback=feedback), []
        for _ in range(steps):
            staged = c.stage(keys)
            out = staged.outputs()["user"]
            starts.append(c.tables["user"].lookup(keys["user"]))  # what this rank has itself, not rounded
            staged.apply({"user": np.tile(grad, (len(out), 1))})
        moved = starts[0] - c.tables["user"].lookup(keys["user"])
        mine = moved[:, 0] != 0
        return np.abs(moved[mine, 1] - grad[1] * steps).max(), moved.tobytes()

    step = 1 / 127
    kept = run_ranks(lambda t: act(t, 100), Loopback.group(2, 5))
    assert max(error for error, _ in kept) < 2 * step
    assert run_ranks(lambda t: act(t, 100), Loopback.group(2, 5)) == kept
    lost = run_ranks(lambda t: act(t, 0), Loopback.group(2, 5))
    assert max(error for error, _ in lost) > 2 * step


PLAIN = {"a": "a", "b": "b", "more": "b", "c": "c"}


def plain_batches(n=6, rows=200):
    """Global batches of single keys, of which some occur far more often than a block of sums holds."""
    rng = np.random.default_rng(1)
    weights = [rng.integers(1, 4, rows).astype(np.float32) for _ in range(n)]
    return [{f: rng.geometric(0.05, rows) * (i + 1) for i, f in enumerate(PLAIN)} | {"weight": w} for w in weights]


@pytest.mark.parametrize("left_out", [(), ("more",)], ids=["all", "one left out"])
@pytest.mark.parametrize("stack", [None, {"s": ["c", "a", "more"]}], ids=["apart", "stacked"])
@pytest.mark.parametrize("size, wire", [(1, "float32"), (2, "int8"), (3, "float32")])
def test_tables_of_ranks_together_give_what_each_gives(size, wire, stack, left_out):
    """Bit for bit: outputs, rows, state, frequencies and last steps, with ranks that have no rows or no weight."""

    def act(transport, together):
        made = [
            Table("a", 4, optimizer=Adagrad(lr=0.5), initializer=Normal(0, 1, seed=1)),
            Table("b", 4, optimizer=RowWiseAdagrad(lr=0.5), admission=CountAdmission(2)),
            Table("c", 4, optimizer=Adam(lr=0.1), nonfinite="skip"),
        ]
        for table in made:
            table.joinable = table.joinable and together
        placement = {"a": np.arange(1, 9)} if size > 1 else None
        c = Sharded(Collection(made, PLAIN, stack=stack), transport, wire, placement)
        seen = []
        for step, batch in enumerate(plain_batches()):
            n_rows = 0 if step == 2 and transport.rank else len(batch["a"]) - 7 * transport.rank
            mine = {name: column[transport.rank : n_rows : size] for name, column in batch.items()}
            weight = mine["weight"] * (step != 4 or transport.rank == 0)
            staged = c.stage(mine, ahead=step % 2 == 0, weight=float(weight.sum()))
            out = staged.outputs()
            seen += [out[name].copy() for name in sorted(out)]
            staged.apply({f: g for f, g in loss_gradient(out, weight).items() if f not in left_out})
        return seen, rows_of(c)

    results = []
    for together in (True, False):
        found = run_ranks(lambda t, together=together: act(t, together), Loopback.group(size, timeout=20))
        for r in found:
            if isinstance(r, BaseException):
                raise r
        results.append(found)
    np.testing.assert_equal(*results)
    assert sum(map(len, results[0][0][1].values())) > 20
