"""Sources and the names that files are found under."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hbkit import errors
from hbkit.parquet import list_files, open_source, read_columns


@pytest.fixture
def tree(tmp_path):
    for name in "b.parquet", "a.parquet", "x.parq", "deep/er/c.pq", "_hidden.parquet", "deep/.d.parquet", "notes.txt":
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"n": [name]}), path)
    return tmp_path


def test_list_files_directory(tree):
    assert list_files(tree) == [str(tree / n) for n in ("a.parquet", "b.parquet", "deep/er/c.pq", "x.parq")]


@pytest.mark.parametrize(
    "pattern, names",
    [
        ("*.parquet", ["_hidden.parquet", "a.parquet", "b.parquet"]),
        ("?.parquet", ["a.parquet", "b.parquet"]),
        ("[!a].parquet", ["b.parquet"]),
        ("**/*.pq", ["deep/er/c.pq"]),
        ("**/c.*", ["deep/er/c.pq"]),
        ("deep/*/c.pq", ["deep/er/c.pq"]),
    ],
)
def test_list_files_glob(tree, pattern, names):
    assert list_files(tree / pattern) == [str(tree / n) for n in names]


def test_list_files_glob_is_relative_to_the_working_directory(tree, monkeypatch):
    monkeypatch.chdir(tree)
    assert [n.removeprefix("./") for n in list_files("?.parquet")] == ["a.parquet", "b.parquet"]


def test_list_files_takes_a_name_with_wildcards_literally(tmp_path):
    path = tmp_path / "day[1].parquet"
    pq.write_table(pa.table({"n": [1]}), path)
    assert list_files(path) == [str(path)]


@pytest.mark.parametrize("name", ["nothing", "*.nothing", "empty"])
def test_list_files_of_nothing_is_not_found(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.NotFound, match=str(tmp_path)):
        list_files(tmp_path / name)


def test_source_reads_ranges(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    source = open_source(path)
    assert (source.nbytes, source.path) == (10, str(path))
    assert [bytes(b) for b in source.read([(0, 3), (9, 1), (4, 0)])] == [b"012", b"9", b""]
    assert source.file.read() == b"0123456789"
    for outside in (0, 11), (-1, 2), (10, 1):
        with pytest.raises(errors.Corrupt, match="outside"):
            source.read([outside])
    source.close()


def test_source_errors_have_names(tmp_path):
    with pytest.raises(errors.NotFound):
        open_source(tmp_path / "nothing")
    with pytest.raises((errors.InvalidArgument, errors.StorageError)):
        open_source(tmp_path)
    with pytest.raises(errors.Unsupported, match="nosuchscheme"):
        open_source("nosuchscheme://x/y")


def test_file_uri_is_local(tree):
    uri = (tree / "a.parquet").as_uri()
    assert not open_source(uri).remote
    assert read_columns(uri)["n"].tolist() == [b"a.parquet"]


def test_fsspec_uri(tree):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for path in tree.rglob("*.p*q*"):
        memory.pipe(f"/hb/{path.relative_to(tree)}", path.read_bytes())
    try:
        found = list_files("memory://hb")
        assert [n.rsplit("/", 1)[1] for n in found] == ["a.parquet", "b.parquet", "c.pq", "x.parq"]
        assert [read_columns(n)["n"].tolist() for n in found[:2]] == [[b"a.parquet"], [b"b.parquet"]]
        assert len(list_files("memory://hb/**/c.pq")) == 1
        with pytest.raises(errors.NotFound):
            open_source("memory://hb/nothing.parquet")
        source = open_source(found[0])
        assert source.remote
        assert bytes(source.read([(0, 4)])[0]) == b"PAR1"
    finally:
        memory.rm("/hb", recursive=True)
