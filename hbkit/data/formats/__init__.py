"""What ``convert`` reads: each format as a stream of Arrow record batches of one schema."""

from __future__ import annotations

import os
import re

from hbkit import errors
from hbkit._ext.tfrecord import is_record
from hbkit.data.formats.aliccp import AliCcp
from hbkit.data.formats.delimited import SEPARATORS, Criteo, Csv
from hbkit.data.formats.input import Input, head, opened
from hbkit.data.formats.libsvm import LibFfm, LibSvm
from hbkit.data.formats.movielens import MovieLens
from hbkit.data.formats.parquet import ParquetFiles
from hbkit.data.formats.sequence import Sequences
from hbkit.data.formats.slot import Slot
from hbkit.data.formats.tfrecord import TfRecord

__all__ = [
    "FORMATS",
    "AliCcp",
    "Criteo",
    "Csv",
    "Input",
    "LibFfm",
    "LibSvm",
    "MovieLens",
    "ParquetFiles",
    "Sequences",
    "Slot",
    "TfRecord",
    "detect",
]

FORMATS = (
    *("auto", "csv", "tsv", "libsvm", "libffm", "slot", "sequence"),
    *("criteo", "aliccp", "movielens", "tfrecord", "parquet"),
)

_LIBFFM = re.compile(r"\d+:\d+:[^:,\s]+$")
_LIBSVM = re.compile(r"(qid|\d+):[^:,\s]+$")
_SLOT = re.compile(r"[^:\s]+:[^:\s]+$")
_ALICCP = re.compile(r"\d+,[01],[01](,\w+:\d+)+\s*$", re.ASCII)
_TFRECORD = re.compile(r"\.tfrecords?(\.gz)?$")


def detect(path: str) -> str:
    """The format of a file or directory, by what it holds; only a damaged or empty TFRecord file is known by its name.

    Raises
    ------
    NotFound
        No such file, or a directory with nothing that is known.
    Unsupported
        It is neither Parquet, TFRecord nor text, or text of no known format.
    """
    if os.path.isdir(path):
        names = set(os.listdir(path))
        if {"users.dat", "movies.dat"} <= names:
            return "movielens"
        if any(name.endswith((".parquet", ".parq", ".pq")) for name in names):
            return "parquet"
        raise errors.NotFound("no data in the directory that is known", remedy="name its files", file=path)
    if "://" in path or (any(c in path for c in "*?[") and not os.path.exists(path)):
        return "parquet"
    with opened(path) as stream:
        start = stream.read(12)
    if start[:4] in (b"PAR1", b"PARE"):
        return "parquet"
    if is_record(start) or _TFRECORD.search(path):
        return "tfrecord"
    lines = head(path)
    words = [w for line in lines if (w := line.split("#")[0].split())]
    features = [w for row in words for w in row[1:]]
    if features and all(_LIBFFM.match(w) for w in features):
        return "libffm"
    if features and all(_SLOT.match(w) for row in words for w in row):
        return "slot"
    if features and all(_LIBSVM.match(w) for w in features):
        return "libsvm"
    if lines and all(_ALICCP.match(line) for line in lines):
        return "aliccp"
    if lines and all(line.count("\t") == 39 for line in lines) and all(line[:2] in ("0\t", "1\t") for line in lines):
        return "criteo"
    if words and len(words[0]) > 1 and not any(sep in lines[0] for sep in SEPARATORS):
        if all(w.isdecimal() for row in words for w in row):
            return "sequence"
        raise errors.Unsupported("cannot tell the format of this text", remedy="name its --format", file=path)
    return "csv"
