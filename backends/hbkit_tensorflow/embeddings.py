"""`EmbeddingCollection`: the core's tables as a layer."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from hbkit import errors
from hbkit.embedding import Checkpoint, Collection, Staged, build, describe
from hbkit_tensorflow import backward
from hbkit_tensorflow.data import feature_column, tensor, to_column
from hbkit_tensorflow.pipeline import Sequence, from_outputs
from hbkit_tensorflow.update import Forward, Updating, gradients, leaves

__all__ = ["EmbeddingCollection"]


@keras.saving.register_keras_serializable("hbkit")
class EmbeddingCollection(Updating, keras.layers.Layer):
    """A layer over `hbkit.embedding.Collection`: a batch of keys in, one tensor of rows for each feature out.

    With ``training=True`` a call creates the rows of new keys; after the gradients, ``apply(grads)`` makes one fused
    update of every table. Else it only reads, and a key without a row gives what `Table.lookup` gives for it. The layer
    has no weights: the rows live in the tables. ::

        with tf.GradientTape() as tape:
            rows = embeddings(batch, training=True)
            tape.watch(rows)
            loss = ...
        embeddings.apply(tape.gradient(loss, rows))

    To accumulate, call ``accumulate(grads)`` for all batches but the last: its ``apply(grads)`` makes the update of all
    of them as one.

    Parameters
    ----------
    collection : hbkit.embedding.Collection
        Borrowed: closing the layer leaves the tables open.
    update : "apply" or "backward"
        When the tables are updated. In backward there is nothing to watch or apply: a tape's gradient of any variables
        is an update, by the gradients as they come. LossScaleOptimizer, accumulation and clipping by a global norm
        would need them later, and are refused. A feature all of whose gradients are zero counts as one that the loss
        did not use.
    snapshot : str or path, optional
        Where ``save`` and ``save_weights`` of a model that holds the layer commit the rows (`hbkit.snapshot`); the file
        names the commit, and ``load_weights`` and ``load_model`` go back to it. Without it, saving raises, since the
        rows would be missing.
    name : str, optional

    Notes
    -----
    Not thread-safe. One call is pending at a time: a call whose ``apply`` or ``accumulate`` did not come is dropped by
    the next one, and leaves the rows as they were. Rows are float32 under every dtype policy. Those of tables on a
    device (`hbkit.store.device_cached`) come to host memory, and their gradients come from there.

    In a `tf.function` the same lines run, with one call back to Python for the rows and one for the update: they take
    the Python lock, copy keys, rows and gradients, and XLA cannot compile them. `pipeline` and `attach` need none.
    """

    def __init__(
        self,
        collection: Collection,
        update: Literal["apply", "backward"] = "apply",
        snapshot: str | os.PathLike[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        if update not in ("apply", "backward"):
            raise errors.InvalidArgument(f"update={update!r}", remedy="use 'apply' or 'backward'")
        self._collection = collection
        self._snapshot = None if snapshot is None else os.fspath(snapshot)
        self._checkpoint = Checkpoint(collection, snapshot)
        self._staged: Staged | None = None
        self._held: deque[Forward] = deque()
        self._watch = backward.Watch() if update == "backward" else None
        self._n_scaled = backward.n_scaled()
        self._load_error: errors.HbkitError | None = None
        self._closed = False
        self.built = True

    @property
    def collection(self) -> Collection:
        """The core's collection.

        Raises
        ------
        Closed
            The layer was closed.
        """
        if self._closed:
            raise errors.Closed(
                "the embedding collection is closed",
                feature=", ".join(self._collection.features),
                remedy="make a new EmbeddingCollection over the same tables",
            )
        return self._collection

    @tf.autograph.experimental.do_not_convert
    def __call__(self, batch: Mapping[str, Any], training: bool = False) -> dict[str, Any]:
        """Rows of a batch. (Keras's own ``__call__`` would make tensors of all columns, and cast them.)

        Parameters
        ----------
        batch : dict
            A key column for each feature: integer Tensor or ndarray [n], RaggedTensor, SparseTensor or `hbkit.Ragged`;
            other columns are ignored.
        training : bool

        Returns
        -------
        dict of feature to Tensor float32[n, dim]
            A ragged feature without pooling gives a `Sequence`.

        Raises
        ------
        UnknownColumn
            A feature is not in the batch.
        InvalidArgument
            A feature's keys are not integers.
        Unsupported
            Keys are a SparseTensor that is no matrix; or, in a `tf.function`, features stand side by side (`stack`).
        Closed
            The layer was closed.
        """
        self._n_scaled = backward.n_scaled()
        graph = tf.inside_function()
        rows = self._call_in_graph(batch, training) if graph else from_outputs(self._outputs(batch, training))
        if self._watch is None or not training:
            return rows
        staged = self._staged

        def update(grads: dict[str, Any]) -> None:
            if not graph and (self._staged is not staged or staged is None):
                raise backward.refused("Accumulation of several calls or backwards")
            self._with_arrays(self._apply_used, grads)

        return self._watch.update_in_backward(rows, update)

    def _outputs(self, batch: Mapping[str, Any], training: bool) -> dict[str, Any]:
        columns = {f: to_column(batch[f], f) for f in self.collection.features if f in batch}
        staged = self.collection.stage(columns, train=training)
        try:
            staged.wait()
            if training:
                self._drop_call()
            outputs = staged.outputs()
        except BaseException:
            staged.close()
            raise
        if training:
            self._staged = staged
        else:
            staged.close()
        return outputs

    def _call_in_graph(self, batch: Mapping[str, Any], training: bool) -> dict[str, Any]:
        collection = self.collection
        if collection.stack:
            raise errors.Unsupported(
                "features side by side in a tf.function", feature=", ".join(collection.stack), remedy="use hb.pipeline"
            )
        keys = {feature: feature_column(batch, feature) for feature in collection.features}
        # What a feature gives, and its shape, as the core decides by its column.
        kinds: dict[str, Any] = {}
        for feature, column in keys.items():
            one, dim = column.shape.rank == 1, collection.dim(feature)
            pooled = one or collection.pooling[feature] is not None
            rows = tf.TensorSpec((None, dim) if pooled else (None, None, dim), tf.float32)
            kinds[feature] = rows if pooled else Sequence(rows, tf.TensorSpec((None, None), tf.bool))

        def outputs(*flat: Any) -> list[Any]:
            columns = tf.nest.pack_sequence_as(keys, [tensor(a) for a in flat], expand_composites=True)
            found = self._outputs(columns, training)
            return [part for feature in kinds for part in tf.nest.flatten(found[feature])]

        specs = [spec for kind in kinds.values() for spec in tf.nest.flatten(kind)]
        flat = tf.nest.flatten(keys, expand_composites=True)
        parts = iter(tf.numpy_function(outputs, flat, [spec.dtype for spec in specs]))

        def shaped(spec: Any) -> Any:
            part = next(parts)
            part.set_shape(spec.shape)
            return part

        return {
            feature: Sequence(*map(shaped, kind)) if isinstance(kind, Sequence) else shaped(kind)
            for feature, kind in kinds.items()
        }

    @tf.autograph.experimental.do_not_convert
    def apply(self, grads: Mapping[str, Any]) -> None:
        """Update the tables by the gradients of the last call with ``training=True``, and of those accumulated.

        Parameters
        ----------
        grads : dict of feature to Tensor shaped as its rows, or None
            None is for a feature that the loss did not use, whose rows stay as they are.

        Raises
        ------
        Closed
            There is no call to apply, or no feature has a gradient; or backward has updated the tables.
        Unsupported
            A `keras.optimizers.LossScaleOptimizer` scaled the loss.
        """
        self._refuse_in_backward()
        backward.refuse_scaled(self._n_scaled)
        self._with_arrays(self._apply, grads)

    @tf.autograph.experimental.do_not_convert
    def accumulate(self, grads: Mapping[str, Any]) -> None:
        """Keep the gradients of the last call for the ``apply`` of a later one. Takes and raises what that does."""
        self._refuse_in_backward()
        backward.refuse_scaled(self._n_scaled)
        self._with_arrays(self._accumulate, grads)

    def _refuse_in_backward(self) -> None:
        if self._watch is not None:
            raise errors.Closed(
                "the gradient has updated the tables",
                remedy="leave apply() out, or make the collection without update='backward'",
            )

    @staticmethod
    def _with_arrays(act: Callable[[Mapping[str, Any]], None], grads: Mapping[str, Any]) -> None:
        """Do it now, or in a `tf.function` whenever that runs."""
        if not tf.inside_function():
            act(grads)
            return
        found = {feature: tf.convert_to_tensor(grad) for feature, grad in leaves(grads).items() if grad is not None}

        def later(*flat: Any) -> None:
            act(dict(zip(found, flat, strict=True)))

        tf.numpy_function(later, [tf.cast(grad, tf.float32) for grad in found.values()], [])

    def _call(self) -> Staged:
        if self._staged is None:
            raise errors.Closed(
                "there is no call to apply", remedy="call the layer with training=True, then apply() once"
            )
        return self._staged

    def _apply(self, grads: Mapping[str, Any]) -> None:
        self.update(self._call(), gradients(grads))
        self._drop_call()

    def _apply_used(self, grads: Mapping[str, Any]) -> None:
        """TensorFlow gives zeros for what the loss did not use."""
        if found := {feature: grad for feature, grad in grads.items() if np.any(grad)}:
            self._apply(found)
        self._drop_call()

    def _accumulate(self, grads: Mapping[str, Any]) -> None:
        self.hold(self._call(), gradients(grads))
        self._drop_call()

    def _drop_call(self) -> None:
        if self._staged is not None:
            self._staged.close()
        self._staged = None

    def drop(self) -> None:
        """Forget the pending call and what was accumulated, if any, without an update."""
        self._drop_call()
        self._held.clear()

    def lend(self) -> Collection:
        """The collection, to a pipeline: what is pending is dropped, since its steps come in its place.

        Raises
        ------
        Unsupported
            The tables are updated in backward; a pipeline's steps have an ``apply``.
        """
        if self._watch is not None:
            raise backward.refused("A pipeline")
        self.drop()
        return self.collection

    def get_config(self) -> dict[str, Any]:
        """Tables, features and pooling, as `hbkit.embedding.describe` gives them, and where the rows are committed.

        Raises
        ------
        Unsupported
            A table has more than that says: an SSD store, an admission filter, ...
        """
        return {
            "name": self.name,
            "collection": describe(self._collection),
            "update": "apply" if self._watch is None else "backward",
            "snapshot": self._snapshot,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> EmbeddingCollection:
        """A layer over new tables in host memory; loading its weights brings their rows."""
        return cls(**{**config, "collection": build(config["collection"])})

    def save_own_variables(self, store: Any) -> None:
        """Name the rows as a commit, where Keras saves weights.

        Raises
        ------
        InvalidArgument
            The layer has no ``snapshot``.
        HbkitError
            As `hbkit.snapshot.save` raises.
        """
        for name, value in self._checkpoint.name().items():
            store[name] = np.frombuffer(value.encode(), np.uint8)

    def load_own_variables(self, store: Any) -> None:
        """Go back to the commit that a file names.

        Raises
        ------
        NotFound
            It is not there any more. Keras makes a ValueError of it and of others, with the same text.
        HbkitError
            As `hbkit.snapshot.load` raises.
        """
        self.drop()
        named = {name: store[name] for name in ("snapshot", "commit", "digest") if name in store}
        if not named and self._load_error is not None:
            raise self._load_error  # Keras asks again, elsewhere in the file, and would tell of that alone
        try:
            self._checkpoint.load({name: np.asarray(value).tobytes().decode() for name, value in named.items()})
            self._load_error = None
        except errors.HbkitError as error:
            self._load_error = error
            raise

    def close(self) -> None:
        """Drop the pending call and refuse further ones; the tables stay open. Idempotent."""
        self.drop()
        if self._watch is not None:
            self._watch.end()
        self._closed = True
