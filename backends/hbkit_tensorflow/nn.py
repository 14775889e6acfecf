"""Embeddings over the core's tables, and the layers that the models are written from."""

from __future__ import annotations

from hbkit_tensorflow.attach import attach
from hbkit_tensorflow.embeddings import EmbeddingCollection
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
