"""Tables that take a batch together, and outputs that stand side by side, give what each table by itself gives."""

from __future__ import annotations

import numpy as np
import pytest

from hbkit._ext import share
from hbkit._ext.together import Together
from hbkit.embedding import (
    SGD,
    Adagrad,
    Adam,
    Collection,
    Constant,
    CountAdmission,
    Normal,
    RowWiseAdagrad,
    Table,
    TruncatedNormal,
    Uniform,
)
from hbkit.embedding.initializers import Initializer
from hbkit.errors import InvalidArgument, UnknownColumn
from hbkit.ragged import Ragged

FEATURES = ["a", "b", "c", "d"]


@pytest.fixture(scope="module", autouse=True, params=[1, 3])
def n_threads(request):
    """All that is here holds for one thread, and for several however little they have to do."""
    before = share.n_threads()
    share.use(request.param, 1)
    yield
    share.use(before)


def make(dim=16, joinable=True, stack=None, optimizer=None, tables=None, **options):
    tables = tables or dict(zip(FEATURES, FEATURES, strict=True))
    made = [Table(t, dim, optimizer=optimizer or RowWiseAdagrad(lr=0.1), **options) for t in set(tables.values())]
    for table in made:
        table.joinable = table.joinable and joinable
    return Collection(made, tables, stack={"s": stack} if stack else None)


def batches(n_steps=4, n_rows=300, seed=0):
    """Keys of which some occur far more often than a block of sums holds."""
    rng = np.random.default_rng(seed)
    return [{f: rng.geometric(0.05, n_rows) * (i + 1) for i, f in enumerate(FEATURES)} for _ in range(n_steps)]


def gradient(shape, step):
    g = np.random.default_rng(step).normal(size=shape).astype(np.float32)
    g[::7] = -0.0
    return g


def train(c, stack, size=None, steps=None):
    """Outputs of all steps by feature, with the same gradient for each feature whether stacked or not."""
    seen = []
    for step, batch in enumerate(steps or batches()):
        staged = c.stage(batch, size=size, ahead=True)
        outputs = staged.outputs()
        shape = (staged.size, len(FEATURES), c.dim("a"))
        g = gradient(shape, step)
        if stack:
            seen.append(
                {f: outputs["s"][:, i] for i, f in enumerate(stack)}
                | {f: outputs.get(f) for f in FEATURES if f not in stack}
            )
            grads = {"s": np.stack([g[:, FEATURES.index(f)] for f in stack], 1)}
            grads |= {f: g[:, i] for i, f in enumerate(FEATURES) if f not in stack}
        else:
            seen.append(outputs)
            grads = {f: g[:, i] for i, f in enumerate(FEATURES)}
        staged.apply(grads)
    return seen


def lines(c):
    return {
        name: [np.concatenate(column) for column in zip(*table.store.scan(), strict=True)]
        for name, table in c.tables.items()
    }


def same(a, b):
    for name, columns in a.items():
        for x, y in zip(columns, b[name], strict=True):
            np.testing.assert_array_equal(x.view(np.uint8), y.view(np.uint8))


@pytest.mark.parametrize("stack", [None, FEATURES, ["c", "a"]])
@pytest.mark.parametrize("dim", [1, 16, 21, 32])
@pytest.mark.parametrize("optimizer", [RowWiseAdagrad(lr=0.1), Adam(lr=0.1), SGD(lr=0.1, clip_norm=1.0)])
def test_together_gives_what_each_table_gives(stack, dim, optimizer):
    """Bit for bit: outputs, rows, state, frequencies and last steps."""
    together, alone = make(dim, stack=stack, optimizer=optimizer), make(dim, joinable=False, optimizer=optimizer)
    for one, other in zip(train(together, stack), train(alone, None), strict=True):
        for f in FEATURES:
            np.testing.assert_array_equal(one[f], other[f])
    same(lines(together), lines(alone))


@pytest.mark.parametrize("stack", [None, FEATURES])
def test_together_sums_a_shared_table_in_the_order_of_features(stack):
    """A table of several features adds their gradients as it would by itself; the last batch is padded."""
    shared = {"a": "t", "b": "u", "c": "t", "d": "t"}
    together = make(stack=stack, tables=shared, optimizer=Adagrad(lr=0.1))
    alone = make(joinable=False, tables=shared, optimizer=Adagrad(lr=0.1))
    for one, other in zip(train(together, stack, 512), train(alone, None, 512), strict=True):
        for f in FEATURES:
            np.testing.assert_array_equal(one[f], other[f])
            assert not one[f][300:].any()
    same(lines(together), lines(alone))


def test_together_heeds_admission_erased_keys_and_missing_gradients():
    """What happens between staging and the step, and what a table leaves out."""
    made = []
    for joinable in (True, False):
        c = make(joinable=joinable, admission=CountAdmission(3))
        for step, batch in enumerate(batches(6)):
            staged = c.stage(batch, ahead=True)
            for table in c.tables.values():
                table.store.erase(np.arange(0, 40, 3))
            staged.outputs()
            left_out = FEATURES[step % 5 : step % 5 + 1]
            staged.apply({f: gradient((300, 16), step) for f in FEATURES if f not in left_out})
        made.append(lines(c))
    same(*made)


class Doubled(Initializer):
    """An initializer that the slabs cannot draw themselves."""

    def __call__(self, table, keys, dim):
        return np.repeat(keys[:, None] * np.float32(2), dim, axis=1).astype(np.float32)


def test_together_makes_rows_as_each_table_does():
    """However they begin, with or without metadata and admission, in slots of erased rows and where slabs grow."""
    kinds = [Normal(1, 0.1, seed=3), Constant(0.5), TruncatedNormal(seed=1), Uniform(-1, 1), Doubled(), Normal()]
    made = []
    for joinable in (True, False):
        tables = [
            Table(
                f"t{i}",
                512,
                initializer=kind,
                optimizer=Adagrad() if i % 2 else SGD(),
                metadata=i != 2,
                admission=CountAdmission(2) if i == 5 else None,
            )
            for i, kind in enumerate(kinds)
        ]
        for table in tables:
            table.joinable = joinable
        c = Collection(tables)
        rng = np.random.default_rng(0)
        for step in range(4):
            staged = c.stage({t: rng.integers(0, 3000, 900) for t in c.tables})
            staged.outputs()
            staged.apply({t: np.full((900, 512), 0.1, np.float32) for t in c.tables})
            for table in tables:
                table.store.erase(np.arange(step, 3000, 5))
        for table in tables:
            table.store.validate()
        made.append(lines(c))
    assert min(len(columns[0]) for columns in made[0].values()) > 300
    same(*made)


def test_together_leaves_points_and_deltas_as_they_were():
    """What a point has does not change where new keys take the slots of erased ones, nor what a later one finds."""
    made = []
    for joinable in (True, False):
        c = make(joinable=joinable)
        stores = [c.tables[f].store for f in FEATURES]
        steps = batches(6)
        train(c, None, steps=steps[:2])
        points = [store.point() for store in stores]
        for store, point in zip(stores, points, strict=True):
            store.changes.name(point.mark, "then")
            store.erase(np.arange(0, 50, 2))
        train(c, None, steps=[{f: keys + 40 for f, keys in batch.items()} for batch in steps[2:4]])
        seen = [point.scan() for point in points]
        seen = [[np.concatenate(column) for column in zip(*chunks, strict=True)] for chunks in seen]
        for point in points:
            point.close()
        for table in c.tables.values():
            table.step = 0  # steps that began anew: stamps do not tell what they change
        train(c, None, steps=[{f: keys + 90 for f, keys in batch.items()} for batch in steps[4:]])
        for store in stores:
            point = store.point("then")
            seen.append([np.concatenate(column) for column in zip(*point.scan(), strict=True)])
            point.close()
        made.append(dict(enumerate(seen)))
    assert all(len(columns[0]) > 20 for columns in made[0].values())
    same(*made)


def test_together_reads_ahead_what_was_updated_since():
    """Rows of a batch that was staged long before are those of the step before it, and only reading makes none."""
    c, alone = make(stack=FEATURES), make(joinable=False)
    steps = batches()
    staged = [c.stage(batch, ahead=True) for batch in steps]
    for step, s in enumerate(staged):
        s.outputs()
        s.apply({"s": gradient((300, 4, 16), step)})
    train(alone, None, steps=steps)
    same(lines(c), lines(alone))
    new = {f: np.array([10**9]) for f in FEATURES}
    read = c.stage(new, train=False, ahead=True)
    assert not read.outputs()["s"].any()
    read.close()
    assert not c.lookup(new)["s"].any()
    same(lines(c), lines(alone))


def test_stack_of_what_cannot_go_together():
    """Lists, weights and tables of another kind are written into the stack one by one."""
    keys = Ragged(np.arange(6), (np.array([0, 1, 3, 6]),))
    c = Collection([Table("a", 4), Table("b", 4), Table("c", 4, padding_key=0)], stack={"s": ["c", "a", "b"]})
    batch = {"a": np.arange(3), "b": keys, "c": np.arange(3)}
    staged = c.stage(batch, size=4)
    out = staged.outputs()["s"]
    staged.apply({"s": np.ones((4, 3, 4), np.float32)})
    assert out.shape == (4, 3, 4) and not out[3].any() and not out[0, 0].any()
    np.testing.assert_array_equal(out[:3, 1], Table("a", 4).lookup(np.arange(3), train=True))
    assert len(c.tables["b"]) == 6
    unpooled = Collection([Table("b", 4)], pooling=None, stack={"s": ["b"]})
    with pytest.raises(InvalidArgument, match="without pooling"):
        unpooled.lookup({"b": keys})


def test_stack_errors():
    """Each names the stack or the feature."""
    tables = [Table("a", 4), Table("b", 4), Table("c", 8)]
    for stack in ({"s": ["a", "c"]}, {"a": ["b"]}, {"s": []}, {"s": ["a"], "t": ["a"]}, {"s": ["a", "a"]}):
        with pytest.raises(InvalidArgument):
            Collection(tables, stack=stack)
    with pytest.raises(UnknownColumn, match="z"):
        Collection(tables, stack={"s": ["z"]})
    c = Collection(tables, stack={"s": ["a", "b"]})
    staged = c.stage({f: np.arange(3) for f in "abc"})
    staged.outputs()
    for grads in ({"a": np.zeros((3, 4), np.float32)}, {"z": np.zeros((3, 4), np.float32)}):
        with pytest.raises(UnknownColumn):
            staged.apply(grads)
    with pytest.raises(InvalidArgument, match="s"):
        staged.apply({"s": np.zeros((3, 4), np.float32)})


@pytest.mark.parametrize("tables", [["a", "b"], ["a"]])
def test_together_refuses_gradients_that_are_not_finite(tables):
    """No table is updated, the feature or the key is named, and the batch can be applied after all."""
    c = Collection([Table(t, 4) for t in tables], stack={"s": tables})
    staged = c.stage({t: np.arange(100, 103) for t in tables})
    staged.outputs()
    before = lines(c)
    for bad in (np.nan, np.inf):
        g = np.ones((3, len(tables), 4), np.float32)
        g[1, -1, 2] = bad
        with pytest.raises(InvalidArgument, match="diverged") as e:
            staged.apply({"s": g})
        assert e.value.place["feature" if len(tables) > 1 else "key"] == (tables[-1] if len(tables) > 1 else 101)
        same(before, lines(c))
    staged.apply({"s": np.ones((3, len(tables), 4), np.float32)})


def test_together_refuses_what_does_not_fit():
    """Arrays from outside are checked before memory is touched."""
    store = Table("a", 4).store
    keys = np.arange(6)
    for n_rows, places in ((4, [(0, 0)]), (3, [(0, 0)]), (0, []), (6, [(0, 0), (0, 4)]), (6, [(-1, 0)])):
        with pytest.raises(InvalidArgument):
            Together([store.parts], [keys], places, [n_rows])
    batch = Together([store.parts], [keys], [(0, 4)], [6])
    with pytest.raises(InvalidArgument):
        batch.make([0])  # there is no room
    store.grow(6)
    with pytest.raises(InvalidArgument):
        Together([(*store.parts[:3], None)], [keys], [(0, 4)], [6]).make([0])
    for out in (np.zeros((6, 7), np.float32), np.zeros((5, 8), np.float32)):
        with pytest.raises(InvalidArgument):
            batch.gather([out])
        with pytest.raises(InvalidArgument):
            batch.sum([out])
    hyper = Adagrad(lr=0.1).hyper(1)
    with pytest.raises(InvalidArgument):
        batch.apply([1], [hyper], [0], 1)  # nothing was summed
    assert batch.sum([np.zeros((6, 8), np.float32)])
    batch.slots[0][:] = 10**9
    with pytest.raises(InvalidArgument):
        batch.gather([np.zeros((6, 8), np.float32)])
    with pytest.raises(InvalidArgument):
        batch.stamp([0], 1)
    with pytest.raises(InvalidArgument):
        batch.apply([1], [hyper], [0], 1)


def test_together_over_given_rows():
    """Rows and sums of keys that lie elsewhere, in an order of their own; what does not fit is refused."""
    keys = np.array([7, 5, 7, 9, 5, 5])
    batch = Together([3], [keys], [(0, 1), (0, 4)], [3])
    assert batch.keys[0].tolist() == [7, 5, 9] and batch.inverse(0).tolist() == [0, 1, 0, 2, 1, 1]
    for order, place in (([0, 1], [0, 1]), ([0, 1, 3], [0, 1, 2]), ([0, 1, 2], [-1, 1, 2])):
        with pytest.raises(InvalidArgument):
            batch.reorder(0, np.array(order), np.array(place))
    for number in (-1, 1):
        with pytest.raises(InvalidArgument):
            batch.inverse(number)
    batch.reorder(0, np.array([2, 0, 1]), np.array([1, 2, 0]))
    assert batch.keys[0].tolist() == [9, 7, 5] and batch.counts[0].tolist() == [1, 2, 3]
    rows, out = np.repeat(np.float32([[9], [7], [5]]), 3, 1), np.zeros((3, 7), np.float32)
    batch.gather([out], [rows])
    np.testing.assert_array_equal(out, np.c_[np.zeros(3), np.repeat(keys.reshape(2, 3).T, 3, 1)])
    with pytest.raises(InvalidArgument):
        batch.gather([out], [rows[:2]])
    with pytest.raises(InvalidArgument):
        batch.sums()  # nothing was summed
    assert batch.sum([np.ones((3, 7), np.float32)])
    np.testing.assert_array_equal(batch.sums()[0], np.float32([[1], [2], [3]]).repeat(3, 1))
    with pytest.raises(InvalidArgument):
        batch.sums()  # they were taken
    for tables, stands in (([0], None), ([3], [keys[:2]]), ([3], [])):
        with pytest.raises(InvalidArgument):
            Together(tables, [keys], [(0, 0), (0, 3)], [3], stands)
    counted = Together([3], [keys], [(0, 0), (0, 3)], [3], [np.arange(6)])
    assert counted.counts[0].tolist() == [2, 10, 3]
    with pytest.raises(InvalidArgument):
        counted.reorder(0, np.arange(3), np.arange(3))
