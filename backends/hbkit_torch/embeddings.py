"""`EmbeddingCollection`: the core's tables as a module."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from hbkit import errors
from hbkit.embedding import Checkpoint, Collection
from hbkit_torch import backward
from hbkit_torch.data import to_column
from hbkit_torch.pipeline import leaves
from hbkit_torch.transfer import empty_on, in_order, place_of
from hbkit_torch.update import Forward, Updating

__all__ = ["EmbeddingCollection"]


class EmbeddingCollection(Updating, torch.nn.Module):
    """A module over `hbkit.embedding.Collection`: a batch of keys in, one tensor of rows for each feature out.

    In training (train mode, gradients on) a forward creates the rows of new keys and gives leaf tensors; after
    ``loss.backward()``, ``apply()`` makes one fused update of every table. In eval mode or under ``torch.no_grad`` it
    only reads, and a key without a row gives zeros. The module has no parameters: the rows live in the tables.

    Gradients accumulate as those of parameters do: several forwards, each with its backward, and one ``apply()`` make
    the update of all their batches as one. ``zero_grad()`` forgets them. With a scaler, and clipped together::

        scaler.scale(loss).backward()
        for part in optimizer, embeddings:
            scaler.unscale_(part)
        torch.nn.utils.clip_grad_norm_([*model.parameters(), *embeddings.leaves], 1.0)
        scaler.step(optimizer)
        embeddings.apply(scaler=scaler)
        scaler.update()

    Parameters
    ----------
    collection : hbkit.embedding.Collection
        Borrowed: closing the module leaves the tables open.
    update : "apply" or "backward"
        When the tables are updated. In backward there is nothing to apply: each backward is an update, by the gradients
        as they come. GradScaler, accumulation and clipping by a global norm would need them later, and are refused.
    snapshot : str or path, optional
        Where ``state_dict()`` commits the rows (`hbkit.snapshot`); the state names the commit, and ``load_state_dict``
        goes back to it. Without it, ``state_dict()`` raises, since the rows would be missing.

    Notes
    -----
    Rows of tables on a device (`hbkit.store.device_cached`) are written into tensors there, and updated by gradients
    that are there: neither passes through host memory. Device and model work in order, on whichever stream of PyTorch's
    is current. Over tables that ranks share, rows come to host memory.

    Not thread-safe. A forward in training waits for ``apply()`` until ``zero_grad()`` or ``drop()``; one that had no
    backward by then has no part in the update. The forward itself is no part of a compiled graph; the model behind it
    is. Rows are float32, under autocast too.
    """

    def __init__(
        self,
        collection: Collection,
        update: Literal["apply", "backward"] = "apply",
        snapshot: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        if update not in ("apply", "backward"):
            raise errors.InvalidArgument(f"update={update!r}", remedy="use 'apply' or 'backward'")
        self._collection = collection
        self._checkpoint = Checkpoint(collection, snapshot)
        self._forwards: list[Forward] = []
        self._watch = backward.Watch() if update == "backward" else None
        self._closed = False

    @property
    def collection(self) -> Collection:
        """The core's collection.

        Raises
        ------
        Closed
            The module was closed.
        """
        if self._closed:
            raise errors.Closed(
                "the embedding collection is closed",
                feature=", ".join(self._collection.features),
                remedy="make a new EmbeddingCollection over the same tables",
            )
        return self._collection

    @torch.compiler.disable
    def forward(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Rows of a batch.

        Parameters
        ----------
        batch : dict
            A key column for each feature: integer Tensor or ndarray [n], `Jagged`, ``(values, row_splits)`` or
            `hbkit.Ragged`; other columns are ignored. Tensors may be on the device of the feature's table, and then
            stay there; they must not change before the update.

        Returns
        -------
        dict of feature to Tensor float32[n, dim]
            A ragged feature without pooling gives a `Sequence`. On the device of the feature's table where that has
            one (`hbkit.embedding.Table.device`), else in host memory.

        Raises
        ------
        UnknownColumn
            A feature is not in the batch.
        InvalidArgument
            A feature's keys are not integers, or neither in host memory nor on its table's device.
        Closed
            The module was closed.
        """
        train = self.training and torch.is_grad_enabled()
        collection = self.collection
        columns = {f: to_column(batch[f], f, place_of(collection.device(f))) for f in collection.features if f in batch}
        with in_order(collection) as streams:
            staged = collection.stage(columns, train=train)
            try:
                staged.wait()
                if train:
                    self._make_way()
                embeddings = leaves(staged.outputs(empty_on(streams)), train)
            except BaseException:
                staged.close()
                raise
        if not train:
            staged.close()
            return embeddings
        self._forwards.append(forward := Forward(staged, embeddings))
        return embeddings if self._watch is None else self._watch.update_in_backward(forward)

    def _make_way(self) -> None:
        """The forward before, if it waits, goes on waiting with its rows let go of; or never updates, in backward."""
        if self._watch is not None:
            self.drop()
        elif self._forwards and self._forwards[-1].staged.state == "read":
            self._forwards[-1].staged.hold()

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors that take the gradients of all forwards since the last update, for ``clip_grad_norm_``.

        A key's gradients in several rows count one by one in the norm: they are summed at the update.

        Raises
        ------
        Unsupported
            The tables are updated in backward.
        """
        if self._watch is not None:
            raise backward.refused("Unscaling by GradScaler and clipping by a global norm")
        return super().leaves

    def apply(
        self, fn: Callable[[torch.nn.Module], None] | None = None, scaler: torch.amp.GradScaler | None = None
    ) -> EmbeddingCollection:
        """Update the tables by the gradients since the last update; with ``fn``, `torch.nn.Module.apply`.

        A feature that the loss did not use has no gradient, and its rows stay as they are.

        Parameters
        ----------
        fn : function of a module, optional
        scaler : torch.amp.GradScaler, optional
            That scaled the loss; call its ``update()`` afterwards. Gradients are unscaled, unless
            ``scaler.unscale_(embeddings)`` did so already, and where one is not finite no row changes: as for each of
            several optimizers, by its own gradients.

        Raises
        ------
        Closed
            There is no forward in train mode to apply, or no backward came after it.
        Unsupported
            A scaler is given, and the tables are updated in backward.
        """
        if fn is not None:
            return super().apply(fn)
        if self._watch is not None:
            if scaler is not None:
                raise backward.refused("GradScaler")
            raise errors.Closed(
                "backward() has updated the tables",
                remedy="leave apply() out, or make the collection without update='backward'",
            )
        if not self._forwards:
            raise errors.Closed(
                "there is no forward to apply",
                remedy="call the module in train mode, then backward(), then apply() once",
            )
        self.update(scaler)
        self.drop()
        return self

    def lend(self) -> Collection:
        """The collection, to a pipeline: forwards that wait are dropped, since its steps come in their place.

        Raises
        ------
        Unsupported
            The tables are updated in backward; a pipeline's steps have an ``apply``.
        """
        if self._watch is not None:
            raise backward.refused("A pipeline")
        self.drop()
        return self.collection

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As `drop`."""
        self.drop()

    def drop(self) -> None:
        """Forget the forwards that wait, and their gradients, without an update."""
        for forward in self._forwards:
            forward.staged.close()
        self._forwards = []

    def get_extra_state(self) -> dict[str, str]:
        """What ``state_dict()`` has of the rows: the snapshot's path, the commit and its digest.

        Raises
        ------
        InvalidArgument
            The module has no ``snapshot``.
        HbkitError
            As `hbkit.snapshot.save` raises.
        """
        return self._checkpoint.name()

    def set_extra_state(self, state: Any) -> None:
        """Go back to the commit that a state names.

        Raises
        ------
        NotFound
            It is not there any more.
        HbkitError
            As `hbkit.snapshot.load` raises.
        """
        self.drop()
        self._checkpoint.load(state)

    def close(self) -> None:
        """Drop the forwards that wait and refuse further ones; the tables stay open. Idempotent."""
        self.drop()
        if self._watch is not None:
            self._watch.end()
        self._closed = True
