"""hbkit for TensorFlow and Keras 3: the core's data and embedding tables as tensors, layers and a training step.

Thin on purpose: reading, looking up and updating rows happen in the core, in NumPy; what a model computes is pure
TensorFlow, and compiles whole.
"""

from hbkit_tensorflow import data, distributed, metrics, models, nn, training
from hbkit_tensorflow.pipeline import pipeline

__all__ = ["data", "distributed", "metrics", "models", "nn", "pipeline", "training"]
