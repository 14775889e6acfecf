"""Tables, step and state on disk as one commit: Parquet files that other tools read, and a manifest of checksums."""

from hbkit.snapshot.follow import Follower, follow
from hbkit.snapshot.interop import (
    export_arrow,
    export_dense,
    export_dense_npy,
    export_ipc,
    export_npy,
    export_parquet,
    import_arrays,
    import_parquet,
    saved,
)
from hbkit.snapshot.maintain import Diff, diff, prune, squash
from hbkit.snapshot.reader import Commit, Loaded, load, log, verify
from hbkit.snapshot.saving import Saving
from hbkit.snapshot.writer import save

__all__ = [
    "Commit",
    "Diff",
    "Follower",
    "Loaded",
    "Saving",
    "diff",
    "export_arrow",
    "export_dense",
    "export_dense_npy",
    "export_ipc",
    "export_npy",
    "export_parquet",
    "follow",
    "import_arrays",
    "import_parquet",
    "load",
    "log",
    "prune",
    "save",
    "saved",
    "squash",
    "verify",
]
