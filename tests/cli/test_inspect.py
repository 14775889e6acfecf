"""``hbkit inspect``."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from hbkit.cli.main import main


def run(*arguments, status=0):
    result = CliRunner().invoke(main, ["inspect", *(str(a) for a in arguments)])
    assert result.exit_code == status, result.output
    return result


def test_inspect_shows_what_the_file_holds(tmp_path):
    table = pa.table(
        {
            "key": pa.array([1, None, 3, 4] * 5, pa.int64()),
            "score": pa.array(np.arange(20), pa.float32()),
            "items": pa.array([[], [1], None, [1, 2, 3]] * 5, pa.list_(pa.int64())),
            "names": pa.array([["a", "b"]] * 20, pa.list_(pa.string())),
        }
    )
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=8, compression="zstd", use_dictionary=["key"])
    result = run(tmp_path / "x.parquet")
    metadata = pq.read_metadata(tmp_path / "x.parquet")
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line.startswith("  ")}
    assert re.search(r"rows +20\n +row groups +3, of 4 to 8 rows\n", result.stdout)
    for i, name in enumerate(table.column_names):
        nbytes = sum(metadata.row_group(g).column(i).total_compressed_size for g in range(3))
        assert f" {nbytes:,} " in lines[name] and " ZSTD " in lines[name]
    assert re.search(r"key +int64 +\d+ +5 +native +ZSTD +.*RLE_DICTIONARY", lines["key"])
    assert re.search(r"score +float32 +\d+ +0 ", lines["score"])
    assert lines["items"].endswith(" 0 1.0 3") and lines["names"].endswith(" 2 2.0 2")


def test_inspect_names_members_and_decoders(tmp_path):
    table = pa.table(
        {
            "user": pa.array([{"age": 7, "tags": ["a", "b"]}, None, {"age": None, "tags": []}]),
            "bag": pa.array([[("k", 1)], [], None], pa.map_(pa.string(), pa.int32())),
            "when": pa.array([1, 2, 3], pa.timestamp("ns")),
        }
    )
    pq.write_table(table, tmp_path / "x.parquet", use_deprecated_int96_timestamps=True)
    lines = {line.split()[0]: line for line in run(tmp_path / "x.parquet").stdout.splitlines() if line.startswith("  ")}
    assert re.search(r"user.age +int64 +\d+ +2 +native ", lines["user.age"])
    assert re.search(r"user.tags +list<string> +\d+ +\? +native .* 0 0.7 2$", lines["user.tags"])
    assert re.search(r"bag.value +list<int32> +\d+ +\? +native .* 0 0.3 1$", lines["bag.value"])
    assert re.search(r"when +timestamp\[ns\] +\d+ +\S+ +pyarrow ", lines["when"])
    assert "user" not in lines and "bag" not in lines and "bag.key" in lines


def test_inspect_sums_up_a_directory(tmp_path):
    CliRunner().invoke(main, ["synth", str(tmp_path / "s"), "--rows", "3000", "--files", "3", "--shape", "taobao"])
    result = run(tmp_path / "s")
    auc = pq.read_metadata(tmp_path / "s" / "part-00000.parquet").metadata[b"hbkit.bayes_auc"].decode()
    assert re.search(r"files +3\n +rows +3,000\n +row groups +3, of 1,000 rows\n", result.stdout)
    assert re.search(rf"hbkit.bayes_auc +{auc}\n", result.stdout)
    assert re.search(r"item_history +list<int64> .* 0 \d+\.\d 50\n", result.stdout)
    assert run(tmp_path / "s" / "*.parquet").stdout.split("\n", 1)[1] == result.stdout.split("\n", 1)[1]


def test_inspect_says_where_files_differ(tmp_path):
    pq.write_table(pa.table({"x": [1], "y": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"x": [1.5]}), tmp_path / "b.parquet")
    assert "differs between the files" in run(tmp_path).stdout


def test_inspect_of_no_rows(tmp_path):
    pq.write_table(pa.table({"x": pa.array([], pa.list_(pa.int64()))}), tmp_path / "a.parquet")
    assert re.search(r"rows +0\n", run(tmp_path).stdout)


@pytest.mark.parametrize("name", ["absent.parquet", "text.parquet", "cut.parquet", "empty"])
def test_inspect_errors_are_one_line(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.parquet").write_text("a,b\n1,2\n")
    pq.write_table(pa.table({"x": np.arange(1000)}), tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    result = run(tmp_path / name, status=2)
    assert result.stdout == "" and result.stderr.count("\n") == 1
    assert result.stderr.startswith("hbkit: error: ") and name in result.stderr


def test_inspect_real_files_without_a_crash(shared):
    """Each in this process: a file that aborts the reader would end the tests."""
    n = 0
    for path in sorted(shared("data/parquet-testing").rglob("*.parquet")):
        result = CliRunner().invoke(main, ["inspect", str(path)])
        assert result.exit_code in (0, 2), (path, result.output, result.exception)
        assert result.exit_code == 0 or result.stderr.splitlines()[-1].startswith("hbkit: error: ")
        n += result.exit_code == 0
    assert n > 40


def test_inspect_lists_the_commits_of_a_snapshot(tmp_path):
    from hbkit import snapshot
    from hbkit.embedding import SGD, Normal, Table

    table = Table("user", 4, initializer=Normal(0, 1, seed=0), optimizer=SGD(lr=0.1))
    table.lookup(np.arange(5), train=True)
    first = snapshot.save(tmp_path / "s", [table], 1)
    table.lookup(np.arange(9), train=True)
    snapshot.save(tmp_path / "s", [table], 2)
    result = run(tmp_path / "s")
    assert "2 commits" in result.stdout and "rows of user" in result.stdout
    assert re.search(rf"{first} .* 5\n", result.stdout) and re.search(r" 2 .* 9\n", result.stdout)


def test_inspect_damaged_manifest_is_one_line(tmp_path):
    (tmp_path / "c00000001.json").write_text(json.dumps({"x": 1}))
    result = run(tmp_path, status=2)
    assert result.stderr.startswith("hbkit: error: ") and result.stderr.count("\n") == 1
