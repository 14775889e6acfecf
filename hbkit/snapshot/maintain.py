"""Keeping a history: what differs between two commits, one commit in place of a chain, and old commits removed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hbkit.errors import Corrupt, InvalidArgument
from hbkit.snapshot import rows
from hbkit.snapshot.files import FileEntry
from hbkit.snapshot.history import History
from hbkit.snapshot.manifest import VERSION, Manifest, encode, state_path, table_directory
from hbkit.snapshot.merge import Part, merged, side_by_side
from hbkit.snapshot.place import Draft
from hbkit.snapshot.places import place_of
from hbkit.store.line import Int64s


class Diff(NamedTuple):
    """How a table differs between two commits: keys, each array in the order of a snapshot's files.

    Attributes
    ----------
    added : key_dtype[n]
        The second commit alone has a row of them.
    changed : key_dtype[n]
        Frequency, last step, row or state differ in some bit.
    erased : key_dtype[n]
        The first commit alone has a row of them.
    """

    added: npt.NDArray[Any]
    changed: npt.NDArray[Any]
    erased: npt.NDArray[Any]


def diff(path: str | os.PathLike[str], a: str, b: str = "latest") -> dict[str, Diff]:
    """What is different in commit `b` from what it was in commit `a`, for each table that either has.

    Parameters
    ----------
    path : str or path
        Of a snapshot.
    a, b : str
        Ids of commits, or "latest". A table that one of them lacks counts as empty there.

    Raises
    ------
    NotFound, Corrupt, StorageError
        As `hbkit.snapshot.load`.

    Notes
    -----
    Reads all rows of both; holds some row groups of each file, and the keys that differ.
    """
    history = History(place_of(path))
    commits = [history.find(commit) for commit in (a, b)]
    names = dict.fromkeys(name for commit in commits for name in commit.tables)
    return {name: _diff(history, commits, name) for name in names}


def _diff(history: History, commits: list[Manifest], name: str) -> Diff:
    chains = [history.chain(m, name) if name in m.tables else [] for m in commits]
    added, changed, erased = [_NONE], [_NONE], [_NONE]
    for old, new in side_by_side([_lines(history, chain, name) for chain in chains]):
        at, there = _find(new.key, old.key)
        erased.append(old.key[~there])
        added.append(new.key[~_find(old.key, new.key)[1]])
        if there.any():
            assert old.lines is not None and new.lines is not None
            differs = np.zeros(np.count_nonzero(there), np.bool_)
            columns: Iterable[Any] = zip(old.lines, new.lines, strict=True)
            for x, y in columns:
                differs |= _differ(x[there], y[at[there]])
            changed.append(old.key[there][differs])
    key_dtype = next(m.tables[name].key_dtype for m in reversed(commits) if name in m.tables)
    return Diff._make(np.concatenate(parts).astype(key_dtype) for parts in (added, changed, erased))


def _lines(history: History, chain: list[Manifest], name: str) -> Iterable[Part]:
    return (Part(chunk.key, chunk) for chunk in merged(history, chain, name)) if chain else ()


def _find(keys: Int64s, wanted: Int64s) -> tuple[Int64s, npt.NDArray[np.bool_]]:
    """Where among ascending keys others are, and which of them are there."""
    at = np.searchsorted(keys, wanted)
    there = at < len(keys)
    there[there] = keys[at[there]] == wanted[there]
    return at, there


def _differ(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which entries differ in some bit: of integers [n], or floats [n, w]. Of another width, all do."""
    if x.shape != y.shape:
        return np.ones(len(x), np.bool_)
    x, y = (np.ascontiguousarray(column).view(f"i{column.itemsize}").reshape(len(x), -1) for column in (x, y))
    out: npt.NDArray[np.bool_] = (x != y).any(axis=1)
    return out


def squash(path: str | os.PathLike[str], commit: str = "latest") -> str:
    """Make a commit that holds in full what another holds as a chain of deltas; its id.

    Rows, step and state are the same, and its files are those that a full save would have written. `prune` can then
    remove the chain. A table that was saved as the squashed commit, or loaded from it, can save a delta to the new one.

    Parameters
    ----------
    path : str or path
        Of a snapshot.
    commit : str
        Its id. As the new commit is the newest, squashing an older one goes back to it.

    Returns
    -------
    str
        The new commit; the same one where it is full already.

    Raises
    ------
    Locked
        Another writer is saving here, or has committed meanwhile. In a local directory, saves are refused in the same
        way until this returns.
    NotFound, Corrupt, StorageError
        As `hbkit.snapshot.load` and `save`; the history is as it was.

    Notes
    -----
    Holds some row groups of each file of the chain, whatever the table's size. The chain's checksums are checked.
    """
    place = place_of(path)
    History(place).find(commit)  # before a draft makes the directory
    with place.draft() as draft:
        history = History(place)
        old = history.find(commit)
        if all(table.since is None for table in old.tables.values()):
            return old.commit
        chains = {name: history.chain(old, name) for name in old.tables}
        others = [*old.state_files.values(), *(f for table in old.tables.values() for f in table.admission_files)]
        history.check_files(others)  # those of rows are checked while they are read
        tables = {}
        for name, table in old.tables.items():
            directory = table_directory(draft.directory, name)
            lines = merged(history, chains[name], name)
            path_ = f"{directory}/rows-00000.parquet"
            tables[name] = replace(
                table,
                since=None,
                rows=[rows.write_rows(draft, path_, lines, name, table.key_dtype, table.dim, table.n_state)],
                erased=[],
                admission_files=[
                    _copy(draft, history, file, f"{directory}/{file.path.rpartition('/')[2]}")
                    for file in table.admission_files
                ],
            )
        manifest = replace(
            old,
            version=VERSION,
            commit=draft.commit,
            parent=None,
            tables=tables,
            state_files={
                name: _copy(draft, history, file, state_path(draft.directory, name))
                for name, file in old.state_files.items()
            },
            directory=draft.directory,
            squashed=old.squashed or history.digest(old),
        )
        draft.publish(encode(manifest)[0])
    return draft.commit


def _copy(draft: Draft, history: History, file: FileEntry, path: str) -> FileEntry:
    with draft.create(path) as sink:
        sink.write(history.place.read(file.path, file.nbytes))
    return sink.entry(path, file.n_rows)


def prune(path: str | os.PathLike[str], keep: int = 3) -> list[str]:
    """Remove all but the newest commits, and what is left of commits that were never finished; ids of those removed.

    Parameters
    ----------
    path : str or path
        Of a snapshot.
    keep : int
        How many to keep, at least 1. Commits that these build on stay as well: `squash` the newest first to let go of a
        long chain.

    Raises
    ------
    NotFound
        There is no snapshot.
    Locked
        Another writer is at work here.
    Corrupt
        A manifest of what is to be kept is damaged; nothing was removed.
    StorageError
        The disk fails. What is still listed is whole.

    Notes
    -----
    Killed at any instant, this leaves a history in which every commit that is listed is whole; the next call removes
    the rest, in a bucket when it is a day old. Who loads a commit that is removed meanwhile gets it whole, or an error.
    In a bucket, nobody may save a delta to a commit that is removed meanwhile: to the newest is safe.
    """
    if isinstance(keep, bool) or not isinstance(keep, int | np.integer) or keep < 1:
        raise InvalidArgument(f"keep={keep!r}", remedy="keep at least 1 commit")
    place = place_of(path)
    History(place).find(None)
    with place.lock():
        history = History(place)
        commits = history.commits()
        kept: set[str] = set()
        for commit in commits[-keep:]:
            kept |= _needed(history, history.manifest(commit))
        gone = [commit for commit in commits if commit not in kept]
        directories = [_directory(history, commit) for commit in gone]
        for commit in reversed(gone):  # first those that build on others
            place.withdraw(commit)
        place.remove(directories)
        place.remove(place.leftovers({commit: _directory(history, commit) for commit in sorted(kept)}))
    return gone


def _directory(history: History, commit: str) -> str:
    """Where the files of a commit are, as far as its manifest can be read."""
    try:
        return history.manifest(commit).directory or commit
    except Corrupt:
        return commit


def _needed(history: History, manifest: Manifest) -> set[str]:
    """A commit and those that its tables build on."""
    chains = (history.chain(manifest, name) for name in manifest.tables)
    return {manifest.commit}.union(*({link.commit for link in chain} for chain in chains))


_NONE = np.zeros(0, np.int64)
