"""The benchmarks of the device tier run from end to end, on its twin, in the simulator and on software devices.

No figure is looked at. On software devices it is what `make gpu` does on a GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")
BENCH = Path(__file__).parents[2] / "bench"


def run(tmp_path, script, lane, *more):
    """What a benchmark prints: on the twin, in the simulator, or on software devices."""
    on = [Path(__file__).parent / "soft"] if lane == "soft" else []
    done = subprocess.run(
        [sys.executable, *on, BENCH / script, "--small", "--device", "cpu" if lane == "cpu" else "cuda:0", *more],
        cwd=tmp_path,
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": str(int(lane == "cudasim")), "SOFT_CUDA_TILES": "64"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("lane", ["cpu", pytest.param("cudasim", marks=pytest.mark.slow), "soft"])  # 27 s
def test_steps_and_tier_are_reported(tmp_path, lane):
    out = run(tmp_path, "gpu.py", lane, "--report", "report.md")
    assert (tmp_path / "report.md").read_text() == out
    assert "one step from ids" in out
    for case in ("all | ", "a batch | ", "0.8 of it | "):
        assert f"\n| {case}" in out
    if lane != "cpu":
        assert "equals the C kernels bit for bit: True" in out
        for kernel in ("dedupe", "order", "hold", "insert", "stamp", "gather", "adam bfloat16"):
            assert f"\n| {kernel}" in out


@pytest.mark.parametrize("lane", ["cpu", "cudasim", "soft"])
def test_index_is_reported(tmp_path, lane):
    run(tmp_path, "gpu_index.py", lane, "--json", "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    for case in ("dedupe, one key", "order, all distinct", "hold, all there", "insert-and-evict"):
        assert any(name.startswith(case) for name in figures)
