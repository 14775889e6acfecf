"""The S3 server is a fixture here."""

from services import hasty, proxy, service

__all__ = ["hasty", "proxy", "service"]
