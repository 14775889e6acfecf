"""The commits of a snapshot: which there are, what they build on, and whether their files are what they say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from hbkit.errors import Corrupt, NotFound
from hbkit.snapshot import rows
from hbkit.snapshot.files import RESTORE, FileEntry
from hbkit.snapshot.manifest import Manifest, TableEntry, decode
from hbkit.snapshot.place import Place
from hbkit.snapshot.rows import Metadata
from hbkit.store.base import Chunk, Int64s


class History:
    """The commits in a directory, each manifest read and checked once.

    Parameters
    ----------
    place : Place
        Where the snapshot lives.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self._read: dict[str, tuple[Manifest, str]] = {}

    def commits(self) -> list[str]:
        """Ids of all commits, oldest first; none where there is no snapshot."""
        return self.place.commits()

    def find(self, commit: str | None) -> Manifest:
        """The manifest of a commit; the newest where `commit` is None or "latest". Raises NotFound."""
        commits = self.commits()
        if not commits:
            raise NotFound("there is no snapshot", file=self.place.name, remedy="check the path; save one first")
        if commit is None or commit == "latest":
            return self.manifest(commits[-1])
        if commit not in commits:
            raise NotFound(
                f"no commit {commit!r}",
                file=self.place.name,
                remedy=f"there are {commits[0]} to {commits[-1]}; see log",
            )
        return self.manifest(commit)

    def manifest(self, commit: str) -> Manifest:
        """The manifest of a commit that a name or another manifest promises."""
        if commit not in self._read:
            data = self.place.manifest(commit)
            self._read[commit] = decode(data, commit, self.place.where(f"{commit}.json"))
        return self._read[commit][0]

    def digest(self, manifest: Manifest) -> str:
        """What identifies a commit of this history wherever it is copied."""
        return self._read[manifest.commit][1]

    def chain(self, manifest: Manifest, table: str) -> list[Manifest]:
        """The commits that hold a table's rows as of `manifest`: the one with all rows first. Raises Corrupt."""
        return list(self._links(manifest, table))[::-1]

    def since(self, manifest: Manifest, table: str, digest: str) -> list[Manifest] | None:
        """The part of `chain` after the commit of this digest; None where the chain does not pass through it.

        Manifests before that commit are not read.
        """
        links: list[Manifest] = []
        for link in self._links(manifest, table):
            if digest == self.digest(link):
                return links[::-1]
            links.append(link)
        return None

    def _links(self, manifest: Manifest, table: str) -> Iterator[Manifest]:
        yield manifest
        while (since := (entry := manifest.tables[table]).since) is not None:
            assert manifest.parent is not None
            parent = self.manifest(manifest.parent)
            below = parent.tables.get(table)
            if below is None or below.step != since or _shape(below) != _shape(entry):
                raise Corrupt(
                    f"commit {manifest.commit} does not fit its parent",
                    file=self.place.where(f"{parent.commit}.json"),
                    table=table,
                    remedy=RESTORE,
                )
            yield (manifest := parent)

    def check_files(self, files: Iterable[FileEntry]) -> None:
        """Compare files with their manifests: present, whole, every bit. Raises Corrupt."""
        for file in files:
            self.place.check(file)

    def check_rows(self, chain: list[Manifest], table: str) -> Int64s:
        """Decode all rows of a table; its keys, ascending: int64[n]. Raises Corrupt."""
        return self._metadata(chain, table, rows.read_rows).key

    def metadata(self, chain: list[Manifest], table: str) -> Metadata:
        """Key, freq and last_step of a table's rows, in key order; no other columns are read. Raises Corrupt."""
        return self._metadata(chain, table, rows.read_metadata)

    def _metadata(
        self,
        chain: list[Manifest],
        table: str,
        read: Callable[[Place, FileEntry, TableEntry], Iterable[Chunk | Metadata]],
    ) -> Metadata:
        held = rows.NO_METADATA
        for manifest in chain:
            entry = manifest.tables[table]
            for file in entry.erased:
                held = held.without(rows.read_keys(self.place, file, entry))
            for file in entry.rows:
                held = held.updated([Metadata._make(chunk[:3]) for chunk in read(self.place, file, entry)])
            if len(held.key) != entry.n_rows:
                raise Corrupt(
                    f"commit {manifest.commit} has {len(held.key)} rows, its manifest says {entry.n_rows}",
                    file=self.place.where(f"{manifest.commit}.json"),
                    table=table,
                    remedy=RESTORE,
                )
        return held

    def replay(self, chain: list[Manifest], table: str) -> Iterator[tuple[Int64s, Chunk | None]]:
        """What makes an empty table the one saved, in order: keys to erase, or lines to put.

        Yields
        ------
        erased : int64[n]
        chunk : Chunk or None
        """
        nothing = np.zeros(0, np.int64)
        for manifest in chain:
            entry = manifest.tables[table]
            for file in entry.erased:
                yield rows.read_keys(self.place, file, entry), None
            for file in entry.rows:
                for chunk in rows.read_rows(self.place, file, entry):
                    yield nothing, chunk

    def changes(self, links: list[Manifest], table: str) -> tuple[Int64s, Chunk]:
        """What deltas make together: keys to erase, and lines to put; both ascend, and no key is in both.

        All of it is in memory at once.
        """
        entry = links[-1].tables[table]
        none = np.zeros(0, np.int64)
        empty = Chunk(none, none, none, np.zeros((0, entry.dim), np.float32), np.zeros((0, entry.n_state), np.float32))
        chunks, events, n = [empty], [(none, none)], 0  # keys, and the line that each of them has then, or -1
        for erased, chunk in self.replay(links, table):
            if chunk is None:
                events.append((erased, np.full(len(erased), -1)))
            else:
                chunks.append(chunk)
                events.append((chunk.key, np.arange(n, n := n + len(chunk.key))))
        keys, lines = latest(*(np.concatenate(parts) for parts in zip(*events, strict=True)))
        whole = Chunk._make(np.concatenate(columns) for columns in zip(*chunks, strict=True))
        put = lines >= 0
        return keys[~put], Chunk._make(column[lines[put]] for column in whole)


def latest(keys: Int64s, values: Int64s) -> tuple[Int64s, Int64s]:
    """Each key once, ascending, with the last of its values."""
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    last = np.append(keys[1:] != keys[:-1], np.ones(min(1, len(keys)), np.bool_))
    return keys[last], values[order[last]]


def _shape(entry: TableEntry) -> tuple[Any, ...]:
    return entry.dim, entry.n_state, entry.dtype, entry.key_dtype, entry.optimizer["name"]
