"""Datasets: Parquet or ORC files to batches, sharded, filtered, shuffled and resumable."""

from hbkit.data.batch import Batch, Inputs, dense_inputs
from hbkit.data.dataset import Dataset
from hbkit.data.deduplicated import write_deduplicated
from hbkit.data.field import Field

__all__ = ["Batch", "Dataset", "Field", "Inputs", "dense_inputs", "write_deduplicated"]
