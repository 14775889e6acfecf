"""Small files of each encoding, cut off, blanked and with bits flipped: an error with a name, or values; no crash."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import hbkit
from hbkit.parquet import Field, File

SCRIPT = pathlib.Path(__file__).with_name("damage.py")
ENV = {**os.environ, "PYTHONPATH": str(pathlib.Path(hbkit.__file__).parents[1])}  # the script tests the same hbkit
NAMED = {"read", "Corrupt", "Unsupported", "BudgetExceeded"}

LEAVES = {
    "PLAIN": [pa.bool_(), pa.int32(), pa.string(), pa.binary(3), pa.decimal128(9, 2)],
    "dictionary": [pa.int64(), pa.string(), pa.binary(3)],
    "RLE": [pa.bool_()],
    "DELTA_BINARY_PACKED": [pa.int32(), pa.int64()],
    "DELTA_LENGTH_BYTE_ARRAY": [pa.string()],
    "DELTA_BYTE_ARRAY": [pa.string(), pa.binary(3)],
    "BYTE_STREAM_SPLIT": [pa.float32(), pa.int64()],
}
CODECS = ["none", "none", "snappy", "zstd", "lz4", "gzip", "brotli"]


def values(leaf, n, rng):
    numbers = rng.integers(0, 99, n)
    if pa.types.is_boolean(leaf):
        return pa.array(numbers > 50)
    if pa.types.is_string(leaf):
        return pa.array([f"item {k}" * (k % 3) for k in numbers])
    if pa.types.is_fixed_size_binary(leaf):
        return pa.array([b"%03d" % k for k in numbers], leaf)
    return pa.array(numbers.tolist(), leaf)


def columns(leaf, n, rng):
    """Flat, nullable, lists, and lists of lists."""

    def listed(items, n):
        ends = np.sort(rng.integers(0, len(items) + 1, n - 1))
        offsets = pa.array([0, *ends.tolist(), len(items)], pa.int32(), mask=np.append(rng.random(n) < 0.1, False))
        return pa.ListArray.from_arrays(offsets, items)

    def nullable(n):
        return pa.array(values(leaf, n, rng).to_pylist(), leaf, mask=rng.random(n) < 0.2)

    return [values(leaf, n, rng), nullable(n), listed(nullable(2 * n), n), listed(listed(nullable(2 * n), n), n)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two files of each encoding, of both page versions; the codecs take turns."""
    folder, out = tmp_path_factory.mktemp("hostile"), []
    for i, (encoding, leaves) in enumerate(LEAVES.items()):
        rng = np.random.default_rng(i)
        arrays = [column for leaf in leaves for column in columns(leaf, 24, rng)]
        table = pa.table({f"c{k}": column for k, column in enumerate(arrays)})
        options = {"use_dictionary": True, "dictionary_pagesize_limit": 60}
        if encoding != "dictionary":
            paths = [f"c{k}" + ".list.element" * (k % 4 - 1) for k in range(len(arrays))]
            options = {"use_dictionary": False, "column_encoding": dict.fromkeys(paths, encoding)}
        for version in "1.0", "2.0":
            path = folder / f"{encoding}-{version}.parquet"
            codec = CODECS[i] if version == "2.0" else "none"
            options |= {"data_page_version": version, "compression": codec, "max_rows_per_page": 8}
            pq.write_table(table, path, row_group_size=16, store_schema=False, write_batch_size=8, **options)
            out.append(path)
    indexed = pa.table({"n": range(3000), "l": [[k % 7] * (k % 3) for k in range(3000)]})
    out.append(folder / "indexed.parquet")
    pq.write_table(indexed, out[-1], write_page_index=True, max_rows_per_page=500, write_batch_size=100)
    duckdb = pytest.importorskip("duckdb")
    with duckdb.connect() as connection:
        connection.register("t", pa.table({"n": range(300), "s": [f"item {k % 7}" for k in range(300)]}))
        for version in "V1", "V2":
            out.append(folder / f"duckdb-{version}.parquet")
            connection.sql(
                f"COPY t TO '{out[-1]}' (FORMAT parquet, PARQUET_VERSION {version}, WRITE_BLOOM_FILTER false)"
            )
    return out


def damage(kind, n, paths, seed=0):
    """Counts of outcomes over n damaged copies of each file."""
    run = subprocess.run(
        [sys.executable, SCRIPT, kind, str(n), str(seed), *map(str, paths)],
        capture_output=True,
        text=True,
        check=False,
        env=ENV,
    )
    lines = run.stdout.splitlines()
    assert run.returncode == 0, f"{run.returncode} {lines[-1:]} {run.stderr[-4000:]}"
    return json.loads(lines[-1])


def test_whole_files_are_read(files):
    for path in files:
        file = File(path)
        for g in range(len(file.row_group_rows)):
            file.read_row_group(g, [Field(name, null="empty") for name in file.schema])


def test_file_cut_off_is_corrupt(files):
    assert set(damage("cut", 30, files)) == {"Corrupt"}


def test_pages_cut_off_are_corrupt(files):
    """Reads that end early, at most places of each file; what lies behind the pages need not be read."""
    assert set(damage("short", 150, [path for path in files if path.stem != "indexed"])) == {"Corrupt"}
    assert set(damage("short", 300, [path for path in files if path.stem == "indexed"])) <= {"Corrupt", "read"}


def test_blanked_pages_are_named_or_read(files):
    outcomes = damage("blank", 50, files)
    assert outcomes.keys() <= NAMED and outcomes["Corrupt"] > 100


@pytest.mark.parametrize("kind", ["flip", "page"])
def test_flipped_bit_is_named_or_read(files, kind):
    outcomes = damage(kind, 70, files)
    assert outcomes.keys() <= NAMED and outcomes["Corrupt"] > 100 and outcomes["read"] > 100


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, n", [("cut", 10_000), ("short", 10_000), ("blank", 10_000), ("flip", 50_000), ("page", 50_000)]
)
def test_damage_is_named_or_read_at_length(files, kind, n):
    outcomes = damage(kind, n // len(files), files, seed=1)
    assert outcomes.keys() <= ({"Corrupt"} if kind == "cut" else NAMED)
