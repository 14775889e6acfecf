"""The loop of ``hbkit train``: epochs over files, figures after them, commits between, and what to say of it all."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import hbkit
from hbkit.cli.building import SHUFFLE_ROWS, build, dataset
from hbkit.cli.columns import Columns
from hbkit.cli.commits import Commits, committed
from hbkit.cli.console import note, progress
from hbkit.cli.evaluation import mean_auc, measure, show
from hbkit.cli.events import EventWriter
from hbkit.cli.options import Options
from hbkit.cli.ranks import gathered, shard_of
from hbkit.embedding import Collection, Table
from hbkit.errors import InvalidArgument
from hbkit.shuffle import Transport

__all__ = ["Smoothed", "Training", "reporter"]


class Training:
    """One training on ``--data``: made, or loaded where it is to go on; then `run`, and what to `report`.

    Parameters
    ----------
    options
    columns
        Of its data.
    settings
        What to build.
    transport : optional
        To the ranks that train with this one: all make and run theirs together.
    """

    def __init__(
        self, options: Options, columns: Columns, settings: dict[str, Any], transport: Transport | None = None
    ) -> None:
        self._transport, self._shard = transport, shard_of(transport)
        self._options, self._columns, self._settings = options, columns, settings
        weights = options.positive_weight
        self._hb, self._trainer, self.collection = build(
            settings,
            transport,
            options.wire,
            compile=options.compile,
            amp=options.amp,
            positive_weight=None if not weights else weights[0] if len(weights) == 1 else weights,
        )
        assert options.data is not None
        self._ds = dataset(options.data, columns, options.batch_size, self._shard)
        self._ds = self._ds.shuffle(options.seed, SHUFFLE_ROWS)
        self._commits = self._open_save()
        self._losses, self._n_rows, self._seconds = Smoothed(), 0, 0.0
        self._figures: dict[str, float] | None = None
        self._saved: str | None = None  # where, in words
        self._stale = 0  # epochs since the best one

    def _open_save(self) -> Commits | None:
        """Commits to --save, after the newest one was loaded if the training is to go on from there."""
        o = self._options
        if o.save is None:
            return None
        loaded = committed(o.save, self._settings) if o.resume else None
        if loaded is not None:
            self._trainer.load(o.save, self._ds, loaded.commit)
            note(f"continuing from commit {loaded.commit}, step {self.collection.step}")
        return Commits(self._trainer, o.save, o.save_every, self._state, "latest" if loaded is not None else None)

    def _state(self) -> dict[str, Any]:
        return {"train": {**self._settings, "figures": self._figures}}

    def run(self) -> None:
        """Train all epochs, or until --patience ends; evaluate and save."""
        o = self._options
        self._n_epochs = self._ds.state_dict()["epoch"]  # that are over: not 0 where it goes on
        with EventWriter(None if self._shard[0] else o.log_dir) as log:
            while self._n_epochs < o.epochs and (o.patience is None or self._stale < o.patience):
                self._epoch(log)
                if o.patience is not None:
                    self._keep_if_better(self._evaluated(log))
            if o.patience is None:
                self._figures = None if o.eval_data is None else self._evaluated(log)
                self._keep()

    def _epoch(self, log: EventWriter) -> None:
        epoch, epochs = self._n_epochs, self._options.epochs
        started = time.perf_counter()
        with progress("training" if epochs == 1 else f"epoch {epoch + 1}/{epochs}", self._ds.n_rows, "rows") as bar:
            report = reporter(bar, self._losses, self.collection)

            def on_step(n: int, loss: float) -> None:
                self._n_rows += n
                report(n, loss)
                log.scalars(self.collection.step, {"training/loss": loss})
                if self._commits is not None:
                    self._commits.step()

            self._trainer.fit(self._ds.set_epoch(epoch), on_step=on_step)
        self._seconds += time.perf_counter() - started
        self._n_epochs += 1

    def _evaluated(self, log: EventWriter) -> dict[str, float]:
        data = self._options.eval_data
        assert data is not None
        ds = dataset(data, self._columns, self._options.batch_size, self._shard)
        found = measure(self._hb, self._trainer, ds, data, self._settings["group"])
        log.scalars(self.collection.step, {f"evaluation/{name}": value for name, value in found.items()})
        return found

    def _keep_if_better(self, figures: dict[str, float]) -> None:
        if self._figures is None or mean_auc(figures) > mean_auc(self._figures):
            self._figures, self._stale = figures, 0
            self._keep()
        else:
            self._stale += 1

    def _keep(self) -> None:
        if self._commits is not None:
            save, commit = str(self._options.save), self._commits.commit()
            if self._shard[0] == 0:
                hbkit.snapshot.verify(save)
            self._saved = f"{save} (commit {commit}, verified)"

    def report(self) -> dict[str, Any]:
        """What the training was and came to, on all ranks: for people."""
        o, n_epochs = self._options, self._n_epochs
        n_keys = {name: len(table) for name, table in self.collection.tables.items()}
        every = gathered(self._transport, [self._n_rows, self._seconds, n_keys])
        n_rows, seconds = sum(n for n, _, _ in every), max(s for _, s, _ in every)
        result: dict[str, Any] = {
            "model": f"{o.model} ({o.backend}), dim {o.dim}",
            "rows": f"{n_rows:,}" + (f" ({n_epochs} epochs)" if n_epochs > 1 else ""),
            "samples/s": f"{n_rows / max(seconds, 1e-9):,.0f}",
            "training loss": f"{self._losses.value:.4f}",
        }
        if self._stale:
            result["best epoch"] = f"{n_epochs - self._stale}, whose figures these are"
        if self._figures is not None:
            result |= show(self._figures)
        result |= {f"keys in {name}": f"{sum(keys[name] for _, _, keys in every):,}" for name in n_keys}
        return result if self._saved is None else {**result, "saved": self._saved}


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
