"""When a training commits while it goes on, and how it comes back to what it has committed."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import click

import hbkit
from hbkit.cli.console import note
from hbkit.cli.ranks import Agreed
from hbkit.embedding import Resumable
from hbkit.errors import InvalidArgument, Locked, NotFound, SchemaMismatch

__all__ = ["Commits", "Every", "committed", "every"]

PATIENCE = 60.0  # seconds that a commit waits for another writer, such as one who squashes


class Every(NamedTuple):
    """An interval: of `seconds`, or else of `steps`."""

    seconds: float | None = None
    steps: int = 0


def every(_: click.Context, option: click.Parameter, value: Any) -> Every | None:
    """``10s`` or ``500steps`` as `Every`."""
    if value is None:
        return None
    if found := re.fullmatch(r"(\d+(?:\.\d+)?) ?s(?:ec|econds?)?", value):
        return Every(seconds=float(found[1]))
    if (found := re.fullmatch(r"(\d+) ?steps?", value)) and int(found[1]):
        return Every(steps=int(found[1]))
    raise InvalidArgument(f"{option.opts[0]} {value!r}", remedy="give seconds or steps, as in 10s or 500steps")


class Commits:
    """Commits of a trainer: the first one of all rows, unless it builds on one that was loaded, then deltas.

    Parameters
    ----------
    trainer, path
    interval : Every or None
        None commits on demand alone.
    state : callable
        What to keep beside the trainer's own state.
    base : "latest" or None
        "latest" where the trainer was loaded from the newest commit.
    """

    def __init__(
        self,
        trainer: Resumable,
        path: str,
        interval: Every | None,
        state: Callable[[], dict[str, Any]],
        base: str | None = None,
    ) -> None:
        self._trainer, self._path, self._interval, self._state = trainer, path, interval, state
        self._base = base
        self._saving: hbkit.snapshot.Saving | None = None
        self._agreed = Agreed(getattr(trainer.collection, "transport", None))
        self._step = trainer.collection.step  # of the last commit
        self._last = self._began = time.monotonic()  # when that was, and when what it lacks began

    @property
    def behind(self) -> bool:
        """Whether there were steps since the last commit."""
        return self._trainer.collection.step != self._step

    def step(self, resting: bool = False) -> None:
        """Commit if it is time, after a step; or, `resting`, where none is about to follow.

        A time is counted from the last commit, but a batch that comes after a pause does not bring on a commit by
        itself: those that came with it go into the same one. Ranks commit when rank 0 would, all at the same step.
        """
        if not self.behind or self._interval is None:
            return
        now, n = time.monotonic(), self._trainer.collection.step - self._step
        if n == 1 and not resting:
            self._began = now
        if self._interval.seconds is None:
            due = n >= self._interval.steps
        else:
            due = now - (self._last if resting else max(self._last, self._began)) >= self._interval.seconds
        busy = self._saving is not None and not self._saving.done and not resting  # one is on its way
        if self._agreed(due and not busy, ask=self._interval.seconds is None and due):
            self._begin(resting)

    def commit(self) -> str:
        """Commit now, and wait for it; the commit's id."""
        return self._begin(wait=True)

    def wait(self) -> None:
        """Return once all that was begun is committed; raises what made it fail."""
        if self._saving is not None:
            self._saving.wait()

    def _begin(self, wait: bool) -> str:
        """Commit, in the background unless told to wait. Waits a while for another writer; raises Locked then."""
        until, commit = time.monotonic() + PATIENCE, ""
        while True:
            try:
                if wait:
                    commit = self._trainer.save(self._path, self._base, self._state())
                else:
                    self._saving = self._trainer.save(self._path, self._base, self._state(), background=True)
                break
            except Locked as e:
                if time.monotonic() > until:
                    raise
                note(f"waiting: {e}")
                time.sleep(1)
        self._base, self._step, self._last = "latest", self._trainer.collection.step, time.monotonic()
        return commit


def committed(path: str, settings: dict[str, Any] | None = None) -> hbkit.snapshot.Loaded | None:
    """Step and state of the newest commit, None where there is none; no rows are loaded.

    Raises
    ------
    SchemaMismatch
        It is not of ``hbkit train``, or knows no position in its data.
    InvalidArgument
        It was trained with other settings than these.
    """
    try:
        loaded = hbkit.snapshot.load(path, [])
    except NotFound:
        return None
    saved = loaded.state.get("train")
    if not isinstance(saved, dict) or "cursor" not in loaded.state:
        raise SchemaMismatch(
            f"commit {loaded.commit} does not say where its training stood",
            file=path,
            remedy="give --save another directory, or leave --resume out",
        )
    for name, value in (settings or {}).items():
        if saved.get(name) != value:
            raise InvalidArgument(
                f"the model was trained with {name.replace('_', '-')} {_short(saved.get(name))}, not {_short(value)}",
                file=path,
                remedy="give the same options to go on, or --save another directory",
            )
    return loaded


def _short(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) < 60 else text[:57] + "..."
