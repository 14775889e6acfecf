"""The kernels of another architecture, cross-compiled and emulated, against those of this machine, bit for bit."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
EXT = HERE.parents[1] / "hbkit" / "_ext"
FLAGS = ["-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", f"-I{EXT}"]  # as setup.py


def digest(where, isa, compiler, *options, emulator=()):
    program = where / f"digest_{isa}"
    objects = []
    for source in ("kernels.c", "decode.c", "snappy_kernel.c", "index_kernel.c", "dedupe_kernel.c", "wire_kernel.c"):
        objects.append(where / f"{source}_{isa}.o")
        subprocess.run(
            [*compiler, *FLAGS, *options, f"-DHBKIT_ISA={isa}", "-c", EXT / source, "-o", objects[-1]], check=True
        )
    link = [
        *compiler,
        *FLAGS,
        f"-DKERNELS=hb_kernels_{isa}",
        HERE / "digest.c",
        *objects,
        "-lm",
        "-static",
        "-o",
        program,
    ]
    subprocess.run(link, check=True)
    return subprocess.run([*emulator, program], check=True, capture_output=True, text=True).stdout


def test_kernels_of_aarch64_give_the_bits_of_x86(tmp_path):
    for tool in ("gcc", "aarch64-linux-gnu-gcc", "qemu-aarch64"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed (Debian: gcc-aarch64-linux-gnu, libc6-dev-arm64-cross, qemu-user)")
    here = subprocess.run(["gcc", "-dumpmachine"], check=True, capture_output=True, text=True).stdout
    if not here.startswith("x86_64"):
        pytest.skip(f"this machine is {here.strip()}, not x86-64")
    baseline = digest(tmp_path, "v2", ["gcc"], "-march=x86-64-v2")
    assert digest(tmp_path, "neon", ["aarch64-linux-gnu-gcc"], emulator=["qemu-aarch64"]) == baseline
