"""Fixtures and settings that all rooms' tests share."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import soft
from hypothesis import HealthCheck, settings

settings.register_profile(
    "hbkit", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("hbkit")

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED = pathlib.Path(os.environ.get("HBKIT_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def shared():
    """``shared("data/ml-1m")``: a path of real data, or a skip that names what is absent."""

    def find(name: str) -> pathlib.Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"real data absent: {name} is not beside this checkout (set HBKIT_SHARED)")
        return path

    return find


def run_again(command, env, file, marks, select, tmp_path):
    """Run a test file in a process of its own; elsewhere than in the checkout, which hides the installed package."""
    if "NUMBA_ENABLE_CUDASIM" in os.environ or soft.driver:
        pytest.skip("this process is one in which a file runs again: it starts no other")
    options = "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=native", "-m", marks, "-k", select
    done = subprocess.run(
        [sys.executable, *command, "-m", "pytest", *options, file],
        cwd=tmp_path,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


@pytest.fixture
def shared_by():
    """``shared_by(n)``: let n threads share calls into the core from now on, however little they have to do."""
    from hbkit._ext import share

    before = share.n_threads()
    yield lambda n: share.use(n, 1)
    share.use(before)


@pytest.fixture
def in_simulator(tmp_path):
    """``in_simulator(__file__)``: run a test file in a process where Numba simulates CUDA, which must pass.

    Of its tests those that `marks` selects, the short ones when left out. The simulator has to be chosen before Numba
    is imported.
    """
    pytest.importorskip("numba")

    def run(file: str, marks: str = "not slow") -> None:
        run_again([], {"NUMBA_ENABLE_CUDASIM": "1"}, file, marks, "", tmp_path)

    return run


@pytest.fixture
def on_soft_devices(tmp_path):
    """``on_soft_devices(__file__)``: run a test file's lane "soft" in a process with a CUDA driver in software.

    Tests whose names have `select` in them, with `seed` of the order in which streams and threads run.
    """
    pytest.importorskip("numba_cuda")
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("no C compiler builds the driver here")

    def run(file: str, marks: str = "not slow", select: str = "soft", seed: int = 1) -> None:
        run_again(
            [str(ROOT / "tests" / "cuda" / "soft")],
            {"SOFT_CUDA_SEED": str(seed), "SOFT_CUDA_TILES": "64"},
            file,
            marks,
            select,
            tmp_path,
        )

    return run
