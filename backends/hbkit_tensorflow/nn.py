"""Embeddings over the core's tables, and the layers that the models are written from."""

from __future__ import annotations

from hbkit_tensorflow.attach import attach
from hbkit_tensorflow.embeddings import EmbeddingCollection
from hbkit_tensorflow.layers import (
    MLP,
    CompressedInteraction,
    CrossNetwork,
    DotInteraction,
    FactorizationMachine,
    MixtureOfExperts,
    PReLU,
    ProductLayer,
    SignedLog,
    TargetAttention,
)

__all__ = [
    "MLP",
    "CompressedInteraction",
    "CrossNetwork",
    "DotInteraction",
    "EmbeddingCollection",
    "FactorizationMachine",
    "MixtureOfExperts",
    "PReLU",
    "ProductLayer",
    "SignedLog",
    "TargetAttention",
    "attach",
]
