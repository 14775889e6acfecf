"""What every kernel compiles to, without a device: PTX of three architectures, and through ptxas where it is present.

`-s` prints registers, spills and shared memory.
"""

import importlib
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess

import pytest
import soft.ptx

import hbkit.cuda

CUDA = pathlib.Path(hbkit.cuda.__file__).parent
ROOMS = sorted(path.stem for path in CUDA.glob("*.py") if "\nSIGNATURES" in path.read_text() and path.stem != "kernels")
SLOW = ("rows", "rules")  # they have many, one for each dtype and rule
ARCHITECTURES = [(8, 0), (9, 0), (10, 0)]

pytestmark = [
    pytest.mark.skipif(os.environ.get("NUMBA_ENABLE_CUDASIM") == "1", reason="the simulator compiles nothing"),
    pytest.mark.skipif(not importlib.util.find_spec("numba_cuda"), reason="numba-cuda is not installed: no PTX"),
]


def ptxas():
    """The assembler of NVIDIA's toolkit: of the package nvidia-cuda-nvcc, or on the path."""
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations or () if spec else ():
        for found in pathlib.Path(place).glob("*/bin/ptxas"):
            return str(found)
    return shutil.which("ptxas")


def cases():
    """A module of kernels and an architecture each."""
    return [
        pytest.param(room, cc, marks=[pytest.mark.slow] if room in SLOW else [], id=f"{room}-sm_{cc[0]}{cc[1]}")
        for room in ROOMS
        for cc in ARCHITECTURES
    ]


def test_all_modules_of_kernels_are_listed():
    from hbkit.cuda import kernels

    assert sorted(module.__name__.rpartition(".")[2] for module in kernels.MODULES) == ROOMS


def test_only_one_module_asks_other_lanes():
    asks = re.compile(r"\b(shfl\w*|\w+_sync|syncwarp|activemask|laneid)\b")
    assert {path.stem for path in CUDA.glob("*.py") if asks.search(path.read_text())} == {"warp"}


@pytest.mark.parametrize(("room", "cc"), cases())
def test_kernels_assemble_without_spills_or_local_arrays(room, cc, tmp_path):
    from hbkit.cuda import kernels

    assembler = ptxas()
    for kernel in importlib.import_module(f"hbkit.cuda.{room}").SIGNATURES:
        ptx, name = kernels.ptx(kernel, cc), kernel.__name__
        assert ".visible .entry" in ptx
        soft.ptx.translate(ptx)  # all of it is what the lane "soft" can run
        # Each operation rounds by itself and keeps denormals, and nothing has an address of its own in local memory.
        wrong = [word for word in ("fma.", ".ftz", ".approx", ".local") if word in ptx]
        if name != "own":  # a signed and an unsigned word together would become a float
            wrong += [word for word in [".f64"] if word in ptx]
        assert not wrong, f"{name}: {wrong}"
        if assembler:
            assemble(assembler, name, ptx, f"sm_{cc[0]}{cc[1]}", tmp_path)
    if assembler is None:
        pytest.skip("ptxas is not installed (pip install nvidia-cuda-nvcc): PTX alone was compiled")


def assemble(assembler, name, ptx, target, tmp_path):
    """PTX to machine code, which uses no local memory."""
    (tmp_path / "kernel.ptx").write_text(ptx)
    done = subprocess.run(
        [assembler, "-v", f"-arch={target}", "kernel.ptx", "-o", os.devnull],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    if "Unsupported .version" in done.stderr:
        pytest.skip(f"{assembler} is older than the PTX of this numba-cuda")
    assert done.returncode == 0, done.stderr
    registers = int(re.search(r"Used (\d+) registers", done.stderr)[1])
    shared = re.search(r"(\d+) bytes smem", done.stderr)
    frame, stores, loads = map(
        int,
        re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr).groups(),
    )
    held = int(shared[1]) if shared else 0
    print(f"{name} {target}: {registers} registers, {stores + loads} bytes spilled, {held} bytes of shared memory")
    assert frame == stores == loads == 0, name
