"""Output files appear whole or not at all."""

import pyarrow as pa
import pytest

from hbkit import errors
from hbkit.data.output import Output, Writer, writers

SCHEMA = pa.schema([("x", pa.int64())])
BATCH = pa.RecordBatch.from_pydict({"x": [1, 2, 3]}, schema=SCHEMA)


def write(output):
    with output, writers(output, ["a.parquet", "b.parquet"], SCHEMA, 2, "zstd") as files:
        for file in files:
            file.write(BATCH)
            file.finish({})


def test_output_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with Output(tmp_path / "deep" / "out") as output, writers(output, ["a.parquet"], SCHEMA, 2, "none") as files:
            files[0].write(BATCH)
            raise ZeroDivisionError
    assert not (tmp_path / "deep" / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        with Output(tmp_path / "out"):
            raise KeyboardInterrupt
    assert list((tmp_path / "out").iterdir()) == []


def test_output_that_fails_keeps_what_was_there(tmp_path):
    write(Output(tmp_path))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ZeroDivisionError):
        with Output(tmp_path, overwrite=True) as output, writers(output, ["a.parquet"], SCHEMA, 2, "none"):
            raise ZeroDivisionError
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_output_overwrites_only_when_told(tmp_path):
    write(Output(tmp_path / "out"))
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(errors.InvalidArgument, match="--overwrite"):
        Output(tmp_path / "out")
    with Output(tmp_path / "out", overwrite=True) as output, writers(output, ["c.parquet"], SCHEMA, 2, "none") as files:
        files[0].finish({})
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["c.parquet", "notes.txt"]


def test_output_refuses_a_directory_where_a_file_is(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(errors.InvalidArgument, match="stands where a directory"):
        Output(tmp_path / "x")
    with pytest.raises(errors.StorageError):
        write(Output(tmp_path / "x" / "y"))


@pytest.mark.parametrize(("rows", "compression"), [(0, "zstd"), (1, "lzo")])
def test_writer_refuses(tmp_path, rows, compression):
    with pytest.raises(errors.InvalidArgument):
        Writer(str(tmp_path / "x"), SCHEMA, rows, compression)


def test_full_disk_is_a_storage_error():
    try:
        writer = Writer("/dev/full", SCHEMA)
    except errors.StorageError:
        return  # the sink already refused
    with pytest.raises(errors.StorageError, match="cannot write"):
        writer.write(BATCH)
        writer.finish({})
    writer.abort()
