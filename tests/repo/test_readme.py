"""The README's Python runs as it stands, each block in a process of its own."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "README.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def clicks(tmp_path_factory):
    where = tmp_path_factory.mktemp("readme")
    synth = [sys.executable, "-m", "hbkit.cli", "synth", "clicks", "--rows", "20000", "--files", "10"]
    subprocess.run(synth, cwd=where, check=True, capture_output=True)
    return where


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_readme_code_runs(clicks, framework):
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed")
    (code,) = [b for b in BLOCKS if f"import hbkit.{framework} as hb" in b]
    assert len([line for line in code.splitlines() if line.strip()]) <= 25
    done = subprocess.run([sys.executable, "-c", code], cwd=clicks, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"'c1': \d+", done.stdout), done.stdout
