"""The soak benchmark's five-minute form: memory, disk and files stay bounded, and rows are those of memory."""

import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "bench" / "soak.py"


@pytest.mark.slow
def test_soak_stays_within_bounds_for_five_minutes(tmp_path):
    done = subprocess.run([sys.executable, SOAK, tmp_path, "--minutes", "5"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count('"pass"') > 5
