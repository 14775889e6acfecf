"""hbkit for PyTorch: the core's data and embedding tables as tensors, modules and a training step.

Thin on purpose: reading, looking up and updating rows happen in the core, in NumPy; what a model computes is pure
PyTorch, and compiles whole.
"""

from hbkit_torch import data, distributed, metrics, models, nn, training
from hbkit_torch.pipeline import pipeline

__all__ = ["data", "distributed", "metrics", "models", "nn", "pipeline", "training"]
