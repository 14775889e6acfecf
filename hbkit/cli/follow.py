"""``hbkit train --follow``: files are trained on as they arrive, and what was learnt is published as deltas."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

from hbkit.cli.building import build, check_label, choose_columns, columns_of, dataset, settings_of
from hbkit.cli.columns import Columns
from hbkit.cli.commits import Commits, committed
from hbkit.cli.console import note, progress, summary
from hbkit.cli.options import Options
from hbkit.cli.training import Smoothed, reporter
from hbkit.data import Dataset
from hbkit.errors import Corrupt, HbkitError, InvalidArgument, NotFound, StorageError
from hbkit.parquet import list_modified
from hbkit.snapshot.places import place_of

__all__ = ["follow"]

POLL = 0.2  # seconds between two looks at the directory, at least
REPORT = 30.0  # seconds after which a file that cannot be read is spoken of, again and again


def follow(o: Options) -> None:
    """Train on the files of a directory, each once, in order of (time of change, name), until told to stop.

    The state of each commit says which files are done and where the one in progress stood, so that a later call with
    the same arguments continues with exactly the rows that no commit has.
    """
    assert o.follow is not None and o.save is not None
    place_of(o.save).prepare()
    with _Stop() as stop:
        files = Files(o.follow)
        loaded = committed(o.save, {**o.kept, "label": o.label if len(o.label) > 1 else o.label[0]})
        if loaded is None:
            first = files.wait(stop, o.idle_exit)
            if first is None:
                note(f"no file came to {o.follow}")
                return
            columns = choose_columns(first[1], o.label, o.dense, o.sparse)
        else:
            columns = columns_of(loaded.state["train"])
            for option, given, saved in (("dense", o.dense, columns.dense), ("sparse", o.sparse, columns.sparse)):
                if given and [x.removesuffix(":ragged") for x in given] != saved:
                    raise InvalidArgument(
                        f"the model was trained with {option} {','.join(saved)}",
                        file=o.save,
                        remedy=f"leave --{option} out",
                    )
        settings = settings_of(columns, **o.kept)
        _, trainer, collection = build(settings)
        current: str | None = None
        if loaded is not None:
            trainer.load(o.save, commit=loaded.commit)
            current = loaded.state.get("file")
            files.done = set(json.loads(loaded.state.get("done", b"[]")))
            note(f"continuing from commit {loaded.commit}, step {collection.step}")

        def state() -> dict[str, Any]:
            return {
                "train": {**settings, "figures": None},
                "file": current,
                "done": json.dumps(sorted(files.done)).encode(),
            }

        commits = Commits(trainer, o.save, o.publish_every, state, "latest" if loaded is not None else None)
        losses, n_files, started, healthy = Smoothed(), 0, collection.step, True
        try:
            with progress("following", None, "rows") as bar:
                report = reporter(bar, losses, collection)

                def on_step(n_rows: int, loss: float) -> None:
                    nonlocal healthy
                    healthy = False
                    report(n_rows, loss)  # raises where the training diverged, which is not to be committed
                    healthy = True
                    commits.step()
                    stop.check()

                wanted, cursor = current, trainer.cursor
                quiet = time.monotonic()
                while not stop.asked:
                    name = wanted if wanted is not None else files.next()
                    ds = None if name is None else files.open(name, partial(_ready, columns, o.batch_size))
                    if name is None or ds is None:
                        if wanted is not None and files.gone(wanted):
                            note(f"{wanted} is gone: rows of it that may be left are not trained on")
                            wanted = current = None
                        commits.step(resting=True)
                        if o.idle_exit is not None and time.monotonic() - quiet >= o.idle_exit:
                            break
                        files.sleep()
                        continue
                    if wanted is not None and cursor is not None:
                        ds.load_state_dict(cursor)
                    current, wanted = name, None
                    trainer.fit(ds, on_step)
                    files.finish(name)
                    current, quiet, n_files = None, time.monotonic(), n_files + 1
                    if files.next() is None:
                        commits.step(resting=True)
        except _Stopped:
            pass
        finally:
            commits.wait()
            if healthy and commits.behind:
                note(f"last commit: {commits.commit()}")
    summary(
        "followed",
        {
            "files": n_files,
            "steps": collection.step - started,
            "training loss": losses.value,
            **{f"keys in {name}": len(table) for name, table in collection.tables.items()},
            "saved": o.save,
        },
    )


def _ready(columns: Columns, batch_size: int, path: str) -> Dataset:
    """The rows of a file that is complete and fits the model."""
    ds = dataset(path, columns, batch_size)
    check_label(path, columns)
    return ds


class Files:
    """The Parquet files of a directory to which more come.

    Attributes
    ----------
    done : set of str
        Names, relative to the directory, of those that need not be looked at any more; they are forgotten when the file
        is gone, so that their number is bounded by what the directory holds.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._base, mark, options = directory.partition("?") if "://" in directory else (directory, "", "")
        self._base, self._options = self._base.rstrip("/"), mark + options
        self.done: set[str] = set()
        self._waiting: dict[str, str] = {}  # path by name, in order, of those that are not done
        self._failing: dict[str, _Failure] = {}
        self._looked, self._seconds = -math.inf, 0.0  # when, and how long it took

    def next(self) -> str | None:
        """Name of the first file that is not done; those that could not be read come last. None where there is none."""
        if time.monotonic() - self._looked >= self._pause:
            self._look()
        new = (name for name in self._waiting if name not in self._failing)
        failing = (name for name in self._waiting if name in self._failing)
        return next(new, None) or min(failing, key=lambda name: self._failing[name].tried, default=None)

    def finish(self, name: str) -> None:
        """A file need not be looked at any more."""
        self.done.add(name)
        self._waiting.pop(name, None)

    def gone(self, name: str) -> bool:
        """Whether a file that was there has been removed."""
        return self._look() and name not in self._waiting

    def open(self, name: str, read: Callable[[str], Any]) -> Any:
        """What `read` gives of a file; None where it is not all there yet, which is reported when it lasts."""
        try:
            ready = read(self._waiting.get(name) or f"{self._base}/{name}{self._options}")
        except (Corrupt, StorageError, NotFound) as e:
            self._report(name, e)
            return None
        self._failing.pop(name, None)
        return ready

    def _look(self) -> bool:
        """List the directory anew; whether that succeeded."""
        started = time.monotonic()
        try:
            found = list_modified(self._directory)
        except StorageError as e:
            self._report(self._directory, e)
            return False
        finally:
            self._looked = time.monotonic()
            self._seconds = self._looked - started
        paths = {path.removesuffix(self._options).removeprefix(self._base).lstrip("/"): path for _, path in found}
        self.done &= paths.keys()
        self._waiting = {name: path for name, path in paths.items() if name not in self.done}
        self._failing = {name: failure for name, failure in self._failing.items() if name in self._waiting}
        return True

    def _report(self, name: str, e: HbkitError) -> None:
        now = time.monotonic()
        failure = self._failing.setdefault(name, _Failure(now, now, now))
        failure.tried = now
        if now - failure.reported >= REPORT:
            note(f"not read for {now - failure.since:.0f} s, and tried again: {e}")
            failure.reported = now

    def wait(self, stop: _Stop, idle_exit: float | None) -> tuple[str, Dataset] | None:
        """The first file that can be read; None where none has come before it is time to stop."""
        until = None if idle_exit is None else time.monotonic() + idle_exit
        while not stop.asked and (until is None or time.monotonic() < until):
            name = self.next()
            ds = None if name is None else self.open(name, Dataset.from_parquet)
            if name is not None and ds is not None:
                return name, ds
            self.sleep()
        return None

    @property
    def _pause(self) -> float:
        """Seconds between two looks: longer where looking takes long."""
        return max(POLL, min(5.0, 10 * self._seconds))

    def sleep(self) -> None:
        """Wait until it is time to look again."""
        time.sleep(self._pause)


@dataclass
class _Failure:
    """Since when a file cannot be read, and when that was last tried and reported: `time.monotonic`."""

    since: float
    tried: float
    reported: float


class _Stopped(Exception):
    """The training is to end after this step."""


class _Stop:
    """Takes the first SIGINT or SIGTERM as a wish; the second one does what it would have done."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def check(self) -> None:
        """Raise _Stopped where it is time."""
        if self.asked:
            raise _Stopped

    def __enter__(self) -> _Stop:
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self.__exit__()
