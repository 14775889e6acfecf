"""``hbkit snapshot``."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from hbkit.cli.main import main
from hbkit.embedding import Table
from hbkit.snapshot import log, save


def run(*arguments, status=0):
    result = CliRunner().invoke(main, ["snapshot", *(str(a) for a in arguments)])
    assert result.exit_code == status, result.output
    return result.output


def train(table, keys):
    table.lookup(keys, train=True)
    table.update(keys, np.ones((len(keys), table.dim)))


@pytest.fixture
def path(tmp_path):
    """Two tables, in full and with two deltas."""
    user, item = Table("user", 4), Table("item", 2)
    train(user, np.arange(1000))
    train(item, [7])
    save(tmp_path / "s", [user, item], 10)
    train(user, [1, 2000])
    user.store.erase(np.arange(3, 6))
    save(tmp_path / "s", [user, item], 20, base="latest")
    train(user, [2001])
    save(tmp_path / "s", [user, item], 30, base="latest")
    return tmp_path / "s"


def test_log_lists_the_commits(path):
    output = run("log", path)
    assert "3 commits, oldest first" in output
    assert re.search(r"c00000001 +- +10 +\d+\.\d kB +1 +1,000\n", output)
    assert re.search(r"c00000003 +c00000002 +30 +\d+\.\d kB +1 +999\n", output)
    assert CliRunner().invoke(main, ["inspect", str(path)]).output == output


def test_diff_counts_rows(path):
    output = run("diff", path, "c00000001")
    assert re.search(r"table +added +changed +erased\n", output)
    assert re.search(r"user +2 +1 +3\n", output) and re.search(r"item +0 +0 +0\n", output)
    assert re.search(r"user +1 +0 +0\n", run("diff", path, "c00000002", "c00000003"))
    assert "no commit 'x'" in run("diff", path, "x", status=2)


def test_verify_says_what_is_wrong(path):
    assert re.search(r"3 commits, \d+\.\d kB: all sound, the newest is c00000003\n", run("verify", path))
    file = next((path / "c00000002").rglob("rows-*"))
    file.write_bytes(file.read_bytes()[:-1])
    output = run("verify", path, status=2)
    assert output.startswith("hbkit: error: ") and str(file) in output


def test_squash_and_prune(path):
    assert run("prune", path, "--keep", "1") == (
        "Removed nothing\nKept 3 commits, since the newest 1 build on them: squash first to let go of them\n"
    )
    assert run("squash", path) == "c00000004 holds all rows\n"
    assert run("squash", path) == "c00000004 holds all rows already\n"
    assert run("prune", path, "--keep", "1") == "Removed c00000001, c00000002, c00000003\n"
    assert [c.id for c in log(path)] == ["c00000004"]
    run("prune", path, "--keep", "0", status=2)


def test_export_writes_what_others_read(path, tmp_path):
    assert run("export", path, "--table", "user", "-o", tmp_path / "u.parquet") == (
        f"999 rows of user in {tmp_path / 'u.parquet'}\n"
    )
    table = pq.read_table(tmp_path / "u.parquet")
    keys, rows = table["key"].to_numpy(), np.stack(table["row"].to_numpy())
    assert keys.tolist() == [0, 1, 2, *range(6, 1000), 2000, 2001]

    run("export", path, "--table", "user", "--format", "arrow", "-o", tmp_path / "u.arrow")
    with pa.ipc.open_file(tmp_path / "u.arrow") as file:
        assert file.read_all().equals(table)
    run("export", path, "--table", "user", "--format", "npy", "-o", tmp_path / "npy")
    np.testing.assert_array_equal(np.load(tmp_path / "npy" / "row.npy"), rows)
    run("export", path, "--table", "user", "--format", "dense", "-o", tmp_path / "dense")
    assert sorted(p.name for p in (tmp_path / "dense").iterdir()) == ["vocabulary.npy", "weights.npy"]
    np.testing.assert_array_equal(np.load(tmp_path / "dense" / "weights.npy"), rows)
    np.testing.assert_array_equal(np.load(tmp_path / "dense" / "vocabulary.npy"), keys)

    early = "--commit", "c00000001", "--format", "npy"
    assert run("export", path, "--table", "user", *early, "-o", tmp_path / "early").startswith("1,000 rows")
    output = run("export", path, "-o", tmp_path / "x", status=2)
    assert "no table named" in output and "name one of item, user" in output
