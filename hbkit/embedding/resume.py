"""Resumable: tables, dense weights, random generators and cursor of a training as one commit of a snapshot."""

from __future__ import annotations

import os
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

from hbkit import snapshot
from hbkit.data import Dataset
from hbkit.embedding.collection import Collection
from hbkit.errors import NotFound, SchemaMismatch
from hbkit.shuffle import Transport
from hbkit.snapshot.ranks import Ranks

__all__ = ["Resumable", "random_arrays", "set_random_arrays"]


class Resumable(ABC):
    """What the trainers of all frameworks share: a training saved at any step goes on exactly from there.

    The losses after `load` are bit for bit those of a training that was not interrupted, at a fixed number of the
    framework's threads.

    Over sharded embeddings all ranks call `save` and `load` together: each saves the rows that it owns, and loads those
    that it owns then, so that any number of ranks goes on with what any other saved; with the same number, exactly.

    Attributes
    ----------
    cursor : dict or None
        Where the dataset continues after the last batch that was applied, however many were staged ahead of it; None
        before the first.
    """

    embeddings: Any
    cursor: dict[str, Any] | None = None
    _channel: Transport | None = None  # of saves, which may go on beside the steps

    @abstractmethod
    def dense_state(self) -> bytes:
        """The model's parameters and its optimizer's state, as a safetensors file. The tables are not in it."""

    @abstractmethod
    def load_dense_state(self, state: bytes) -> None:
        """Load what `dense_state` gave."""

    @staticmethod
    @abstractmethod
    def random_state() -> bytes:
        """The states of the random generators, as a safetensors file."""

    @staticmethod
    @abstractmethod
    def load_random_state(state: bytes) -> None:
        """Load what `random_state` gave."""

    @property
    def collection(self) -> Collection:
        """The tables."""
        collection: Collection = getattr(self.embeddings, "collection", self.embeddings)
        return collection

    @property
    def _group(self) -> Transport | None:
        """The ranks that save together; None where the embeddings are not sharded."""
        transport = getattr(self.collection, "transport", None)
        if self._channel is None and transport is not None:
            self._channel = transport.split()
        return self._channel

    def state(self) -> dict[str, Any]:
        """All but the tables, as `hbkit.snapshot.save` takes it: ``dense`` and ``random`` (bytes), and ``cursor``.

        Dense weights and the cursor are the same on all ranks, and rank 0 gives them; the others give ``random-RANK``.
        """
        transport = getattr(self.collection, "transport", None)
        if transport is not None and transport.rank:
            return {f"random-{transport.rank}": self.random_state()}
        return {"dense": self.dense_state(), "random": self.random_state(), "cursor": self.cursor}

    def load_state(self, state: Mapping[str, Any], ds: Dataset | None = None) -> None:
        """Load what `state` gave, and let the next iteration of `ds` continue after the last batch applied.

        Raises
        ------
        SchemaMismatch
            There is no dense state in it, or that of another model.
        Corrupt
            Its bytes are no safetensors file.
        InvalidArgument
            `ds` is not the dataset that was trained on.
        """
        if not isinstance(state.get("dense"), bytes):
            raise SchemaMismatch("the state holds no model", remedy="load what a trainer saved")
        cursor = state.get("cursor")
        if ds is not None and cursor is not None:
            ds.load_state_dict(cursor)
        self.load_dense_state(state["dense"])
        transport = getattr(self.collection, "transport", None)
        random = f"random-{transport.rank}" if transport is not None and transport.rank else "random"
        if random in state:  # not in commits of tables and weights alone, or of fewer ranks
            self.load_random_state(state[random])
        self.cursor = cursor

    @overload
    def save(
        self,
        path: str | os.PathLike[str],
        base: str | None = None,
        state: Mapping[str, Any] | None = None,
        background: Literal[False] = False,
    ) -> str: ...

    @overload
    def save(
        self,
        path: str | os.PathLike[str],
        base: str | None = None,
        state: Mapping[str, Any] | None = None,
        *,
        background: Literal[True],
    ) -> snapshot.Saving: ...

    def save(
        self,
        path: str | os.PathLike[str],
        base: str | None = None,
        state: Mapping[str, Any] | None = None,
        background: bool = False,
    ) -> str | snapshot.Saving:
        """Commit tables, weights, generators, step and cursor as one; the commit's id, or a `hbkit.snapshot.Saving`.

        Parameters
        ----------
        path, base, background
            As `hbkit.snapshot.save` takes them; but "latest" where there is no commit yet writes all rows.
        state : mapping of str to JSON value or bytes, optional
            Of the caller's own, beside what `state` gives.

        Raises
        ------
        HbkitError
            See `hbkit.snapshot.save`.
        """
        whole = {**self.state(), **(state or {})}
        try:
            return self._save(path, base, whole, background)
        except NotFound:
            if base != "latest":
                raise
            return self._save(path, None, whole, background)

    def _save(
        self, path: str | os.PathLike[str], base: str | None, state: dict[str, Any], background: bool
    ) -> str | snapshot.Saving:
        tables, step = list(self.collection.tables.values()), self.collection.step
        if background:
            return snapshot.save(path, tables, step, base, state, background=True, group=self._group)
        return snapshot.save(path, tables, step, base, state, group=self._group)

    def load(
        self, path: str | os.PathLike[str], ds: Dataset | None = None, commit: str | None = None
    ) -> snapshot.Loaded:
        """Go back to a commit that `save` made: what follows is what followed then.

        >>> trainer.load("model", ds)  # build trainer and ds as they were built for the run that was saved
        >>> for epoch in range(ds.state_dict()["epoch"], epochs):
        ...     trainer.fit(ds.set_epoch(epoch), on_step)

        Parameters
        ----------
        path : str or path
        ds : Dataset, optional
            Its next iteration continues after the last batch applied.
        commit : str, optional
            Its id; the newest when left out.

        Raises
        ------
        HbkitError
            As `load_state` and `hbkit.snapshot.load` raise; then the trainer may be half loaded, and is of no use
            before something was loaded whole.
        """
        ranks = Ranks(self._group)
        found: list[snapshot.Loaded] = []
        commit = ranks.gather(lambda: snapshot.load(path, [], commit).commit)[0]

        def load() -> None:
            loaded = snapshot.load(path, [], commit)
            self.load_state(loaded.state, ds)
            tables = list(self.collection.tables.values())
            found.append(snapshot.load(path, tables, loaded.commit, (ranks.rank, ranks.size)))

        ranks.gather(load)
        return found[0]


def random_arrays() -> dict[str, npt.NDArray[Any]]:
    """The states of Python's and NumPy's global generators, which functions given to ``Dataset.map`` may use."""
    _, words, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=False)  # noqa: NPY002 it is the global one that is meant
    return {
        "python": np.array(words, np.int64),
        "python/gauss": np.array([] if gauss is None else [gauss]),
        "numpy": np.array(legacy["state"]["key"]),
        "numpy/position": np.array([legacy["state"]["pos"], legacy["has_gauss"]], np.int64),
        "numpy/gauss": np.array([legacy["gauss"]]),
    }


def set_random_arrays(arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Set both generators to what `random_arrays` gave; arrays of other names are left alone."""
    gauss = arrays["python/gauss"].tolist()
    random.setstate((3, tuple(arrays["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss = arrays["numpy/position"].tolist()
    np.random.set_state(("MT19937", arrays["numpy"], position, has_gauss, float(arrays["numpy/gauss"][0])))  # noqa: NPY002 as above
