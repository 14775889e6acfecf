"""Files made to harm: each is refused by name, or read rightly, soon and in bounded memory."""

import json
import os
import pathlib
import runpy
import subprocess
import sys

import pytest

import hbkit

SCRIPT = pathlib.Path(__file__).with_name("bombs.py")
BOMBS = runpy.run_path(str(SCRIPT))["BOMBS"]
REFUSALS = {"Corrupt", "Unsupported", "BudgetExceeded"}
SANITIZED = "HBKIT_SANITIZE" in os.environ  # then all takes longer, and more
MEMORY = (256 + 64) << 20  # the largest page, and what decoding it takes


@pytest.fixture(scope="module")
def told():
    """What came of each file, by name: one entry for each way to read it."""
    env = {**os.environ, "PYTHONPATH": str(pathlib.Path(hbkit.__file__).parents[1])}  # the script tests the same hbkit
    run = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False, env=env)
    assert run.returncode == 0, run.stderr[-4000:]
    out = {name: [] for name in BOMBS}
    for line in run.stdout.splitlines():
        said = json.loads(line)
        out[said["name"]].append(said)
    return out


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_is_refused_or_read_soon_and_small(told, name):
    rows = BOMBS[name][1]
    for said in told[name]:
        assert "alien" not in said, said
        refused = said.get("error")
        # an error comes within a second; what is rightly read, of 20,000 columns say, may take a slow machine longer
        assert SANITIZED or (said["seconds"] < (1 if refused else 5) and said["grown"] < MEMORY), said
        assert "error" not in said or "file bomb" in said["text"], said
        if said["way"] in ("hashed", "by leaps"):
            assert refused in {None, "SchemaMismatch"} | REFUSALS, said
        elif rows is None:
            assert refused in REFUSALS, said
        elif refused is None and rows is not ... and said["way"] == "whole":
            assert said["rows"] == repr(rows), said
        else:
            assert refused in {None, "NullFound"} | REFUSALS, said


def test_good_file_is_read(told):
    good = {name: rows for name, (_, rows) in BOMBS.items() if "good" in name}
    assert len(good) > 15
    assert {name: told[name][0].get("rows") for name in good} == {name: repr(rows) for name, rows in good.items()}
