"""Embeddings over the core's tables, and the layers that the models are written from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from hbkit import errors
from hbkit.embedding import Collection, Staged
from hbkit_tensorflow.attach import attach
from hbkit_tensorflow.data import feature_column, tensor, to_column
from hbkit_tensorflow.layers import (
    MLP,
    CompressedInteraction,
    CrossNetwork,
    Dice,
    DotInteraction,
    FactorizationMachine,
    MixtureOfExperts,
    ProductLayer,
    SignedLog,
    TargetAttention,
)
from hbkit_tensorflow.pipeline import from_outputs, gradients

__all__ = [
    "MLP",
    "CompressedInteraction",
    "CrossNetwork",
    "Dice",
    "DotInteraction",
    "EmbeddingCollection",
    "FactorizationMachine",
    "MixtureOfExperts",
    "ProductLayer",
    "SignedLog",
    "TargetAttention",
    "attach",
]


class EmbeddingCollection(keras.layers.Layer):
    """A layer over `hbkit.embedding.Collection`: a batch of keys in, one tensor of rows for each feature out.

    With ``training=True`` a call creates the rows of new keys; after the gradients, ``apply(grads)`` makes one fused
    update of every table. Else it only reads, and a key without a row gives what `Table.lookup` gives for it. The layer
    has no weights: the rows live in the tables, which `hbkit.snapshot` saves. ::

        with tf.GradientTape() as tape:
            rows = embeddings(batch, training=True)
            tape.watch(rows)
            loss = ...
        embeddings.apply(tape.gradient(loss, rows))

    Parameters
    ----------
    collection : hbkit.embedding.Collection
        Borrowed: closing the layer leaves the tables open.

    Notes
    -----
    Not thread-safe. One call is pending at a time: a call whose ``apply`` did not come is dropped by the next one, and
    leaves the rows as they were.

    In a `tf.function` the same lines run, with one call back to Python for the rows and one for the update: they take
    the Python lock, copy keys, rows and gradients, and XLA cannot compile them. `pipeline` and `attach` need none.
    """

    def __init__(self, collection: Collection, name: str | None = None) -> None:
        super().__init__(name=name)
        self._collection = collection
        self._staged: Staged | None = None
        self._closed = False

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

    def __call__(self, batch: Mapping[str, Any], training: bool = False) -> dict[str, Any]:
        """Rows of a batch. (Keras's own ``__call__`` would make tensors of all columns, and cast them.)

        Parameters
        ----------
        batch : dict
            A key column for each feature: integer Tensor or ndarray [n], RaggedTensor or `hbkit.Ragged`; other columns
            are ignored.
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
            Keys are a SparseTensor; or, in a `tf.function`, a feature has no pooling.
        Closed
            The layer was closed.
        """
        if tf.inside_function():
            return self._call_in_graph(batch, training)
        return from_outputs(self._outputs(batch, training))

    def _outputs(self, batch: Mapping[str, Any], training: bool) -> dict[str, Any]:
        self.drop()
        columns = {f: to_column(batch[f], f) for f in self.collection.features if f in batch}
        staged = self.collection.stage(columns, train=training)
        try:
            staged.wait()
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
        features = {feature: self.collection.tables[table].dim for feature, table in self.collection.features.items()}
        for feature in features:
            if self.collection.pooling[feature] is None:
                raise errors.Unsupported("no pooling in a tf.function", feature=feature, remedy="use hb.pipeline")
        keys = {feature: feature_column(batch, feature) for feature in features}

        def outputs(*flat: Any) -> list[Any]:
            columns = tf.nest.pack_sequence_as(keys, [tensor(a) for a in flat], expand_composites=True)
            found = self._outputs(columns, training)
            return [found[feature] for feature in features]

        rows = tf.numpy_function(outputs, tf.nest.flatten(keys, expand_composites=True), [tf.float32] * len(features))
        for row, dim in zip(rows, features.values(), strict=True):
            row.set_shape((None, dim))
        return dict(zip(features, rows, strict=True))

    def apply(self, grads: Mapping[str, Any]) -> None:
        """Update the tables by the gradients of the last call with ``training=True``.

        Parameters
        ----------
        grads : dict of feature to Tensor shaped as its rows, or None
            None is for a feature that the loss did not use, whose rows stay as they are.

        Raises
        ------
        Closed
            There is no call to apply, or no feature has a gradient.
        """
        if tf.inside_function():
            found = {feature: tf.convert_to_tensor(grad) for feature, grad in grads.items() if grad is not None}

            def apply(*flat: Any) -> None:
                self.apply(dict(zip(found, flat, strict=True)))

            tf.numpy_function(apply, list(found.values()), [])
            return
        if self._staged is None:
            raise errors.Closed(
                "there is no call to apply", remedy="call the layer with training=True, then apply() once"
            )
        self._staged.apply(gradients(grads))
        self.drop()

    def drop(self) -> None:
        """Forget the pending call, if any, without an update."""
        if self._staged is not None:
            self._staged.close()
        self._staged = None

    def close(self) -> None:
        """Drop the pending call and refuse further ones; the tables stay open. Idempotent."""
        self.drop()
        self._closed = True
