"""Checkpoint: a framework's own checkpoint names the commit of a snapshot in the place of the tables' rows."""

from __future__ import annotations

import os
from collections.abc import Mapping

from hbkit import snapshot
from hbkit.embedding.collection import Collection
from hbkit.errors import InvalidArgument, NotFound, SchemaMismatch
from hbkit.snapshot.history import History
from hbkit.snapshot.places import place_of

__all__ = ["Checkpoint"]


class Checkpoint:
    """Commits a collection's tables, and goes back to the commit that a checkpoint names.

    Parameters
    ----------
    collection : Collection
    path : str or path, optional
        Directory or URI of the snapshot to commit to. Without one, nothing can be named.

    Notes
    -----
    Over several ranks, `name` and `load` are collective.
    """

    def __init__(self, collection: Collection, path: str | os.PathLike[str] | None = None) -> None:
        self._collection = collection
        self._path = None if path is None else os.fspath(path)
        self._group = getattr(collection, "transport", None)
        self._last: tuple[dict[str, str], list[tuple[int, int]]] | None = None

    def _state(self) -> list[tuple[int, int]]:
        """What differs as soon as a step was taken or a row made."""
        return [(table.step, len(table)) for table in self._collection.tables.values()]

    def name(self) -> dict[str, str]:
        """The tables as they are now, as a commit: strings ``snapshot`` (its path), ``commit`` and ``digest``.

        A commit is made where something changed since the last one; it holds the rows changed since.

        Raises
        ------
        InvalidArgument
            There is no path to commit to.
        HbkitError
            As `hbkit.snapshot.save` raises.
        """
        if self._path is None:
            raise InvalidArgument(
                "no snapshot for the rows, which are no part of a framework's checkpoint",
                feature=", ".join(self._collection.features),
                remedy="make the EmbeddingCollection with snapshot=path, or leave it out of the checkpoint",
            )
        # Ranks may differ in what changed, and must all save or none.
        if self._last is None or self._group is not None or self._last[1] != self._state():
            try:
                commit = self._save("latest")
            except NotFound:  # it is the first
                commit = self._save(None)
            self._last = self._named(self._path, commit), self._state()
        return dict(self._last[0])

    def _save(self, base: str | None) -> str:
        assert self._path is not None
        tables, step = list(self._collection.tables.values()), self._collection.step
        return snapshot.save(self._path, tables, step, base, group=self._group)

    @staticmethod
    def _named(path: str, commit: str) -> dict[str, str]:
        history = History(place_of(path))
        return {"snapshot": path, "commit": commit, "digest": history.digest(history.find(commit))}

    def load(self, state: Mapping[str, str]) -> None:
        """Replace the rows by those of a commit, given as `name` gives it.

        It is looked for in this checkpoint's own snapshot, then in the one it was made in.

        Raises
        ------
        NotFound
            It is in neither: pruned, moved, or overwritten by another training.
        SchemaMismatch
            `state` names no commit, or one of other tables.
        HbkitError
            As `hbkit.snapshot.load` raises.
        """
        if not isinstance(state, Mapping) or not all(
            isinstance(state.get(name), str) for name in ("snapshot", "commit", "digest")
        ):
            raise SchemaMismatch("the checkpoint names no commit of a snapshot", remedy="load one that hbkit made")
        paths = list(dict.fromkeys([self._path or state["snapshot"], state["snapshot"]]))
        for path in paths:
            try:
                found = self._named(path, state["commit"])
            except NotFound:
                continue
            if found["digest"] == state["digest"]:
                group, tables = self._group, list(self._collection.tables.values())
                shard = (0, 1) if group is None else (group.rank, group.size)
                snapshot.load(path, tables, state["commit"], shard)
                self._last = found, self._state()
                return
        raise NotFound(
            f"the checkpoint's commit {state['commit']} of digest {state['digest'][:12]} is not there",
            file=" or ".join(paths),
            remedy="bring the snapshot back, or load another checkpoint",
        )
