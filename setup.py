"""Build the Cython extensions, and the kernels once for each instruction set (docs/adr/0002)."""

import os
import platform
import sys
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

EXT = Path("hbkit/_ext")
DEBUG = os.environ.get("HBKIT_DEBUG") == "1"
# clang's sanitizers, for `make asan` and `make fuzz`
SANITIZE = os.environ.get("HBKIT_SANITIZE", "")
# Builds lie apart, since timestamps do not tell their files from each other.
BUILD = {"1": "build/asan", "fuzz": "build/fuzz"}.get(SANITIZE, "build/debug" if DEBUG else "build")

X86 = platform.machine().lower() in ("x86_64", "amd64")
MARCH = {"v2": "x86-64-v2", "v3": "x86-64-v3", "v4": "x86-64-v4"} if X86 else {"neon": None}
SOURCES = [
    str(EXT / name)
    for name in ("kernels.c", "decode.c", "snappy_kernel.c", "index_kernel.c", "dedupe_kernel.c", "wire_kernel.c")
]
# Promise 1: no contraction into fma, so that every instruction set gives the same bits.
CFLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-Werror=vla"]
# Only for compiling: an extension brings no sanitizer of its own, the process has loaded one before (LD_PRELOAD).
SANITIZER = ["-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-fsanitize=address"] if SANITIZE else []
SANITIZER += {"1": ["-fsanitize=undefined"], "fuzz": ["-fsanitize=fuzzer-no-link"]}.get(SANITIZE, [])


class BuildExt(build_ext):
    """Compiles SOURCES for each instruction set and links the objects to hbkit._ext.isa alone."""

    def build_extensions(self) -> None:
        objects = []
        for isa, march in MARCH.items():
            objects += self.compiler.compile(
                SOURCES,
                output_dir=f"{self.build_temp}/{isa}",
                macros=[("HBKIT_ISA", isa)],
                extra_postargs=["-std=c11", *CFLAGS, *SANITIZER, *([f"-march={march}"] if march else [])],
            )
        isa = next(e for e in self.extensions if e.name == "hbkit._ext.isa")
        isa.extra_objects = objects
        super().build_extensions()


if sys.byteorder != "little":
    sys.exit("hbkit: Parquet and the kernels assume a little-endian machine")

setup(
    ext_modules=cythonize(
        [
            Extension(
                f"hbkit._ext.{path.stem}",
                [str(path)],
                depends=[str(path) for path in sorted(EXT.glob("*.[ch]"))],
                extra_compile_args=[
                    "-O3",
                    *([] if DEBUG or SANITIZE else ["-g0"]),
                    "-ffp-contract=off",
                    "-Wno-unused-function",
                    *SANITIZER,
                ],
                define_macros=[("CYTHON_CCOMPLEX", "0")],
            )
            for path in sorted(EXT.glob("*.pyx"))
        ],
        build_dir=f"{BUILD}/cython",
        compiler_directives={
            "language_level": 3,
            "boundscheck": DEBUG,
            "wraparound": False,  # with boundscheck, a negative index raises
            "initializedcheck": DEBUG,
            "cdivision": True,
            "embedsignature": True,
            "auto_pickle": False,
            "freethreading_compatible": False,
        },
    ),
    cmdclass={"build_ext": BuildExt},
    options={"build": {"build_base": BUILD}, "build_ext": {"parallel": os.cpu_count()}},
)
