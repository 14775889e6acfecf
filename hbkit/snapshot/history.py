"""The commits of a snapshot: which there are, what they build on, and whether their files are what they say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np

from hbkit.errors import Corrupt, NotFound
from hbkit.snapshot import rows
from hbkit.snapshot.files import RESTORE, FileEntry
from hbkit.snapshot.manifest import Manifest, TableEntry, decode
from hbkit.snapshot.place import Place
from hbkit.store.line import Chunk, Int64s

Step: TypeAlias = tuple[Int64s, Chunk | None]


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

    def same(self, manifest: Manifest) -> list[str]:
        """Digests of the commits whose rows a commit has: its own, and that of the one it was squashed from."""
        return [self.digest(manifest), *filter(None, [manifest.squashed])]

    def chain(self, manifest: Manifest, table: str) -> list[Manifest]:
        """The commits that hold a table's rows as of `manifest`: the one with all rows first. Raises Corrupt."""
        return list(self._chain(manifest, table))[::-1]

    def _chain(self, manifest: Manifest, table: str) -> Iterator[Manifest]:
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
        """Read all rows of a table and check them; its keys, ascending: int64[n]. Raises Corrupt."""
        held = _Keys()
        for _, steps in self._links(chain, table, held):
            for _ in steps:
                pass
        return held.all()

    def replay(self, chain: list[Manifest], table: str) -> Iterator[Step]:
        """What makes an empty table the one saved, in order: keys to erase, or lines to put.

        Everything is checked on the way: checksums, schema, that keys ascend and are in no two files of a commit, and
        counts, unless `chain` begins with a delta. What was yielded is right if all comes without an error. Raises
        Corrupt.

        Yields
        ------
        erased : int64[n]
        chunk : Chunk or None
        """
        for _, steps in self.links(chain, table):
            yield from steps

    def links(self, chain: list[Manifest], table: str) -> Iterator[tuple[Manifest, Iterator[Step]]]:
        """`replay`, a commit after the other."""
        return self._links(chain, table, _Keys())

    def changes(self, manifest: Manifest, table: str, digest: str) -> tuple[Int64s, Chunk] | None:
        """What makes a table of the commit of this digest the one of `manifest`: keys to erase, and lines to put.

        Both ascend, no key is in both, and all of it is in memory at once. None where the chain of `manifest` does not
        pass through that commit; what is before it is not read. Raises Corrupt.
        """
        links: list[Manifest] = []
        for link in self._chain(manifest, table):
            if digest in self.same(link):
                break
            links.append(link)
        else:
            return None
        entry, none = manifest.tables[table], np.zeros(0, np.int64)
        empty = Chunk(none, none, none, np.zeros((0, entry.dim), np.float32), np.zeros((0, entry.n_state), np.float32))
        chunks, events, n = [empty], [(none, none)], 0  # keys, and the line that each of them has then, or -1
        for erased, chunk in self.replay(links[::-1], table):
            if chunk is None:
                events.append((erased, np.full(len(erased), -1)))
            else:
                chunks.append(chunk)
                events.append((chunk.key, np.arange(n, n := n + len(chunk.key))))
        keys, lines = _last(*(np.concatenate(parts) for parts in zip(*events, strict=True)))
        whole = Chunk._make(np.concatenate(columns) for columns in zip(*chunks, strict=True))
        put = lines >= 0
        return keys[~put], Chunk._make(column[lines[put]] for column in whole)

    def _links(self, chain: list[Manifest], table: str, held: _Keys) -> Iterator[tuple[Manifest, Iterator[Step]]]:
        counted = bool(chain) and chain[0].tables[table].since is None
        for manifest in chain:
            yield manifest, self._steps(manifest, table, held)
            if held.end_commit() != manifest.tables[table].n_rows and counted:
                raise Corrupt(
                    f"commit {manifest.commit} has {held.n} rows, its manifest says {manifest.tables[table].n_rows}",
                    file=self.place.where(f"{manifest.commit}.json"),
                    table=table,
                    remedy=RESTORE,
                )

    def _steps(self, manifest: Manifest, table: str, held: _Keys) -> Iterator[Step]:
        entry, nothing = manifest.tables[table], np.zeros(0, np.int64)
        for file in entry.erased:
            keys = rows.read_keys(self.place, file, entry)
            held.erase(keys)
            yield keys, None
        for file in entry.rows:
            for chunk in rows.read_rows(self.place, file, entry):
                held.put(chunk.key)
                yield nothing, chunk
            if not held.end_file():
                raise Corrupt(
                    "a key is in two files of one commit",
                    file=self.place.where(file.path),
                    table=table,
                    remedy=RESTORE,
                )


class _Keys:
    """The keys of a table along a chain, merged no sooner than there are others to compare them with.

    Attributes
    ----------
    n : int
        Keys as of the last commit.
    """

    def __init__(self) -> None:
        self.n = 0
        self._held: list[Int64s] = []  # of the commits before; together they ascend
        self._files: list[Int64s] = []  # of this commit so far; together they ascend
        self._file: list[Int64s] = []

    def all(self) -> Int64s:
        """All of them, ascending: int64[n]."""
        return np.concatenate([np.zeros(0, np.int64), *self._held])

    def erase(self, keys: Int64s) -> None:
        """Without these."""
        held = self.all()
        self._held = [held[~np.isin(held, keys, assume_unique=True)]]

    def put(self, keys: Int64s) -> None:
        """With these, which ascend within a file. They are copied."""
        self._file.append(keys.copy())

    def end_file(self) -> bool:
        """Whether the keys of this file are in no other of this commit."""
        self._files, apart = _merged(self._files, self._file)
        self._file = []
        return apart

    def end_commit(self) -> int:
        """How many keys there are now."""
        self._held, _ = _merged(self._held, self._files)
        self._files = []
        self.n = sum(map(len, self._held))
        return self.n


def _merged(a: list[Int64s], b: list[Int64s]) -> tuple[list[Int64s], bool]:
    """Both together, each ascending, without repeats; and whether there were none."""
    a, b = ([keys for keys in some if len(keys)] for some in (a, b))
    if not a or not b or a[-1][-1] < b[0][0]:
        return a + b, True
    both = np.concatenate(a + b)
    both.sort(kind="stable")  # linear: two runs that ascend
    is_new = np.append(True, both[1:] != both[:-1])
    return [both[is_new]], bool(is_new.all())


def _last(keys: Int64s, values: Int64s) -> tuple[Int64s, Int64s]:
    """Each key once, ascending, with the last of its values."""
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    last = np.append(keys[1:] != keys[:-1], np.ones(min(1, len(keys)), np.bool_))
    return keys[last], values[order[last]]


def _shape(entry: TableEntry) -> tuple[Any, ...]:
    return entry.dim, entry.n_state, entry.dtype, entry.key_dtype, entry.optimizer["name"]
