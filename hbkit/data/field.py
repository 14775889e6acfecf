"""What a user asks of one column. The decoder consumes it, so it lives in that room; this is its public door."""

from hbkit.parquet.field import ColumnType, Field

__all__ = ["ColumnType", "Field"]
