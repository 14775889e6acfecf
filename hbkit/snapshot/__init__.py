"""Tables, step and state on disk as one commit: Parquet files that other tools read, and a manifest of checksums."""

from hbkit.snapshot.follow import Follower, follow
from hbkit.snapshot.reader import Commit, Loaded, load, log, verify
from hbkit.snapshot.saving import Saving
from hbkit.snapshot.writer import save

__all__ = ["Commit", "Follower", "Loaded", "Saving", "follow", "load", "log", "save", "verify"]
