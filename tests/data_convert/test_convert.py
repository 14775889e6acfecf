"""The converters against pandas, scikit-learn and naive parsers, on generated and on real files."""

import csv
import gzip
import io
import os

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_svmlight_file

from hbkit import errors
from hbkit.data import formats
from hbkit.data.convert import convert


def converted(path, tmp_path, **options):
    """The rows of ``path`` after conversion, and what the converter says of itself."""
    paths = path if isinstance(path, list) else [path]
    done = convert(paths, tmp_path / "out.parquet", overwrite=True, **options)
    table = pq.read_table(tmp_path / "out.parquet")
    assert done.n_rows == table.num_rows == done.files[0].n_rows
    assert table.schema.equals(done.schema)
    return table, done


def written(tmp_path, text, name="in.txt"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.fixture
def small_blocks(monkeypatch):
    """Block ends fall into these small files too."""
    monkeypatch.setattr(formats.input, "BLOCK_NBYTES", 4096)
    monkeypatch.setattr(formats.delimited, "BLOCK_NBYTES", 1 << 16)


# ---- CSV ----------------------------------------------------------------------------------------------------------


def same_as_pandas(table, frame):
    assert table.column_names == list(frame.columns)
    for name in frame.columns:
        ours, theirs = table[name].to_pylist(), frame[name]
        expected = [None if pd.isna(v) else v for v in theirs]
        assert len(ours) == len(expected), name
        if pa.types.is_string(table[name].type):
            assert [None if v is None else str(v) for v in ours] == [None if v is None else str(v) for v in expected], (
                name
            )
        else:
            np.testing.assert_array_equal(
                np.array([np.nan if v is None else v for v in ours], np.float64),
                np.array([np.nan if v is None else v for v in expected], np.float64),
                err_msg=name,
            )


CSVS = {
    "criteo_train.tiny.csv": {"Id": pa.int64(), "Label": pa.int64(), "I1": pa.int64(), "C1": pa.string()},
    "deepctr_avazu_sample.txt": {"id": pa.uint64(), "click": pa.int64(), "site_id": pa.string()},
    "deepctr_movielens_sample.txt": {"user_id": pa.int64(), "title": pa.string(), "genres": pa.string()},
    "sparrow_testSamples.csv": {"movieId": pa.int64(), "rating": pa.float64(), "userRatedMovie5": pa.int64()},
    "talkingdata_train_sample.csv": {"ip": pa.int64(), "click_time": pa.string(), "is_attributed": pa.int64()},
}


@pytest.mark.parametrize("name", CSVS)
def test_real_csv_is_what_pandas_reads(shared, tmp_path, small_blocks, name):
    path = shared("data/raw/csv") / name
    table, done = converted(path, tmp_path)
    assert done.format == "csv"
    text = {c for c in table.column_names if pa.types.is_string(table[c].type)}
    frame = pd.read_csv(path, dtype=dict.fromkeys(text, str), keep_default_na=False, na_values={c: [""] for c in text})
    for c in set(table.column_names) - text:
        frame[c] = pd.to_numeric(frame[c].replace("", None))
    same_as_pandas(table, frame)
    for column, kind in CSVS[name].items():
        assert table[column].type == kind


def test_real_criteo_csv_beside_tfrecords(shared, tmp_path):
    path = shared("data/raw/tfrecord") / "criteo_sample.txt"
    table, _ = converted(path, tmp_path)
    text = {f"C{i}": str for i in range(1, 27)}
    same_as_pandas(table, pd.read_csv(path, dtype=text))
    assert table["I3"].null_count > 0


def test_real_dmr_csv_without_header(shared, tmp_path):
    path = shared("data/raw/paddlerec-samples") / "dmr_alimama_sampled_train.txt"
    table, _ = converted(path, tmp_path, label="f266")
    frame = pd.read_csv(path, header=None)
    assert table.column_names == ["label", *(f"f{i}" for i in range(266))]
    assert table["label"].to_pylist() == frame[266].tolist() and sum(frame[266]) == 210
    np.testing.assert_array_equal(table["f250"].to_numpy(), frame[250])


def test_real_din_csv_with_lists_between_semicolons(shared, tmp_path):
    path = shared("data/raw/paddlerec-samples") / "din_amazon_electronics_sample.txt"
    table, _ = converted(path, tmp_path, lists={"f0": " ", "f1": " "}, label="f4")
    rows = [line.split(";") for line in path.read_text().splitlines()]
    assert table["f0"].type == pa.list_(pa.int64())
    assert table["f0"].to_pylist() == [[int(x) for x in row[0].split()] for row in rows]
    assert table["f1"].to_pylist() == [[int(x) for x in row[1].split()] for row in rows]
    assert table["label"].to_pylist() == [int(row[4]) for row in rows]


@pytest.mark.parametrize("name", ["rank.test.query", "rank.train.query"])
def test_real_query_sizes(shared, tmp_path, name):
    path = shared("data/raw/libsvm") / name
    table, _ = converted(path, tmp_path)
    assert table["f0"].to_pylist() == [int(x) for x in path.read_text().split()]


def test_real_csv_genres_become_lists(shared, tmp_path):
    path = shared("data/raw/csv") / "deepctr_movielens_sample.txt"
    table, _ = converted(path, tmp_path, lists={"genres": "|"})
    assert table["genres"].to_pylist() == [g.split("|") for g in pd.read_csv(path)["genres"]]
    assert table["zip"].to_pylist() == pd.read_csv(path, dtype={"zip": str})["zip"].tolist()


CELLS = st.one_of(
    st.integers(-(2**63), 2**63 - 1).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.text(st.characters(codec="utf-8", exclude_characters="\0\r", exclude_categories=["Cs"]), max_size=5),
    st.just(""),
)


@settings(max_examples=60)
@given(
    st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(CELLS, min_size=n, max_size=n), min_size=1, max_size=20)),
    st.sampled_from([",", ";"]),
)
def test_csv_cells_survive(tmp_path_factory, rows, sep):
    rows = [["a", *row] for row in rows]  # a row of one empty cell would be an empty line
    names = [f"x{i}" for i in range(len(rows[0]))]
    text = io.StringIO()
    writer = csv.writer(text, delimiter=sep, lineterminator="\n")
    writer.writerows([names, *rows])
    tmp_path = tmp_path_factory.mktemp("csv")
    table, _ = converted(written(tmp_path, text.getvalue()), tmp_path, format="csv", sep=sep)
    for name, cells in zip(names, zip(*rows, strict=True), strict=True):
        kind, values = table[name].type, table[name].to_pylist()
        for cell, value in zip(cells, values, strict=True):
            if pa.types.is_string(kind):
                assert value == (None if cell in ("", "\\N") else cell)
            elif value is None:
                assert cell.strip(" \t\n\v\f") in formats.delimited.NUMBER_NULLS
            else:
                assert value == (float(cell) if pa.types.is_floating(kind) else int(cell))
        if all(c == "" or c.lstrip("-").isdigit() for c in cells) and any(cells):
            assert kind == pa.int64() or any(c.lstrip("-")[:1] == "0" and c != "0" for c in cells)


def test_csv_type_is_that_of_the_last_row_too(tmp_path, small_blocks):
    n = 60_000
    lines = ["id,score,key,big"] + [f"{i},{i},{i},{i}" for i in range(n)] + [f"{n},0.5,x,{2**64 - 1}"]
    table, _ = converted(written(tmp_path, "\n".join(lines) + "\n"), tmp_path)
    assert [f.type for f in table.schema] == [pa.int64(), pa.float64(), pa.string(), pa.uint64()]
    assert table["key"].to_pylist()[-2:] == [str(n - 1), "x"] and table["big"].to_pylist()[-1] == 2**64 - 1


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (["1", "-2", ""], pa.int64()),
        (["1", "NA", "nan"], pa.int64()),
        (["1", "2.5"], pa.float64()),
        ([".5", "1.", "1e-05"], pa.float64()),
        (["1", str(2**63)], pa.uint64()),
        (["-1", str(2**63)], pa.string()),
        ([str(2**64)], pa.string()),
        (["1e999"], pa.string()),
        (["02139", "48067"], pa.string()),
        (["0x1F"], pa.string()),
        (["+49"], pa.string()),
        (["inf", "1"], pa.string()),
        (["NA", "DE"], pa.string()),
        (["", "\\N"], pa.float64()),
        ([" 7", "8 "], pa.int64()),
    ],
)
def test_csv_type_of_cells(tmp_path, cells, kind):
    table, _ = converted(written(tmp_path, "x,y\n" + "".join(f"{c},a\n" for c in cells)), tmp_path)
    assert table["x"].type == kind
    if cells == ["NA", "DE"]:
        assert table["x"].to_pylist() == ["NA", "DE"]
    if cells == ["", "\\N"]:
        assert table["x"].to_pylist() == [None, None]


def test_csv_lists_leave_out_missing_elements(tmp_path):
    text = "tags,ids,y\na|b,1 2,1\n,,0\nc||d|, 3  4 ,1\n"
    table, _ = converted(written(tmp_path, text), tmp_path, lists={"tags": "|", "ids": " "})
    assert table["tags"].to_pylist() == [["a", "b"], [], ["c", "d"]]
    assert table["ids"].to_pylist() == [[1, 2], [], [3, 4]]


@pytest.mark.parametrize("sep", [",", "\t", ";", "|"])
@pytest.mark.parametrize("packed", [False, True])
def test_csv_separator_header_and_gzip_are_found(tmp_path, sep, packed):
    text = f"user{sep}item{sep}y\r\n1{sep}a{sep}0.5\r\n2{sep}b{sep}\r\n".encode()
    table, _ = converted(written(tmp_path, gzip.compress(text) if packed else text), tmp_path)
    assert table.to_pydict() == {"user": [1, 2], "item": ["a", "b"], "y": [0.5, None]}


def test_csv_byte_order_mark_and_quotes(tmp_path):
    table, _ = converted(written(tmp_path, '\ufeffa,b\n"x, ""y""\nz",1\n'), tmp_path)
    assert table.to_pydict() == {"a": ['x, "y"\nz'], "b": [1]}


def test_tsv_quotes_mean_nothing(tmp_path):
    table, _ = converted(written(tmp_path, 'a\tb\n"x\t1\n'), tmp_path)
    assert table.to_pydict() == {"a": ['"x'], "b": [1]}


def test_csv_header_can_be_told(tmp_path):
    path = written(tmp_path, "a,b\nc,d\n")
    assert converted(path, tmp_path, format="csv", header=False)[0].num_rows == 2
    assert converted(path, tmp_path)[0].to_pydict() == {"a": ["c"], "b": ["d"]}
    assert converted(written(tmp_path, "a,b\n"), tmp_path)[0].num_rows == 0


def test_several_csv_become_one(tmp_path):
    a, b = written(tmp_path, "x,y\n1,2\n", "a"), written(tmp_path, "x,y\n0.5,z\n", "b")
    table, _ = converted([a, b], tmp_path)
    assert table.to_pydict() == {"x": [1.0, 0.5], "y": ["2", "z"]}
    with pytest.raises(errors.SchemaMismatch, match="convert these files apart"):
        converted([a, written(tmp_path, "x,z\n1,2\n", "c")], tmp_path)


@pytest.mark.parametrize(
    ("text", "options", "error", "says"),
    [
        ("a,b\n1,2\n3\n", {}, errors.Corrupt, "1 cells, not 2 .*line 3"),
        ("", {}, errors.Corrupt, "empty"),
        (b"a,b\n1,\xff\n", {}, errors.Corrupt, "UTF-8"),
        (b"a,b\n1,\x00\n", {}, errors.Unsupported, "neither Parquet, TFRecord nor text"),
        ('a,b\n1,"2\n3,4\n', {}, errors.Corrupt, "quote is left open"),
        ('a,b\n"1,2\n3,4\n', {}, errors.Corrupt, "cells, not 2"),
        ("a,a\n1,2\n", {"header": True}, errors.Unsupported, "same name .*column a"),
        ("a,b\n1,2\n", {"label": "c"}, errors.UnknownColumn, "there are a, b .*column c"),
        ("a,b\n1,2\n", {"lists": {"c": "|"}}, errors.UnknownColumn, "column c"),
        ("a,b\n1,\n", {"label": "b"}, errors.NullFound, "label is missing .*column b, row 0"),
        ("a,b\n1,yes\n", {"label": "b"}, errors.InvalidArgument, "a label is a number"),
        ("a,label\n1,2\n", {"label": "a"}, errors.InvalidArgument, "another column named label"),
        ("a,b\n1,2\n", {"scalars": ["a"]}, errors.InvalidArgument, "scalar already"),
        ("a,b\n1,2\n", {"sep": "::"}, errors.InvalidArgument, "one ASCII character"),
        ("a,b\n1,2\n", {"split": "8-1-1"}, errors.InvalidArgument, "8:1:1"),
        ("hello world\nsome text\n", {}, errors.Unsupported, "name its --format"),
    ],
)
def test_csv_errors_name_the_place(tmp_path, text, options, error, says):
    path = written(tmp_path, text)
    with pytest.raises(error, match=says) as caught:
        convert([path], tmp_path / "out", **({"format": "csv"} if options.get("sep") else {}), **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_damaged_gzip_is_corrupt(tmp_path):
    whole = gzip.compress(b"a,b\n" + b"".join(b"%d,%d\n" % (i, i * i) for i in range(5000)))
    for name, bad in (("cut", whole[: len(whole) // 2]), ("flipped", whole[:-6] + b"xxxxxx")):
        with pytest.raises(errors.Corrupt, match="gzip data are damaged"):
            convert([written(tmp_path, bad, name)], tmp_path / "out")
        assert not (tmp_path / "out").exists()


# ---- Criteo -------------------------------------------------------------------------------------------------------


def test_real_criteo_kaggle(shared, tmp_path, small_blocks):
    path = shared("data/raw/criteo-kaggle-10k") / "train_examples.txt"
    table, done = converted(path, tmp_path)
    assert done.format == "criteo"
    names = list(formats.Criteo.NAMES)
    frame = pd.read_csv(path, sep="\t", header=None, names=names, dtype={n: str for n in names if n[0] == "c"})
    same_as_pandas(table, frame)
    assert [table[n].type for n in ("label", "i1", "c1")] == [pa.int64(), pa.float64(), pa.string()]
    assert table["label"].to_numpy().mean() == pytest.approx(0.218, abs=1e-3)


def test_criteo_bad_cell_is_named(tmp_path):
    good = "1" + "\t3" * 13 + "\tab" * 26
    path = written(tmp_path, "\n".join([good] * 70_000 + [good.replace("\t3", "\tx", 1), good]) + "\n")
    with pytest.raises(errors.Corrupt, match=r"cell 'x' .*line 70001, column i1"):
        convert([path], tmp_path / "out")
    with pytest.raises(errors.Corrupt, match=r"39 cells, not 40 .*line 2"):
        convert([written(tmp_path, f"{good}\n{good[:-3]}\n")], tmp_path / "out", format="criteo")
    with pytest.raises(errors.NullFound, match="label is missing"):
        convert([written(tmp_path, f"{good}\n{good[1:]}\n")], tmp_path / "out", format="criteo")


# ---- libsvm and libffm --------------------------------------------------------------------------------------------

LIBSVMS = [
    "raw/libsvm/a9a_123d_train.libsvm",
    "raw/libsvm/agaricus.txt.train",
    "raw/libsvm/agaricus.txt.test",
    "raw/libsvm/heart_scale",
    "raw/libsvm/rank.train",
    "raw/libsvm/rank.test",
    "raw/libsvm/svmlight_classification.txt",
    "raw/libffm-libfm/frappe.test.libfm",
    "raw/libffm-libfm/frappe.validation.libfm",
]


def same_as_sklearn(table, matrix, label):
    np.testing.assert_array_equal(table["label"].to_numpy(), np.asarray(label, np.float32))
    index, value = table["index"].combine_chunks(), table["value"].combine_chunks()
    np.testing.assert_array_equal(index.offsets, value.offsets)
    np.testing.assert_array_equal(index.offsets, matrix.indptr)
    np.testing.assert_array_equal(index.values, matrix.indices)
    np.testing.assert_array_equal(value.values, matrix.data.astype(np.float32))


@pytest.mark.parametrize("name", LIBSVMS)
def test_real_libsvm_is_what_sklearn_reads(shared, tmp_path, name):
    path = shared("data") / name
    table, done = converted(path, tmp_path)
    assert done.format == "libsvm"
    same_as_sklearn(table, *load_svmlight_file(str(path), zero_based=True))


def test_real_multilabel_is_what_sklearn_reads(shared, tmp_path):
    path = shared("data/raw/libsvm") / "svmlight_multilabel.txt"
    table, _ = converted(path, tmp_path)
    matrix, labels = load_svmlight_file(str(path), multilabel=True, zero_based=True)
    assert [tuple(sorted(row)) for row in table["label"].to_pylist()] == labels
    assert table["index"].combine_chunks().values.to_pylist() == matrix.indices.tolist()


@pytest.mark.parametrize("name", ["tfr_train.txt", "tfr_vali.txt", "tfr_test.txt"])
def test_real_ranking_data_keep_their_order(shared, tmp_path, name):
    path = shared("data/raw/libsvm") / name
    table, _ = converted(path, tmp_path)
    rows = [line.split() for line in path.read_text().splitlines()]
    assert table["label"].to_pylist() == [float(row[0]) for row in rows]
    assert table["qid"].to_pylist() == [int(row[1][4:]) for row in rows]
    assert table["index"].to_pylist() == [[int(w.split(":")[0]) for w in row[2:]] for row in rows]
    values = [np.float32(w.split(":")[1]) for row in rows for w in row[2:]]
    assert table["value"].combine_chunks().values.to_pylist() == values


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("svmlight_invalid.txt", r"label 'python' .*svmlight_invalid.txt, line 1"),
        ("svmlight_invalid_order.txt", r"index 2 follows 5 .*line 1\): .*--unsorted"),
    ],
)
def test_real_invalid_libsvm_raises(shared, tmp_path, name, says):
    path = shared("data/raw/libsvm") / name
    with pytest.raises(errors.Corrupt, match=says):
        convert([path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unsorted_libsvm_is_taken_when_told(shared, tmp_path):
    table, _ = converted(shared("data/raw/libsvm") / "svmlight_invalid_order.txt", tmp_path, unsorted=True)
    assert table["index"].to_pylist() == [[5, 2, 15]]


@pytest.mark.parametrize("name", ["criteo_small_train.ffm.txt", "criteo_small_test.ffm.txt"])
def test_real_libffm_keeps_fields(shared, tmp_path, name):
    path = shared("data/raw/libffm-libfm") / name
    table, done = converted(path, tmp_path)
    assert done.format == "libffm"
    rows = [line.split() for line in path.read_text().splitlines()]
    assert table["label"].to_pylist() == [float(row[0]) for row in rows]
    for i, column in enumerate(("field", "index")):
        assert table[column].to_pylist() == [[int(w.split(":")[i]) for w in row[1:]] for row in rows]
    values = [float(np.float32(w.split(":")[2])) for row in rows for w in row[1:]]
    assert table["value"].combine_chunks().values.to_pylist() == values


FEATURES = st.dictionaries(st.integers(0, 2**31 - 1), st.floats(width=32, allow_nan=False, allow_infinity=False))
ROWS = st.lists(
    st.tuples(st.sampled_from(["1", "-1", "+1", "0.5"]), st.one_of(st.none(), st.integers(0, 9)), FEATURES),
    min_size=1,
    max_size=20,
)


@settings(max_examples=60)
@given(ROWS, st.sampled_from([" ", "\t", "  \t"]), st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans())
def test_libsvm_lines_survive(tmp_path_factory, rows, space, end, comments, packed):
    lines = ["# a comment", ""] if comments else []
    for label, qid, features in rows:
        words = [label, *([f"qid:{qid}"] if qid is not None else [])]
        words += [f"{i}:{v!r}" for i, v in sorted(features.items())]
        lines.append(space.join(words) + (space + "# 7:7" if comments else ""))
    tmp_path = tmp_path_factory.mktemp("libsvm")
    text = end.join(lines).encode()
    path = written(tmp_path, gzip.compress(text) if packed else text)
    table, _ = converted(path, tmp_path, format="libsvm")
    assert table["label"].to_pylist() == [float(label) for label, _, _ in rows]
    if any(qid is not None for _, qid, _ in rows):
        assert table["qid"].to_pylist() == [qid for _, qid, _ in rows]
    else:
        assert "qid" not in table.column_names
    assert table["index"].to_pylist() == [sorted(f) for _, _, f in rows]
    assert table["value"].to_pylist() == [[f[i] for i in sorted(f)] for _, _, f in rows]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("1 2", "'2' is not index:value"),
        ("1 2:3:4", "is not index:value"),
        ("1 2:x", "value 'x' is not a number"),
        ("1 -2:3", "index '-2' is not a whole number"),
        ("1 0x1F:3", "index '0x1F'"),
        (f"1 {2**63}:1", "is not a number of type int64"),
        ("nan 2:3", "not finite"),
        ("2:3", "no label"),
        ("1 qid:x 2:3", "qid 'x'"),
        ("1 2:3 2:4", "index 2 follows 2"),
        ("1 \N{LATIN SMALL LETTER E WITH ACUTE}:1", "is not a whole number"),
    ],
)
@pytest.mark.parametrize("before", [0, 3, 700])
def test_bad_libsvm_line_is_named(tmp_path, small_blocks, line, says, before):
    path = written(tmp_path, "1 2:3 5:4\n" * before + line + "\n" + "0 1:1\n" * 5)
    with pytest.raises(errors.Corrupt, match=says) as caught:
        convert([path], tmp_path / "out", format="libsvm")
    assert f"line {before + 1})" in str(caught.value)


def test_text_that_is_not_utf8_is_named(tmp_path, small_blocks):
    path = written(tmp_path, b"1 2:3\n" * 900 + b"1 2:3 # \xe9\n")
    with pytest.raises(errors.Corrupt, match=r"not UTF-8 text .*line 901"):
        convert([path], tmp_path / "out", format="libsvm")


def test_line_without_end_does_not_fill_the_memory(tmp_path, small_blocks, monkeypatch):
    monkeypatch.setattr(formats.input, "LINE_NBYTES", 50_000)
    path = written(tmp_path, "1 " + "2:3 " * 100_000)
    with pytest.raises(errors.Corrupt, match="line is longer"):
        convert([path], tmp_path / "out", format="libsvm")


# ---- slots and sequences ------------------------------------------------------------------------------------------


def test_real_slots_keep_unsigned_keys(shared, tmp_path):
    path = shared("data/raw/paddlerec-samples") / "slot_dnn_demo_10"
    table, done = converted(path, tmp_path)
    assert done.format == "slot"
    rows = [[w.split(":") for w in line.split()] for line in path.read_text().splitlines()]
    slots = sorted({int(s) for row in rows for _, s in row})
    assert table.column_names == ["label", *(f"slot_{s}" for s in slots if s != 1)]
    assert table["label"].to_pylist() == [int(k) for row in rows for k, s in row if s == "1"]
    top = 0
    for s in slots[1:]:
        column = table[f"slot_{s}"]
        assert column.type == pa.list_(pa.uint64())
        assert column.to_pylist() == [[int(k) for k, slot in row if slot == str(s)] for row in rows]
        top = max(top, pc.max(column.combine_chunks().values).as_py())
    assert top > 2**63


def test_real_named_slots(shared, tmp_path):
    path = shared("data/raw/paddlerec-samples") / "bst_amazon_train.txt"
    table, done = converted(path, tmp_path, scalars=["userid", "target"])
    assert done.format == "slot"
    rows = [[w.split(":") for w in line.split()] for line in path.read_text().splitlines()]
    assert table["label"].to_pylist() == [int(k) for row in rows for s, k in row if s == "label"]
    assert table["userid"].to_pylist() == [int(k) for row in rows for s, k in row if s == "userid"]
    assert table["history"].to_pylist() == [[int(k) for s, k in row if s == "history"] for row in rows]


def test_slot_label_must_be_one(tmp_path):
    with pytest.raises(errors.InvalidArgument, match=r"a list of 2 values is no scalar .*column slot_1, row 1"):
        convert([written(tmp_path, "1:1 5:2\n0:1 1:1 5:2\n")], tmp_path / "out")
    with pytest.raises(errors.NullFound, match="column slot_1, row 1"):
        convert([written(tmp_path, "1:1 5:2\n7:2 8:2\n")], tmp_path / "out")
    with pytest.raises(errors.Corrupt, match=r"key '-5' .*line 2"):
        convert([written(tmp_path, "1:1 5:2\n1:1 -5:2\n")], tmp_path / "out", format="slot")


def test_slots_in_small_steps_are_the_same(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    lines = [f"{i % 2}:1 " + " ".join(f"{k}:{k % 7 + 2}" for k in rng.integers(0, 99, 5)) for i in range(50)]
    path = written(tmp_path, "\n".join(lines))
    whole, _ = converted(path, tmp_path)
    monkeypatch.setattr(formats.slot, "SLOT_CELLS", 20)
    assert converted(path, tmp_path)[0].equals(whole)


def same_as_ali_ccp_lines(table, lines):
    rows = [line.split(",") for line in lines]
    head = [table[name].to_pylist() for name in ("id", "click", "buy")]
    assert list(zip(*head, strict=True)) == [tuple(int(x) for x in row[:3]) for row in rows]
    pairs = [[w.split(":") for w in row[3:]] for row in rows]
    slots = {s for row in pairs for s, _ in row}
    assert set(table.column_names) == {"id", "click", "buy", *(f"slot_{s}" for s in slots)}
    for s in slots:
        column = table[f"slot_{s}"]
        assert column.type == pa.list_(pa.uint64())
        assert column.to_pylist() == [[int(k) for slot, k in row if slot == s] for row in pairs]


def test_real_ali_ccp_has_a_list_for_each_slot(shared, tmp_path):
    path = shared("data/raw/paddlerec-samples") / "esmm_aliccp_small.txt"
    table, done = converted(path, tmp_path)
    assert done.format == "aliccp"
    same_as_ali_ccp_lines(table, path.read_text().splitlines())
    assert table.num_rows == 10 and table.num_columns == 3 + 22
    assert table.column_names[3:6] == ["slot_101", "slot_109_14", "slot_110_14"]
    assert max(map(len, table["slot_110_14"].to_pylist())) > 300
    labelled, _ = converted(path, tmp_path, label="click", scalars=["slot_101"])
    assert labelled.column_names[:4] == ["label", "id", "buy", "slot_101"]
    assert labelled["label"].to_pylist() == table["click"].to_pylist()
    assert labelled["slot_101"].type == pa.uint64()


@settings(max_examples=60)
@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from(["101", "9", "109_14", "20"]), st.integers(0, 2**64 - 1)), max_size=6),
        min_size=1,
        max_size=20,
    ),
    st.integers(1, 8),
    st.booleans(),
    st.sampled_from(["\n", "\r\n", "\n\n"]),
)
def test_ali_ccp_lines_survive(tmp_path_factory, rows, cells, packed, end):
    lines = [",".join([f"{i},{i % 2},0", *(f"{s}:{k}" for s, k in row)]) for i, row in enumerate(rows)]
    tmp_path = tmp_path_factory.mktemp("aliccp")
    text = end.join(lines).encode()
    path = written(tmp_path, gzip.compress(text) if packed else text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats.slot, "SLOT_CELLS", cells)
        table, _ = converted(path, tmp_path, format="aliccp")
    same_as_ali_ccp_lines(table, lines)
    slots = sorted(table.column_names[3:], key=lambda name: int(name.split("_")[1]))
    assert table.column_names[3:] == slots


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("5,1", "the line is not id,click,buy,slot:key,..."),
        ("5,1,0,7", "'7' is not slot:key"),
        ("5,1,0,7:8:9", "'7:8:9' is not slot:key"),
        ("5,1,0,7:x", "key 'x' is not a whole number"),
        ("5,yes,0,7:1", "click 'yes' is not a whole number"),
        (f"5,1,0,7:{2**64}", "is not a number of type uint64"),
    ],
)
def test_bad_ali_ccp_line_is_named(tmp_path, small_blocks, line, says):
    path = written(tmp_path, "1,0,0,7:8,7:9\n" * 500 + line + "\n")
    with pytest.raises(errors.Corrupt, match=says) as caught:
        convert([path], tmp_path / "out", format="aliccp")
    assert "line 501)" in str(caught.value)


def test_real_sequences(shared, tmp_path):
    path = shared("data/beauty") / "Beauty.txt"
    table, done = converted(path, tmp_path)
    assert done.format == "sequence"
    rows = [[int(x) for x in line.split()] for line in path.read_text().splitlines()]
    assert table["user"].to_pylist() == [row[0] for row in rows]
    assert table["items"].to_pylist() == [row[1:] for row in rows]


# ---- MovieLens ----------------------------------------------------------------------------------------------------


def test_real_movielens(shared, tmp_path):
    path = shared("data/ml-1m")
    table, done = converted(path, tmp_path)
    assert done.format == "movielens"
    ratings = pq.read_table(path / "ratings.parquet").to_pandas()
    ratings = ratings[ratings.rating != 3]
    frame = pd.DataFrame({"label": (ratings.rating > 3).astype(int), "user": ratings.user_id, "item": ratings.movie_id})
    like = {"sep": "::", "engine": "python", "header": None, "encoding": "latin-1"}
    users = pd.read_csv(path / "users.dat", names=["user", "gender", "age", "occupation", "zip"], **like)
    movies = pd.read_csv(path / "movies.dat", names=["item", "title", "genres"], **like)
    frame = frame.merge(users.drop(columns="zip"), on="user", how="left")
    frame = frame.merge(movies.drop(columns="title"), on="item", how="left")
    assert table.num_rows == 739_012 and table.column_names == list(frame.columns)
    assert table["genres"].type == pa.list_(pa.string())
    joined = pa.table({**{n: table[n] for n in table.column_names}, "genres": pc.binary_join(table["genres"], "|")})
    for name in frame.columns:
        assert (joined[name].to_numpy() == frame[name].to_numpy()).all(), name


def movielens(directory, ratings, movies="1::A (1999)::Drama|War\n2::B\xe9 (2000)::Comedy\n"):
    directory.mkdir(exist_ok=True)
    (directory / "ratings.dat").write_text(ratings)
    (directory / "users.dat").write_text("7::F::25::4::02139\n8::M::1::0::x-1\n")
    (directory / "movies.dat").write_text(movies, encoding="latin-1")
    return directory


def test_movielens_from_dat_files(tmp_path):
    table, _ = converted(movielens(tmp_path / "ml", "7::1::5::0\n7::2::3::0\n8::2::2::0\n8::1::4::9\n"), tmp_path)
    assert table.to_pydict() == {
        "label": [1, 0, 1],
        "user": [7, 8, 8],
        "item": [1, 2, 1],
        "gender": ["F", "M", "M"],
        "age": [25, 1, 1],
        "occupation": [4, 0, 0],
        "genres": [["Drama", "War"], ["Comedy"], ["Drama", "War"]],
    }


@pytest.mark.parametrize(
    ("ratings", "movies", "error", "says"),
    [
        ("7::9::5::0\n", "1::A::B\n", errors.Corrupt, "9 is rated .*not listed .*movies.dat"),
        ("7::1::5::0\n7::1::5\n", "1::A::B\n", errors.Corrupt, r"ratings.dat, line 2"),
        ("7::1::x::0\n", "1::A::B\n", errors.Corrupt, r"rating 'x' .*line 1"),
        ("7::1::5::0\n", "1::A::B\nx::A::B\n", errors.Corrupt, r"movies.dat, line 2"),
    ],
)
def test_bad_movielens_is_named(tmp_path, ratings, movies, error, says):
    with pytest.raises(error, match=says):
        convert([movielens(tmp_path / "ml", ratings, movies)], tmp_path / "out")


# ---- Parquet, scalars and splits ----------------------------------------------------------------------------------


def test_real_criteo_80k_by_order(shared, tmp_path):
    path = shared("data/criteo-80k") / "clicks.parquet"
    done = convert([path], tmp_path / "out", scalars=["label"], split="75:25", split_by="order")
    assert [(os.path.basename(f.path), f.n_rows) for f in done.files] == [
        ("train.parquet", 60_000),
        ("test.parquet", 20_000),
    ]
    whole = pq.read_table(path)
    parts = [pq.read_table(f.path) for f in done.files]
    table = pa.concat_tables(parts)
    assert table["label"].type == pa.float64()
    assert table["label"].to_pylist() == [row[0] for row in whole["label"].to_pylist()]
    assert table.drop_columns("label").equals(whole.drop_columns("label"))
    assert sum(parts[1]["label"].to_pylist()) == 676


def test_scalar_lists_may_be_empty_but_not_long(tmp_path):
    rows = pa.table({"x": [[1], [], None, [4]], "y": [[1], [2], [3], [4, 5]]})
    pq.write_table(rows, tmp_path / "in.parquet")
    table, _ = converted(tmp_path / "in.parquet", tmp_path, scalars=["x"])
    assert table["x"].to_pylist() == [1, None, None, 4]
    with pytest.raises(errors.InvalidArgument, match=r"a list of 2 values is no scalar .*column y, row 3"):
        converted(tmp_path / "in.parquet", tmp_path, scalars=["y"])


@settings(max_examples=40)
@given(st.lists(st.one_of(st.none(), st.lists(st.integers(), max_size=1)), max_size=30), st.integers(0, 30))
def test_scalar_of_sliced_lists(lists, start):
    from hbkit.data.convert import _Reshape

    array = pa.array(lists, pa.list_(pa.int64()))[start:] if all(
        x is None or not x or -(2**63) <= x[0] < 2**63 for x in lists
    ) else pa.array([], pa.list_(pa.int64()))  # fmt: skip
    assert _Reshape._scalar(array, 0, {}).to_pylist() == [x[0] if x else None for x in array.to_pylist()]


def test_parquet_files_become_one_with_row_groups_of_one_size(tmp_path):
    rows = pa.table({"x": np.arange(10_000), "s": [f"k{i % 7}" for i in range(10_000)]})
    for i in range(4):
        pq.write_table(rows.slice(2500 * i, 2500), tmp_path / f"in{i}.parquet", row_group_size=700)
    done = convert(
        [tmp_path / f"in{i}.parquet" for i in range(4)], tmp_path / "o", row_group_rows=3000, compression="none"
    )
    metadata = pq.read_metadata(done.files[0].path)
    assert [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)] == [3000, 3000, 3000, 1000]
    assert metadata.row_group(0).column(0).compression == "UNCOMPRESSED"
    assert pq.read_table(done.files[0].path).equals(rows)
    pq.write_table(pa.table({"x": [1.5], "s": ["a"]}), tmp_path / "in4.parquet")
    with pytest.raises(errors.SchemaMismatch):
        convert([tmp_path / "in0.parquet", tmp_path / "in4.parquet"], tmp_path / "p")


@pytest.mark.parametrize("split", ["8:1:1", "3:1", "0.5:0.25:0.25"])
def test_random_split_is_a_partition_near_its_shares(tmp_path, split):
    n = 40_000
    pq.write_table(pa.table({"x": np.arange(n)}), tmp_path / "in.parquet")
    done = convert([tmp_path / "in.parquet"], tmp_path / "a", split=split, seed=7)
    weights = np.array([float(w) for w in split.split(":")])
    rows = [pq.read_table(f.path)["x"].to_numpy() for f in done.files]
    assert np.array_equal(np.sort(np.concatenate(rows)), np.arange(n))
    assert all((np.diff(r) > 0).all() for r in rows)
    for r, share in zip(rows, weights / weights.sum(), strict=True):
        assert len(r) == pytest.approx(n * share, abs=5 * np.sqrt(n * share * (1 - share)))
    # which part a row goes to does not hang on how the input is cut
    pq.write_table(pa.table({"x": np.arange(n)}), tmp_path / "in.parquet", row_group_size=777)
    again = convert([tmp_path / "in.parquet"], tmp_path / "b", split=split, seed=7, row_group_rows=999)
    for r, f in zip(rows, again.files, strict=True):
        assert np.array_equal(r, pq.read_table(f.path)["x"].to_numpy())
    other = convert([tmp_path / "in.parquet"], tmp_path / "c", split=split, seed=8)
    assert not np.array_equal(rows[0], pq.read_table(other.files[0].path)["x"].to_numpy())


@given(st.integers(0, 2**64 - 1), st.integers(0, 10_000), st.integers(0, 50))
def test_uniform_of_a_row_does_not_depend_on_the_batch(seed, first, n):
    from hbkit.data.convert import _uniform

    whole = np.random.Generator(np.random.Philox(key=seed)).random(first + n)
    assert np.array_equal(_uniform(seed, first, n), whole[first:])


def test_order_split_of_text_counts_the_rows_first(tmp_path):
    good = "1" + "\t3" * 13 + "\tab" * 26 + "\n"
    done = convert([written(tmp_path, good * 103)], tmp_path / "o", split="8:1:1", split_by="order")
    assert [f.n_rows for f in done.files] == [82, 11, 10]
    ml = movielens(tmp_path / "ml", "7::1::5::0\n7::2::3::0\n8::2::2::0\n8::1::4::9\n7::1::1::1\n")
    assert [f.n_rows for f in convert([ml], tmp_path / "m", split="1:1", split_by="order").files] == [2, 2]


@pytest.mark.parametrize(("positive", "clicks"), [(1, [0, 1, 1, 1]), (2, [0, 0, 0, 1])])
def test_positive_makes_labels_clicks(tmp_path, positive, clicks):
    table, _ = converted(written(tmp_path, "-1 1:1\n+1 1:1\n1 2:1\n2 1:1\n"), tmp_path, positive=positive)
    assert table["label"].type == pa.int64() and table["label"].to_pylist() == clicks


def test_bad_parquet_is_an_error_and_leaves_nothing(tmp_path):
    pq.write_table(pa.table({"x": np.random.default_rng(0).random(50_000)}), tmp_path / "in.parquet")
    whole = (tmp_path / "in.parquet").read_bytes()
    cut = written(tmp_path, whole[: len(whole) // 2], "cut.parquet")
    damaged = written(tmp_path, whole[:1000] + b"\xff" * 2000 + whole[3000:], "damaged.parquet")
    for path in (cut, damaged):
        try:
            convert([path], tmp_path / "out")
        except errors.Corrupt as e:
            assert str(path) in str(e)
        else:
            # a flipped bit in plain, uncompressed numbers cannot be seen
            assert path == damaged
        if (tmp_path / "out").exists():
            assert pq.read_table(tmp_path / "out").num_rows == 50_000


def test_nothing_there_is_not_found(tmp_path):
    for path in (tmp_path / "absent", tmp_path, tmp_path / "*.parquet"):
        with pytest.raises(errors.NotFound):
            convert([path], tmp_path / "out")


def test_what_was_converted_stands_in_the_metadata(tmp_path):
    pq.write_table(pa.table({"x": np.arange(100)}), tmp_path / "in.parquet")
    done = convert([tmp_path / "in.parquet"], tmp_path / "o", split="3:1", seed=9)
    metadata = pq.read_metadata(done.files[1].path).metadata
    assert metadata[b"hbkit.format"] == b"parquet" and metadata[b"hbkit.source"] == b"in.parquet"
    assert metadata[b"hbkit.split"] == b"test, 0.25 of the rows, by random, seed 9"
