"""Between ranks: who owns a key, distinct keys of a batch, rows as bytes on the wire, and the exchange itself."""

from hbkit.shuffle.dedupe import dedupe
from hbkit.shuffle.exchange import Loopback, Transport
from hbkit.shuffle.partition import N_VSHARDS, owner, partition, vshard
from hbkit.shuffle.quantize import WIRES, Noise, pack, row_nbytes, unpack

__all__ = [
    "N_VSHARDS",
    "WIRES",
    "Loopback",
    "Noise",
    "Transport",
    "dedupe",
    "owner",
    "pack",
    "partition",
    "row_nbytes",
    "unpack",
    "vshard",
]
