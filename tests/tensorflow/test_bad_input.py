"""Bad input ends in one clear error that names the feature or column: one table of cases. (PyTorch has the twin.)"""

import numpy as np
import pytest
import tensorflow as tf

import hbkit
import hbkit.tensorflow as hb
from hbkit import embedding, errors

KEYS = {"user": np.array([1, 2]), "item": np.array([3, 4]), "tags": np.zeros((2, 1), np.int64)}


def staged(change=dict, device=None):
    """A case: a dataset's columns are changed, and staged."""
    return lambda make: list(hb.pipeline(make.clicks(100, 64).map(change), make.collection(), device=device))


def raw(**columns):
    """A case: columns are given to the module."""
    return lambda make: hb.nn.EmbeddingCollection(make.collection())({**KEYS, **columns})


def applied(grads):
    """A case: ``grads(step)`` is applied."""

    def run(make):
        for step in hb.pipeline(make.clicks(100, 64), make.collection()):
            step.apply(grads(step))

    return run


def late(make):
    with hb.pipeline(make.clicks(100, 64), make.collection()) as steps:
        step = next(steps)
    step.apply({"user": step.embeddings["user"]})


def closed(make):
    module = hb.nn.EmbeddingCollection(make.collection())
    module.close()
    return hb.pipeline(make.clicks(100, 64), module)


def deep(columns):
    return hbkit.Ragged.from_lists([[[1]]] * len(columns["age"]), np.int64)


def without(name):
    return lambda columns: {n: c for n, c in columns.items() if n != name}


def words(columns):
    return hbkit.Strings.from_list(["a"] * len(columns["age"]))


CASES = {
    # dtypes
    "float keys": (staged(lambda c: {**c, "item": c["item"].astype("f4")}), errors.InvalidArgument, "float32.*item"),
    "float keys, raw": (raw(item=tf.ones(2)), errors.InvalidArgument, "float32.*feature item.*cast"),
    "words as keys": (staged(lambda c: {**c, "user": words(c)}), errors.InvalidArgument, "Strings.*user.*hash_to"),
    "words as input": (staged(lambda c: {**c, "word": words(c)}), errors.InvalidArgument, "Strings.*column word"),
    "words as label": (staged(lambda c: {**c, "click": words(c)}), errors.InvalidArgument, "Strings.*column click"),
    "gradients of another shape": (
        applied(lambda s: {"user": s.embeddings["user"][:, 1:]}),
        errors.InvalidArgument,
        r"float32\[64, 7\].*feature user.*float32\[64, 8\]",
    ),
    "gradients of another dtype": (
        applied(lambda s: {"item": tf.ones((64, 8), tf.int32)}),
        errors.InvalidArgument,
        "gradient of int32.*feature item",
    ),
    # devices
    "no such device": (staged(device="meta:x"), errors.InvalidArgument, "device='meta:x'"),
    "a device that is not here": (staged(device="GPU:77"), errors.DeviceUnavailable, "no device 'GPU:77'"),
    # features, tables and columns
    "no table": (
        lambda make: embedding.Collection([embedding.Table("t", 2)], {"user": "users"}),
        errors.UnknownColumn,
        "no table 'users'.*feature user",
    ),
    "no feature": (staged(without("item")), errors.UnknownColumn, "not in the batch.*feature item"),
    "no label": (staged(without("click")), errors.UnknownColumn, "not in the batch.*column click"),
    "no gradient": (
        applied(lambda s: dict.fromkeys(s.embeddings)),
        errors.Closed,
        "gradient.*feature user, item, tags",
    ),
    "gradient of no feature": (
        applied(lambda s: {"city": s.embeddings["user"]}),
        errors.UnknownColumn,
        "unknown feature 'city'",
    ),
    "no such column": (lambda make: make.clicks().select(["click", "x"]), errors.UnknownColumn, "'x'"),
    # lists where there should be none
    "lists as input": (staged(lambda c: {**c, "more": c["tags"]}), errors.InvalidArgument, "Ragged.*column more"),
    "lists as label": (staged(lambda c: {**c, "click": c["tags"]}), errors.InvalidArgument, "Ragged.*column click"),
    "lists named label": (lambda make: make.clicks().supervised("tags"), errors.SchemaMismatch, "column tags"),
    "lists of lists": (staged(lambda c: {**c, "tags": deep(c)}), errors.InvalidArgument, "ragged_rank=2.*feature tags"),
    "sparse keys of three dimensions": (
        raw(tags=tf.sparse.from_dense([[[1]], [[2]]])),
        errors.Unsupported,
        "3 dimensions.*feature tags",
    ),
    "a cube of keys": (raw(user=tf.zeros((2, 2, 2), tf.int64)), errors.InvalidArgument, "feature user"),
    "rows that disagree": (raw(item=tf.zeros(3, tf.int64)), errors.InvalidArgument, "3 rows where.*feature item"),
    # nothing
    "an empty batch": (
        lambda make: hb.nn.EmbeddingCollection(make.collection())({}),
        errors.UnknownColumn,
        "feature user.*the batch has nothing",
    ),
    "no batches": (lambda make: unbatched(make).loader(), errors.InvalidArgument, "batch"),
    "no batches, staged": (
        lambda make: hb.pipeline(unbatched(make), make.collection()),
        errors.InvalidArgument,
        "batch",
    ),
    # too late
    "applied after its time": (late, errors.Closed, "was closed.*feature user, item, tags"),
    "a closed module": (closed, errors.Closed, "closed.*feature user, item, tags"),
}


def unbatched(make):
    return hb.data.Dataset.from_parquet(make.clicks()._plan.units[0].file.path)


@pytest.fixture
def make(clicks, collection):
    class Make:
        pass

    Make.clicks, Make.collection = staticmethod(clicks), staticmethod(collection)
    return Make


@pytest.mark.usefixtures("no_threads_left")
@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_error_by_name(make, case):
    run, error, says = CASES[case]
    with pytest.raises(error, match=says) as caught:
        run(make)
    assert "\n" not in str(caught.value)


def test_dataset_without_rows_gives_no_steps(clicks, collection):
    import pyarrow.compute as pc

    assert list(hb.pipeline(clicks(100, 64).filter(pc.field("age") < 0), collection())) == []
