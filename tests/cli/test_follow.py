"""`hbkit train` that follows a directory, or is resumed: killed at any moment, it ends as if it had not been."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hbkit import errors
from hbkit.cli.commits import Every, every
from hbkit.cli.follow import Files
from hbkit.embedding import Adagrad, Table
from hbkit.snapshot import follow, load, log

OPTIONS = ["--label", "y", "--dim", 4, "--batch-size", 64, "--model", "dlrm"]


def start(*args):
    command = [sys.executable, "-m", "hbkit.cli", "train", *map(str, [*OPTIONS, *args])]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process, status=0):
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, out + err
    return out + err


def write(path, n_rows, seed, mtime=None, **more):
    rng = np.random.default_rng(seed)
    columns = {
        "y": rng.integers(0, 2, n_rows),
        "x": rng.random(n_rows, np.float32),
        "a": rng.zipf(1.3, n_rows) % 500,
        "b": rng.zipf(1.3, n_rows) % 50,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns | more), path, row_group_size=300)
    if mtime:
        os.utime(path, (mtime, mtime))


def tables():
    return [Table(name, 4, optimizer=Adagrad(lr=0.05)) for name in "ab"]


def end(path):
    """Everything that the newest commit holds, but for which files are done."""
    loaded = load(path, found := tables())
    rows = [column.tobytes() for t in found for chunk in t.store.scan() for column in chunk]
    return loaded.step, loaded.state["dense"], rows


def wait_for(path, commits, process, last=None):
    """Until there are so many commits, or one of step `last`, or it has ended well."""
    until = time.monotonic() + 100
    while not (path / f"c{commits:08d}.json").exists() and process.poll() != 0:
        if last is not None and list(path.glob("c*.json")) and log(path)[-1].step == last:
            break
        assert time.monotonic() < until and process.poll() is None, finish(process)
        time.sleep(0.01)


@pytest.mark.slow
def test_followed_files_are_trained_on_once_however_often_it_is_killed(tmp_path):
    pytest.importorskip("torch")
    for n, name in enumerate(["z", "m", "a", "b"]):  # in order of their times
        write(tmp_path / "in" / f"{name}.parquet", 1500, n, mtime=1_700_000_000 + n // 3 * 5)
    common = ["--follow", tmp_path / "in", "--publish-every", "7steps", "--save"]
    whole = finish(start(*common, tmp_path / "whole", "--idle-exit", 1))
    assert "files          4" in whole
    expected = end(tmp_path / "whole")
    steps = [
        c.step for c in log(tmp_path / "whole")
    ]  # a save that is due while another goes on waits for the next step
    assert expected[0] == steps[-1] == 4 * 24 and min(np.diff(steps[:-1])) >= 7

    for commits, how in ((2, signal.SIGKILL), (4, signal.SIGKILL), (6, signal.SIGTERM)):
        process = start(*common, tmp_path / "parts")
        wait_for(tmp_path / "parts", commits, process, last=96)
        process.send_signal(how)
        if how == signal.SIGTERM:
            assert "saved" in finish(process)
        else:
            process.communicate()
    finish(start(*common, tmp_path / "parts", "--idle-exit", 1))
    assert end(tmp_path / "parts") == expected
    assert "model was trained with lr" in finish(start(*common, tmp_path / "parts", "--lr", 1), 2)


@pytest.mark.slow
def test_files_may_come_half_written_and_what_does_not_fit_is_named(tmp_path):
    pytest.importorskip("torch")
    into, save = tmp_path / "in", tmp_path / "model"
    write(tmp_path / "new.parquet", 700, 0)
    data = (tmp_path / "new.parquet").read_bytes()
    into.mkdir()
    process = start("--follow", into, "--save", save, "--publish-every", "0.2s")
    (into / "one.parquet").write_bytes(data[: len(data) // 2])
    time.sleep(1)
    (into / "one.parquet").write_bytes(data)
    wait_for(save, 1, process)
    mine = tables()
    follower = follow(save, mine)  # in this process
    until = time.monotonic() + 60
    while (follower.poll() is None or log(save)[-1].step < 11) and time.monotonic() < until:
        time.sleep(0.05)
    follower.poll()
    assert [len(t) for t in mine] == list(log(save)[-1].tables.values()) and log(save)[-1].step == 11
    write(into / "two.parquet", 100, 1)
    write(into / "x.tmp", 100, 1)  # not a name of a Parquet file
    os.rename(tmp_path / "new.parquet", into / "_hidden.parquet")
    wait_for(save, len(log(save)) + 1, process)
    write(tmp_path / "bad.parquet", 100, 2, a=["s"] * 100)
    os.rename(tmp_path / "bad.parquet", into / "bad.parquet")
    said = finish(process, 2)
    assert "hbkit: error:" in said and "bad.parquet" in said and "column a" in said
    assert log(save)[-1].step == 13


@pytest.mark.slow
def test_train_resumes_exactly_where_it_was_killed(tmp_path):
    pytest.importorskip("torch")
    write(tmp_path / "in" / "one.parquet", 3000, 0)
    common = ["--data", tmp_path / "in", "--epochs", 3, "--save-every", "5steps", "--resume", "--save"]
    finish(start(*common, tmp_path / "whole"))
    for commits in (2, 8):
        process = start(*common, tmp_path / "parts")
        wait_for(tmp_path / "parts", commits, process)
        process.kill()
        process.communicate()
    assert "continuing from commit" in finish(start(*common, tmp_path / "parts"))
    assert end(tmp_path / "parts") == end(tmp_path / "whole") and end(tmp_path / "whole")[0] == 3 * 47
    assert "trained with batch-size 64, not 32" in finish(start(*common, tmp_path / "parts", "--batch-size", 32), 2)


@pytest.mark.parametrize(
    "wrong",
    [
        ["--resume", "--data", "x"],
        ["--follow", "x", "--data", "y", "--save", "z"],
        ["--save", "z"],
        ["--follow", "x"],
        ["--follow", "x", "--save", "z", "--epochs", "2"],
        ["--follow", "x", "--save", "z", "--publish-every", "soon"],
        ["--follow", "x", "--save", "z", "--publish-every", "0steps"],
    ],
)
def test_options_that_contradict_each_other_are_refused(wrong):
    from click.testing import CliRunner

    from hbkit.cli.main import main

    done = CliRunner().invoke(main, ["train", "--label", "y", *wrong])
    assert done.exit_code == 2 and done.output.startswith("hbkit: error: "), done.output


def test_every_is_seconds_or_steps():
    assert every(None, None, "1.5s") == Every(seconds=1.5)
    assert every(None, None, "500steps") == every(None, None, "500 steps") == Every(steps=500)
    assert every(None, None, None) is None


def test_files_come_once_in_order_and_those_that_fail_come_last(tmp_path, monkeypatch):
    monkeypatch.setattr("hbkit.cli.follow.POLL", 0.0)
    monkeypatch.setattr("hbkit.cli.follow.REPORT", 0.0)
    said = []
    monkeypatch.setattr("hbkit.cli.follow.note", said.append)
    files = Files(str(tmp_path / "in"))
    assert files.next() is None  # no directory yet

    def broken(path):
        raise errors.Corrupt("half")

    for name, mtime in (("sub/a.parquet", 30), ("b.parquet", 10), ("c.parquet", 20), ("d.txt", 5)):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
        os.utime(tmp_path / "in" / name, (mtime, mtime))
    files.sleep()
    assert files.next() == "b.parquet" and files.open("b.parquet", broken) is None
    assert files.next() == "c.parquet" and files.open("c.parquet", broken) is None
    assert files.next() == "sub/a.parquet"
    assert files.open("sub/a.parquet", lambda path: path) == str(tmp_path / "in" / "sub/a.parquet")
    files.finish("sub/a.parquet")
    for name in ("b.parquet", "c.parquet", "b.parquet"):  # each has its turn
        assert files.next() == name and files.open(name, broken) is None
    assert len(said) == 5 and "half" in said[0]
    assert not files.gone("b.parquet") and files.done == {"sub/a.parquet"}
    (tmp_path / "in" / "sub/a.parquet").unlink()
    (tmp_path / "in" / "b.parquet").unlink()
    assert files.gone("b.parquet") and files.done == set() and files.next() == "c.parquet"
