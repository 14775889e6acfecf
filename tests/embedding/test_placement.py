"""Where rows of sharded tables are: replicated, on one rank, hot keys apart; and the planner that decides it."""

import numpy as np
import pytest
from faults import run_ranks
from test_sharded import (
    FEATURES,
    POOLING,
    Prepared,
    assert_close,
    batches,
    loss_gradient,
    part,
    rows_of,
    tables,
    unsharded,
)

from hbkit.embedding import SGD, Adam, Collection, CountAdmission, IdleSteps, Sharded, Table, lookahead
from hbkit.embedding.placement import Load, Machine, measure, plan, traffic
from hbkit.errors import InvalidArgument, SchemaMismatch
from hbkit.shuffle import WIRES, Loopback, owner
from hbkit.snapshot import load, save

HOT = np.array([3, 7, 7, 0, 11, 12, 39, 1000])
PLACEMENTS = [{"item": "replicate"}, {"item": HOT}, {"user": "replicate", "item": HOT, "both": 1}]


def train(size, data, placement, wire="float32", make=tables, path=None, begin=None):
    """Rows of each rank after training; saved to `path` by all ranks together, or begun from there."""

    def act(transport):
        c = Sharded(Collection(make(), FEATURES, POOLING), transport, wire, placement)
        if begin is not None:
            load(begin, c.tables, shard=(transport.rank, size))
        mine = (part(b, transport.rank, size) for b in data)
        with lookahead(mine, c, 3, prepare=Prepared) as steps:
            for prepared, staged in steps:
                staged.apply(loss_gradient(staged.outputs(), prepared.weight))
        if path is not None:
            save(path, list(c.tables.values()), c.step, group=transport)
        rows = rows_of(c)
        c.close()
        return rows

    results = run_ranks(act, Loopback.group(size, timeout=20))
    for r in results:
        if isinstance(r, BaseException):
            raise r
    return results


def bits(line):
    row, state, freq, last = line
    return row.tobytes(), state.tobytes(), freq, last


def whole(results, placement):
    """One table of all ranks' rows. Where several hold a key they hold equal rows, and nobody holds what is not his."""
    out = {name: {} for name in results[0]}
    for rank, rows in enumerate(results):
        for name, some in rows.items():
            where = placement.get(name)
            for key, line in some.items():
                everywhere = isinstance(where, str) or (isinstance(where, np.ndarray) and key in where)
                if everywhere:
                    assert all(bits(other[name][key]) == bits(line) for other in results)
                elif isinstance(where, int):
                    assert rank == where
                else:
                    assert owner(np.array([key]), len(results))[0] == rank
                out[name][key] = line
    return out


@pytest.mark.parametrize("placement", PLACEMENTS, ids=["replicate", "hot", "all"])
def test_any_placement_gives_one_ranks_results(placement):
    data = batches(20)
    want = unsharded(data)
    for size in (2, 3):
        assert_close(whole(train(size, data, placement), placement), want)


@pytest.mark.parametrize("wire", WIRES)
def test_replicas_are_equal_to_the_bit_on_any_wire(wire):
    placement = PLACEMENTS[2]

    def make():
        return tables(Adam(lr=0.1))

    data = batches(15, rows=60)
    first = whole(train(3, data, placement, wire, make), placement)
    again = whole(train(3, data, placement, wire, make), placement)
    for name, rows in first.items():
        assert {k: bits(line) for k, line in rows.items()} == {k: bits(line) for k, line in again[name].items()}


def test_replicated_tables_evict_alike():
    def make():
        return [
            Table("user", 4, optimizer=SGD(lr=0.5), eviction=[IdleSteps(3)], evict_every=2),
            Table("item", 3, optimizer=SGD(lr=0.5), padding_key=0),
            Table("both", 4, optimizer=SGD(lr=0.5)),
        ]

    data = batches(20, keys=3000) + batches(20, keys=300)
    placement = {"user": "replicate"}
    got, want = whole(train(3, data, placement, make=make), placement), unsharded(data, make)
    assert 0 < len(want["user"]) < 300
    assert_close(got, want)


@pytest.mark.parametrize("placement", PLACEMENTS, ids=["replicate", "hot", "all"])
def test_placed_tables_are_saved_once_and_load_under_any_other_placement(placement, tmp_path):
    path, data = tmp_path / "snapshot", batches(12)
    want = whole(train(3, data[:6], placement, path=path), placement)
    alone = {t.name: t for t in tables()}
    load(path, alone)
    got = rows_of(Collection(list(alone.values()), FEATURES, POOLING))
    for name, rows in want.items():
        assert {k: bits(line) for k, line in rows.items()} == {k: bits(line) for k, line in got[name].items()}
    train(2, data[:1], {}, path=path, begin=path)  # a delta on top, by others
    for size, other in ((2, {"item": "replicate"}), (3, placement)):
        assert_close(whole(train(size, data[6:], other, begin=path), other), unsharded([*data[:6], data[0], *data[6:]]))


def test_reading_sends_nothing_for_replicated_rows():
    def act(transport):
        everything = dict.fromkeys(("user", "item", "both"), "replicate")
        c = Sharded(Collection(tables(), FEATURES, POOLING), transport, placement=everything)
        batch = part(batches(2)[0], transport.rank, transport.size)
        staged = c.stage(batch)
        staged.apply(loss_gradient(staged.outputs(), batch["weight"]))
        before = c.stats()
        c.lookup(batch)
        assert c.stats() == before
        return before

    for stats in run_ranks(act, Loopback.group(2, 20)):
        assert not isinstance(stats, BaseException), stats
        assert all(s["sent_rows_nbytes"] == 0 and s["sent_gradients_nbytes"] > 0 for s in stats.values())


def test_placements_that_cannot_be_are_refused():
    def sharded(placement, transport=None, **more):
        c = Collection([Table("user", 4, **more)], {"user": "user"})
        return Sharded(c, transport or Loopback.group(1)[0], placement=placement)

    for bad in ({"user": 1}, {"user": -1}, {"user": "everywhere"}, {"other": 0}, {"user": np.array([0.5])}):
        with pytest.raises(InvalidArgument, match="placement"):
            sharded(bad)
    for more in ({"admission": CountAdmission(2)}, {"eviction": [IdleSteps(5)]}):
        with pytest.raises(InvalidArgument, match="admission or eviction"):
            sharded({"user": HOT}, **more)
    with pytest.raises(InvalidArgument, match="admission or eviction"):
        sharded({"user": "replicate"}, admission=CountAdmission(2))
    for error in run_ranks(lambda t: sharded({"user": HOT[: 2 * t.rank + 2]}, t), Loopback.group(2, 5)):
        assert isinstance(error, SchemaMismatch) and "keys replicated" in str(error)


# --- what it costs, and the planner --------------------------------------------------------------------------------


def zipf(rng, n, keys=200_000):
    """Keys of which few are in most batches."""
    return (np.floor(keys ** rng.random(n)) - 1).astype(np.int64)


def clicks(seed, rank, n=600):
    rng = np.random.default_rng([seed, rank])
    return {"user": rng.integers(0, 50_000, n), "item": zipf(rng, n), "day": rng.integers(0, 7, n)}


def collection():
    dims = {"user": 16, "item": 24, "day": 8}
    return Collection([Table(name, dim) for name, dim in dims.items()], {name: name for name in dims})


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("placement", [{}, {"day": "replicate", "item": np.arange(64), "user": 0}], ids=["key", "all"])
def test_the_model_says_what_ranks_send(size, placement):
    n_steps = 4
    for wire in ("float32", "int8"):

        def act(transport, wire=wire):
            c = Sharded(collection(), transport, wire, placement)
            before = c.traffic()
            for step in range(n_steps):
                staged = c.stage(clicks(step, transport.rank))
                staged.apply({f: np.ones_like(v) for f, v in staged.outputs().items()})
            return {kind: n - before.get(kind, 0) for kind, n in c.traffic().items()}

        ranks = run_ranks(act, Loopback.group(size, 20))
        assert not [r for r in ranks if isinstance(r, BaseException)]
        loads = measure(collection(), [clicks(step, rank) for step in range(n_steps) for rank in range(size)])
        said = traffic(loads, size, wire, placement)
        per_step = {kind: sum(r.get(kind, 0) for r in ranks) / size / n_steps for kind in set().union(*ranks)}
        assert sum(per_step.get(f"{k}_messages", 0) for k in ("keys", "rows", "gradients")) == said.messages
        for kind, expected in zip(("keys", "rows", "gradients"), said[1:4], strict=True):
            assert per_step.get(f"{kind}_nbytes", 0) == pytest.approx(expected, rel=0.01), kind


def of(unique, dim=16, rows=10**6, **more):
    return Load(dim, unique, rows, **more)


def test_large_tables_go_by_key_and_small_ones_do_not_where_there_are_many_ranks():
    loads = {"user": of(4000), "item": of(2000, dim=64)} | {f"small{i}": of(3, rows=3) for i in range(6)}
    few, many = plan(loads, 2, "int8"), plan(loads, 64, "int8")
    assert "user" not in many.placement and "item" not in few.placement
    assert set(many.placement) == {f"small{i}" for i in range(6)}
    assert many.traffic.seconds(Machine()) < traffic(loads, 64, "int8").seconds(Machine())
    assert plan(loads, 1).placement == {}


def test_what_may_not_be_copied_is_not():
    loads = {"a": of(3, rows=3, may_replicate=False), "b": of(3, rows=10**9)}
    assert "replicate" not in plan(loads, 64).placement.values()


def test_hot_keys_of_one_rank_are_replicated_and_others_left():
    keys = np.arange(10_000)
    mine, presence = keys[owner(keys, 4) == 1][:200], np.full(200, 0.9)
    loads = {"skewed": of(300, keys=mine, presence=presence), "even": of(300, keys=keys[:200], presence=presence)}
    slow = Machine(bandwidth=1e7, block=0)
    found = plan(loads, 4, "int8", slow)
    assert set(found.placement) == {"skewed"} and set(found.placement["skewed"]) <= set(mine.tolist())
    assert found.traffic.seconds(slow) < traffic(loads, 4, "int8").seconds(slow)
    assert "times the mean" in str(found) and "skewed" in str(found)


def test_a_plan_is_said_in_words_and_works():
    batches = [clicks(step, 0) for step in range(3)]
    found = plan(measure(collection(), batches, rows={"user": 50_000}), 3, "int8")
    for text in ("user", "50,000", "placement", "by key", "3 ranks, int8"):
        assert text in str(found), str(found)

    def act(transport):
        c = Sharded(collection(), transport, "int8", found.placement)
        staged = c.stage(batches[0])
        staged.apply({f: np.ones_like(v) for f, v in staged.outputs().items()})

    assert run_ranks(act, Loopback.group(3, 20)) == [None] * 3
    with pytest.raises(InvalidArgument, match="no batches"):
        measure(collection(), [])
