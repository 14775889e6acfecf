"""Directory: a snapshot in a local directory, its draft, and a file of that draft."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hbkit.errors import Locked, NotFound, StorageError
from hbkit.snapshot.files import DIRECT_NBYTES, PAGE_NBYTES, FileEntry, Sink, check, storage_errors
from hbkit.snapshot.manifest import COMMIT, DIRECTORY
from hbkit.snapshot.place import Draft, Place
from hbkit.store.disk import Disk

__all__ = ["Directory"]

DRAFT = ".hbkit-draft"


class Directory(Place):
    """A local directory.

    Parameters
    ----------
    path : str
    disk : Disk, optional
        What reaches the file system, to write; reads go their own ways.

    Notes
    -----
    A commit is written in a draft beside the others. When its files and their directories are durable, its directory
    is moved to its place, and when that is durable, its manifest. A writer that dies leaves the draft, or the directory
    of a commit that has no manifest; the next draft removes both. The lock is the operating system's, so it ends with
    the process at the latest.
    """

    def __init__(self, path: str, disk: Disk | None = None) -> None:
        self.name = path
        self.root = Path(path)
        self._disk = disk or Disk(ring=False)

    def where(self, path: str) -> str:
        return str(self.root / path)

    def open(self, path: str) -> str:
        return self.where(path)

    def local(self, path: str) -> Path:
        return self.root / path

    def commits(self) -> list[str]:
        if not self.root.is_dir():
            return []
        with storage_errors(self.root):
            names = os.listdir(self.root)
        return sorted(name[:-5] for name in names if name.endswith(".json") and COMMIT.fullmatch(name[:-5]))

    def read(self, path: str, limit: int) -> bytes:
        file = self.root / path
        with storage_errors(file):
            try:
                if stat.S_ISREG(os.stat(file).st_mode):
                    with open(file, "rb") as opened:
                        return opened.read(limit)
            except (FileNotFoundError, NotADirectoryError):
                pass
        raise NotFound("no such file", file=str(file), remedy="check the path")

    def check(self, entry: FileEntry) -> None:
        with storage_errors(self.root / entry.path):
            check(self.root / entry.path, entry)

    def prepare(self) -> None:
        try:
            self._make()
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as e:
            raise StorageError(
                f"cannot save there: {e.strerror}", file=self.name, remedy="name a directory that you may write to"
            ) from e

    def _make(self) -> None:
        new = [p for p in (self.root, *self.root.parents) if not p.is_dir()]
        for directory in reversed(new):
            self._disk.make_directory(directory)
            self._disk.sync_directory(directory.parent)

    @contextmanager
    def lock(self) -> Iterator[None]:
        with storage_errors(self.root):
            try:
                handle = self._disk.lock(self.root / "LOCK")
            except BlockingIOError as e:
                raise Locked(
                    "another writer saves here", file=str(self.root), remedy="wait until it has finished"
                ) from e
            try:
                yield
            finally:
                self._disk.unlock(handle)

    @contextmanager
    def draft(self) -> Iterator[Draft]:
        with storage_errors(self.root):
            self._make()
            with self.lock():
                draft = _DirectoryDraft(self.root, self.next_commit(), self._disk)
                self._remove([draft.draft, self.root / draft.commit])
                try:
                    self._disk.make_directory(draft.draft / draft.directory)
                    yield draft
                finally:
                    # Never root / commit: its manifest may be there.
                    self._disk.remove_tree(draft.draft, ignore_errors=True)

    @contextmanager
    def join(self, commit: str, directory: str) -> Iterator[Draft]:
        with storage_errors(self.root):
            yield _DirectoryDraft(self.root, commit, self._disk)

    def leftovers(self, kept: Mapping[str, str]) -> list[str]:
        with storage_errors(self.root):
            names = [name for name in os.listdir(self.root) if DIRECTORY.fullmatch(name)]
        return sorted(set(names) - set(kept.values()))

    def withdraw(self, commit: str) -> None:
        self.remove([f"{commit}.json"])

    def remove(self, paths: Iterable[str]) -> None:
        with storage_errors(self.root):
            self._remove([self.root / path for path in paths])
            self._disk.sync_directory(self.root)

    def _remove(self, paths: Iterable[Path]) -> None:
        for path in paths:
            if path.is_dir():
                self._disk.remove_tree(path)
            elif path.exists():
                self._disk.unlink(path)


class _DirectoryDraft(Draft):
    def __init__(self, root: Path, commit: str, disk: Disk) -> None:
        self.root, self.draft = root, root / DRAFT
        self.spill = self.draft
        self.commit = self.directory = commit
        self._disk = disk

    @contextmanager
    def create(self, path: str) -> Iterator[Sink]:
        file = self.draft / path
        self._disk.make_directory(file.parent)
        with Sink(_File(self._disk, file)) as sink:
            yield sink
            sink.sync()

    def publish(self, manifest: bytes) -> None:
        with self.create("manifest.json") as sink:
            sink.write(manifest)
        for directory, _, _ in os.walk(self.draft / self.directory):
            self._disk.sync_directory(Path(directory))
        self._disk.rename(self.draft / self.directory, self.root / self.directory)
        self._disk.sync_directory(self.root)
        self._disk.rename(self.draft / "manifest.json", self.root / f"{self.commit}.json")
        self._disk.sync_directory(self.root)


class _File:
    """A new local file: what a `Sink` writes to. What lies as the disk wants it goes past the page cache."""

    def __init__(self, disk: Disk, path: Path) -> None:
        self._disk, self._path, self._at = disk, path, 0
        self._handle = disk.open(path, create=True)
        self._direct = -1  # the same file

    def write(self, data: Any) -> None:
        view = np.frombuffer(data, np.uint8)
        if view.size >= DIRECT_NBYTES and not (self._at | view.ctypes.data | view.size) % PAGE_NBYTES:
            if self._direct < 0:
                self._direct = self._disk.open(self._path, direct=True)
            try:
                self._disk.write(self._direct, view, self._at)
            except OSError as e:
                if e.errno != errno.EINVAL:
                    raise
                # The file system wants other places than these, or is full in the midst of a page: the cache can tell.
                self._disk.write(self._handle, view, self._at)
        else:
            self._disk.write(self._handle, view, self._at)
        self._at += view.size

    def sync(self) -> None:
        self._disk.sync(self._handle)

    def close(self) -> None:
        self._disk.close(self._handle)
        if self._direct >= 0:
            self._disk.close(self._direct)
