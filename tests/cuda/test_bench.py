"""The benchmarks of the device tier run from end to end, on its twin and in the simulator; no figure is looked at."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")
BENCH = Path(__file__).parents[2] / "bench"


def run(tmp_path, script, device, *more):
    """What a benchmark prints; where it is not the twin, in the simulator."""
    done = subprocess.run(
        [sys.executable, BENCH / script, "--small", "--device", device, *more],
        cwd=tmp_path,
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "0" if device == "cpu" else "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.slow)])  # 27 s
def test_steps_and_tier_are_reported(tmp_path, device):
    out = run(tmp_path, "gpu.py", device, "--report", "report.md")
    assert (tmp_path / "report.md").read_text() == out
    assert "one step from ids" in out
    for case in ("all | ", "a batch | ", "0.8 of it | "):
        assert f"\n| {case}" in out
    if device != "cpu":
        assert "equals the C kernels bit for bit: True" in out
        for kernel in ("dedupe", "order", "hold", "insert", "stamp", "gather", "adam bfloat16"):
            assert f"\n| {kernel}" in out


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_index_is_reported(tmp_path, device):
    run(tmp_path, "gpu_index.py", device, "--json", "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    for case in ("dedupe, one key", "order, all distinct", "hold, all there", "insert-and-evict"):
        assert any(name.startswith(case) for name in figures)
