"""Between ranks: which rank owns a key, distinct keys of a batch, int8 rows on the wire, and the exchange itself."""

from hbkit.shuffle.dedupe import dedupe
from hbkit.shuffle.exchange import Loopback, Transport
from hbkit.shuffle.partition import N_VSHARDS, owner, partition, vshard
from hbkit.shuffle.quantize import dequantize, quantize

__all__ = [
    "N_VSHARDS",
    "Loopback",
    "Transport",
    "dedupe",
    "dequantize",
    "owner",
    "partition",
    "quantize",
    "vshard",
]
