"""``hbkit convert``."""

import re

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from hbkit.cli import convert as command
from hbkit.cli.main import main
from hbkit.data import formats
from hbkit.data.output import COMPRESSIONS, ROW_GROUP_ROWS

CSV = "user,genres,y,rating\n1,a|b,1,5\n2,,0,2\n3,c,1,4\n4,a,0,1\n"


def run(*arguments, status=0):
    result = CliRunner().invoke(main, ["convert", *(str(a) for a in arguments)])
    assert result.exit_code == status, result.output
    return result


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.csv"
    path.write_text(CSV)
    return path


def test_convert_writes_and_sums_up(tmp_path, source):
    out = tmp_path / "out"
    result = run(source, out, "--label", "y", "--list", "genres:|", "--compression", "snappy")
    table = pq.read_table(out / "part-00000.parquet")
    assert table.column_names == ["label", "user", "genres", "rating"]
    assert table["genres"].to_pylist() == [["a", "b"], [], ["c"], ["a"]]
    assert pq.read_metadata(out / "part-00000.parquet").row_group(0).column(0).compression == "SNAPPY"
    nbytes = (out / "part-00000.parquet").stat().st_size
    assert re.search(rf"part-00000.parquet +4 +{nbytes:,}\n", result.stdout)
    columns = "label, user, genres, rating"
    assert re.search(rf"format +csv\n +rows +4\n +columns +{columns}\n +before +{len(CSV)} B\n", result.stdout)
    assert f"ratio    {len(CSV) / nbytes:.2f}" in result.stdout
    for task in ("first pass", "convert"):
        assert f"{task}: {len(CSV)} B of {len(CSV)} B (100%)" in result.stderr


def test_convert_splits(tmp_path, source):
    result = run(source, tmp_path / "o", "--split", "2:1:1", "--split-by", "order", "--row-group-rows", 1)
    names = ["train.parquet", "valid.parquet", "test.parquet"]
    assert [pq.read_table(tmp_path / "o" / n)["user"].to_pylist() for n in names] == [[1, 2], [3], [4]]
    assert all(name in result.stdout for name in names)


def test_convert_options_reach_the_converter(tmp_path, source):
    run(source, tmp_path / "o.parquet", "--label", "rating", "--positive", 4)
    assert pq.read_table(tmp_path / "o.parquet")["label"].to_pylist() == [1, 0, 1, 0]


def test_convert_several_inputs(tmp_path, source):
    run(source, source, tmp_path / "o.parquet")
    assert pq.read_table(tmp_path / "o.parquet").num_rows == 8


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{absent}", "{out}"], r"no such file \(file .*absent\)"),
        (
            ["{source}", "{out}", "--label", "click"],
            r"no such column; there are user, genres, y, rating \(.*column click",
        ),
        (["{source}", "{out}", "--scalar", "a,b"], r"no such column.*column a\)"),
        (["{source}", "{out}", "--label", "genres"], "a label is a number, and this is string"),
        (["{source}", "{out}", "--split", "1:2:3:4"], "cannot split by '1:2:3:4'.*8:1:1"),
        (["{source}", "{source}"], "a file stands where a directory is to be made"),
        (["{source}", "{out}", "--format", "libsvm"], r"label 'user' .*line 1\)"),
        (["{source}", "{out}", "--format", "movielens"], "no ratings.dat or ratings.parquet in the directory"),
        (["{source}", "{out}", "--format", "parquet"], "in.csv"),
        (["{source}", "{out}", "--format", "criteo"], "1 columns, and raw Criteo data has 40"),
        (["{source}", "{out}", "--format", "libsvm", "--list", "genres:|"], "--list is for csv and tsv"),
        (["{source}", "{out}.parquet", "--split", "1:1"], "a split makes several files"),
    ],
)
def test_convert_errors_are_one_line(tmp_path, source, arguments, says):
    names = {"absent": tmp_path / "absent", "source": source, "out": tmp_path / "out"}
    result = run(*(a.format(**names) for a in arguments), status=2)
    line = result.stderr.splitlines()[-1]
    assert re.search(says, line) and line.startswith("hbkit: error: ")
    assert "Traceback" not in result.output and result.stdout == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.csv"]


def test_convert_keeps_what_is_there(tmp_path, source):
    run(source, tmp_path / "o")
    assert "--overwrite" in run(source, tmp_path / "o", status=2).stderr
    run(source, tmp_path / "o", "--overwrite", "--split", "1:1")
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["test.parquet", "train.parquet"]


@pytest.mark.parametrize("text", ["genres", ":|", "genres:"])
def test_convert_list_needs_column_and_separator(tmp_path, source, text):
    assert "COLUMN:SEPARATOR" in run(source, tmp_path / "o", "--list", text, status=2).stderr


def test_choices_are_those_of_the_converter():
    options = {option.name: option for option in command.convert.params}
    assert command.FORMATS == formats.FORMATS
    assert tuple(options["compression"].type.choices) == COMPRESSIONS
    assert options["row_group_rows"].default == ROW_GROUP_ROWS


def test_help_says_what_each_format_is():
    text = run("--help").stdout
    for name in formats.FORMATS[1:]:
        assert re.search(rf"^ *(csv, )?{name}(, tsv)?  +\w", text, re.MULTILINE), name


def test_convert_tfrecord(shared, tmp_path):
    source = shared("data/raw/tfrecord")
    result = run(source / "criteo_sample.tr.tfrecords", tmp_path / "o", "--label", "label", "--split", "8:1:1")
    assert re.search(r"format +tfrecord\n +rows +160\n +columns +label, C1, C2, ", result.stdout)
    (tmp_path / "cut.tfrecord").write_bytes((source / "criteo_sample.te.tfrecords").read_bytes()[:-1])
    line = run(tmp_path / "cut.tfrecord", tmp_path / "p", status=2).stderr.splitlines()[-1]
    assert re.search(r"error: the record is cut off \(file .*cut.tfrecord, byte \d+\): fetch the file again", line)


def test_convert_movielens(shared, tmp_path):
    result = run(shared("data/ml-1m"), tmp_path / "ml", "--split", "8:1:1", "--seed", 0)
    rows = [pq.read_metadata(tmp_path / "ml" / f"{n}.parquet").num_rows for n in ("train", "valid", "test")]
    assert sum(rows) == 739_012
    assert [r / 739_012 for r in rows] == pytest.approx([0.8, 0.1, 0.1], abs=2e-3)
    assert "rows     739,012" in result.stdout


def test_convert_criteo_80k(shared, tmp_path):
    path = shared("data/criteo-80k") / "clicks.parquet"
    run(path, tmp_path / "c", "--scalar", "label", "--split", "75:25", "--split-by", "order")
    assert [pq.read_metadata(tmp_path / "c" / f"{n}.parquet").num_rows for n in ("train", "test")] == [60_000, 20_000]
