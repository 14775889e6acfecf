"""Rows that are stepped over: by page headers, by the offset index, and one by one, with the same rows behind them."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from hbkit import errors
from hbkit.data import Dataset
from hbkit.parquet import Field, File
from hbkit.parquet.decoded import read

N = 20_000


def table():
    rng = np.random.default_rng(0)
    lengths = rng.poisson(3, N)
    splits = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    lists = pa.ListArray.from_arrays(pa.array(splits), pa.array(rng.integers(0, 1000, splits[-1])))
    nested = pa.ListArray.from_arrays(pa.array(np.arange(0, N + 1, dtype=np.int32)), lists)
    return pa.table(
        {
            "flat": pa.array(np.arange(N), mask=rng.random(N) < 0.1),
            "plain": pa.array(rng.random(N)),
            "text": pa.array([f"text {i % 97}" * (i % 3) for i in range(N)]),
            "flag": pa.array(rng.random(N) < 0.5),
            "list": lists,
            "nested": nested,
        }
    )


FIELDS = [Field(n, null="default", default=-1) if n == "flat" else Field(n) for n in table().column_names]
OPTIONS = {
    "v1": {"data_page_version": "1.0"},
    "v2": {"data_page_version": "2.0"},
    "indexed": {"write_page_index": True},
    "indexed v2": {"write_page_index": True, "data_page_version": "2.0"},
    "plain": {"use_dictionary": False, "write_page_index": True},
}


def same(a, b):
    return a.tolist() == b.tolist()


@pytest.mark.parametrize("options", OPTIONS)
def test_skip_leaves_the_rows_behind_it(tmp_path, options):
    path = tmp_path / "x.parquet"
    pq.write_table(table(), path, data_page_size=4000, **OPTIONS[options])
    whole = File(path).read_row_group(0, FIELDS)
    rng = np.random.default_rng(1)
    for _ in range(15):
        group, at = File(path).open_row_group(0, FIELDS), 0
        while at < N:
            step = int(min(N - at, rng.choice([1, 7, 500, 3000, 9000])))
            if rng.random() < 0.6:
                group.skip(step)
            else:
                got = read(group, step)
                for name, column in whole.items():
                    assert same(got[name], column[at : at + step]), (name, at, step)
            at += step


@pytest.mark.parametrize("options", ["v1", "indexed"])
def test_skip_with_an_index_opens_few_pages(tmp_path, options, monkeypatch):
    from hbkit.parquet import codecs

    opened = []
    decompress = codecs.decompress
    monkeypatch.setattr(codecs, "decompress", lambda *a: opened.append(1) or decompress(*a))
    path = tmp_path / "x.parquet"
    pq.write_table(table(), path, data_page_size=4000, compression="zstd", **OPTIONS[options])
    group = File(path).open_row_group(0, [Field("list")])
    group.skip(N - 10)
    read(group, 10)
    # a v1 page of lists does not say how many rows it holds
    assert len(opened) <= 3 if options == "indexed" else len(opened) > 20


def test_mask_reads_only_its_rows(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(table(), path, data_page_size=4000)
    whole = File(path).read_row_group(0, FIELDS)
    for share in (0.0, 0.01, 0.5, 1.0):
        rows = np.random.default_rng(2).random(N) < share
        got = File(path).read_row_group(0, FIELDS, rows)
        for name, column in whole.items():
            want = [x for x, keep in zip(column.tolist(), rows, strict=True) if keep]
            assert got[name].tolist() == want


def test_null_beyond_the_rows_read_is_no_error(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"x": [1, 2, None, 4]}), path)
    group = File(path).open_row_group(0, [Field("x")])
    assert read(group, 2)["x"].tolist() == [1, 2]
    with pytest.raises(errors.NullFound):
        read(group, 1)


@pytest.mark.parametrize("options", ["v1", "indexed", "indexed v2"])
def test_filter_reads_the_pages_that_may_hold_a_row(tmp_path, options, monkeypatch):
    path = tmp_path / "x.parquet"
    rows = table().append_column("day", pa.array(np.arange(N) // 100, mask=np.arange(N) % 1000 == 0))
    pq.write_table(rows, path, data_page_size=4000, max_rows_per_page=700, **OPTIONS[options])
    read = []
    monkeypatch.setattr(File, "read_arrow", spy(File.read_arrow, read))
    for expr in (
        pc.field("day") == 77,
        (pc.field("day") > 150) & (pc.field("text") == "text 1"),
        pc.field("day").is_null(),
        ~(pc.field("day") < 190),
        pc.field("day") > 10**6,
    ):
        ds = Dataset.from_parquet(path, ["plain", "list", "nested"]).filter(expr).batch(64)
        want = rows.filter(expr)
        got = list(ds)
        for name in ("plain", "list", "nested"):
            assert [x for b in got for x in b[name].tolist()] == want.column(name).to_pylist()
    if options != "v1":
        assert sum(b - a for a, b in read[0]) <= 1400  # of the first filter, two pages at the most


def spy(method, calls):
    def spied(self, g, names, num_threads=1, ranges=None):
        calls.append(ranges)
        return method(self, g, names, num_threads, ranges)

    return spied


def test_filter_with_a_lying_column_index_is_still_bounded(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(table(), path, data_page_size=4000, write_page_index=True)
    data = bytearray(path.read_bytes())
    file = File(path)
    rng = np.random.default_rng(0)
    spans = [s for c in (file.footer.chunk(0, i) for i in range(2)) for s in (c.column_index, c.offset_index)]
    for _ in range(200):
        bad = bytearray(data)
        at, n = spans[rng.integers(len(spans))]
        bad[at + rng.integers(n)] ^= 1 << rng.integers(8)
        path.write_bytes(bad)
        try:
            list(Dataset.from_parquet(path, ["flat", "plain"]).filter(pc.field("plain") > 0.99).batch(64))
            list(Dataset.from_parquet(path, [FIELDS[0], "plain"]).filter(pc.field("flat") > 19_000).batch(64))
        except errors.HbkitError as e:
            assert "x.parquet" in str(e)
