"""`attach`: Keras ``fit``, ``evaluate`` and ``predict`` over staged batches."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import hbkit
from hbkit import errors
from hbkit_tensorflow.pipeline import Feed, Step
from hbkit_tensorflow.update import gradients, leaves

__all__ = ["attach"]


def attach(model: keras.Model, embeddings: Any, lookahead: int = 8) -> keras.Model:
    """A Keras model whose ``fit``, ``evaluate`` and ``predict`` take hbkit datasets and train `embeddings` with it.

    Parameters
    ----------
    model : keras.Model
        Called as ``model(dense, embeddings)``: float32[B, n_dense] and a dict of float32[B, dim]. Compile it before or
        after, with ``jit_compile=True`` if you like.
    embeddings : EmbeddingCollection or hbkit.embedding.Collection
    lookahead : int
        Batches staged ahead at the most. It does not change the results.

    Returns
    -------
    keras.Model
        The same model.

    Raises
    ------
    Unsupported
        On ``compile(steps_per_execution=2)`` or more, ``class_weight``, an optimizer's ``gradient_accumulation_steps``,
        `tf.distribute`, and tables shared between ranks.
    InvalidArgument
        On data that is no hbkit dataset, or has no batch size, or no label for ``fit`` and ``evaluate``.

    Notes
    -----
    Each epoch of ``fit`` is the dataset's next epoch, in the order that its own ``shuffle`` gives it. Weights of the
    dataset are sample weights; without a weight column there are none. ``evaluate`` and ``predict`` create no rows.

    The last batch is padded, so that every step has one shape and XLA compiles once. Padded rows take no part: the loss
    has them masked as Keras masks, metrics and ``predict`` do not see them. But a ``compute_loss`` of your own must
    heed that mask, and a layer that mixes rows (batch normalisation) sees zeros there.

    Of the model's optimizer, ``global_clipnorm`` is taken of weights and rows together, and a `LossScaleOptimizer`
    unscales both; where one of their gradients is not finite, neither changes. ``clipnorm`` and ``clipvalue`` are the
    weights' own, as `hbkit.embedding`'s optimizers have theirs for the rows. Saving the model saves `embeddings` too.

    In each step: a Python call takes the staged rows of the batch, one compiled function gives the loss, updates the
    dense weights and returns the gradients of the rows, a Python call updates the rows, and a second function, which
    XLA does not compile, updates the metrics with the valid rows.
    """
    _Attached(model, embeddings, lookahead)
    return model


class _Attached:
    """What `attach` puts in the place of a model's methods."""

    def __init__(self, model: keras.Model, embeddings: Any, lookahead: int) -> None:
        self.model, self.embeddings, self.lookahead = model, embeddings, lookahead
        self.feeds: list[Feed] = []
        if isinstance(embeddings, keras.layers.Layer):
            # Saving finds it there; Keras's own assignment refuses layers in a model that is built.
            object.__setattr__(model, "attached_embeddings", embeddings)
        model.make_train_function = self._maker("train_function", self._train_function)
        model.make_test_function = self._maker("test_function", self._test_function)
        model.make_predict_function = self._maker("predict_function", self._predict_function)
        model.train_function = model.test_function = model.predict_function = None
        for name in "fit", "evaluate", "predict":
            setattr(model, name, self._taking_datasets(name))

    def _taking_datasets(self, name: str) -> Callable[..., Any]:
        """A method of the model that takes hbkit datasets too, as `x` and as `validation_data`."""
        method = getattr(self.model, name)
        signature = inspect.signature(method)

        @functools.wraps(method)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            call = signature.bind(*args, **kwargs)
            given, n_open = call.arguments, len(self.feeds)
            self._check(given)
            try:
                for argument in "x", "validation_data":
                    if isinstance(ds := given.get(argument), hbkit.data.Dataset):
                        if ds.label is None and name != "predict":
                            raise errors.InvalidArgument(
                                "the dataset has no label", remedy="call .supervised(label) on it"
                            )
                        feed = Feed(ds, self.embeddings, name == "fit" and argument == "x", self.lookahead)
                        self.feeds.append(feed)
                        given[argument] = feed.dataset()
                        if name == "fit":
                            given["shuffle"] = False  # Keras would warn that it does not shuffle
                with warnings.catch_warnings():
                    if not given.keys() & {"steps_per_epoch", "validation_steps", "steps"}:
                        # Keras says so of all data whose number of batches it does not know before
                        warnings.filterwarnings("ignore", "Your input ran out of data")
                    return method(*call.args, **call.kwargs)
            except Exception as error:
                for feed in self.feeds:
                    if feed.error is error:
                        raise error from feed.cause
                raise
            finally:
                for feed in self.feeds[n_open:]:
                    feed.close()
                del self.feeds[n_open:]

        return wrapped

    def _check(self, given: Mapping[str, Any]) -> None:
        model = self.model
        if model.steps_per_execution != 1:
            raise errors.Unsupported(
                f"steps_per_execution={model.steps_per_execution} with attached embeddings",
                remedy="compile with steps_per_execution=1: the rows are updated between steps",
            )
        if given.get("class_weight") is not None:
            raise errors.Unsupported(
                "class_weight with attached embeddings", remedy="name a weight column: .supervised(label, weight)"
            )
        optimizer = getattr(model, "optimizer", None)
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        if steps := getattr(optimizer, "gradient_accumulation_steps", None):
            raise errors.Unsupported(
                f"gradient_accumulation_steps={steps} with attached embeddings",
                remedy="give the dataset larger batches, or accumulate in a loop over hb.pipeline",
            )
        collection = getattr(self.embeddings, "collection", self.embeddings)
        if getattr(collection, "transport", None) is not None:
            raise errors.Unsupported(
                "tables shared between ranks under an attached model",
                remedy="use hb.training.Trainer, or a loop over hb.pipeline with hb.distributed.reduce_gradients",
            )
        if model.distribute_strategy.num_replicas_in_sync > 1:
            raise errors.Unsupported("several replicas with attached embeddings", remedy="train in one replica")

    def _maker(self, attribute: str, make: Callable[[], Any]) -> Callable[..., Any]:
        """As Keras's make_..._function: sets the model's function, anew after ``compile`` or by force, and gives it."""

        def make_function(force: bool = False) -> Any:
            if force or getattr(self.model, attribute) is None:
                setattr(self.model, attribute, make())
            return getattr(self.model, attribute)

        return make_function

    def _take(self, element: Any) -> tuple[Step, tuple[Any, ...]]:
        """The gathered step that an element's ticket names, and what the graph sees of it."""
        match element:
            case ({"ticket": ticket, "dense": dense}, label, weight):
                for feed in self.feeds:
                    if (step := feed.take(int(ticket))) is not None:
                        valid = tf.range(label.shape[0]) < step.n_rows
                        weight = None if feed.ds.weight is None else weight
                        label = label[:, None] if label.shape.rank == 1 else label
                        return step, (dense, step.embeddings, label, weight, valid)
        raise errors.InvalidArgument(
            "the data is no hbkit dataset", remedy="an attached model takes hb.data.Dataset, which carries the keys"
        )

    def _forward(self, dense: Any, embeddings: Any, valid: Any, training: bool) -> Any:
        """The model's outputs, at least [B, 1] (losses take the mean of the last axis), masked as Keras masks."""
        mode = {"training": training} if self.model._call_has_training_arg else {}
        pred = self.model(dense, embeddings, **mode)
        pred = tf.nest.map_structure(lambda p: p[:, None] if p.shape.rank == 1 else p, pred)
        for p in tf.nest.flatten(pred):
            p._keras_mask = valid
        return pred

    def _loss(self, dense: Any, label: Any, weight: Any, valid: Any, pred: Any, training: bool) -> Any:
        loss = self.model.compute_loss(x=dense, y=label, y_pred=pred, sample_weight=weight, training=training)
        self.model._loss_tracker.update_state(loss, sample_weight=tf.reduce_sum(tf.cast(valid, loss.dtype)))
        return loss

    def _function(self, graph: Callable[..., Any], jit: bool) -> Callable[..., Any]:
        if self.model.run_eagerly:
            return graph
        made: Callable[..., Any] = tf.function(graph, jit_compile=jit, autograph=False, reduce_retracing=True)
        return made

    def _step_function(self, graph: Callable[..., Any], train: bool) -> Callable[[Iterator[Any]], dict[str, Any]]:
        """A step over ``graph(dense, embeddings, label, weight, valid) -> (pred, gradients of rows, all finite)``."""

        def logs(label: Any, pred: Any, weight: Any, n_rows: Any) -> Any:
            pred = tf.nest.map_structure(lambda p: p[:n_rows], pred)
            return self.model.compute_metrics(None, label[:n_rows], pred, None if weight is None else weight[:n_rows])

        compiled = self._function(graph, self.model.jit_compile)
        # Metrics see the valid rows alone; their number varies, so XLA stays out of it.
        logs = self._function(logs, jit=False)

        def step_function(iterator: Iterator[Any]) -> dict[str, Any]:
            step, inputs = self._take(next(iterator))
            with closing(step):
                self._build(train, *inputs[:2])
                pred, rows, finite = compiled(*inputs)
                if train and finite:
                    step.update(step._staged, gradients(rows))
            found: dict[str, Any] = logs(inputs[2], pred, inputs[3], tf.constant(step.n_rows))
            return found

        return step_function

    def _build(self, train: bool, dense: Any, embeddings: Any) -> None:
        """Make the variables that do not exist yet: a compiled function cannot."""
        if not self.model.built:
            self.model(dense, embeddings)
        if train and not self.model.optimizer.built:
            self.model.optimizer.build(self.model.trainable_variables)

    def _train_function(self) -> Callable[..., Any]:
        model = self.model

        def graph(dense: Any, embeddings: Any, label: Any, weight: Any, valid: Any) -> tuple[Any, ...]:
            inputs = leaves(embeddings)
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                pred = self._forward(dense, embeddings, valid, training=True)
                loss = self._loss(dense, label, weight, valid, pred, training=True)
                loss = model.optimizer.scale_loss(loss)
            grads, rows = tape.gradient(loss, (model.trainable_variables, inputs))
            rows = {feature: tf.convert_to_tensor(grad) for feature, grad in rows.items() if grad is not None}
            grads, rows, finite = self._together(grads, rows)
            if grads:
                model.optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))
            return pred, rows, finite

        return self._step_function(graph, train=True)

    def _together(self, grads: list[Any], rows: dict[str, Any]) -> tuple[list[Any], dict[str, Any], Any]:
        """Gradients of weights, for the optimizer, and of rows, unscaled; clipped as one; and if all are finite."""
        optimizer = self.model.optimizer
        scale = optimizer.scale_loss(tf.constant(1.0))
        limit = getattr(optimizer, "inner_optimizer", optimizer).global_clipnorm
        dynamic = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        finite: Any = True
        if limit or dynamic:
            grads = [None if grad is None else tf.convert_to_tensor(grad) for grad in grads]
        parts = [grad for grad in (*grads, *rows.values()) if grad is not None]
        if dynamic:
            # It skips the step and lowers its scale where a gradient of a weight is not finite: let it see the rows'.
            finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(part)) for part in parts])
            grads = [None if grad is None else tf.where(finite, grad, np.nan) for grad in grads]
        factor = 1.0
        if limit:
            factor = limit / tf.maximum(limit, tf.linalg.global_norm(parts) / scale)
            grads = [None if grad is None else grad * factor for grad in grads]
        return grads, {feature: grad * (factor / scale) for feature, grad in rows.items()}, finite

    def _test_function(self) -> Callable[..., Any]:
        def graph(dense: Any, embeddings: Any, label: Any, weight: Any, valid: Any) -> tuple[Any, ...]:
            pred = self._forward(dense, embeddings, valid, training=False)
            self._loss(dense, label, weight, valid, pred, training=False)
            return pred, {}, True

        return self._step_function(graph, train=False)

    def _predict_function(self) -> Callable[..., Any]:
        def graph(dense: Any, embeddings: Any) -> Any:
            mode = {"training": False} if self.model._call_has_training_arg else {}
            return self.model(dense, embeddings, **mode)

        compiled = self._function(graph, self.model.jit_compile)

        def predict_function(data: list[Any]) -> Any:
            step, inputs = self._take(data[0])
            with closing(step):
                self._build(False, *inputs[:2])
                pred = compiled(*inputs[:2])
            return tf.nest.map_structure(lambda p: p[: step.n_rows], pred)

        return predict_function
