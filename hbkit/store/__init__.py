"""Where rows live: index, row slabs and tiers behind one seam (`base.Store`)."""

from hbkit.store.device import device_cached
from hbkit.store.host import host_memory
from hbkit.store.policy import LFU, LRU, Policy, TinyLFU
from hbkit.store.ssd import cached_ssd

__all__ = ["LFU", "LRU", "Policy", "TinyLFU", "cached_ssd", "device_cached", "host_memory"]
