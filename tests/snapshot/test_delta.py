"""A delta holds what changed since its base, exactly, and costs no more than that: it does not look at its parent."""

import logging
import shutil

import numpy as np
import pytest

import hbkit
from hbkit.embedding import Adagrad, Table
from hbkit.snapshot import load, log, save, verify
from hbkit.store import cached_ssd, device_cached, host_memory
from hbkit.store import changes as changes_of
from hbkit.store.line import Chunk

PLACES = {
    "host": lambda path: host_memory(),
    "ssd": lambda path: cached_ssd(path / "rows", "1MiB"),
    "device": lambda path: device_cached(host_memory(), "20KiB", "cpu"),
}


@pytest.fixture(params=PLACES)
def table(request, tmp_path):
    t = Table("t", 4, optimizer=Adagrad(lr=0.1), store=PLACES[request.param](tmp_path))
    yield t
    t.close()


def train(table, keys):
    keys = np.array(keys)
    table.lookup(keys, train=True)
    table.update(keys, np.ones((len(keys), table.dim)))
    return table


def lines(table):
    chunks = list(table.store.scan())
    return [np.concatenate(columns).tobytes() for columns in zip(*chunks, strict=True)] if chunks else []


def files(path, commit):
    """Keys of a commit's rows and of what it erases."""
    found = {}
    for what in ("rows", "erased"):
        file = path / commit / "tables" / "t" / f"{what}-00000.parquet"
        found[what] = hbkit.parquet.read_columns(file, ["key"])["key"].tolist() if file.exists() else []
    return found["rows"], found["erased"]


def same(path, table, commit=None):
    other = Table("t", 4, optimizer=Adagrad(lr=0.1))
    load(path, [other], commit=commit)
    return lines(other) == lines(table)


def test_delta_holds_exactly_what_changed(table, tmp_path):
    path = tmp_path / "snapshot"
    save(path, [train(table, range(500))], 1)
    train(table, [3, 1, 700])
    table.lookup([5, 701], train=True)  # counted, not updated
    table.lookup([6, 702])  # read
    table.store.erase(np.array([10, 11, 999]))
    one = np.array([12])
    table.store.put(Chunk(one, one, np.array([1]), np.ones((1, 4), np.float32), np.ones((1, 4), np.float32)))
    table.store.erase(np.array([13]))
    train(table, [13])  # gone and come again
    train(table, [703])
    table.store.erase(np.array([703]))  # never seen by the base
    delta = save(path, [table], 2, base="latest")
    rows, erased = files(path, delta)
    assert rows == [1, 3, 5, 12, 13, 700, 701]
    assert erased == [10, 11, 703]
    assert same(path, table)
    empty = save(path, [table], 2, base="latest")
    assert files(path, empty) == ([], [])
    assert same(path, table) and len(verify(path)) == 3


def test_delta_after_load_goes_on_from_any_link_of_the_chain(table, tmp_path):
    path = tmp_path / "snapshot"
    first = save(path, [train(table, range(100))], 1)
    table.store.erase(np.array([0, 1]))
    save(path, [train(table, [2, 3])], 2, base="latest")
    other = Table("t", 4, optimizer=Adagrad(lr=0.1))
    load(path, [other])
    train(other, [4])
    assert files(path, save(path, [other], 3, base="latest")) == ([4], [])
    assert files(path, save(path, [other], 3, base=first)) == ([2, 3, 4], [0, 1])
    assert same(path, other)


def test_delta_reads_nothing_of_its_parent(table, tmp_path, monkeypatch):
    path = tmp_path / "snapshot"
    save(path, [train(table, range(2000))], 1)
    hidden = tmp_path / "hidden"
    shutil.move(path / "c00000001", hidden)  # all but the manifest
    train(table, range(20))
    save(path, [table], 2, base="latest")
    shutil.move(hidden, path / "c00000001")
    assert same(path, table)
    full, delta = log(path)
    assert delta.nbytes < full.nbytes / 20


def test_delta_step_between_its_lookup_and_its_update(table, tmp_path):
    """The save falls into a step: what the step updates afterwards was stamped before."""
    path, keys = tmp_path / "snapshot", np.arange(10)
    train(table, range(20))
    table.lookup(keys, train=True)
    save(path, [table], 1)
    table.update(keys, np.ones((10, 4)))
    assert files(path, save(path, [table], 2, base="latest"))[0] == keys.tolist()
    assert same(path, table)


def test_delta_too_much_erased_is_written_in_full_and_says_so(table, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(changes_of, "LEAST_KEYS", 50)
    monkeypatch.setattr(changes_of, "KEYS", 10**9)
    path = tmp_path / "snapshot"
    first = save(path, [train(table, range(300))], 1)
    table.store.erase(np.arange(30))
    second = save(path, [table], 2, base="latest")
    table.store.erase(np.arange(30, 60))  # the first commit is forgotten, not the second
    third = save(path, [table], 3, base=second)
    assert files(path, third) == ([], list(range(30, 60)))
    with caplog.at_level(logging.WARNING, "hbkit.snapshot"):
        fourth = save(path, [table], 3, base=first)
    assert files(path, fourth) == (list(range(60, 300)), [])
    assert "table t is written in full" in caplog.text and "too much has changed" in caplog.text
    table.store.erase(np.arange(60, 200))
    assert len(files(path, save(path, [table], 4, base="latest"))[0]) == 100
    train(table, [250])
    assert files(path, save(path, [table], 5, base="latest"))[0] == [250]
    assert same(path, table)


def test_delta_without_metadata_is_written_in_full_and_says_so(tmp_path, caplog):
    t = Table("t", 4, optimizer=Adagrad(lr=0.1), metadata=False)
    save(tmp_path, [train(t, range(9))], 1)
    with caplog.at_level(logging.WARNING, "hbkit.snapshot"):
        commit = save(tmp_path, [train(t, [1])], 2, base="latest")
    assert files(tmp_path, commit)[0] == list(range(9)) and "has no metadata" in caplog.text
    other = Table("t", 4, optimizer=Adagrad(lr=0.1), metadata=False)
    load(tmp_path, [other])
    assert lines(other) == lines(t)


def test_delta_beyond_the_largest_stamp(tmp_path):
    t = train(Table("t", 4, optimizer=Adagrad(lr=0.1)), [1, 2, 3])
    t.step = 2**32 + 5
    save(tmp_path, [train(t, [1])], 1)
    assert files(tmp_path, save(tmp_path, [train(t, [2])], 2, base="latest"))[0] == [2]
