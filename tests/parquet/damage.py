"""Read damaged copies of the files named as arguments; run as a script, so that a crash has a process of its own.

``python damage.py cut|flip|filter N SEED FILE...``: N copies of each file, cut off at an offset, or with one bit
flipped and then read or filtered. The last line is a JSON count of outcomes: "read", or the name of the error.
"""

import collections
import json
import random
import sys

import pyarrow as pa
import pyarrow.compute as pc

from hbkit import errors
from hbkit.data.filter import RowFilter
from hbkit.parquet import Field, File


class Bytes:
    """A source in memory."""

    remote = False

    def __init__(self, path: str, data: bytes) -> None:
        self.path, self.data, self.nbytes = path, data, len(data)
        self.file = pa.BufferReader(data)

    def read(self, ranges):
        return [memoryview(self.data)[offset : offset + nbytes] for offset, nbytes in ranges]

    def close(self) -> None:
        self.file.close()


def read(source: Bytes, filtered: bool) -> str:
    try:
        file = File(source)
        row_filter = RowFilter((pc.field("a") > 50) & (pc.field("s") == "x")) if filtered else None
        for g in range(len(file.row_group_rows)):
            if row_filter is not None:
                row_filter.mask(file, g)
                continue
            file.read_row_group(g, [Field(n, null="empty") for n, kind in file.schema.items() if not kind.unsupported])
    except errors.HbkitError as e:
        assert source.path in str(e), f"the error does not name the file: {e}"
        return type(e).__name__
    return "read"


def main(kind: str, n: int, seed: int, paths: list[str]) -> None:
    rng, outcomes = random.Random(seed), collections.Counter()
    for path in paths:
        with open(path, "rb") as f:
            whole = f.read()
        places = len(whole) if kind == "cut" else len(whole) * 8
        for place in sorted(rng.sample(range(places), min(n, places))):
            print(f"{kind} {path} at {place}", flush=True)
            data = bytearray(whole[:place] if kind == "cut" else whole)
            if kind != "cut":
                data[place // 8] ^= 1 << place % 8
            outcomes[read(Bytes(path, bytes(data)), kind == "filter")] += 1
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
