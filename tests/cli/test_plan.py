"""``hbkit plan``: its simulation against brute force, its sample against all keys, and the command."""

import os
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from hbkit.cli import plan as module
from hbkit.cli.main import main
from hbkit.cli.plan import clairvoyant, hits, rate_of, read_rate, sample
from hbkit.data import Dataset
from hbkit.errors import StorageError
from hbkit.store import LFU, LRU


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.05)
    monkeypatch.setattr(module, "DISK_NBYTES", 1 << 20)


def run(*arguments, status=0):
    result = CliRunner().invoke(main, ["plan", *map(str, arguments)])
    assert result.exit_code == status, result.output
    return result


@pytest.fixture
def clicks(tmp_path):
    """30,000 rows of a popular, a rare and a ragged column, and others that hold no keys."""
    rng, n = np.random.default_rng(0), 30_000
    law = np.cumsum(np.arange(1, 20_001) ** -1.05)
    popular = np.searchsorted(law, rng.random(n) * law[-1])
    table = pa.table(
        {
            "user": popular,
            "word": pa.array([f"w{k}" for k in rng.integers(0, 50, n)]),
            "seen": pa.array([popular[i : i + i % 3].tolist() for i in range(n)]),
            "price": rng.random(n),
            "day": pa.array(rng.integers(0, 9, n).astype(np.int32), pa.date32()),
        }
    )
    pq.write_table(table, tmp_path / "clicks.parquet", row_group_size=5000)
    return tmp_path / "clicks.parquet"


def best_by_force(trace, n_lines):
    """Most hits of any choice of what to keep, tried out."""
    states = {frozenset(): 0}
    for keys in trace:
        after = {}
        for held, count in states.items():
            count += len(held & set(keys))
            everything = sorted(held | set(keys))
            for mask in range(1 << len(everything)):
                keep = frozenset(k for i, k in enumerate(everything) if mask >> i & 1)
                if len(keep) <= n_lines:
                    after[keep] = max(after.get(keep, 0), count)
        states = after
    return max(states.values())


@given(st.lists(st.sets(st.integers(0, 4), min_size=1, max_size=3), min_size=1, max_size=6), st.integers(1, 3))
def test_clairvoyant_is_the_best_there_is(trace, n_lines):
    trace = [np.array(sorted(keys), np.int64) << 40 for keys in trace]
    best = best_by_force([keys.tolist() for keys in trace], n_lines)
    assert clairvoyant(trace, n_lines).sum() == best
    assert hits(trace, n_lines, LRU).sum() <= best
    assert hits(trace, n_lines, LFU, ahead=len(trace)).sum() == best  # all is known


def test_sample_of_a_part_of_the_keys_tells_of_all(clicks, monkeypatch):
    class Silent:
        def update(self, n, **fields):
            pass

    ds = Dataset.from_parquet(str(clicks), fields=["user"]).batch(500)
    whole = sample(ds, ["user"], 10**9, Silent())
    assert whole.rate == 1 and whole.n_rows == 30_000
    n_keys = len(np.unique(pq.read_table(clicks)["user"].to_numpy()))
    assert whole.n_keys == n_keys == len(np.unique(np.concatenate(whole.batches)))
    monkeypatch.setattr(module, "SAMPLE_KEYS", n_keys // 3)
    part = sample(ds, ["user"], 10**9, Silent())
    assert part.rate == 1 / 4 and len(np.unique(np.concatenate(part.batches))) <= n_keys // 3
    assert abs(part.n_keys / n_keys - 1) < 0.1 and part.batch_keys == whole.batch_keys
    for size in (n_keys // 20, n_keys // 4):
        truth, guess = (rate_of(s, size, lambda trace, n: hits(trace, n, LFU)) for s in (whole, part))
        assert abs(truth.mean - guess.mean) < max(4 * guess.error, 0.05)


def test_plan_prints_curves(clicks):
    result = run(clicks, "--budget", "400KiB", "--batch-size", 1000, "--lookahead", 4)
    assert "user, word, seen" in result.stdout
    assert "lfu, 4 ahead  clairvoyant" in result.stdout
    rows = [line.split() for line in result.stdout.splitlines() if line.count("%") == 6]
    assert any("*" in row for row in rows)
    rates = np.array([[float(x[:-1]) for x in row if x.endswith("%")] for row in rows])
    share, lfu, lru, tinylfu, ahead, best = rates.T
    assert (np.diff(share) >= 0).all() and share[-1] == 100
    assert (np.diff(best) >= -0.1).all()
    for curve in (lfu, lru, tinylfu, ahead):
        assert (curve <= best + 0.11).all()
    assert (lfu >= lru - 2).all() and (ahead >= lfu - 0.11).all()
    assert "two standard errors" in result.stdout and "(100%)" in result.stderr
    assert os.listdir(clicks.parent) == ["clicks.parquet"]  # the file for measuring is gone


def test_plan_says_when_the_budget_is_too_small(clicks):
    result = run(clicks, "--sparse", "user", "--budget", "1KiB", "--rows", 5000)
    assert "does not even hold the index" in result.stdout and "rows read" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparse", "nothing"], "there is no column 'nothing'"),
        (["--sparse", "price"], "the column holds no keys"),
        (["--budget", "much"], "budget 'much'"),
    ],
)
def test_plan_names_what_is_wrong(clicks, arguments, message):
    result = run(clicks, *arguments, status=2)
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_plan_names_what_is_missing_before_it_works(clicks, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    result = run(clicks, "--plot", tmp_path / "x.png", status=2)
    assert "hbkit[plot]" in result.stderr and "reading" not in result.stderr


def test_plan_draws(clicks, tmp_path):
    pytest.importorskip("matplotlib", reason="drawing needs the extra 'plot'")
    run(clicks, "--plot", tmp_path / "x.png", "--rows", 5000, "--budget", "1MiB")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_read_rate_is_that_of_the_disk_or_an_error(tmp_path):
    try:
        assert read_rate(str(tmp_path)) > 0
    except StorageError as e:  # a file system that does not read past the page cache
        assert "--disk" in str(e)
    assert os.listdir(tmp_path) == []
    with pytest.raises(StorageError, match="name a directory in --disk"):
        read_rate(str(tmp_path / "nowhere"))
