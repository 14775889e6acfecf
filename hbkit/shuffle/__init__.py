"""Between ranks: which rank owns a key, distinct keys of a batch, int8 rows on the wire, and the exchange itself."""

from hbkit.shuffle.agree import agree
from hbkit.shuffle.dedupe import dedupe
from hbkit.shuffle.exchange import Loopback, Transport, check_counts, failed
from hbkit.shuffle.partition import N_VSHARDS, owner, partition, vshard
from hbkit.shuffle.quantize import dequantize, quantize
from hbkit.shuffle.reduce import sum_over

__all__ = [
    "N_VSHARDS",
    "Loopback",
    "Transport",
    "agree",
    "check_counts",
    "dedupe",
    "dequantize",
    "failed",
    "owner",
    "partition",
    "quantize",
    "sum_over",
    "vshard",
]
