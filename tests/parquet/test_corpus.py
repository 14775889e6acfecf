"""Files that others wrote, whole and damaged: never a crash; an error with a name, or pyarrow's values."""

import json
import os
import pathlib
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import hbkit

HERE = pathlib.Path(__file__).parent
ENV = {**os.environ, "PYTHONPATH": str(pathlib.Path(hbkit.__file__).parents[1])}  # the scripts test the same hbkit
NAMES = "*.parquet", "*.parq", "*.pq", "*.parquet.encrypted"


def compare(paths):
    """What compare.py says of each file; a crash is the result of the file it happened on, and the rest goes on."""
    results, left = {}, [str(p) for p in paths]
    while left:
        run = subprocess.run(
            [sys.executable, HERE / "compare.py"],
            input="\n".join(left),
            capture_output=True,
            text=True,
            check=False,
            env=ENV,
        )
        lines = run.stdout.splitlines()
        done = [json.loads(line) for line in lines if line.startswith("{")]
        results.update({r["path"]: r for r in done})
        left = left[len(done) :]
        if left:
            assert run.returncode < 0, run.stderr  # killed by a signal, else the script itself is wrong
            results[left[0]] = {"path": left[0], "file": f"crash: {lines[-1]}", "columns": {}}
            left = left[1:]
    return results


@pytest.fixture(scope="module")
def corpus(shared):
    folders = "parquet-testing/data", "parquet-testing/bad_data", "parquet-testing/shredded_variant", "parquet-real"
    found = {p for folder in folders for name in NAMES for p in shared(f"data/{folder}").rglob(name)}
    return compare(sorted(found))


def columns(corpus, start):
    return {
        f"{pathlib.Path(path).name}:{name}": said
        for path, r in corpus.items()
        for name, said in r["columns"].items()
        if said.startswith(start)
    }


# Where hbkit and pyarrow part, by the file's name without its suffix: who reads it, and why the other does not.
STRICTER = {
    "tests~src~test~resources~nested-unsigned-malformed": "the chunks hold more rows than their row group",
    "testdata~data~bad_column_metadata": "pages hold other numbers of values than the footer says",
    "testdata~malformed~num_values_exceeds_data": "a page claims more values than the chunk",
}
MORE_LENIENT = {
    "testdata~data~create_table_like_parquet_test": "a logical type on a group, of which hbkit reads the leaves",
    "incorrect_map_schema": "map keys that are not required",
    "ARROW-RS-GH-6229-DICTHEADER": "the column beside the damaged ones is whole",
}


def test_file_equals_oracle_or_fails_with_it(corpus):
    assert {p: r["file"] for p, r in corpus.items() if r["file"] and not r["file"].startswith("both fail")} == {}
    said = {s.split(":")[0] for r in corpus.values() for s in r["columns"].values()}
    assert said <= {"equal", "both fail", "unsupported", "hbkit alone fails", "pyarrow alone fails"}, [
        columns(corpus, s) for s in said - {"equal", "both fail", "unsupported"}
    ]
    assert {name.split(".")[0] for name in columns(corpus, "hbkit alone fails")} == set(STRICTER)
    assert {name.split(".")[0] for name in columns(corpus, "pyarrow alone fails")} == set(MORE_LENIENT)
    assert len(columns(corpus, "equal")) > 4300


def test_file_reads_what_others_refuse_for_one_column(corpus):
    # read whole, both fail; only some of their columns are encrypted or damaged
    good = columns(corpus, "equal")
    assert "encrypt_columns_plaintext_footer.parquet.encrypted:int64_field" in good
    assert any(name.startswith("ARROW-GH-41321.parquet:") for name in good)


def test_unsupported_columns_are_the_known_kinds(corpus):
    """The list of what hbkit does not read, by reason; a new reason must be added on purpose."""
    reasons = {said.removeprefix("unsupported: ") for said in columns(corpus, "unsupported").values()}
    reasons = {"decimal" if r.startswith("decimal") else r for r in reasons}
    assert reasons == {
        "its logical type does not suit its physical type",
        "null columns are not supported",
        "decimal",  # of more than 18 digits
        "two columns have this name",
        "the column is encrypted",
        "compression codec 5000 is not in the format",
    }


def test_bad_data_is_named_or_the_oracles(corpus):
    bad = [r for path, r in corpus.items() if "/bad_data/" in path]
    assert len(bad) == 8
    for r in bad:
        said = [r["file"], *r["columns"].values()]
        assert all(s == "" or s.startswith(("both fail: Corrupt", "equal", "unsupported", "pyarrow alone")) for s in said), r


SMALL = "nested_lists.snappy", "datapage_v2.snappy", "alltypes_plain.snappy", "list_columns"


def damage(kind, n, paths):
    run = subprocess.run(
        [sys.executable, HERE / "damage.py", kind, str(n), "0", *map(str, paths)],
        capture_output=True,
        text=True,
        check=False,
        env=ENV,
    )
    lines = run.stdout.splitlines()
    assert run.returncode == 0, f"{lines[-1:]} {run.stderr[-2000:]}"
    return json.loads(lines[-1])


def test_truncated_file_is_corrupt(shared):
    paths = [shared(f"data/parquet-testing/data/{name}.parquet") for name in SMALL[:3]]
    outcomes = damage("cut", 300, paths)
    assert outcomes == {"Corrupt": 900}


def test_flipped_bit_is_named_or_read(shared):
    outcomes = damage("flip", 150, [shared(f"data/parquet-testing/data/{name}.parquet") for name in SMALL])
    assert outcomes.keys() <= {"read", "Corrupt", "Unsupported"}
    assert outcomes["Corrupt"] > 50
    assert sum(outcomes.values()) == 600


def test_filter_over_a_flipped_bit_is_named_or_answered(tmp_path):
    # pyarrow.dataset aborts the process here: it looks at the metadata of column chunks without a guard
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": range(100), "s": ["x", "yy"] * 50}), path, row_group_size=30)
    outcomes = damage("filter", 600, [path])
    assert outcomes.keys() <= {"read", "Corrupt", "Unsupported", "UnknownColumn", "SchemaMismatch"}
    assert outcomes["Corrupt"] > 100
