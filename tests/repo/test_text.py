"""The repository speaks of itself alone: no paths of the machine it was written on, no registry's host."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Put together here, so that this file does not hold them.
PATHS = ["/" + "work/", "/" + "tmp/v", "/" + "tmp/spec", "/" + "root/", "/" + "opt/wheels", "/" + "opt/pypi"]
HOSTS = [a + b for a, b in [("pypi.", "org"), ("files.python", "hosted"), ("deb.deb", "ian"), ("registry.npm", "js")]]
HOSTS += ["download.py" + "torch", "conda.ana" + "conda"]


def tracked() -> list[Path]:
    """The text files that git has or would take."""
    git = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(git, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / os.fsdecode(p) for p in done.stdout.split(b"\0") if p]
    return [p for p in paths if p.is_file() and b"\0" not in p.read_bytes()[:8000]]


@pytest.mark.parametrize("needles", [PATHS, HOSTS], ids=["paths", "hosts"])
def test_repository_names_no(needles):
    found = [
        f"{path.relative_to(ROOT)}:{i}: {line.strip()}"
        for path in tracked()
        for i, line in enumerate(path.read_text(errors="replace").splitlines(), start=1)
        if any(needle in line for needle in needles)
    ]
    assert found == []
