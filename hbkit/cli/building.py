"""What a training is made of: columns, tables, model and rows, from settings that a snapshot keeps."""

from __future__ import annotations

import importlib
from dataclasses import asdict, fields
from types import ModuleType
from typing import Any

import numpy as np

import hbkit
from hbkit.cli.columns import Columns, choose, key_field
from hbkit.cli.console import note
from hbkit.data import Dataset, Field
from hbkit.embedding import Collection, Normal, Table
from hbkit.errors import InvalidArgument, Unsupported
from hbkit.shuffle import Transport

__all__ = [
    "adapter",
    "build",
    "check_label",
    "choose_columns",
    "columns_of",
    "dataset",
    "group_field",
    "settings_of",
]

MODELS = ("dlrm", "deepfm", "xdeepfm", "dcnv2", "pnn", "mmoe", "din")
BACKENDS = ("torch", "tensorflow")
# Rows' optimizers by name; the dense part takes the nearest one of the framework.
OPTIMIZERS = {
    "sgd": ("SGD", "sgd"),
    "adagrad": ("Adagrad", "adagrad"),
    "rowwise-adagrad": ("RowWiseAdagrad", "adagrad"),
    "adam": ("Adam", "adam"),
    "adamw": ("AdamW", "adamw"),
    "rowwise-adam": ("RowWiseAdam", "adam"),
    "ftrl": ("Ftrl", "adagrad"),
}
SHUFFLE_ROWS = 1 << 20
INITIAL_STD = 0.01


def choose_columns(ds: Dataset, label: list[str], dense: list[str], sparse: list[str]) -> Columns:
    """`choose` of a data set's columns, and say what was chosen; there must be keys."""
    columns = choose(ds.schema, ds.stats()["unsupported"], label, dense, sparse)
    if not columns.sparse:
        raise InvalidArgument("no column of keys", remedy="name integer, string or list columns in --sparse")
    for what, text in columns.describe().items():
        note(f"{what}: {text}")
    return columns


def columns_of(settings: dict[str, Any]) -> Columns:
    """The columns that `settings_of` took."""
    return Columns(
        settings["label"],
        settings["dense"],
        settings["sparse"],
        [Field(**f) for f in settings["fields"]],
        newest=settings.get("newest", {}),
    )


def settings_of(columns: Columns, **options: Any) -> dict[str, Any]:
    """What `build` needs to make the same model again, as JSON keeps it: options and columns."""
    return {
        **options,
        "label": columns.label,
        "dense": columns.dense,
        "sparse": columns.sparse,
        "fields": [_to_json(f) for f in columns.fields],
        "newest": columns.newest,
    }


def adapter(backend: str) -> ModuleType:
    """``hbkit.torch`` or ``hbkit.tensorflow``."""
    try:
        return importlib.import_module(f"hbkit.{backend}")
    except ImportError as e:
        raise Unsupported(f"backend {backend} cannot be loaded", remedy=str(e)) from e


def build(
    settings: dict[str, Any], transport: Transport | None = None, wire: str = "float32", **trained: Any
) -> tuple[ModuleType, Any, Collection]:
    """The adapter, a trainer and its tables, as `settings` say; equal settings give equal initial values.

    The tables are sharded where there is a `transport`. What else is `trained` goes to the trainer.
    """
    hb = adapter(settings["backend"])
    rows, dense_optimizer = OPTIMIZERS[settings["optimizer"]]
    make = hb.models.MODELS[settings["model"]]
    past = settings.get("sequences", {})
    single = [name for name in settings["sparse"] if name not in past]
    tables = [
        Table(
            name,
            make.row_dim(settings["dim"]),
            key_dtype="uint64" if field.get("dtype") is None and field.get("hash_to") is None else "int64",
            initializer=Normal(0.0, INITIAL_STD, seed=settings["seed"]),
            optimizer=getattr(hbkit.embedding, rows)(lr=settings["lr"]),
        )
        for name, field in ((f["name"], f) for f in settings["fields"] if f["name"] in single)
    ]
    features = {name: past.get(name, name) for name in settings["sparse"]}
    pooling = {name: None if name in past else "mean" for name in features}
    embeddings: Any = Collection(tables, features, pooling, make.stack(single))
    if transport is not None:
        embeddings = hb.distributed.shard(embeddings, transport, wire)
    hb.training.seed(settings["seed"])
    options: dict[str, Any] = {"features": single, "dim": settings["dim"], "n_dense": len(settings["dense"])}
    if settings["model"] == "mmoe":
        options["n_tasks"] = 1 if isinstance(settings["label"], str) else len(settings["label"])
    if settings["model"] == "din":
        options["sequences"] = past
    trainer = hb.training.Trainer(
        make(**options), embeddings, optimizer=dense_optimizer, lr=settings["dense_lr"], **trained
    )
    if transport is not None and transport.rank:
        hb.training.seed(settings["seed"] + transport.rank)  # of dropout, which is not to drop the same everywhere
    return hb, trainer, trainer.collection


def dataset(data: str, columns: Columns, batch_size: int, shard: tuple[int, int] = (0, 1)) -> Dataset:
    """The rows of the columns, in batches."""
    ds = Dataset.from_parquet(data, columns.fields, shard).supervised(columns.label).batch(batch_size)
    return ds.map(columns.cut) if columns.newest else ds


def group_field(name: str | None, whole: Dataset) -> dict[str, Any] | None:
    """How the column to group by is read."""
    if name is None:
        return None
    kind = whole.schema.get(name)
    if kind is None or kind.ragged_rank or kind.dtype.startswith("float"):
        raise InvalidArgument(
            f"{name!r} is no column of one key a row", remedy=f"group by one of {', '.join(whole.schema)}"
        )
    return _to_json(key_field(name, kind))


def check_label(data: str, columns: Columns, shard: tuple[int, int] = (0, 1)) -> None:
    """Nulls and values other than 0..1 in the labels, before anything is trained."""
    for batch in Dataset.from_parquet(data, columns.fields[: len(columns.labels)], shard).batch(SHUFFLE_ROWS):
        for name in columns.labels:
            values = np.asarray(batch[name])
            wrong = (values < 0) | (values > 1) | ~np.isfinite(values)
            if wrong.any():
                raise InvalidArgument(
                    f"label {values[wrong][0]:g} is not a click probability",
                    file=data,
                    column=name,
                    remedy="labels are 0 or 1 (or between); convert the column first",
                )


def _to_json(field: Field) -> dict[str, Any]:
    """A Field as keyword arguments that JSON keeps."""
    defaults = {f.name: f.default for f in fields(Field)}
    return {k: v for k, v in asdict(field).items() if k == "name" or v != defaults[k]}
