"""Layers that the models are written from.

Every dense layer starts with Glorot-uniform weights, drawn from Keras's generator, and zero bias.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

__all__ = [
    "MLP",
    "CompressedInteraction",
    "CrossNetwork",
    "Dice",
    "DotInteraction",
    "FactorizationMachine",
    "MixtureOfExperts",
    "ProductLayer",
    "SignedLog",
    "TargetAttention",
]

MOMENTUM = 0.1  # of the last batch, among the moments that `Dice` keeps


class Dice(keras.layers.Layer):
    """x by its gate p, else slope * x by 1 - p: p is the sigmoid of x as it stands among its column's values.

    p = sigmoid((x - mean) / sqrt(var + 1e-8)); the slopes are learned, 0 at first. When training, mean and variance are
    those of the batch's valid elements; else those of the last batches, an element's output depends on nothing but it.

    Source: Zhou et al., Deep Interest Network for Click-Through Rate Prediction, KDD 2018.
    """

    def build(self, input_shape: Sequence[Any]) -> None:
        """Make the slopes (not before: until then, weights do not know what they are a part of) and the moments."""
        width = input_shape[-1]
        self.slope = self.add_weight(shape=(width,), initializer="zeros", name="slope")
        # Mean, variance, and their weight: 1 in the end.
        self.moments = self.add_weight(
            shape=(3, width), initializer="zeros", trainable=False, autocast=False, name="moments"
        )

    def call(self, x: Any, valid: Any = None, training: bool = False) -> Any:
        """float32[..., width] to the same shape; `valid`, bool[...], says what counts."""
        ops = keras.ops
        x = ops.cast(x, "float32")  # in mixed precision too: sums
        if training:
            weight = ops.ones_like(x[..., :1]) if valid is None else ops.cast(valid, "float32")[..., None]
            axes, n = tuple(range(len(x.shape) - 1)), ops.sum(weight)
            mean = ops.sum(x * weight, axes) / ops.maximum(n, 1)
            var = ops.sum(ops.square(x - mean) * weight, axes) / ops.maximum(n, 1)
            last = ops.stack([mean, var, ops.ones_like(mean)])
            rate = MOMENTUM * ops.cast(n > 0, "float32")
            self.moments.assign(self.moments + rate * (ops.stop_gradient(last) - self.moments))
        else:
            mean, var = ops.unstack(self.moments[:2] / ops.maximum(self.moments[2], np.finfo(np.float32).tiny))
        p = ops.sigmoid((x - mean) * ops.rsqrt(var + 1e-8))
        return x * (p + (1 - p) * ops.cast(self.slope, "float32"))


class MLP(keras.layers.Layer):
    """Dense layers with ReLU between them: [..., n] to [..., widths[-1]].

    Parameters
    ----------
    widths : sequence of int
        Outputs of each layer.
    last_relu : bool
        Whether a ReLU follows the last layer too.
    dice : bool
        Whether `Dice` takes the place of each ReLU.
    """

    def __init__(
        self, widths: Sequence[int], last_relu: bool = False, dice: bool = False, name: str | None = None
    ) -> None:
        super().__init__(name=name)
        layers: list[keras.layers.Layer] = []
        for i, width in enumerate(widths):
            relu = Dice(name=f"dice_{i}") if dice else keras.layers.ReLU(name=f"relu_{i}")
            layers += [keras.layers.Dense(width, name=f"dense_{i}"), relu]
        self.layers = layers if last_relu else layers[:-1]

    def call(self, x: Any, valid: Any = None, training: bool = False) -> Any:
        """float32[..., n] to float32[..., widths[-1]]; `valid`, bool[...], for `Dice`."""
        for layer in self.layers:
            x = layer(x, valid, training=training) if isinstance(layer, Dice) else layer(x)
        return x


class SignedLog(keras.layers.Layer):
    """sign(x) * log(1 + abs(x)): brings counts and amounts of any sign to a scale that a dense layer can use."""

    def call(self, x: Any) -> Any:
        """Elementwise."""
        return keras.ops.sign(x) * keras.ops.log1p(keras.ops.abs(x))


class DotInteraction(keras.layers.Layer):
    """Dot product of each pair of features: [B, F, D] to [B, F (F - 1) / 2], pairs (1, 0), (2, 0), (2, 1), (3, 0), ...

    Source: Naumov et al., Deep Learning Recommendation Model for Personalization and Recommendation Systems, 2019.
    """

    def call(self, x: Any) -> Any:
        """float32[B, F, D] to float32[B, F (F - 1) / 2]."""
        n_features = x.shape[1]
        row, column = np.tril_indices(n_features, -1)
        products = keras.ops.matmul(x, keras.ops.transpose(x, (0, 2, 1)))
        products = keras.ops.reshape(products, (-1, n_features * n_features))
        return keras.ops.take(products, row * n_features + column, axis=1)


class FactorizationMachine(keras.layers.Layer):
    """Sum over all pairs of features of their dot product, in linear time: [B, F, D] to [B].

    Source: Rendle, Factorization Machines, ICDM 2010.
    """

    def call(self, x: Any) -> Any:
        """float32[B, F, D] to float32[B]."""
        square_of_sum = keras.ops.square(keras.ops.sum(x, axis=1))
        return 0.5 * keras.ops.sum(square_of_sum - keras.ops.sum(keras.ops.square(x), axis=1), axis=1)


class ProductLayer(keras.layers.Layer):
    """The vectors side by side, then the inner product of each pair: [B, F, D] to [B, F D + F (F - 1) / 2].

    The weights that the paper gives these two signals, and its bias, are those of the dense layer that follows. Pairs
    of a vector with itself are left out.

    Source: Qu et al., Product-based Neural Networks for User Response Prediction, ICDM 2016 (its inner product).
    """

    def __init__(self, name: str | None = None) -> None:
        super().__init__(name=name)
        self.interaction = DotInteraction(name="interaction")

    def call(self, x: Any) -> Any:
        """float32[B, F, D] to float32[B, F D + F (F - 1) / 2]."""
        flat = keras.ops.reshape(x, (-1, x.shape[1] * x.shape[2]))
        return keras.ops.concatenate([flat, self.interaction(x)], axis=1)


class CrossNetwork(keras.layers.Layer):
    """Explicit feature crosses of bounded degree, x[l+1] = x[0] * (W[l] x[l] + b[l]) + x[l]: [B, width] to [B, width].

    Source: Wang et al., DCN V2: Improved Deep & Cross Network, WWW 2021.
    """

    def __init__(self, width: int, n_layers: int, name: str | None = None) -> None:
        super().__init__(name=name)
        self.layers = [keras.layers.Dense(width, name=f"dense_{i}") for i in range(n_layers)]

    def call(self, x: Any) -> Any:
        """float32[B, width] to float32[B, width]."""
        crossed = x
        for layer in self.layers:
            crossed = x * layer(crossed) + crossed
        return crossed


class CompressedInteraction(keras.layers.Layer):
    """xDeepFM's CIN, crosses of whole vectors: [B, F, D] to [B, sum(widths)].

    Layer l mixes the elementwise products of each of its input's vectors with each of the F vectors into ``widths[l]``
    vectors, x[l][h] = sum over i, j of W[l][h, i, j] x[l-1][i] * x[0][j], linearly; their sums over D are the output.

    Notes
    -----
    A step holds B * D * F * widths[l - 1] floats for each layer.

    Source: Lian et al., xDeepFM: Combining Explicit and Implicit Feature Interactions, KDD 2018.
    """

    def __init__(self, widths: Sequence[int], name: str | None = None) -> None:
        super().__init__(name=name)
        self.layers = [keras.layers.Dense(n, use_bias=False, name=f"dense_{i}") for i, n in enumerate(widths)]

    def call(self, x: Any) -> Any:
        """float32[B, F, D] to float32[B, sum(widths)]."""
        first = crossed = keras.ops.transpose(x, (0, 2, 1))  # [B, D, F]: the layers mix the last axis
        sums = []
        for layer in self.layers:
            products = crossed[:, :, :, None] * first[:, :, None]
            crossed = layer(keras.ops.reshape(products, (-1, x.shape[2], crossed.shape[2] * x.shape[1])))
            sums.append(keras.ops.sum(crossed, axis=1))
        return keras.ops.concatenate(sums, axis=1)


class MixtureOfExperts(keras.layers.Layer):
    """Experts that all tasks share, mixed by a gate for each task: [B, n] to [B, n_tasks, widths[-1]].

    An expert is an `MLP` of these widths with a last ReLU; a gate is the softmax of a dense layer without bias.

    Source: Ma et al., Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts, KDD 2018.
    """

    def __init__(self, n_tasks: int, n_experts: int, widths: Sequence[int], name: str | None = None) -> None:
        super().__init__(name=name)
        dense = keras.layers.Dense
        self.experts = [MLP(widths, last_relu=True, name=f"expert_{i}") for i in range(n_experts)]
        self.gates = [dense(n_experts, "softmax", use_bias=False, name=f"gate_{i}") for i in range(n_tasks)]

    def call(self, x: Any) -> Any:
        """float32[B, n] to float32[B, n_tasks, widths[-1]]."""
        experts = keras.ops.stack([expert(x) for expert in self.experts], axis=1)  # [B, n_experts, width]
        gates = keras.ops.stack([gate(x) for gate in self.gates], axis=1)  # [B, n_tasks, n_experts]
        return keras.ops.matmul(gates, experts)


class TargetAttention(keras.layers.Layer):
    """DIN's pooling: a sum of the sequence's vectors, each weighed by how it goes with the target.

    target [B, D], values [B, L, D] and mask bool[B, L] to [B, D]. The weight is an `MLP` with `Dice` of target, value,
    their difference and their product; as in the paper, the weights of a row need not sum to 1, and a row without keys
    gives zeros.

    Source: Zhou et al., Deep Interest Network for Click-Through Rate Prediction, KDD 2018.
    """

    def __init__(self, hidden: Sequence[int], name: str | None = None) -> None:
        super().__init__(name=name)
        self.score = MLP([*hidden, 1], dice=True, name="score")

    def call(self, target: Any, values: Any, mask: Any, training: bool = False) -> Any:
        """float32[B, D], float32[B, L, D] and bool[B, L] to float32[B, D]."""
        target = keras.ops.broadcast_to(target[:, None], keras.ops.shape(values))
        pairs = [target, values, target - values, target * values]
        score = self.score(keras.ops.concatenate(pairs, axis=2), mask, training=training)
        return keras.ops.sum(keras.ops.where(mask[:, :, None], score * values, 0.0), axis=1)


def serializable(kind: type[keras.layers.Layer]) -> None:
    """Let Keras save and load layers of a kind, by the arguments of its ``__init__`` and its dtype policy."""
    keras.saving.register_keras_serializable("hbkit")(kind)
    if "__init__" not in vars(kind):
        return  # Keras's own arguments
    new, get_config, signature = kind.__new__, kind.get_config, inspect.signature(kind)

    def recording_new(cls: Any, *args: Any, **kwargs: Any) -> Any:
        made = new(cls, *args, **kwargs)
        if cls is kind:  # not by Keras's own assignment, which makes lists and dicts of its own
            object.__setattr__(made, "_arguments", signature.bind(*args, **kwargs).arguments)
        return made

    # What the class's signature is taken from; one of the class itself would pass for that of calling its objects.
    cls = inspect.Parameter("cls", inspect.Parameter.POSITIONAL_ONLY)
    recording_new.__signature__ = signature.replace(parameters=[cls, *signature.parameters.values()])  # type: ignore[attr-defined]  # of any function

    def config(self: Any) -> dict[str, Any]:
        if type(self) is not kind:
            return get_config(self)  # a class of the user's, with arguments of its own
        name = {"name": self.name} if "name" in signature.parameters else {}
        return {**self._arguments, **name, "dtype": keras.dtype_policies.serialize(self.dtype_policy)}

    def from_config(cls: Any, config: Mapping[str, Any], custom_objects: Any = None) -> Any:
        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy(keras.dtype_policies.get(config["dtype"]))
        try:
            return cls(**{name: value for name, value in config.items() if name != "dtype"})
        finally:
            keras.config.set_dtype_policy(before)

    patched: Any = kind
    patched.__new__ = staticmethod(recording_new)
    patched.get_config, patched.from_config = config, classmethod(from_config)


for _name in __all__:
    serializable(globals()[_name])
