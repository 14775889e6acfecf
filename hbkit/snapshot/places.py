"""Which kind of place a path or URI names."""

from __future__ import annotations

import os

from hbkit.parquet.source import resolve
from hbkit.snapshot.bucket import Bucket
from hbkit.snapshot.directory import Directory
from hbkit.snapshot.place import Place

__all__ = ["place_of"]


def place_of(path: str | os.PathLike[str]) -> Place:
    """The place that a path or URI names."""
    text = os.fspath(path)
    if "://" not in text:
        return Directory(text)
    if text.startswith("file://"):
        return Directory(resolve(text)[1])
    return Bucket(text)
