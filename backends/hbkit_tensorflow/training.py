"""A plain training loop over staged steps, and the dense half of a saved model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import keras
import numpy as np
import safetensors
import safetensors.numpy
import tensorflow as tf

from hbkit import errors
from hbkit.embedding import Resumable, random_arrays, set_random_arrays
from hbkit_tensorflow.data import Array, array
from hbkit_tensorflow.distributed import broadcast, reduce_gradients
from hbkit_tensorflow.pipeline import Step, pipeline
from hbkit_tensorflow.update import leaves

__all__ = ["Trainer", "seed"]


class Adagrad(keras.optimizers.Adagrad):
    """Divides by sqrt(sum) + epsilon, as PyTorch and hbkit's rows do, not by sqrt(sum + epsilon)."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        total = self._accumulators[self._get_variable_index(variable)]
        self.assign_add(total, keras.ops.square(gradient))
        root = keras.ops.sqrt(total) + self.epsilon
        self.assign_sub(variable, keras.ops.cast(learning_rate, variable.dtype) * gradient / root)


# PyTorch's defaults, so that a name means the same in both adapters.
OPTIMIZERS: dict[str, Callable[[float], keras.optimizers.Optimizer]] = {
    "adagrad": lambda lr: Adagrad(lr, initial_accumulator_value=0.0, epsilon=1e-10),
    "adam": lambda lr: keras.optimizers.Adam(lr, epsilon=1e-8),
    "adamw": lambda lr: keras.optimizers.AdamW(lr, weight_decay=0.01, epsilon=1e-8),
    "sgd": lambda lr: keras.optimizers.SGD(lr),
}


class Trainer(Resumable):
    """Trains a click model over an embedding collection, predicts with it, and saves and resumes.

    Parameters
    ----------
    model : keras.Model
        Called with dense float32[B, n_dense] and the dict of embeddings; gives logits float32[B], or [B, n_labels] for
        a dataset of a sequence of labels. The caller seeds Keras before building it. Its weights must exist, as those
        of `hbkit_tensorflow.models` do from the start.
    embeddings : EmbeddingCollection or hbkit.embedding.Collection
        Its tables have their own optimizers.
    optimizer : "adagrad", "adam", "adamw" or "sgd"
        Of the model's weights, with PyTorch's defaults.
    lr : float
        Learning rate of that optimizer.
    compile : bool
        Whether XLA compiles the step, whole.
    amp : bool
        Whether the model computes in bfloat16; its weights, logits and loss stay float32. The model's layers get this
        policy for good.
    positive_weight : float, or sequence of n_labels, optional
        Factor of the loss of label 1, for classes that are out of balance.

    Raises
    ------
    InvalidArgument
        There is no such optimizer, or the model has no weights yet.

    Notes
    -----
    For the same model, tables and data, the results are the same for every ``lookahead``, bit for bit, at a fixed
    number of TensorFlow threads; so are those of a training that ``save`` and ``load`` divide, with the dropout of
    Keras's layers as well. (What ``tf.nn.dropout`` and other stateful ops draw is known to TensorFlow alone.)
    """

    def __init__(
        self,
        model: keras.Model,
        embeddings: Any,
        optimizer: str = "adagrad",
        lr: float = 0.01,
        compile: bool = False,
        amp: bool = False,
        positive_weight: float | Sequence[float] | None = None,
    ) -> None:
        if optimizer not in OPTIMIZERS:
            raise errors.InvalidArgument(
                f"no dense optimizer {optimizer!r}", remedy=f"choose of {', '.join(OPTIMIZERS)}"
            )
        if not model.built:
            raise errors.InvalidArgument("the model has no weights yet", remedy="call it once before it is trained")
        if amp:
            for layer in model._flatten_layers():
                layer.dtype_policy = "mixed_bfloat16"
        self.model = model
        self.embeddings = embeddings
        self._positive_weight = None if positive_weight is None else np.asarray(positive_weight, np.float32)
        self._optimizer_name = optimizer
        self._optimizer = OPTIMIZERS[optimizer](lr)
        self._optimizer.build(model.trainable_variables)
        function = partial(tf.function, jit_compile=compile, autograph=False, reduce_retracing=True)
        self._train, self._predict = function(self._train_graph), function(self._predict_graph)
        self._gradients, self._update = function(self._gradients_graph), function(self._update_graph)
        broadcast(model, embeddings)

    def fit(self, ds: Any, on_step: Callable[[int, float], None] | None = None, lookahead: int = 8) -> None:
        """Train on one pass of the dataset: binary cross-entropy, the mean over the valid rows by their weight.

        Of several labels, a row's loss is the mean.

        Parameters
        ----------
        ds : Dataset
            Batched, with a label (``supervised``).
        on_step : function of (n_rows, loss), optional
            Called after each step; it may ``save``. Over sharded embeddings, the rows are this rank's own, and the loss
            is that of all ranks.
        lookahead : int, batches
            See `pipeline`.

        Raises
        ------
        InvalidArgument
            The dataset has no label or is not batched.
        """
        _need_label(ds)
        with pipeline(ds, self.embeddings, lookahead) as steps:
            for step in steps:
                loss, rows = self._trained(step)
                step.apply(rows)
                self.cursor = step.cursor
                if on_step is not None:
                    on_step(step.n_rows, float(loss))

    def _trained(self, step: Step) -> tuple[Any, Any]:
        """Update the dense weights; the loss, and the gradients of the rows."""
        inputs = step.dense, step.embeddings, step.label, step.weight
        if step.transport is None:
            return self._train(*inputs)
        loss, grads, rows = self._gradients(*inputs)
        moving = self.model.non_trainable_weights  # moments of a rank's own batches
        reduced = reduce_gradients([loss, *grads, *moving], step)
        self._update(reduced[1 : 1 + len(grads)])
        for weight, mean in zip(moving, reduced[1 + len(grads) :], strict=True):
            weight.assign(mean)
        return reduced[0], rows

    def _train_graph(self, dense: Any, embeddings: Any, label: Any, weight: Any) -> tuple[Any, Any]:
        loss, grads, rows = self._gradients_graph(dense, embeddings, label, weight)
        self._update_graph(grads)
        return loss, rows

    def _update_graph(self, grads: Any) -> None:
        self._optimizer.apply_gradients(zip(grads, self.model.trainable_variables, strict=True))

    def _gradients_graph(self, dense: Any, embeddings: Any, label: Any, weight: Any) -> tuple[Any, Any, Any]:
        inputs, variables = leaves(embeddings), self.model.trainable_variables
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            losses = self._losses(label, self._logits(dense, embeddings, training=True))
            losses = tf.reduce_mean(losses, 1) if losses.shape.rank == 2 else losses
            total = tf.maximum(tf.reduce_sum(weight), np.finfo(np.float32).tiny)  # a batch may weigh nothing
            loss = tf.reduce_sum(losses * weight) / total
        grads, rows = tape.gradient(loss, (variables, inputs))
        return loss, grads, {feature: tf.convert_to_tensor(grad) for feature, grad in rows.items() if grad is not None}

    def _losses(self, label: Any, logits: Any) -> Any:
        if self._positive_weight is None:
            return tf.nn.sigmoid_cross_entropy_with_logits(label, logits)
        return tf.nn.weighted_cross_entropy_with_logits(label, logits, self._positive_weight)

    def predict(self, ds: Any, lookahead: int = 8) -> Iterator[tuple[Array, Array, Array]]:
        """Predictions over one pass of the dataset; creates no rows.

        Yields
        ------
        label, probability, weight : float32[n]
            Of the valid rows of each batch, in the dataset's order. Labels that the dataset names as a sequence, and
            their probabilities, are float32[n, n_labels].

        Raises
        ------
        InvalidArgument
            The dataset has no label or is not batched.
        """
        _need_label(ds)
        steps = pipeline(ds, self.embeddings, lookahead, train=False)

        def predictions() -> Iterator[tuple[Array, Array, Array]]:
            for step in steps:
                n, probability = step.n_rows, self._predict(step.dense, step.embeddings)
                yield array(step.label)[:n], array(probability)[:n], array(step.weight)[:n]

        return predictions()

    def _predict_graph(self, dense: Any, embeddings: Any) -> Any:
        return tf.sigmoid(self._logits(dense, embeddings, training=False))

    def _logits(self, dense: Any, embeddings: Any, training: bool) -> Any:
        mode = {"training": training} if self.model._call_has_training_arg else {}
        return tf.cast(self.model(dense, embeddings, **mode), tf.float32)

    def _variables(self) -> dict[str, keras.Variable]:
        """Weights by path, optimizer state and layers' seeds by position: Keras numbers names that several share."""
        weights = {f"model/{w.path.partition('/')[2]}": w for w in self.model.weights}
        seeds = [v for v in self.model.variables if v.name == "seed_generator_state"]
        return (
            weights
            | {f"{self._optimizer_name}/{i}": v for i, v in enumerate(self._optimizer.variables)}
            | {f"seed/{i}": v for i, v in enumerate(seeds)}
        )

    def dense_state(self) -> bytes:
        """The model's weights, its layers' random seeds and its optimizer's state, as a safetensors file.

        The tables are not in it.
        """
        return safetensors.numpy.save({path: np.array(array(v.value)) for path, v in self._variables().items()})

    @staticmethod
    def random_state() -> bytes:
        """The generators of TensorFlow (``tf.random.get_global_generator``), Python and NumPy, as a safetensors file.

        Those of Keras's layers belong to the model, and are in ``dense_state``.
        """
        own = {"tensorflow": np.array(tf.random.get_global_generator().state)}
        return safetensors.numpy.save(random_arrays() | own)

    @staticmethod
    def load_random_state(state: bytes) -> None:
        """Set the generators to what ``random_state`` gave.

        Raises
        ------
        Corrupt
            The bytes are not what it gave.
        """
        try:
            arrays = safetensors.numpy.load(state)
            set_random_arrays(arrays)
            tf.random.get_global_generator().reset(arrays["tensorflow"])
        except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as e:
            raise errors.Corrupt(f"the random state is broken: {e}", remedy="load another commit") from e

    def load_dense_state(self, state: bytes) -> None:
        """Load what ``dense_state`` gave. The state of an optimizer of another name is left out: this one starts anew.

        Raises
        ------
        Corrupt
            The bytes are not a safetensors file.
        SchemaMismatch
            The weights are not those of this model.
        """
        try:
            found = safetensors.numpy.load(state)
        except safetensors.SafetensorError as e:
            raise errors.Corrupt(f"the dense state is no safetensors file: {e}", remedy="load another commit") from e
        variables = self._variables()
        kinds = ["model"] + [
            kind for kind in (self._optimizer_name, "seed") if any(path.startswith(f"{kind}/") for path in found)
        ]
        for kind in kinds:
            for path in sorted(path for path in variables.keys() | found.keys() if path.startswith(f"{kind}/")):
                here = tuple(variables[path].shape) if path in variables else None
                there = found[path].shape if path in found else None
                if here != there:
                    raise errors.SchemaMismatch(
                        f"{path} has the shape {here} in the model and {there} in the dense state",
                        remedy="build the model as it was when it was saved, with the same names of layers",
                    )
        for path in variables.keys() & found.keys():
            variables[path].assign(found[path])


def _need_label(ds: Any) -> None:
    if ds.label is None:
        raise errors.InvalidArgument("the dataset has no label", remedy="call .supervised(label) on it")


def seed(seed: int) -> None:
    """Seed the framework's generator: models built next start from equal parameters for equal seeds."""
    keras.utils.set_random_seed(seed)
