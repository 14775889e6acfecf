"""Held batches, checkpoints that name a commit, and collections from their descriptions."""

import json

import numpy as np
import pytest

from hbkit import Ragged, embedding, errors
from hbkit.embedding import Checkpoint, Collection, Table, build, describe
from hbkit.store import cached_ssd

BATCH = {"user": np.array([1, 2, 1, 5]), "tags": Ragged.from_lists([[1, 2], [], [3], [1]], np.int64)}


def collection(optimizer=None, **options):
    names = ("user", "tag")
    initializer = embedding.Normal(0, 0.1, seed=3)
    optimizer = optimizer or embedding.Adagrad(lr=0.1)
    tables = [Table(name, 4, initializer=initializer, optimizer=optimizer, **options) for name in names]
    return Collection(tables, {"user": "user", "tags": "tag", "seen": "user"}, {"tags": "mean", "seen": None})


def batch(n, seed):
    rng = np.random.default_rng(seed)
    lists = [rng.integers(0, 9, rng.integers(0, 4)).tolist() for _ in range(2 * n)]
    return {
        "user": rng.integers(0, 9, n),
        "tags": Ragged.from_lists(lists[:n], np.int64),
        "seen": Ragged.from_lists(lists[n:], np.int64).to_padded(4, pad=7),
    }


def gradients(outputs, seed):
    rng = np.random.default_rng(seed)
    shapes = {f: getattr(o, "values", o).shape for f, o in outputs.items()}
    return {f: rng.normal(size=shape).astype(np.float32) for f, shape in shapes.items()}


def rows(c):
    return {name: table.lookup(np.arange(9)) for name, table in c.tables.items()}


@pytest.mark.parametrize("last_held", [False, True])
@pytest.mark.parametrize("optimizer", [embedding.SGD(lr=0.5), embedding.Adam(lr=0.1)])
def test_held_batches_update_as_one(optimizer, last_held):
    c, d = collection(optimizer), collection(optimizer)
    parts = [batch(n, seed=n) for n in (3, 1, 5)]
    held = []
    for i, part in enumerate(parts):
        staged = c.stage(part, size=len(part["user"]) + i)
        held.append((staged, gradients(staged.outputs(), i)))
        if i < 2 or last_held:
            staged.hold()
            staged.close()
    (staged, last), n = held.pop(), [len(part["user"]) for part in parts]
    held[1][1].pop("user")  # the loss of one batch did not use a feature
    staged.apply(last, held)
    assert c.step == 1 and staged.state == held[0][0].state == "applied"
    tags = [part["tags"].lengths() for part in parts]
    whole = d.stage(
        {
            "user": np.concatenate([part["user"] for part in parts]),
            "tags": Ragged(
                np.concatenate([part["tags"].values for part in parts]),
                np.concatenate([[0], np.cumsum(np.concatenate(tags))]),
            ),
            "seen": np.concatenate([part["seen"] for part in parts]),
        }
    )
    whole.outputs()
    grads = [g for _, g in held] + [last]
    grads[1]["user"] = np.zeros((2, 4), np.float32)
    whole.apply({f: np.concatenate([g[f][:k] for g, k in zip(grads, n, strict=True)]) for f in last})
    for name in c.tables:
        np.testing.assert_allclose(rows(c)[name], rows(d)[name], rtol=1e-5, atol=1e-6)


def test_holding_out_of_turn_is_refused():
    c = collection()
    staged = c.stage(batch(3, 0))
    with pytest.raises(errors.Closed, match="was staged"):
        staged.hold()
    grads = gradients(staged.outputs(), 0)
    other = c.stage(batch(3, 0))
    with pytest.raises(errors.Closed, match="was staged"):
        staged.apply(grads, [(other, grads)])
    staged.hold()
    other.outputs()
    other.apply(grads, [(staged, grads)])
    with pytest.raises(errors.Closed, match="was applied"):
        other.apply(grads, [(staged, grads)])
    with pytest.raises(errors.Closed, match="was applied"):
        staged.hold()


def train(c, seed):
    staged = c.stage(batch(4, seed))
    staged.apply(gradients(staged.outputs(), seed))


def test_checkpoint_goes_back_to_the_commit_it_named(tmp_path):
    c = collection()
    checkpoint = Checkpoint(c, tmp_path / "rows")
    train(c, 0)
    state = json.loads(json.dumps(checkpoint.name()))
    assert checkpoint.name() == state  # nothing changed, so it is the same commit
    then = rows(c)
    train(c, 1)
    assert checkpoint.name()["commit"] != state["commit"]
    train(c, 2)
    checkpoint.load(state)
    assert c.step == 1 and checkpoint.name() == state
    other = collection()
    Checkpoint(other).load(state)  # by the path in the state
    for name in c.tables:
        np.testing.assert_array_equal(rows(c)[name], then[name])
        np.testing.assert_array_equal(rows(other)[name], then[name])
    (tmp_path / "rows").rename(tmp_path / "moved")
    Checkpoint(other, tmp_path / "moved").load(state)


def test_checkpoint_of_a_missing_commit_raises(tmp_path):
    c = collection()
    train(c, 0)
    with pytest.raises(errors.InvalidArgument, match=r"no snapshot.*user, tags, seen.*snapshot=path"):
        Checkpoint(c).name()
    state = Checkpoint(c, tmp_path / "rows").name()
    before = rows(c)
    for broken in ({**state, "commit": "c00000007"}, {**state, "snapshot": str(tmp_path / "none")}):
        with pytest.raises(errors.NotFound, match=broken["commit"]):
            Checkpoint(c).load(broken)
    train(c, 1)
    Checkpoint(c, tmp_path / "other").name()  # a commit of the same id
    with pytest.raises(errors.NotFound, match="digest"):
        Checkpoint(c).load({**state, "snapshot": str(tmp_path / "other")})
    for broken in ({}, None, {"commit": 1}):
        with pytest.raises(errors.SchemaMismatch, match="names no commit"):
            Checkpoint(c).load(broken)
    Checkpoint(c).load(state)
    np.testing.assert_array_equal(rows(c)["user"], before["user"])


def test_description_makes_the_same_collection():
    rule = embedding.Adam(lr=embedding.Warmup(0.1, 10), clip_norm=1.0)
    c = collection(rule, eviction=[embedding.IdleSteps(5)], evict_every=3, padding_key=7, default=[0.5] * 4)
    description = json.loads(json.dumps(describe(c)))
    d = build(description)
    assert describe(d) == description
    for seed in range(3):
        train(c, seed)
        train(d, seed)
    for name in c.tables:
        np.testing.assert_array_equal(rows(c)[name], rows(d)[name])
    assert describe(build(describe(collection())))["tables"][0]["default"] == 0.0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"admission": embedding.CountAdmission(2)}, "admission.*table user"),
        ({"optimizer": embedding.SGD(lr=lambda step: 0.1)}, "function.*table user"),
        ({"columns": {"a": embedding.Column(4)}}, "columns.*table user"),
        ({"on_evict": print, "eviction": [embedding.IdleSteps(5)]}, "on_evict.*table user"),
        ({"store": "ssd"}, "store.*table user"),
    ],
)
def test_description_refuses_what_json_cannot_say(tmp_path, options, says):
    if "store" in options:
        options = {"store": cached_ssd(tmp_path / "ssd", "1MiB")}
    c = Collection([Table("user", 4, **options)])
    with pytest.raises(errors.Unsupported, match=says):
        describe(c)
    c.close()


@pytest.mark.parametrize("broken", [{}, {"tables": [{"class": "os.system"}]}, {"tables": [{"initializer": {}}]}])
def test_description_that_is_none_is_refused(broken):
    with pytest.raises(errors.SchemaMismatch, match="no description"):
        build(broken)
