"""ORC files give what the same table gives as Parquet; damaged footers raise."""

import datetime
import decimal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.orc as orc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbkit import Ragged, Strings, errors
from hbkit.data import Dataset, Field
from hbkit.data.orc import OrcFile

N = 900


def table(first=0, n=N):
    ids = range(first, first + n)
    days = [datetime.date(1960, 1, 1) + datetime.timedelta(37 * i) for i in ids]
    columns = {
        "id": pa.array(ids, pa.int64()),
        "list": pa.array([None if i % 9 == 0 else list(range(i % 4)) for i in ids], pa.list_(pa.int64())),
        "deep": pa.array([[["a"] * (i % 3), []] * (i % 2) for i in ids], pa.list_(pa.list_(pa.string()))),
        "text": pa.array([f"t{i * 7919}" for i in ids], pa.string()),
        "bytes": pa.array([b"\xff" * (i % 3) for i in ids], pa.binary()),
        "x": pa.array([i % 7 for i in ids], pa.float32()),
        "maybe": pa.array([None if i % 5 == 0 else i % 3 for i in ids], pa.int16()),
        "flag": pa.array([i % 3 == 0 for i in ids], pa.bool_()),
        "price": pa.array([decimal.Decimal(i) / 100 for i in ids], pa.decimal128(9, 2)),
        "day": pa.array(days, pa.date32()),
        "when": pa.array([10**9 * i - 10**12 for i in ids], pa.timestamp("ns")),
        "record": pa.array([{"a": 1} for i in ids], pa.struct([("a", pa.int8())])),
        "much": pa.array([decimal.Decimal(i) for i in ids], pa.decimal128(30, 0)),
    }
    return pa.table(columns)


def write(path, rows, stripe_size=1):
    orc.write_table(rows, path, stripe_size=stripe_size, batch_size=100)


FIELDS = [
    "id",
    Field("list", null="empty"),
    Field("list", null="empty", pad_to=3),
    "deep",
    Field("deep", hash_to="int64"),
    "text",
    Field("text", hash_to="int64", hash_seed=3),
    "bytes",
    Field("x", dtype="float64"),
    Field("maybe", null="default", default=-1),
    Field("maybe", null="empty"),
    "flag",
    "price",
    Field("price", dtype="float64"),
    "day",
    "when",
]


def same(a, b):
    return a == b if isinstance(a, (Ragged, Strings)) else a.dtype == b.dtype and np.array_equal(a, b)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same rows as ORC files, one of them empty, and as one Parquet file."""
    folder = tmp_path_factory.mktemp("orc")
    for k, (first, n) in enumerate([(0, 500), (500, 0), (500, 400)]):
        write(folder / f"part-{k}.orc", table(first, n))
    pq.write_table(table(), folder / "all.parquet")
    return folder


@pytest.mark.parametrize("field", FIELDS, ids=str)
def test_orc_columns_equal_parquets(folder, field):
    from_orc, from_parquet = Dataset.from_orc(folder, [field]), Dataset.from_parquet(folder, [field])
    a, b = next(iter(from_orc.batch(2 * N))), next(iter(from_parquet.batch(2 * N)))
    assert from_orc.schema == from_parquet.schema
    (name,) = a
    assert len(a[name]) == N
    assert same(a[name], b[name])


def test_orc_has_stripes_and_names_its_decoder(folder):
    ds = Dataset.from_orc(folder, ["id"])
    assert (ds.n_rows, ds.stats()["decoded_by"]) == (N, {"id": "pyarrow (ORC)"})
    files = [OrcFile(folder / f"part-{k}.orc") for k in range(3)]
    assert [len(f.row_group_rows) > 1 for f in files] == [True, False, True]
    assert [f.n_rows for f in files] == [500, 0, 400]
    files[0].close()


@settings(max_examples=15)
@given(
    st.none() | st.tuples(st.integers(0, 99), st.integers(1, 600)),
    st.sampled_from([None, pc.field("id") >= 400, pc.field("maybe") == 1, pc.field("text") < "t5"]),
    st.integers(50, 500),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_orc_delivers_every_row_once_to_any_shards(folder, shuffle, expr, n, m, n_reads):
    def make(i, m):
        ds = Dataset.from_orc(folder, ["id", "text"], (i, m), num_parallel_reads=n_reads)
        ds = ds if expr is None else ds.filter(expr)
        return (ds.shuffle(*shuffle) if shuffle else ds).batch(n)

    whole = list(make(0, 1))
    want = (table() if expr is None else table().filter(expr))["id"].to_pylist()
    got = [i for b in whole for i in b["id"].tolist()]
    assert sorted(got) == want
    assert shuffle or got == want
    assert all(b["text"].tolist() == [f"t{i * 7919}".encode() for i in b["id"]] for b in whole)
    for i in range(m):
        assert [b["id"].tolist() for b in make(i, m)] == [b["id"].tolist() for b in whole[i::m]]
    if whole:
        rest = list(make(0, 1).load_state_dict(whole[len(whole) // 2].cursor))
        assert [b["id"].tolist() for b in rest] == [b["id"].tolist() for b in whole[len(whole) // 2 + 1 :]]


def test_orc_names_what_it_cannot_read(folder, tmp_path):
    ds = Dataset.from_orc(folder)
    assert set(ds.stats()["unsupported"]) == {"record", "much"}
    assert "record" not in ds.schema
    with pytest.raises(errors.Unsupported, match="struct"):
        Dataset.from_orc(folder, ["record"])
    write(tmp_path / "twice.orc", pa.table([[1], [2], [3]], names=["a", "a", "b"]))
    file = OrcFile(tmp_path / "twice.orc")
    assert file.schema["a"].unsupported and not file.schema["b"].unsupported
    with pytest.raises(errors.Unsupported, match="two columns"):
        file.read_row_group(0, [Field("a")])


def test_orc_file_that_lacks_a_column(tmp_path):
    write(tmp_path / "a.orc", pa.table({"id": [1, 2], "x": [3, 4]}))
    write(tmp_path / "b.orc", pa.table({"id": [5]}))
    with pytest.raises(errors.UnknownColumn, match="not in this file"):
        Dataset.from_orc(tmp_path)
    (batch,) = Dataset.from_orc(tmp_path, ["id", Field("x", default=9)]).batch(10)
    assert batch["x"].tolist() == [3, 4, 9]
    with pytest.raises(errors.NullFound, match=r"part\.orc, column y, row group 0"):
        write(tmp_path / "part.orc", pa.table({"y": [1, None]}))
        list(Dataset.from_orc(tmp_path / "part.orc").batch(2))


def test_orc_without_files_or_rows(tmp_path):
    with pytest.raises(errors.NotFound, match=r"ends in \.orc"):
        Dataset.from_orc(tmp_path)
    write(tmp_path / "none.orc", table(0, 0))
    assert list(Dataset.from_orc(tmp_path).batch(3)) == []
    pq.write_table(table(0, 3), tmp_path / "some.parquet")
    with pytest.raises(errors.Corrupt, match="no ORC file"):
        Dataset.from_orc(tmp_path / "some.parquet")


def test_orc_skips_a_damaged_stripe(tmp_path):
    path = tmp_path / "part.orc"
    noise = [bytes(row).hex() for row in np.random.default_rng(0).integers(0, 256, (60_000, 16), np.uint8)]
    # a compressed stripe, so that the damage is certain to be noticed
    orc.write_table(pa.table({"x": noise}), path, stripe_size=1, batch_size=10_000, compression="zlib")
    assert OrcFile(path).row_group_rows == [10_000] * 6
    data = bytearray(path.read_bytes())
    middle = len(data) * 7 // 12
    data[middle - 20_000 : middle + 20_000] = bytes([255]) * 40_000
    path.write_bytes(data)
    with pytest.raises(errors.Corrupt, match=r"the stripe is damaged.*part\.orc, row group 3"):
        list(Dataset.from_orc(path).batch(5000))
    ds = Dataset.from_orc(path, on_error="skip").batch(5000)
    assert [x.decode() for b in ds for x in b["x"].tolist()] == noise[:30_000] + noise[40_000:]
    assert ds.stats()["n_row_groups_skipped"] == 1


DAMAGE = """
import random, sys
import pyarrow as pa
from hbkit import errors
from hbkit.data.orc import OrcFile

class Bytes:
    path, remote = "x.orc", False
    def __init__(self, data):
        self.data, self.nbytes, self.file = data, len(data), pa.BufferReader(data)
    def read(self, ranges):
        return [memoryview(self.data)[a : a + n] for a, n in ranges]

whole = open(sys.argv[1], "rb").read()
tail, rng, n_bad = int(sys.argv[2]), random.Random(0), 0
for _ in range(1500):
    data = bytearray(whole)
    for _ in range(rng.randrange(1, 4)):
        data[-1 - rng.randrange(tail)] ^= 1 << rng.randrange(8)
    data = data[: len(data) - rng.randrange(20) * rng.randrange(2)]
    print(bytes(data[-tail:]).hex(), flush=True)
    try:
        OrcFile(Bytes(bytes(data)))
    except errors.HbkitError as e:
        assert "x.orc" in str(e)
        n_bad += 1
print(n_bad)
"""


@pytest.mark.parametrize("compression", ["uncompressed", "zlib", "zstd"])
def test_orc_footer_damaged_raises(tmp_path, compression):
    path = tmp_path / "part.orc"
    orc.write_table(table(0, 20), path, compression=compression)
    file = orc.ORCFile(path)
    tail = file.file_footer_length + file.file_postscript_length + 1
    command = [sys.executable, "-c", DAMAGE, str(path), str(tail)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-1000:]
    assert int(done.stdout.split()[-1]) > 100


def varint(n):
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def message(*fields):
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            out += varint(number << 3 | 2) + varint(len(value)) + value
    return out


def hostile(tmp_path, types=(((1, 12),),), stripes=(), n_rows=0, block=65536, extra=(), footer_nbytes=None):
    footer = message(
        *((3, message(*stripe)) for stripe in stripes), *((4, message(*t)) for t in types), (6, n_rows), *extra
    )
    size = len(footer) if footer_nbytes is None else footer_nbytes
    post = message((1, size), (2, 0), (3, block), (4, b"\0\x0c"), (5, 0), (6, 1), (8000, b"ORC"))
    (tmp_path / "x.orc").write_bytes(b"ORC" + footer + post + bytes([len(post)]))
    return tmp_path / "x.orc"


ROOT = ((1, 12), (2, b"\1"), (3, b"a"))
LONG = ((1, 4),)


def test_orc_footer_by_hand_is_read(tmp_path):
    assert OrcFile(hostile(tmp_path, [ROOT, LONG])).schema["a"].dtype == "int64"
    assert OrcFile(hostile(tmp_path, [((1, 12), (2, 1), (3, b"a")), LONG])).n_rows == 0


@pytest.mark.parametrize(
    "what",
    [
        {"types": [ROOT, ((1, 14), (5, 76), (6, 2))]},
        {"types": [ROOT, ((1, 14), (5, 9), (6, 10))]},
        {"types": [ROOT, ((1, 10), (2, b"\1"))]},
        {"types": [ROOT, ((1, 10), (2, b"\0"))]},
        {"types": [ROOT, ((1, 10), (2, b"\7"))]},
        {"types": [ROOT, ((1, 10),)]},
        {"types": [ROOT, ((1, 11), (2, b"\2")), LONG]},
        {"types": [((1, 12), (2, b"\1\2"), (3, b"a")), LONG, LONG]},
        {"types": [((1, 12), (2, b"\1\1"), (3, b"a"), (3, b"b")), LONG]},
        {"types": [ROOT, LONG, LONG]},
        {"types": [ROOT, *(((1, 10), (2, varint(i))) for i in range(2, 3000)), LONG]},
        {"types": [((1, 4),)]},
        {"stripes": [((1, 3), (2, 0), (3, 2**40), (4, 10), (5, 0))]},
        {"stripes": [((5, 10),)], "n_rows": 9},
        {"stripes": [((5, 2**63),)], "n_rows": 9},
        {"stripes": [((1, b"no number"),)]},
        {"block": 2**40},
        {"footer_nbytes": 2**40},
    ],
    ids=str,
)
def test_orc_footer_hostile_raises(tmp_path, what):
    # each in this process: what would crash pyarrow does not reach it
    with pytest.raises(errors.Corrupt, match=r"x\.orc"):
        OrcFile(hostile(tmp_path, **what))


def test_orc_encrypted_is_unsupported(tmp_path):
    with pytest.raises(errors.Unsupported, match="encrypted"):
        OrcFile(hostile(tmp_path, extra=[(10, b"")]))
