"""TFRecord files against a naive encoder and decoder, the text that real files were made of, and TensorFlow."""

import gzip
import importlib.util
import json
import struct
import subprocess
import sys
import tracemalloc

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.preprocessing import LabelEncoder, MinMaxScaler

from hbkit import errors
from hbkit._ext import tfrecord
from hbkit.data import formats
from hbkit.data.convert import convert

# ---- a naive writer -----------------------------------------------------------------------------------------------


def naive_crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 * (crc & 1))
    return crc ^ 0xFFFFFFFF


def masked(data):
    crc = naive_crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def framed(*records):
    heads = [struct.pack("<Q", len(data)) for data in records]
    return b"".join(head + masked(head) + data + masked(data) for head, data in zip(heads, records, strict=True))


def varint(x):
    x %= 2**64
    out = bytearray()
    while x > 127:
        out.append(x & 127 | 128)
        x >>= 7
    return bytes([*out, x])


def field(number, data):
    return varint(number << 3 | 2) + varint(len(data)) + data


def listed(values, packed=True):
    """A Feature of int, float or bytes values; ``packed``, or None for half of it."""
    if not values:
        return b""
    half = len(values) // 2
    one = {int: varint, float: lambda x: struct.pack("<f", x), bytes: lambda x: x}[type(values[0])]
    if isinstance(values[0], bytes):
        return field(1, b"".join(field(1, x) for x in values))
    is_int = isinstance(values[0], int)
    alone = b"\x08" if is_int else b"\x0d"
    n_packed = {True: len(values), False: 0, None: half}[packed]
    data = field(1, b"".join(map(one, values[:n_packed]))) if n_packed else b""
    return field(3 if is_int else 2, data + b"".join(alone + one(x) for x in values[n_packed:]))


def example(row, packed=True, value_first=False):
    entries = []
    for name, values in row.items():
        parts = [field(1, name.encode()), field(2, listed(values, packed))]
        entries.append(field(1, b"".join(parts[::-1] if value_first else parts)))
    return field(1, b"".join(entries))


# ---- a naive reader, as strict as ours ----------------------------------------------------------------------------


class Bad(Exception):
    pass


def naive_varint(data, i):
    x = 0
    for k in range(10):
        if i + k >= len(data):
            raise Bad
        x |= (data[i + k] & 127) << 7 * k
        if data[i + k] < 128:
            return x % 2**64, i + k + 1
    raise Bad


def naive_fields(data, *known):
    """The fields of a message, whose tags must be among those known."""
    i = 0
    while i < len(data):
        tag, i = naive_varint(data, i)
        if tag not in known:
            raise Bad
        if tag & 7 == 0:
            value, i = naive_varint(data, i)
        else:
            n, i = naive_varint(data, i) if tag & 7 == 2 else (4, i)
            value = data[i : i + n]
            if len(value) < n:
                raise Bad
            i += n
        yield tag, value


def naive_list(data):
    """The values of a Feature."""
    lists = list(naive_fields(data, 10, 18, 26))
    if len(lists) > 1:
        raise Bad
    values = []
    for kind, message in lists:
        for tag, value in naive_fields(message, *{10: (10,), 18: (10, 13), 26: (8, 10)}[kind]):
            if kind == 10:
                values.append(value)
            elif kind == 18:
                if len(value) % 4:
                    raise Bad
                values += np.frombuffer(value, "<f4").tolist()
            else:
                i = 0
                while tag == 10 and i < len(value):
                    x, i = naive_varint(value, i)
                    values.append(x - 2**64 * (x >> 63))
                if tag == 8:
                    values.append(value - 2**64 * (value >> 63))
    return values


def naive_example(data):
    row = {}
    for _, features in naive_fields(data, 10):
        for _, entry in naive_fields(features, 10):
            parts = list(naive_fields(entry, 10, 18))
            if sorted(tag for tag, _ in parts) != [10, 18]:
                raise Bad
            name = dict(parts)[10].decode()
            if name in row:
                raise Bad
            row[name] = naive_list(dict(parts)[18])
    return row


# ---- helpers ------------------------------------------------------------------------------------------------------


def read(path):
    """All rows of one file or several, without Parquet between."""
    source = formats.TfRecord([str(p) for p in (path if isinstance(path, list) else [path])])
    source.scan(lambda n: None)
    table = pa.Table.from_batches(source.batches(lambda n: None), source.schema)
    assert table.num_rows == source.n_rows
    table.validate(full=True)
    return table


def written(tmp_path, data, name="in.tfrecord"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(formats.input, "BLOCK_NBYTES", 1000)


# ---- checksums and real files -------------------------------------------------------------------------------------

# RFC 3720, B.4, and the check value of the CRC catalogues.
VECTORS = [
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
    (b"123456789", 0xE3069283),
    (b"", 0),
]


@pytest.mark.parametrize(("data", "crc"), VECTORS)
def test_crc32c_equals_published_vectors(data, crc):
    assert tfrecord.crc32c(data) == crc == naive_crc32c(data)


@given(st.binary(max_size=200), st.integers(0, 20))
def test_crc32c_equals_naive(data, start):
    assert tfrecord.crc32c(memoryview(data)[start:]) == naive_crc32c(data[start:])


def test_real_criteo_equals_its_text(shared, tmp_path, small_blocks):
    directory = shared("data/raw/tfrecord")
    done = convert([directory / f"criteo_sample.{part}.tfrecords" for part in ("tr", "te")], tmp_path, label="label")
    assert done.format == "tfrecord" and done.n_rows == 200
    ours = pq.read_table(done.files[0].path).to_pandas()
    names, numbers = [f"C{i}" for i in range(1, 27)], [f"I{i}" for i in range(1, 14)]
    assert list(ours.columns) == ["label", *names, *numbers]
    text = pd.read_csv(directory / "criteo_sample.txt")
    text[names] = text[names].fillna("-1").apply(LabelEncoder().fit_transform)
    text[numbers] = MinMaxScaler().fit_transform(text[numbers].fillna(0))
    both = ours.merge(text, on=names, suffixes=("", "_text"), validate="one_to_one")
    assert len(both) == 200
    np.testing.assert_array_equal(both["label"], both["label_text"])
    np.testing.assert_array_equal(both[numbers], both[[f"{n}_text" for n in numbers]].astype(np.float32))


def test_real_lists_of_examples_equal_their_text(shared, small_blocks):
    table = read(shared("data/raw/tfrecord") / "tfr_train_numerical_elwc.tfrecord")
    lines = (shared("data/raw/libsvm") / "tfr_train.txt").read_text().splitlines()
    rows = table.to_pylist()
    assert len(rows) == len(lines) == 119 and table["utility"].type == pa.int64()
    assert table.column_names[:3] == ["qid", "custom_features_1", "custom_features_2"]
    qids = {}
    for row, line in zip(rows, lines, strict=True):
        label, qid, *words = line.split()
        assert row.pop("utility") == int(label)
        assert row.pop("qid") == qids.setdefault(qid, len(qids))
        want = {f"custom_features_{i}": float(np.float32(x)) for i, x in (w.split(":") for w in words)}
        assert {name: values[0] for name, values in row.items() if values} == want
        assert all(len(values) <= 1 for values in row.values())


def test_real_fuxictr_equals_naive(shared):
    path = shared("data/raw/tfrecord") / "fuxictr_tiny_train.tfrecord"
    data, rows = path.read_bytes(), []
    while data:
        n = struct.unpack_from("<Q", data)[0]
        rows.append({name: values[0] for name, values in naive_example(data[12 : 12 + n]).items()})
        data = data[16 + n :]
    table = read(path)
    assert table.to_pylist() == [dict(sorted(row.items())) for row in rows] and len(rows) == 100
    assert {name: table[name].type for name in ("clk", "userid")} == {"clk": pa.float32(), "userid": pa.int64()}


TENSORFLOW = """
import json, sys
import tensorflow as tf
found = []
for path, packing, schema in json.loads(sys.stdin.read()):
    types = {"int64": tf.int64, "float": tf.float32, "string": tf.string}
    spec = {name: tf.io.RaggedFeature(types[kind]) for name, kind in schema.items()}
    records = list(tf.data.TFRecordDataset(path, compression_type=packing))
    rows = tf.io.parse_example(tf.stack(records), spec)
    found.append({name: column.to_list() for name, column in rows.items()})
print(json.dumps(found, default=bytes.decode))
"""


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="TensorFlow is not installed")
def test_rows_equal_tensorflow_parse_example(shared, tmp_path):
    rng = np.random.default_rng(0)
    records = []
    for i in range(60):
        row = {
            "ids": rng.integers(-(2**63), 2**63 - 1, rng.integers(5)).tolist(),
            "x": rng.random(rng.integers(1, 4)).astype(np.float32).tolist(),
            "s": [b"key %d" % k for k in range(i % 3)],
            "label": [i % 2],
        }
        if i % 4 == 0:
            del row["x"]
        # TensorFlow's own reader stops where a list changes from packed to not, which protobuf allows
        records.append(example(row, packed=i % 3 > 0, value_first=bool(i % 2)))
    directory = shared("data/raw/tfrecord")
    files = [
        (written(tmp_path, framed(*records)), ""),
        (written(tmp_path, gzip.compress(framed(*records)), "in.tfrecord.gz"), "GZIP"),
        *((directory / f"{name}", "") for name in ("criteo_sample.te.tfrecords", "fuxictr_tiny_train.tfrecord")),
    ]
    tables = [read(path) for path, _ in files]
    question = [
        [str(path), packing, {f.name: str(getattr(f.type, "value_type", f.type)) for f in table.schema}]
        for (path, packing), table in zip(files, tables, strict=True)
    ]
    command = [sys.executable, "-c", TENSORFLOW]
    done = subprocess.run(command, input=json.dumps(question), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for table, theirs in zip(tables, json.loads(done.stdout), strict=True):
        ours = {
            f.name: table[f.name].to_pylist() if pa.types.is_list(f.type) else [[x] for x in table[f.name].to_pylist()]
            for f in table.schema
        }
        assert ours == theirs


# ---- generated files ----------------------------------------------------------------------------------------------

KINDS = {
    "int64": st.integers(-(2**63), 2**63 - 1),
    "float": st.floats(width=32, allow_nan=False),
    "string": st.text(max_size=8).map(str.encode),
}


@st.composite
def rows_of_features(draw):
    kinds = draw(st.dictionaries(st.text(max_size=4), st.sampled_from(sorted(KINDS)), min_size=1, max_size=4))
    row = {}
    for name, kind in kinds.items():
        shape = draw(st.sampled_from([(1, 1), (0, 4)]))
        lists = st.lists(KINDS[kind], min_size=shape[0], max_size=shape[1])
        row[name] = lists if shape == (1, 1) else st.one_of(st.none(), lists)
    rows = draw(st.lists(st.fixed_dictionaries(row), min_size=1, max_size=12))
    return kinds, [{name: x for name, x in row.items() if x is not None} for row in rows]


def same_rows(table, kinds, rows):
    used = {name for row in rows for name in row}
    assert set(table.column_names) == used
    for name in used:
        lists = [row.get(name, []) for row in rows]
        kind = next((kind for x in lists if x for kind in [kinds[name]]), "float")
        scalar = all(len(x) == 1 for x in lists)
        assert str(table[name].type) == (kind if scalar else f"list<item: {kind}>")
        want = [[x.decode() for x in xs] if kind == "string" else xs for xs in lists]
        assert table[name].to_pylist() == ([x[0] for x in want] if scalar else want)


@settings(max_examples=150)
@given(rows_of_features(), st.sampled_from([True, False, None]), st.booleans(), st.booleans(), st.integers(0, 12))
def test_examples_survive(tmp_path_factory, made, packed, value_first, zipped, cut):
    kinds, rows = made
    if not any(rows):
        return
    tmp_path = tmp_path_factory.mktemp("tfrecord")
    records = [example(row, packed, value_first) for row in rows]
    parts = [framed(*part) for part in (records[:cut], records[cut:])]
    paths = [written(tmp_path, gzip.compress(p) if zipped else p, f"{i}.tfrecord") for i, p in enumerate(parts)]
    same_rows(read(paths), kinds, rows)


@settings(max_examples=60)
@given(st.lists(st.tuples(rows_of_features(), st.integers(0, 3)), min_size=1, max_size=4), st.booleans())
def test_lists_of_examples_survive(tmp_path_factory, lists, with_context):
    records, want = [], []
    for i, ((_, rows), k) in enumerate(lists):
        rows = [{"x": [float(j)], "ids": [k] * len(row)} for j, row in enumerate(rows)]
        context = {"user": [b"u%d" % i], "tags": list(range(k))}
        messages = [field(1, example(row)) for row in rows]
        if with_context:
            messages.insert(k % (len(rows) + 1), field(2, example(context)))
        records.append(b"".join(messages))
        more = {"user": f"u{i}", "tags": context["tags"]} if with_context else {}
        want += [{"qid": i, "x": row["x"][0], "ids": row["ids"], **more} for row in rows]
    table = read(written(tmp_path_factory.mktemp("elwc"), framed(*records)))
    if all(len(row["ids"]) == 1 for row in want):
        want = [{**row, "ids": row["ids"][0]} for row in want]
    if with_context and all(k == 1 for _, k in lists):
        want = [{**row, "tags": row["tags"][0]} for row in want]
    assert table.to_pylist() == [{name: row[name] for name in table.column_names} for row in want]
    assert table.column_names == sorted(want[0], key=lambda name: (name != "qid", name))


def test_small_steps_give_the_same_rows(tmp_path, monkeypatch):
    def elwc(i):
        context = field(2, example({"c": list(range(i % 7)), "s": [b"x" * i]}))
        return context + b"".join(field(1, example({"a": [j], "b": [0.5] * (j % 3)})) for j in range(i % 5))

    paths = [
        written(tmp_path, framed(*(example({"a": [i], "b": [0.5] * (i % 3)}) for i in range(100))), "a"),
        written(tmp_path, framed(*(elwc(i) for i in range(100))), "b"),
    ]
    whole = [read(path) for path in paths]
    assert [table.num_rows for table in whole] == [100, 200]
    for cells, block in ((7, 1 << 20), (1 << 20, 100), (1 << 20, 17)):
        monkeypatch.setattr(formats.tfrecord, "CELLS", cells)
        monkeypatch.setattr(formats.input, "BLOCK_NBYTES", block)
        assert all(read(path).equals(table) for path, table in zip(paths, whole, strict=True))


def test_feature_absent_is_an_empty_list_or_a_null(tmp_path):
    rows = [{"y": [1], "x": [3]}, {"y": [0], "x": []}, {"y": [1]}]
    path = written(tmp_path, framed(*(example(row) for row in rows)))
    assert read(path).to_pydict() == {"x": [[3], [], []], "y": [1, 0, 1]}
    convert([path], tmp_path / "o.parquet", scalars=["x"], label="y")
    assert pq.read_table(tmp_path / "o.parquet").to_pydict() == {"label": [1, 0, 1], "x": [3, None, None]}


def test_bytes_that_are_not_text_are_binary(tmp_path):
    path = written(tmp_path, framed(example({"a": [b"x"], "b": [b"x"]}), example({"a": [b"\xff\0"], "b": [b""]})))
    table = read(path)
    assert table.schema.types == [pa.binary(), pa.string()]
    assert table.to_pydict() == {"a": [b"x", b"\xff\0"], "b": ["x", ""]}


def test_columns_are_in_the_order_of_their_numbers(tmp_path):
    names = ["x10", "x9", "a", "x1_b", "x"]
    table = read(written(tmp_path, framed(example({name: [1] for name in names}))))
    assert table.column_names == ["a", "x", "x1_b", "x9", "x10"]


def test_format_is_found_by_what_the_file_holds(tmp_path):
    data = framed(example({"x": [1]}))
    for name, content in [("part-00000-of-00002", data), ("x.csv", gzip.compress(data)), ("x.tfrecords", data[:5])]:
        assert formats.detect(str(written(tmp_path, content, name))) == "tfrecord"
    assert formats.detect(str(written(tmp_path, b"a,b\n1,2\n3,4\n", "text"))) == "csv"
    with pytest.raises(errors.Unsupported, match="neither Parquet, TFRecord nor text"):
        formats.detect(str(written(tmp_path, data[1:], "x")))


# ---- damage -------------------------------------------------------------------------------------------------------

SMALL = [{"id": [1, -2], "x": [0.5], "s": [b"ab"]}, {"id": [3], "x": [1.5], "s": [b""]}]


def test_file_cut_at_any_byte_is_corrupt(tmp_path):
    records = [framed(example(row)) for row in SMALL]
    data = b"".join(records)
    for n in range(len(data)):
        path = written(tmp_path, data[:n])
        if n == len(records[0]):  # that is a whole file
            assert read(path).to_pylist() == [{"id": [1, -2], "s": "ab", "x": 0.5}]
            continue
        with pytest.raises(errors.Corrupt) as caught:
            convert([path], tmp_path / "out")
        assert str(path) in str(caught.value)
        start = 0 if n < len(records[0]) else len(records[0])
        assert f"byte {start})" in str(caught.value) or n == 0
    with pytest.raises(errors.Corrupt, match="gzip data are damaged"):
        read(written(tmp_path, gzip.compress(data)[:-9]))


def test_file_with_any_bit_flipped_is_corrupt(tmp_path):
    records = [framed(example(row)) for row in SMALL]
    data = b"".join(records)
    for i in range(len(data)):
        for bit in range(8):
            bad = bytearray(data)
            bad[i] ^= 1 << bit
            path = written(tmp_path, bytes(bad))
            with pytest.raises(errors.Corrupt, match="checksum") as caught:
                read(path)
            assert caught.value.place == {"file": str(path), "byte": 0 if i < len(records[0]) else len(records[0])}


@given(st.data())
def test_file_with_any_byte_changed_never_gives_other_rows(tmp_path_factory, data):
    whole = framed(*(example(row) for row in SMALL))
    at = data.draw(st.integers(0, len(whole) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda b: b != whole[at]))
    path = written(tmp_path_factory.mktemp("flip"), whole[:at] + bytes([byte]) + whole[at + 1 :])
    with pytest.raises(errors.HbkitError):
        read(path)


def agrees_with_naive(tmp_path, payload):
    """Our reader and the naive one take and refuse the same messages, their checksums being right."""
    path = written(tmp_path, framed(example({"first": [1]}), payload))
    try:
        want = naive_example(payload)
    except (Bad, UnicodeDecodeError):
        with pytest.raises(errors.Corrupt):
            read(path)
        return
    row = read(path).to_pylist()[1]
    assert row.pop("first") == []
    got = {name: [x.encode() if isinstance(x, str) else x for x in values] for name, values in row.items()}
    assert repr(sorted(got.items())) == repr(sorted(want.items()))


@settings(max_examples=300)
@given(st.data())
def test_damaged_messages_are_read_as_the_naive_reader_does(tmp_path_factory, data):
    payload = bytearray(example(SMALL[0], packed=data.draw(st.sampled_from([True, False, None]))))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(payload) - 1))
        match data.draw(st.sampled_from(["flip", "set", "cut", "double"])):
            case "flip":
                payload[at] ^= 1 << data.draw(st.integers(0, 7))
            case "set":
                payload[at] = data.draw(st.integers(0, 255))
            case "cut":
                del payload[at : at + data.draw(st.integers(1, 3))]
            case "double":
                payload[at:at] = payload[at : at + 8]
    agrees_with_naive(tmp_path_factory.mktemp("damaged"), bytes(payload))


def test_message_cut_at_any_byte_is_read_as_the_naive_reader_does(tmp_path):
    for packed in (True, False):
        payload = example(SMALL[0], packed)
        for n in range(len(payload)):
            agrees_with_naive(tmp_path, payload[:n])


def entry(name, feature):
    return field(1, field(1, name) + field(2, feature))


@pytest.mark.parametrize(
    ("payload", "error", "says"),
    [
        (field(1, entry(b"x", listed([1])) + entry(b"x", listed([1]))), errors.Corrupt, "twice .*byte 42, column x"),
        (field(1, entry(b"x", listed([1.0]))), errors.SchemaMismatch, "float_list here, and int64_list .*column x"),
        (field(1, entry(b"y", listed([1]) * 2)), errors.Corrupt, "more than one list"),
        (field(1, entry(b"\xff", listed([1]))), errors.Corrupt, "not UTF-8"),
        (field(1, field(1, field(1, b"x"))), errors.Corrupt, "not one name and one value"),
        (
            field(1, b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"),
            errors.Corrupt,
            "longer than the one that holds it",
        ),
        (field(1, b"\x0a" + b"\x80" * 10 + b"\x01"), errors.Corrupt, "more than ten bytes"),
        (field(1, entry(b"y", field(3, field(1, b"\x80")))), errors.Corrupt, "a number is cut off"),
        (field(1, entry(b"y", field(2, field(1, b"\0\0\0")))), errors.Corrupt, "a number is cut off"),
        (field(1, entry(b"y", field(2, b"\x0d\0\0"))), errors.Corrupt, "no FloatList"),
        (field(1, entry(b"y", field(3, b"\x0d\0\0\0\0"))), errors.Corrupt, "no Int64List"),
        (field(1, entry(b"y", field(4, b""))), errors.Corrupt, "no tf.train.Feature: field 4"),
        (field(2, b""), errors.Corrupt, "no tf.train.Example: field 2 of wire type 2"),
    ],
)
def test_bad_message_is_named(tmp_path, payload, error, says):
    path = written(tmp_path, framed(example({"x": [1]}), payload))
    with pytest.raises(error, match=says) as caught:
        convert([path], tmp_path / "out")
    assert caught.value.place["file"] == str(path) and caught.value.place["byte"] >= 30
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_other_messages_are_unsupported(tmp_path):
    sequence = example({"a": [1]}) + field(2, field(1, field(1, b"b") + field(2, field(1, listed([1, 2])))))
    for payload in (sequence, b"\x08\x01", b"text"):
        with pytest.raises(errors.Unsupported, match=r"neither tf.train.Example nor .*byte 12\): write one"):
            read(written(tmp_path, framed(payload)))
    both = field(1, example({"a": [1]})) + field(2, example({"a": [1]}))
    with pytest.raises(errors.Unsupported, match=r"examples and of their context .*column a\): rename"):
        read(written(tmp_path, framed(both)))


def test_file_without_features_is_corrupt(tmp_path):
    for data in (b"", framed(b""), framed(field(1, b""), b"")):
        with pytest.raises(errors.Corrupt, match=r"no record has any feature .*leave the file out"):
            convert([written(tmp_path, data)], tmp_path / "out")


def test_more_features_than_columns_make_sense_are_unsupported(tmp_path, monkeypatch):
    monkeypatch.setattr(formats.tfrecord, "MAX_FEATURES", 20)
    path = written(tmp_path, framed(*(example({f"x{i}": [1]}) for i in range(21))))
    with pytest.raises(errors.Unsupported, match="more than 20 features"):
        read(path)


@pytest.mark.parametrize(
    ("length", "says"),
    [(2**64 - 1, "a record of 18446744073709551615 bytes"), (2**32, "67108864 are the most"), (60 << 20, "is cut off")],
)
def test_absurd_length_takes_no_memory(tmp_path, length, says):
    good, head = framed(example({"x": [1]})), struct.pack("<Q", length)
    path = written(tmp_path, good + head + masked(head) + bytes(100))
    tracemalloc.start()
    try:
        with pytest.raises(errors.Corrupt, match=rf"{says}.*byte {len(good)}\)"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * formats.input.BLOCK_NBYTES
    finally:
        tracemalloc.stop()


# ---- the functions beneath, on places that are not in the block ---------------------------------------------------


@given(st.binary(max_size=40), st.integers(-5, 45), st.integers(-5, 45), st.integers(0, 9))
def test_values_outside_the_block_are_refused(block, start, end, n):
    lists = np.array([[0, 0, 3, n, start, end]])
    inside = 0 <= start <= end <= len(block)
    for call in (tfrecord.int64_values, tfrecord.float_values, tfrecord.bytes_values):
        try:
            call(block, lists, n)
        except errors.Corrupt:
            assert inside
        except errors.InvalidArgument:
            assert not inside
        else:
            assert inside
    for call in (
        lambda: tfrecord.features(block, lists[:, 4:].copy(), {}),
        lambda: tfrecord.nested(block, lists[:, 4:].copy()),
    ):
        if not inside:
            with pytest.raises(errors.InvalidArgument):
                call()
