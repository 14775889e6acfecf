"""``hbkit train`` and ``hbkit evaluate``: Parquet to a trained, saved model, and its figures again from the save."""

from __future__ import annotations

import importlib
import math
import time
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import numpy as np

import hbkit
from hbkit.cli.columns import Columns, choose
from hbkit.cli.commits import Commits, Every, committed, every
from hbkit.cli.console import note, progress, summary
from hbkit.data import Dataset, Field
from hbkit.embedding import Collection, Normal, Table
from hbkit.errors import InvalidArgument, NotFound, SchemaMismatch, Unsupported
from hbkit.parquet import File, list_files
from hbkit.snapshot.place import place_of

__all__ = ["evaluate", "train"]

MODELS = ("dlrm", "deepfm")
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


def _names(_: click.Context, __: click.Parameter, value: Any) -> list[str]:
    """``a,b`` as names."""
    return [part.strip() for part in (value or "").split(",") if part.strip()]


def _config(ctx: click.Context, _: click.Parameter, path: str | None) -> str | None:
    """Take what a TOML file says as the defaults of the other options."""
    if path is None:
        return None
    try:
        values = tomllib.loads(Path(path).read_text())
    except FileNotFoundError:
        raise NotFound(f"no such file {path}", remedy="give --config the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise InvalidArgument(f"not TOML: {e}", file=path, remedy='write lines such as model = "deepfm"') from None
    known = {p.name for p in ctx.command.params if p.name not in ("config", "help")}
    values = {k.replace("-", "_"): v for k, v in values.items()}
    for name in values:
        if name not in known:
            raise InvalidArgument(f"unknown name {name!r}", file=path, remedy=f"use {', '.join(sorted(known))}")
    text = {k: ",".join(map(str, v)) if isinstance(v, list) else v for k, v in values.items()}
    ctx.default_map = {**(ctx.default_map or {}), **text}
    return path


@click.command()
@click.option("--config", callback=_config, is_eager=True, help="TOML file of these options' names; the line wins.")
@click.option("--data", help="Parquet files to train on: file, directory, glob or URI.")
@click.option(
    "--follow", metavar="DIR", help="Instead: directory or URI; train on its Parquet files as they come, once each."
)
@click.option("--label", required=True, help="Column of 0 and 1 to predict.")
@click.option("--dense", callback=_names, help="Dense columns, a,b. Inferred (floats) if no column is named.")
@click.option(
    "--sparse", callback=_names, help="Key columns, c,d:ragged. Inferred (integers, strings, lists) likewise."
)
@click.option("--model", type=click.Choice(MODELS), default="deepfm", show_default=True)
@click.option("--backend", type=click.Choice(BACKENDS), default="torch", show_default=True)
@click.option("--dim", type=click.IntRange(1), default=16, show_default=True, help="Width of the embeddings.")
@click.option("--batch-size", type=click.IntRange(1), default=4096, show_default=True)
@click.option("--epochs", type=click.IntRange(1), default=1, show_default=True)
@click.option("--optimizer", type=click.Choice(list(OPTIMIZERS)), default="adagrad", show_default=True)
@click.option("--lr", type=float, default=0.05, show_default=True, help="Learning rate of the embeddings.")
@click.option("--dense-lr", type=float, default=0.01, show_default=True, help="Learning rate of the dense part.")
@click.option("--eval-data", help="Parquet files to evaluate on afterwards.")
@click.option("--save", help="Directory or URI of the snapshot; each training adds a commit.")
@click.option("--save-every", callback=every, metavar="EVERY", help="Commit meanwhile too: each 60s, or 500steps.")
@click.option(
    "--resume", is_flag=True, help="Go on from the newest commit of --save, exactly; begin where there is none."
)
@click.option(
    "--publish-every",
    callback=every,
    metavar="EVERY",
    default="10s",
    show_default=True,
    help="With --follow: how often to commit what changed, in seconds or steps.",
)
@click.option(
    "--idle-exit", type=float, metavar="SECONDS", help="With --follow: end when no new file came for so long."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of initial values and the order of rows.")
@click.argument("extra", nargs=-1, metavar="")
def train(
    config: str | None,
    data: str | None,
    follow: str | None,
    label: str,
    dense: list[str],
    sparse: list[str],
    model: str,
    backend: str,
    dim: int,
    batch_size: int,
    epochs: int,
    optimizer: str,
    lr: float,
    dense_lr: float,
    eval_data: str | None,
    save: str | None,
    save_every: Every | None,
    resume: bool,
    publish_every: Every,
    idle_exit: float | None,
    seed: int,
    extra: tuple[str, ...],
) -> None:
    """Train a click model on Parquet files, evaluate it and save it.

    The exit status is 0 only if training, evaluation and saving succeeded.

    With --follow, files are taken once each, in order of (time of change, name), as soon as they are complete; what was
    learnt is committed to --save as deltas. SIGINT or SIGTERM ends it after a last commit. The same command goes on
    with the rows that no commit has.
    """
    if extra:
        raise InvalidArgument(
            f"{len(extra)} arguments belong to no option, the first is {extra[0]}",
            remedy="put a glob in quotes, as in --data 'clicks/*.parquet'",
        )
    options = {
        "model": model,
        "backend": backend,
        "dim": dim,
        "optimizer": optimizer,
        "lr": lr,
        "dense_lr": dense_lr,
        "seed": seed,
        "batch_size": batch_size,
    }
    if (data is None) == (follow is None):
        raise InvalidArgument("neither --data nor --follow, or both", remedy="name the files in one of them")
    if save is None and (follow is not None or save_every is not None or resume):
        raise InvalidArgument("no --save", remedy="name the directory of the snapshot")
    if follow is not None:
        if epochs != 1 or eval_data is not None or save_every is not None:
            raise InvalidArgument(
                "--epochs, --eval-data or --save-every with --follow", remedy="leave them out; see --publish-every"
            )
        from hbkit.cli.follow import follow as follow_files

        assert save is not None
        follow_files(follow, label, dense, sparse, save, publish_every, idle_exit, options)
        return
    assert data is not None
    columns = choose_columns(Dataset.from_parquet(data), label, dense, sparse)
    check_label(data, columns)
    # What is wrong with the evaluation data or the place of the save must be said before hours of training, not after.
    if eval_data is not None:
        dataset(eval_data, columns, batch_size)
    if save is not None:
        place_of(save).prepare()
    settings = settings_of(columns, **options)
    hb, trainer, collection = build(settings)
    ds = dataset(data, columns, batch_size).shuffle(seed, SHUFFLE_ROWS)
    figures: dict[str, float] | None = None
    first, commits = 0, None
    if save is not None:
        loaded = committed(save, settings) if resume else None
        if loaded is not None:
            trainer.load(save, ds, loaded.commit)
            first = ds.state_dict()["epoch"]
            note(f"continuing from commit {loaded.commit}, step {collection.step}")

        def state() -> dict[str, Any]:
            return {"train": {**settings, "figures": figures}}

        commits = Commits(trainer, save, save_every, state, "latest" if loaded is not None else None)
    losses, n_rows, started = Smoothed(), 0, time.perf_counter()
    for epoch in range(first, epochs):
        title = "training" if epochs == 1 else f"epoch {epoch + 1}/{epochs}"
        with progress(title, ds.n_rows, "rows") as bar:
            report = reporter(bar, losses, collection)

            def on_step(n: int, loss: float, report: Callable[[int, float], None] = report) -> None:
                nonlocal n_rows
                n_rows += n
                report(n, loss)
                if commits is not None:
                    commits.step()

            trainer.fit(ds.set_epoch(epoch), on_step=on_step)
    seconds = time.perf_counter() - started
    result: dict[str, Any] = {
        "model": f"{model} ({backend}), dim {dim}",
        "rows": f"{n_rows:,}" + (f" ({epochs} epochs)" if epochs > 1 else ""),
        "samples/s": f"{n_rows / seconds:,.0f}",
        "training loss": f"{losses.value:.4f}",
    }
    if eval_data is not None:
        figures = measure(hb, trainer, dataset(eval_data, columns, batch_size), eval_data)
        result |= _show(figures)
    result |= {f"keys in {name}": f"{len(table):,}" for name, table in collection.tables.items()}
    if save is not None and commits is not None:
        commit = commits.commit()
        hbkit.snapshot.verify(save)
        result["saved"] = f"{save} (commit {commit}, verified)"
    summary("trained", result)
    if save is not None:
        again = eval_data or "'<parquet files>'"
        note(f"next: hbkit evaluate {save} --data {again}")
    else:
        note("next: add --save DIR to keep the model")


@click.command()
@click.argument("path")
@click.option("--data", required=True, help="Parquet files to evaluate on: file, directory, glob or URI.")
@click.option("--backend", type=click.Choice(BACKENDS), help="The one it was trained with when left out.")
def evaluate(path: str, data: str, backend: str | None) -> None:
    """Load a model that `hbkit train` saved at PATH and evaluate it."""
    loaded = hbkit.snapshot.load(path, [])
    settings = loaded.state.get("train")
    if not isinstance(settings, dict) or "dense" not in loaded.state:
        raise SchemaMismatch("the snapshot holds no model", file=path, remedy="give a path that hbkit train saved to")
    if backend not in (None, settings["backend"]):
        raise InvalidArgument(
            f"the dense part was saved by {settings['backend']}",
            file=path,
            remedy="leave --backend out; the tables alone load under either framework",
        )
    hb, trainer, collection = build(settings)
    hbkit.snapshot.load(path, list(collection.tables.values()))
    trainer.load_dense_state(loaded.state["dense"])
    figures = measure(hb, trainer, dataset(data, columns_of(settings), settings["batch_size"]), data)
    result: dict[str, Any] = {"model": f"{settings['model']} ({settings['backend']}), commit {loaded.commit}"}
    result |= _show(figures) | {f"keys in {n}": f"{len(t):,}" for n, t in collection.tables.items()}
    summary("evaluated", result)


def choose_columns(ds: Dataset, label: str, dense: list[str], sparse: list[str]) -> Columns:
    """`choose` of a data set's columns, and say what was chosen; there must be keys."""
    columns = choose(ds.schema, ds.stats()["unsupported"], label, dense, sparse)
    if not columns.sparse:
        raise InvalidArgument("no column of keys", remedy="name integer, string or list columns in --sparse")
    for what, text in columns.describe().items():
        note(f"{what}: {text}")
    return columns


def columns_of(settings: dict[str, Any]) -> Columns:
    """The columns that `settings_of` took."""
    return Columns(settings["label"], settings["dense"], settings["sparse"], [Field(**f) for f in settings["fields"]])


def settings_of(columns: Columns, **options: Any) -> dict[str, Any]:
    """What `build` needs to make the same model again, as JSON keeps it: options and columns."""
    return {
        **options,
        "label": columns.label,
        "dense": columns.dense,
        "sparse": columns.sparse,
        "fields": [_to_json(f) for f in columns.fields],
    }


def build(settings: dict[str, Any]) -> tuple[ModuleType, Any, Collection]:
    """The adapter, a trainer and its tables, as `settings` say; equal settings give equal initial values."""
    try:
        hb = importlib.import_module(f"hbkit.{settings['backend']}")
    except ImportError as e:
        raise Unsupported(f"backend {settings['backend']} cannot be loaded", remedy=str(e)) from e
    rows, dense_optimizer = OPTIMIZERS[settings["optimizer"]]
    make = hb.models.MODELS[settings["model"]]
    tables = [
        Table(
            name,
            make.row_dim(settings["dim"]),
            key_dtype="uint64" if field.get("dtype") is None and field.get("hash_to") is None else "int64",
            initializer=Normal(0.0, INITIAL_STD, seed=settings["seed"]),
            optimizer=getattr(hbkit.embedding, rows)(lr=settings["lr"]),
        )
        for name, field in ((f["name"], f) for f in settings["fields"] if f["name"] in settings["sparse"])
    ]
    collection = Collection(tables, pooling="mean")
    hb.training.seed(settings["seed"])
    model = make(features=settings["sparse"], dim=settings["dim"], n_dense=len(settings["dense"]))
    trainer = hb.training.Trainer(model, collection, optimizer=dense_optimizer, lr=settings["dense_lr"])
    return hb, trainer, collection


def measure(hb: ModuleType, trainer: Any, ds: Dataset, data: str) -> dict[str, float]:
    """AUC, log loss and rows of a data set, and its Bayes-optimal AUC where its files state it."""
    auc, log_loss, n = hb.metrics.AUC(), hb.metrics.LogLoss(), 0
    with progress("evaluating", ds.n_rows, "rows") as bar:
        for label, score, weight in trainer.predict(ds):
            auc.update(label, score, weight)
            log_loss.update(label, score, weight)
            n += len(label)
            bar.update(len(label))
    figures = {"auc": float(auc.result()), "log_loss": float(log_loss.result()), "rows": float(n)}
    ceilings = {File(f).metadata.get("hbkit.bayes_auc") for f in list_files(data)}
    if len(ceilings) == 1 and (ceiling := ceilings.pop()) is not None:
        figures["bayes_auc"] = float(ceiling)
    return figures


def _show(figures: dict[str, float]) -> dict[str, str]:
    shown = {
        "evaluated rows": f"{figures['rows']:,.0f}",
        "AUC": f"{figures['auc']:.6f}",
        "log loss": f"{figures['log_loss']:.6f}",
    }
    if "bayes_auc" in figures:
        shown["AUC of the data's Bayes-optimal model"] = f"{figures['bayes_auc']:.4f}"
    return shown


def dataset(data: str, columns: Columns, batch_size: int) -> Dataset:
    """The rows of the columns, in batches."""
    return Dataset.from_parquet(data, columns.fields).supervised(columns.label).batch(batch_size)


def check_label(data: str, columns: Columns) -> None:
    """Nulls and values other than 0..1 in the label, before anything is trained."""
    label = Dataset.from_parquet(data, [columns.fields[0]]).batch(SHUFFLE_ROWS)
    for batch in label:
        values = np.asarray(batch[columns.label])
        if ((values < 0) | (values > 1) | ~np.isfinite(values)).any():
            raise InvalidArgument(
                f"label {values[(values < 0) | (values > 1) | ~np.isfinite(values)][0]:g} is not a click probability",
                file=data,
                column=columns.label,
                remedy="labels are 0 or 1 (or between); convert the column first",
            )


class Smoothed:
    """A running mean that forgets: what a progress bar shows of a loss."""

    def __init__(self, keep: float = 0.98) -> None:
        self._keep, self._sum, self._weight = keep, 0.0, 0.0

    def add(self, x: float) -> float:
        """Take one more value; the mean now."""
        self._sum = self._keep * self._sum + (1 - self._keep) * x
        self._weight = self._keep * self._weight + (1 - self._keep)
        return self.value

    @property
    def value(self) -> float:
        """The mean, nan before the first value."""
        return self._sum / self._weight if self._weight else float("nan")


def reporter(bar: Any, losses: Smoothed, collection: Collection) -> Callable[[int, float], None]:
    """What shows each step; raises where the training diverged."""

    def on_step(n_rows: int, loss: float) -> None:
        if not math.isfinite(loss):
            raise InvalidArgument(
                f"training diverged: the loss is {loss}",
                step=collection.step,
                remedy="lower --lr or --dense-lr, or look for extreme values among the dense columns",
            )
        bar.update(n_rows, loss=f"{losses.add(loss):.4f}", keys=f"{_n_keys(collection.tables.values()):,}")

    return on_step


def _n_keys(tables: Iterable[Table]) -> int:
    return sum(len(t) for t in tables)


def _to_json(field: Field) -> dict[str, Any]:
    """A Field as keyword arguments that JSON keeps."""
    defaults = {f.name: f.default for f in fields(Field)}
    return {k: v for k, v in asdict(field).items() if k == "name" or v != defaults[k]}
