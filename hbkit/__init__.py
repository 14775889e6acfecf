"""hbkit: recommendation data from Parquet files to trained, servable embeddings.

One framework-neutral core (NumPy in, NumPy out); ``import hbkit.torch as hb`` or ``import hbkit.tensorflow as hb``
gives the same names over PyTorch or TensorFlow. Importing ``hbkit`` imports no framework; rooms load
when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hbkit import errors
from hbkit.ragged import Dictionary, Ragged, Sparse, Strings

if TYPE_CHECKING:
    __version__: str
    from hbkit import data, embedding, metrics, parquet, serving, shuffle, snapshot, store

__all__ = [
    "Dictionary",
    "Ragged",
    "Sparse",
    "Strings",
    "data",
    "embedding",
    "errors",
    "metrics",
    "parquet",
    "serving",
    "shuffle",
    "snapshot",
    "store",
]


def __getattr__(name: str) -> Any:
    """Load a room when it is first named: pyarrow alone costs more than all the rest of hbkit."""
    if name in __all__:
        return importlib.import_module(f"hbkit.{name}")
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("hbkit")
    raise AttributeError(f"module 'hbkit' has no attribute {name!r}")
