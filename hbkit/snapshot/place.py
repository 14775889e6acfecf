"""Where a snapshot lives, and how a commit gets there: all of it or nothing, and one commit after the other.

A `Place` finds and reads commits. A `Draft` is a commit that is being written: its files are created under the names
that they will have, then `Draft.publish` puts the manifest there, and with it the commit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from hbkit.errors import Corrupt, NotFound
from hbkit.parquet.source import Source
from hbkit.snapshot.files import RESTORE, FileEntry, Sink
from hbkit.snapshot.manifest import MAX_NBYTES

__all__ = ["Draft", "Place"]


class Draft(ABC):
    """A commit that is being written.

    Attributes
    ----------
    commit : str
        Its id, one more than that of the newest commit.
    directory : str
        Where its files belong, relative to the place.
    spill : Path or None
        Local directory for temporary files, which have no name there; the system's where it is None.
    """

    commit: str
    directory: str
    spill: Path | None = None

    @abstractmethod
    def create(self, path: str) -> AbstractContextManager[Sink]:
        """A new file at `path`, below `directory`: durable when the block ends without an exception."""

    @abstractmethod
    def publish(self, manifest: bytes) -> None:
        """Make the commit one of the place's, durably. Raises Locked where another writer has made it meanwhile."""


class Place(ABC):
    """Where a snapshot lives.

    Attributes
    ----------
    name : str
        As the user gave it; errors name it.
    """

    name: str

    def __str__(self) -> str:
        return self.name

    @abstractmethod
    def where(self, path: str) -> str:
        """The path or URI of a file of the snapshot; errors name it."""

    @abstractmethod
    def open(self, path: str) -> str | Source:
        """A file of the snapshot, as `hbkit.parquet.File` takes it."""

    def local(self, path: str) -> Path | None:
        """A file of the snapshot in this machine's file system, None where it is not there."""
        return None

    @abstractmethod
    def commits(self) -> list[str]:
        """Ids of all commits, oldest first; none where there is no snapshot."""

    @abstractmethod
    def read(self, path: str, limit: int) -> bytes:
        """The first `limit` bytes of a file, all of it where it is shorter. Raises NotFound."""

    @abstractmethod
    def check(self, entry: FileEntry) -> None:
        """Read a whole file and compare it with its manifest; raises Corrupt."""

    @abstractmethod
    def prepare(self) -> None:
        """Find out whether anything can be saved here, and make the directory. Raises StorageError."""

    @abstractmethod
    def lock(self) -> AbstractContextManager[None]:
        """Be the one who changes the snapshot, where the place has a lock. Raises Locked."""

    @abstractmethod
    def draft(self) -> AbstractContextManager[Draft]:
        """A new commit; what is left of it when the block ends unpublished is removed. Raises Locked."""

    @abstractmethod
    def join(self, commit: str, directory: str) -> AbstractContextManager[Draft]:
        """The draft that another process has made and will publish, so that this one can create files in it."""

    @abstractmethod
    def leftovers(self, kept: Mapping[str, str]) -> list[str]:
        """What belongs to no commit, and nobody can need or be writing any more; for `remove`.

        Parameters
        ----------
        kept : mapping of str to str
            Each commit's directory, by its id.
        """

    @abstractmethod
    def withdraw(self, commit: str) -> None:
        """Take a commit's manifest away, durably. Whoever began a commit of this id before can no longer publish it."""

    @abstractmethod
    def remove(self, paths: Iterable[str]) -> None:
        """Remove manifests, or directories of commits, durably; nothing where they are gone already."""

    def manifest(self, commit: str) -> bytes:
        """The bytes of a commit's manifest. Raises Corrupt."""
        path = f"{commit}.json"
        try:
            data = self.read(path, MAX_NBYTES + 1)
        except NotFound as e:
            raise Corrupt("the manifest is missing or no file", file=self.where(path), remedy=RESTORE) from e
        if len(data) > MAX_NBYTES:
            raise Corrupt("the manifest is too large", file=self.where(path), remedy=RESTORE)
        return data

    def next_commit(self) -> str:
        """Id of the commit after the newest."""
        commits = self.commits()
        return f"c{int(commits[-1][1:]) + 1 if commits else 1:08d}"
