"""Trainings of several ranks: the same number of them goes on exactly from a commit, another number goes on."""

import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import hbkit
from hbkit.data import Dataset
from hbkit.embedding import Collection, Resumable, Sharded, Table, lookahead
from hbkit.errors import NotFound, TransportError
from hbkit.shuffle import Loopback


class Trainer(Resumable):
    """Learns rows, and counts its steps as others would train weights and draw numbers."""

    def __init__(self, transport):
        table = Table("k", 2, optimizer=hbkit.embedding.Adagrad(lr=0.1))
        self.embeddings = Sharded(Collection([table]), transport)
        self.table, self.weights, self.drawn = table, 0, 10 * transport.rank

    def dense_state(self):
        return bytes([self.weights])

    def load_dense_state(self, state):
        self.weights = state[0]

    def random_state(self):
        return bytes([self.drawn])

    def load_random_state(self, state):
        self.drawn = state[0]

    def fit(self, ds, n_steps=None):
        with lookahead(ds, self.embeddings, empty=ds.no_rows) as steps:
            for number, (batch, staged) in enumerate(steps):
                rows = staged.outputs()["k"]
                staged.apply({"k": np.cos(rows) + self.weights})
                self.weights, self.drawn, self.cursor = self.weights + 1, self.drawn + 1, batch.cursor
                if number + 1 == n_steps:
                    return


def together(size, act):
    """What ``act(trainer, rank)`` gives each rank of a group; raises what any of them raised."""
    results, failures = [None] * size, []

    def run(rank, transport):
        try:
            results[rank] = act(Trainer(transport), rank)
        except Exception as e:
            transport.abort(str(e))
            failures.append(e)

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(Loopback.group(size, timeout=30))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for e in failures:
        if not isinstance(e, TransportError):
            raise e
    return results


@pytest.fixture
def data(tmp_path):
    """``data(rank, size)``: 200 rows of 50 keys in batches of 8."""
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"k": np.random.default_rng(0).integers(0, 50, 200)}), path)
    return lambda rank, size: Dataset.from_parquet(path, shard=(rank, size)).shuffle(0, 64).batch(8)


def ended(trainer):
    """What a rank holds: its keys and their rows, weights and draws."""
    chunks = list(trainer.table.store.scan())
    rows = {int(k): (*row, *state) for c in chunks for k, row, state in zip(c.key, c.row, c.state, strict=True)}
    return rows, trainer.weights, trainer.drawn


@pytest.mark.parametrize("background", [False, True])
def test_ranks_go_on_exactly_from_what_they_saved(tmp_path, data, background):
    def whole(trainer, rank):
        trainer.fit(data(rank, 2))
        return ended(trainer)

    def cut(trainer, rank):
        trainer.fit(data(rank, 2), 5)
        saved = trainer.save(tmp_path / "s", background=background)
        if background:
            trainer.fit(data(rank, 2), 2)  # beside it, and lost
            saved.wait()
        saved = trainer.save(tmp_path / "s2", state={"who": rank}) if not background else None

    def resumed(trainer, rank):
        trainer.load(tmp_path / "s", ds := data(rank, 2))
        trainer.fit(ds)
        return ended(trainer)

    together(2, cut)
    assert together(2, resumed) == together(2, whole)
    if not background:
        state = hbkit.snapshot.load(tmp_path / "s2", []).state
        assert (state["who"], state["dense"], state["random"], state["random-1"]) == (0, b"\x05", b"\x05", b"\x0f")


@pytest.mark.parametrize("size", [1, 3])
def test_another_number_of_ranks_goes_on(tmp_path, data, size):
    def cut(trainer, rank):
        trainer.fit(data(rank, 2), 5)
        trainer.save(tmp_path / "s")
        return ended(trainer)[0], trainer.cursor["row"]

    def loaded(trainer, rank):
        trainer.load(tmp_path / "s", ds := data(rank, size))
        rows, seen = ended(trainer), 0
        for batch in ds:
            seen += batch.n_rows
        return *rows, seen, trainer.embeddings.step

    (first, row), (second, _) = together(2, cut)
    found = together(size, loaded)
    assert {k: v for rows, *_ in found for k, v in rows.items()} == first | second
    assert sum(len(rows) for rows, *_ in found) == len(first) + len(second)
    assert sum(seen for *_, seen, _ in found) == 200 - row == 120
    assert {(weights, step) for _, weights, _, _, step in found} == {(5, 5)}
    assert [drawn for _, _, drawn, _, _ in found] == [5, 15, 20][:size]


def test_all_ranks_raise_what_one_of_them_finds(tmp_path, data):
    with pytest.raises(NotFound):
        together(2, lambda trainer, rank: trainer.load(tmp_path / "nothing"))

    def save(trainer, rank):
        trainer.save(tmp_path / "s", state={"bad": {1: 2}} if rank else {})

    with pytest.raises(hbkit.errors.InvalidArgument, match="JSON"):
        together(2, save)
