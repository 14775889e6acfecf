"""``hbkit synth``, and what all commands share: the group, its errors, and the console."""

import os
import pty
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from hbkit.cli import console
from hbkit.cli.main import COMMANDS, main


def run(*arguments, status=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == status, result.output
    return result


@pytest.mark.parametrize("shape", ["criteo", "taobao"])
def test_synth_prints_the_ceiling_of_its_files(tmp_path, shape):
    out = tmp_path / "log"
    result = run("synth", out, "--rows", 5000, "--seed", 3, "--shape", shape, "--files", 2, "--row-group-rows", 1000)
    metadata = pq.read_metadata(out / "part-00001.parquet")
    auc = float(metadata.metadata[b"hbkit.bayes_auc"])
    assert f"Bayes-optimal AUC       {auc:.4f}" in result.stdout
    assert sorted(p.name for p in out.iterdir()) == ["part-00000.parquet", "part-00001.parquet"]
    assert pq.read_table(out).num_rows == 5000 and metadata.num_row_groups == 3
    assert "5,000 of 5,000 rows (100%)" in result.stderr


def test_synth_refuses_to_replace(tmp_path):
    run("synth", tmp_path / "a.parquet", "--rows", 100)
    before = (tmp_path / "a.parquet").read_bytes()
    result = run("synth", tmp_path / "a.parquet", "--rows", 200, status=2)
    assert result.stderr.startswith("hbkit: error: the output exists already") and result.stderr.count("\n") == 1
    assert "--overwrite" in result.stderr and (tmp_path / "a.parquet").read_bytes() == before
    run("synth", tmp_path / "a.parquet", "--rows", 200, "--overwrite")
    assert pq.read_table(tmp_path / "a.parquet").num_rows == 200


@pytest.mark.parametrize("arguments", [["--rows", "0"], ["--rows", "5", "--shape", "x"], []])
def test_synth_usage_is_checked(tmp_path, arguments):
    run("synth", tmp_path / "x", *arguments, status=2)
    assert not (tmp_path / "x").exists()


def test_help_lists_all_commands_and_imports_none():
    code = (
        "import sys\n"
        "from hbkit.cli.main import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "bad = {'numpy.random', 'pyarrow', 'rich', 'torch', 'tensorflow', 'hbkit.cli.train', 'hbkit.data'}\n"
        "sys.exit(str(bad & set(sys.modules)) if bad & set(sys.modules) else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"\n  {name} " in done.stdout


@pytest.mark.parametrize("name", ["synth", "convert", "inspect"])
def test_every_command_has_help(name):
    assert run(name, "--help").stdout.startswith(f"Usage: main {name}")


def test_version_and_unknown_command():
    assert run("--version").stdout.startswith("hbkit")
    assert "No such command" in run("bake", status=2).stderr


def test_module_runs_as_a_process_and_errors_are_one_line(tmp_path):
    def module(*arguments):
        return subprocess.run([sys.executable, "-m", "hbkit.cli", *arguments], capture_output=True, text=True)

    done = module("synth", str(tmp_path / "x"), "--rows", "1000")
    assert done.returncode == 0 and "Wrote" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr and "\r" not in done.stdout + done.stderr
    done = module("synth", str(tmp_path / "x"), "--rows", "1000")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("hbkit: error: ") and done.stderr.count("\n") == 1


def test_progress_lines_come_every_few_seconds(capsys, monkeypatch):
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(clock)))
    with console.progress("train", 1000, keys=0) as bar:
        for i in range(20):
            bar.update(50, loss=0.5 - i / 100, table_size=10 * i)
    lines = capsys.readouterr().err.splitlines()
    assert 5 <= len(lines) <= 11
    assert lines[-1].startswith("train: 1,000 of 1,000 rows (100%), ")
    assert lines[-1].endswith("rows/s, keys 0, loss 0.3100, table size 190")


def test_progress_of_what_fails_says_nothing_more(capsys):
    with pytest.raises(ZeroDivisionError):
        with console.progress("convert", 10, "bytes") as bar:
            bar.update(1)
            raise ZeroDivisionError
    assert capsys.readouterr().err == ""


def test_terminal_gets_a_live_bar_and_a_table(tmp_path):
    code = (
        "from hbkit.cli import console\n"
        "with console.progress('train', 100) as bar:\n"
        "    bar.update(100, loss=0.25)\n"
        "console.summary('Result [x]', {'rows': 1000000, 'AUC': 0.5})\n"
    )
    master, slave = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k != "CI"} | {"TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    shown = b""
    try:
        while data := os.read(master, 4096):
            shown += data
    except OSError:  # the other end is closed
        pass
    os.close(master)
    assert process.wait() == 0
    text = shown.decode()
    assert "\x1b" in text and "loss 0.2500" in text and "1,000,000" in text and "Result [x]" in text


def test_table_aligns_numbers(capsys):
    console.table("Files", ("file", "rows"), [("a", 1000), ("bcd", 7)])
    assert capsys.readouterr().out == "Files\n  file   rows\n  a     1,000\n  bcd       7\n"


def test_sizes_read_well():
    assert [console.size(n) for n in (0, 999, 1000, 2_400_000, 3e9, 5e15)] == [
        "0 B", "999 B", "1.0 kB", "2.4 MB", "3.0 GB", "5000.0 TB",
    ]  # fmt: skip
