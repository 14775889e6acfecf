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

ROOMS = ("kernels", "index", "dedupe")
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


def kernels():
    """(room, name) of every kernel with a signature."""
    if not importlib.util.find_spec("numba_cuda"):
        return []
    return [
        (room, kernel.__name__) for room in ROOMS for kernel in importlib.import_module(f"hbkit.cuda.{room}").SIGNATURES
    ]


@pytest.mark.parametrize("cc", ARCHITECTURES, ids=["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize(("room", "name"), kernels())
def test_kernel_assembles_without_spills_or_local_arrays(room, name, cc, tmp_path):
    from numba import cuda

    module = importlib.import_module(f"hbkit.cuda.{room}")
    kernel = getattr(module, name)
    ptx, _ = cuda.compile_ptx(kernel, module.SIGNATURES[kernel], cc=cc)
    assert ".visible .entry" in ptx
    if room != "kernels":
        assert "f64" not in ptx  # 64-bit words: a signed and an unsigned one together would become a float
    assembler = ptxas()
    if assembler is None:
        pytest.skip("ptxas is not installed: pip install nvidia-cuda-nvcc")
    (tmp_path / "kernel.ptx").write_text(ptx)
    target = f"sm_{cc[0]}{cc[1]}"
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
    print(f"{room}.{name} {target}: {registers} registers, {shared[1] if shared else 0} bytes of shared memory")
    frame, stores, loads = map(
        int,
        re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr).groups(),
    )
    assert stores == loads == 0
    assert frame == 0 or name in LOCAL_ARRAYS


# The partial sums of a row are indexed by its columns, whose number is not known when it compiles.
LOCAL_ARRAYS = {"rowwise_adagrad"}
