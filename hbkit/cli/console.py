"""What the commands show: a progress bar and tables in a terminal, plain lines in CI and pipes.

Progress goes to stderr, results to stdout.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

import click

__all__ = ["Progress", "count", "mute", "note", "progress", "size", "summary", "table"]

SECONDS = 5.0  # between plain lines


_muted = False


def mute(muted: bool) -> None:
    """Show nothing from now on, or all again."""
    global _muted
    _muted = muted


class Progress(Protocol):
    """A task under way."""

    def update(self, n: int, **fields: object) -> None:
        """``n`` units more are done; ``fields`` are shown beside them, as in ``loss=0.31``."""


def count(n: int) -> str:
    """A number of things: ``1,234,567``."""
    return f"{n:,}"


def size(nbytes: float) -> str:
    """A number of bytes: ``1.2 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def _live(stream: TextIO) -> bool:
    """Whether a person looks at this stream in a terminal that can redraw."""
    return stream.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb"


def _text(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return count(value) if isinstance(value, int) else f"{value:.4f}"


class _Task:
    """What a task has come to, in words."""

    def __init__(self, description: str, total: int | None, unit: str) -> None:
        self.description = description
        self.total = total
        self.done = 0
        self.fields: dict[str, object] = {}
        self._amount = size if unit == "bytes" else count
        self._unit = "" if unit == "bytes" else f" {unit}"
        self._start = time.perf_counter()

    def add(self, n: int, fields: Mapping[str, object]) -> None:
        self.done += n
        self.fields.update(fields)

    def words(self) -> str:
        """``1,000 of 2,000 rows (50%), 500 rows/s, loss 0.3100``."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        parts = [self._amount(self.done) + self._unit]
        if self.total:
            share = f"{min(self.done / self.total, 1):.0%}"
            parts = [f"{self._amount(self.done)} of {self._amount(self.total)}{self._unit} ({share})"]
        parts.append(f"{self._amount(int(self.done / seconds))}{self._unit}/s")
        parts += [f"{name.replace('_', ' ')} {_text(value)}" for name, value in self.fields.items()]
        return ", ".join(parts)


class _Lines:
    """Progress as a plain line every few seconds."""

    def __init__(self, task: _Task) -> None:
        self._task = task
        self._last = time.monotonic()

    def update(self, n: int, **fields: object) -> None:
        self._task.add(n, fields)
        if time.monotonic() - self._last >= SECONDS:
            self.show()

    def show(self) -> None:
        self._last = time.monotonic()
        if not _muted:
            click.echo(f"{self._task.description}: {self._task.words()}", err=True)


class _Bar:
    """Progress as a live bar."""

    def __init__(self, task: _Task, bar: Any) -> None:
        self._task, self._bar = task, bar
        self._id = bar.add_task(task.description, total=task.total, words="")

    def update(self, n: int, **fields: object) -> None:
        self._task.add(n, fields)
        self._bar.update(self._id, advance=n, words=self._task.words())


@contextmanager
def progress(description: str, total: int | None = None, unit: str = "rows", **fields: object) -> Iterator[Progress]:
    """Shows a task under way, as a context manager that gives a ``Progress``.

    Parameters
    ----------
    description : str
        What is done, in a word or two.
    total : int, optional
        Units in all; None where that is not known.
    unit : str
        What is counted; "bytes" are shown as kB, MB, ...
    **fields
        First values of what is shown beside the count.
    """
    task = _Task(description, total, unit)
    task.add(0, fields)
    if _muted or not _live(sys.stderr):
        lines = _Lines(task)
        yield lines
        lines.show()
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(20),
        TextColumn("{task.fields[words]}", markup=False),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), refresh_per_second=5) as bar:
        yield _Bar(task, bar)


def note(text: str) -> None:
    """Print one line of a result."""
    if not _muted:
        click.echo(text)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; numbers are aligned to the right."""
    if _muted:
        return
    cells = [[_text(value) for value in row] for row in rows]
    right = [
        any(isinstance(row[i], (int, float)) for row in rows)
        and all(isinstance(row[i], (int, float)) or row[i] in ("", "?", "-") for row in rows)
        for i in range(len(header))
    ]
    if _live(sys.stdout):
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        shown = Table(title=Text(title) if title else None, title_justify="left", show_header=any(header))
        for name, to_right in zip(header, right, strict=True):
            shown.add_column(name, justify="right" if to_right else "left", overflow="fold")
        for row in cells:
            shown.add_row(*(Text(cell) for cell in row))
        Console().print(shown)
        return
    if title:
        click.echo(title)
    lines = ([list(header)] if any(header) else []) + cells
    widths = [max(len(row[i]) for row in lines) for i in range(len(header))] if lines else []
    for line in lines:
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)]
        click.echo("  " + "  ".join(padded).rstrip())


def summary(title: str, rows: Mapping[str, object]) -> None:
    """Print names and values, one a line; whole numbers get commas, fractions four digits."""
    table(title, ("", ""), [(name, _text(value)) for name, value in rows.items()])
