"""The figures of a model on a data set."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, repeat
from types import ModuleType
from typing import Any

import numpy as np

from hbkit.cli.console import progress
from hbkit.cli.ranks import gathered, shard_of
from hbkit.data import Dataset, Field
from hbkit.parquet import File, list_files

__all__ = ["mean_auc", "measure", "show"]

TITLES = {"auc": "AUC", "log_loss": "log loss", "gauc": "GAUC"}


def measure(
    hb: ModuleType, trainer: Any, ds: Dataset, data: str, group: dict[str, Any] | None = None
) -> dict[str, float]:
    """AUC and log loss of each label, GAUC where there is a group, rows, and the Bayes-optimal AUC if the files say it.

    Over sharded tables, they are those of all ranks' rows, and all ranks call this.

    Parameters
    ----------
    ds : Dataset
        Of `data`, or this rank's shard of it; not shuffled, with a label or several, whose figures are named
        ``label: figure`` then.
    group : keyword arguments of a Field, optional
        Column of `data` to group by.
    """
    transport = getattr(trainer.collection, "transport", None)
    names = [""] if isinstance(ds.label, str) else [f"{name}: " for name in ds.label or ()]
    metrics = {name: (hb.metrics.AUC(), hb.metrics.LogLoss(), hb.metrics.GAUC()) for name in names}
    members: Iterable[Any] = repeat(None)
    if group is not None:  # a second pass, which gives the same rows in the same order
        grouped = Dataset.from_parquet(data, [Field(**group)], shard_of(transport)).batch(ds.batch_size or 1)
        members = chain((batch[group["name"]] for batch in grouped), repeat(None))
    n = 0
    with progress("evaluating", ds.n_rows, "rows") as bar:
        for (label, score, weight), group_of in zip(trainer.predict(ds), members, strict=False):
            if not len(label):
                continue  # other ranks have rows left
            columns = zip(label.reshape(len(label), -1).T, score.reshape(len(label), -1).T, strict=True)
            for (auc, log_loss, gauc), (y, p) in zip(metrics.values(), columns, strict=True):
                auc.update(y, p, weight)
                log_loss.update(y, p, weight)
                if group_of is not None:
                    gauc.update(y, p, weight, group_of)
            n += len(label)
            bar.update(len(label))
    figures = {"rows": float(sum(gathered(transport, n)))}
    for name, found in metrics.items():
        auc, log_loss, gauc = found if transport is None else (metric.reduce(transport) for metric in found)
        figures |= {f"{name}auc": float(auc.result()), f"{name}log_loss": float(log_loss.result())}
        if group is not None:
            figures[f"{name}gauc"] = float(gauc.result())
    ceilings = {File(f).metadata.get("hbkit.bayes_auc") for f in list_files(data)}
    if len(ceilings) == 1 and (ceiling := ceilings.pop()) is not None:
        figures["bayes_auc"] = float(ceiling)
    return figures


def mean_auc(figures: dict[str, float]) -> float:
    """The AUC, the mean of all labels'."""
    return float(np.mean([value for name, value in figures.items() if name.rpartition(": ")[2] == "auc"]))


def show(figures: dict[str, float]) -> dict[str, str]:
    """The figures in words: for people."""
    shown = {"evaluated rows": f"{figures['rows']:,.0f}"}
    for name, value in figures.items():
        label, colon, figure = name.rpartition(": ")
        if figure in TITLES:
            shown[f"{label}{colon}{TITLES[figure]}"] = f"{value:.6f}"
    if "bayes_auc" in figures:
        shown["AUC of the data's Bayes-optimal model"] = f"{figures['bayes_auc']:.4f}"
    return shown
