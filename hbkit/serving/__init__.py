"""Read-only lookups in snapshots."""

from hbkit.serving.reader import Reader

__all__ = ["Reader"]
