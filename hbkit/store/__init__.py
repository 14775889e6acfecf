"""Where rows live: index, row slabs and tiers behind one seam (`base.Store`)."""

from hbkit.store.host import host_memory

__all__ = ["host_memory"]
