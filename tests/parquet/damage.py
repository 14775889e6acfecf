"""Read damaged copies of the files named as arguments; run as a script, so that a crash has a process of its own.

``python damage.py KIND N SEED FILE...``: N copies of each file, each damaged at a place of its own: "cut" off there;
"short", where reads of pages end there; "blank", with zeros from there to the footer; with one bit changed anywhere
("flip") or in a page ("page"); or so and then filtered ("filter"). The last line is a JSON count of outcomes: "read",
or the name of the error.
"""

import collections
import json
import random
import resource
import signal
import sys

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hbkit import errors
from hbkit.data.filter import RowFilter
from hbkit.parquet import Field, File, decoded

SECONDS = 10  # until a read, and with it the process, is ended
LIMIT_NBYTES = 64 << 20  # of what a read may decode to
MAX_GROWTH = (256 + 64) << 20  # of the process: the largest page, and what decoding it takes


class Bytes:
    """A source in memory."""

    remote, end = False, sys.maxsize

    def __init__(self, path: str, data: bytes) -> None:
        self.path, self.data, self.nbytes = path, data, len(data)
        self.file = pa.BufferReader(data)

    def read(self, ranges):
        # in memory of their own, so that a sanitizer sees a step beyond their end
        return [np.frombuffer(self.data[at : max(at, min(at + n, self.end))], np.uint8).copy().data for at, n in ranges]

    def close(self) -> None:
        self.file.close()


def read(source: Bytes, kind: str, place: int) -> str:
    try:
        file = File(source, limit_nbytes=LIMIT_NBYTES)
        if kind == "short":
            source.end = place
        row_filter = RowFilter((pc.field("a") > 50) & (pc.field("s") == "x")) if kind == "filter" else None
        fields = [Field(name, null="empty") for name, column in file.schema.items() if not column.unsupported]
        for g, n in enumerate(file.row_group_rows):
            if row_filter is not None:
                row_filter.mask(file, g)
            elif place % 2:
                file.read_row_group(g, fields)
            else:  # some rows read, some stepped over
                group = file.open_row_group(g, fields)
                step = 8 if n < 1000 else 1100  # a leap that is worth a look into the offset index
                for at in range(0, n, step):
                    group.skip(min(step, n - at)) if at % 3 == 0 else decoded.read(group, min(step, n - at))
    except errors.HbkitError as e:
        assert source.path in str(e), f"the error does not name the file: {e}"
        return type(e).__name__
    return "read"


def damaged(whole: bytes, kind: str, place: int, footer: int) -> bytes:
    if kind == "cut":
        return whole[:place]
    if kind == "short":
        return whole
    data = bytearray(whole)
    if kind == "blank":
        data[place:footer] = bytes(footer - place)
    else:
        data[place // 8] ^= 1 << place % 8
    return bytes(data)


def main(kind: str, n: int, seed: int, paths: list[str]) -> None:
    rng, outcomes = random.Random(seed), collections.Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in paths:
        with open(path, "rb") as f:
            whole = f.read()
        footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
        places = (footer if kind in ("short", "blank", "page") else len(whole)) * (
            8 if kind in ("flip", "page", "filter") else 1
        )
        for place in sorted(rng.sample(range(places), min(n, places))):
            print(f"{kind} {path} at {place}", flush=True)
            signal.alarm(SECONDS)
            outcomes[read(Bytes(path, damaged(whole, kind, place, footer)), kind, place)] += 1
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < MAX_GROWTH, (
        "the process grew too much"
    )
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
