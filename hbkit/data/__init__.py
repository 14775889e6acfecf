"""Datasets: Parquet files to batches, sharded, filtered, shuffled and resumable."""

from hbkit.data.batch import Batch
from hbkit.data.dataset import Dataset
from hbkit.data.field import Field

__all__ = ["Batch", "Dataset", "Field"]
