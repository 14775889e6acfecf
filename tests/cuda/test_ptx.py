"""What every kernel compiles to, without a device: PTX of three architectures, and through ptxas where it is present.

`-s` prints registers and shared memory.
"""

import importlib
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess

import pytest

ROOMS = ("kernels", "index", "dedupe", "order")
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
    """A room of kernels and an architecture each; that of rows has many, one for each dtype and rule."""
    return [
        pytest.param(room, cc, marks=[pytest.mark.slow] if room == "kernels" else [], id=f"{room}-sm_{cc[0]}{cc[1]}")
        for room in ROOMS
        for cc in ARCHITECTURES
    ]


@pytest.mark.parametrize(("room", "cc"), cases())
def test_kernels_assemble_without_spills_or_local_arrays(room, cc, tmp_path):
    module = importlib.import_module(f"hbkit.cuda.{room}")
    assembler = ptxas()
    for kernel in module.SIGNATURES:
        ptx = compiled(module, kernel, cc)
        if assembler:
            assemble(assembler, kernel.__name__, ptx, f"sm_{cc[0]}{cc[1]}", tmp_path)
    if assembler is None:
        pytest.skip("ptxas is not installed (pip install nvidia-cuda-nvcc): PTX alone was compiled")


def compiled(module, kernel, cc):
    """A kernel's PTX."""
    from numba import cuda

    from hbkit.cuda import kernels

    if module is kernels:
        ptx = kernels.ptx(kernel, cc)
    else:
        ptx, _ = cuda.compile_ptx(kernel, module.SIGNATURES[kernel], cc=cc)
        assert "f64" not in ptx  # 64-bit words: a signed and an unsigned one together would become a float
    assert ".visible .entry" in ptx
    return ptx


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
    print(f"{name} {target}: {registers} registers, {shared[1] if shared else 0} bytes of shared memory")
    frame, stores, loads = map(
        int,
        re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr).groups(),
    )
    assert frame == stores == loads == 0, name
