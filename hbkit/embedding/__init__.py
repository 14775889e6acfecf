"""Tables of embedding rows, the features over them, and look-ahead."""

from hbkit.embedding.admission import BloomAdmission, CountAdmission
from hbkit.embedding.checkpoint import Checkpoint
from hbkit.embedding.collection import Collection, SequenceOutput, Staged
from hbkit.embedding.columns import Column
from hbkit.embedding.description import build, describe
from hbkit.embedding.eviction import IdleSteps, L2Below, MaxRows
from hbkit.embedding.initializers import Constant, Normal, TruncatedNormal, Uniform
from hbkit.embedding.lookahead import Lookahead, Pipeline, lookahead
from hbkit.embedding.optimizers import (
    SGD,
    Adagrad,
    AdagradDecay,
    Adam,
    AdamW,
    Cosine,
    Exponential,
    Ftrl,
    RowWiseAdagrad,
    RowWiseAdam,
    Warmup,
)
from hbkit.embedding.resume import Resumable, random_arrays, set_random_arrays
from hbkit.embedding.sharded import Sharded
from hbkit.embedding.table import Table

__all__ = [
    "SGD",
    "Adagrad",
    "AdagradDecay",
    "Adam",
    "AdamW",
    "BloomAdmission",
    "Checkpoint",
    "Collection",
    "Column",
    "Constant",
    "Cosine",
    "CountAdmission",
    "Exponential",
    "Ftrl",
    "IdleSteps",
    "L2Below",
    "Lookahead",
    "MaxRows",
    "Normal",
    "Pipeline",
    "Resumable",
    "RowWiseAdagrad",
    "RowWiseAdam",
    "SequenceOutput",
    "Sharded",
    "Staged",
    "Table",
    "TruncatedNormal",
    "Uniform",
    "Warmup",
    "build",
    "describe",
    "lookahead",
    "random_arrays",
    "set_random_arrays",
]
