"""Between ranks: who owns a key, distinct keys of a batch, rows as bytes on the wire, and the exchange itself."""

from hbkit.shuffle.agree import agree
from hbkit.shuffle.dedupe import dedupe
from hbkit.shuffle.exchange import Loopback, Transport, check_counts, failed
from hbkit.shuffle.partition import N_VSHARDS, owner, partition, vshard
from hbkit.shuffle.quantize import WIRES, Noise, pack, row_nbytes, unpack
from hbkit.shuffle.reduce import sum_over

__all__ = [
    "N_VSHARDS",
    "WIRES",
    "Loopback",
    "Noise",
    "Transport",
    "agree",
    "check_counts",
    "dedupe",
    "failed",
    "owner",
    "pack",
    "partition",
    "row_nbytes",
    "sum_over",
    "unpack",
    "vshard",
]
