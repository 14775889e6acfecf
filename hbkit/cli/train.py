"""``hbkit train`` and ``hbkit evaluate``: Parquet to a trained, saved model, and its figures again from the save."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

import hbkit
from hbkit.cli.building import (
    BACKENDS,
    MODELS,
    OPTIMIZERS,
    build,
    check_label,
    choose_columns,
    columns_of,
    dataset,
    group_field,
    settings_of,
)
from hbkit.cli.columns import sequences
from hbkit.cli.commits import every
from hbkit.cli.console import note, summary
from hbkit.cli.evaluation import measure, show
from hbkit.cli.follow import follow
from hbkit.cli.options import Options
from hbkit.cli.ranks import ranks, shard_of
from hbkit.cli.training import Training
from hbkit.data import Dataset
from hbkit.errors import InvalidArgument, NotFound, SchemaMismatch, Unsupported
from hbkit.shuffle import WIRES, Transport
from hbkit.snapshot.places import place_of

__all__ = ["evaluate", "train"]


def _names(_: click.Context, __: click.Parameter, value: Any) -> list[str]:
    """``a,b`` as names."""
    return [part.strip() for part in (value or "").split(",") if part.strip()]


def _numbers(_: click.Context, option: click.Parameter, value: Any) -> list[float]:
    """``1,2.5`` as numbers."""
    try:
        return [float(part) for part in str(value or "").split(",") if part]
    except ValueError:
        raise InvalidArgument(f"{option.opts[0]} {value!r}", remedy="give numbers, as in 5 or 5,20") from None


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
@click.option("--label", callback=_names, required=True, help="Column of 0 and 1 to predict; a,b for --model mmoe.")
@click.option("--dense", callback=_names, help="Dense columns, a,b. Inferred (floats) if no column is named.")
@click.option(
    "--sparse", callback=_names, help="Key columns, c,d:ragged. Inferred (integers, strings, lists) likewise."
)
@click.option(
    "--sequence", callback=_names, help="For --model din: lists of past keys and what they are weighed by, c:d."
)
@click.option(
    "--sequence-length",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    help="Keys of a --sequence to keep, the newest, which are its last.",
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
@click.option("--group", help="Column to evaluate GAUC by, such as the user.")
@click.option(
    "--positive-weight", callback=_numbers, help="Factor of the loss of label 1, of all labels or a,b of each."
)
@click.option("--patience", type=click.IntRange(1), help="Epochs without a better AUC after which to stop.")
@click.option("--log-dir", help="Directory of TensorBoard logs: the loss of each step, and the figures.")
@click.option("--compile", is_flag=True, help="Compile the model: torch.compile, XLA.")
@click.option("--amp", is_flag=True, help="Compute the model in bfloat16; weights and rows stay float32.")
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
@click.option(
    "--wire",
    type=click.Choice(WIRES),
    default="float32",
    show_default=True,
    help="How embeddings travel between ranks: see below.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(1),
    default=300.0,
    show_default=True,
    help="Seconds after which ranks give up on one that does not answer.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of initial values and the order of rows.")
@click.argument("extra", nargs=-1, metavar="")
def train(extra: tuple[str, ...], config: str | None, **given: Any) -> None:
    """Train a click model on Parquet files, evaluate it and save it.

    The exit status is 0 only if training, evaluation and saving succeeded.

    With --follow, files are taken once each, in order of (time of change, name), as soon as they are complete; what was
    learnt is committed to --save as deltas. SIGINT or SIGTERM ends it after a last commit. The same command goes on
    with the rows that no commit has.

    Started by torchrun, or in a cluster that TF_CONFIG names (--backend tensorflow), the processes train one model
    together: each reads its shard of the data, in batches of --batch-size, and holds its shard of the tables. Any
    number of them can --resume what any other number has saved.
    """
    if extra:
        raise InvalidArgument(
            f"{len(extra)} arguments belong to no option, the first is {extra[0]}",
            remedy="put a glob in quotes, as in --data 'clicks/*.parquet'",
        )
    options = Options(**given)
    with ranks(options.backend, options.timeout) as transport:
        if options.follow is None:
            _train(options, transport)
        elif transport is None:
            follow(options)
        else:
            raise Unsupported("--follow with several ranks", remedy="start one process, or train on --data")


def _train(o: Options, transport: Transport | None) -> None:
    """On --data. What is wrong with any file or place must be said before hours of training, not after."""
    assert o.data is not None
    whole = Dataset.from_parquet(o.data)
    columns = choose_columns(whole, o.label, o.dense, o.sparse)
    past = sequences(columns, o.sequence)
    columns = replace(columns, newest=dict.fromkeys(past, o.sequence_length))
    check_label(o.data, columns, shard_of(transport))
    if o.eval_data is not None:
        dataset(o.eval_data, columns, o.batch_size)
    if o.save is not None and (transport is None or transport.rank == 0):
        place_of(o.save).prepare()
    settings = settings_of(columns, sequences=past, group=group_field(o.group, whole), **o.kept)
    training = Training(o, columns, settings, transport)
    training.run()
    summary("trained", training.report())
    if o.save is None:
        note("next: add --save DIR to keep the model")
    else:
        parquet = o.eval_data or "'<parquet files>'"
        note(f"next: hbkit evaluate {o.save} --data {parquet}")


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
    ds = dataset(data, columns_of(settings), settings["batch_size"])
    figures = measure(hb, trainer, ds, data, settings.get("group"))
    result: dict[str, Any] = {"model": f"{settings['model']} ({settings['backend']}), commit {loaded.commit}"}
    result |= show(figures) | {f"keys in {n}": f"{len(t):,}" for n, t in collection.tables.items()}
    summary("evaluated", result)
