"""A CUDA driver in software (driver.c), loaded in place of NVIDIA's: real Numba CUDA runs on it, without a GPU."""

import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import pickle
import subprocess
import sys
import traceback
from pathlib import Path

HERE = Path(__file__).parent
BUILD = HERE.parents[2] / "build" / "soft"
TRANSLATE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int)


def appear(path, make):
    """Let a file appear at once, whole, where several processes may make it: ``make(unfinished)`` writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    make(unfinished)
    unfinished.rename(path)


def shared_object(source, name="soft.so", *options):
    """Compile a C file into build/soft, once for each text. Gives the path."""
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", *options]
    digest = hashlib.sha256(" ".join(command).encode() + source.read_bytes()).hexdigest()[:24]
    path = BUILD / digest / name
    if not path.exists():
        appear(path, lambda to: subprocess.run([*command, "-o", to, source], check=True))
    return path


class Compiled:
    """What Numba made of a kernel of hbkit, kept in build/soft: processes of one run of tests need the same ones.

    Numba's own cache looks at the kernel's file alone, not at those whose functions it calls.
    """

    def __init__(self, kernel):
        self._kernel = kernel

    @staticmethod
    @functools.cache
    def _folder():
        code = Path(importlib.util.find_spec("hbkit").origin).parent / "cuda"
        text = b"".join(path.read_bytes() for path in sorted(code.glob("*.py")))
        version = f"{sys.version} {importlib.metadata.version('numba-cuda')} {driver.tiles}"
        return BUILD / hashlib.sha256(version.encode() + text).hexdigest()[:24]

    def _path(self, signature):
        module = sys.modules[self._kernel.__module__]  # whose constants a test may have changed
        constants = sorted((name, value) for name, value in vars(module).items() if type(value) is int)
        name = f"{module.__name__}.{self._kernel.__name__}{signature}{constants}"
        return self._folder() / hashlib.sha256(name.encode()).hexdigest()[:24]

    def load_overload(self, signature, target):
        path = self._path(signature)
        return pickle.loads(path.read_bytes()) if path.exists() else None

    def save_overload(self, signature, compiled):
        from numba.cuda import serialize

        appear(self._path(signature), lambda to: to.write_bytes(serialize.dumps(compiled)))


driver = None  # the one that was loaded into this process


def load(*args, **options):
    """Load the driver as `Driver` takes it; it stands in `driver` from then on."""
    global driver
    driver = Driver(*args, **options)
    return driver


class Driver:
    """The loaded driver.

    Parameters
    ----------
    seed : int
        Of the order in which streams and threads run; 0 runs all at once, in plain order.
    devices : int
    memory : int
        Bytes of each device.
    kernels : bool
        Whether kernels run; else a launch does nothing.
    race_check : bool
    tiles : int, optional
        How many warps share a scan, in place of what hbkit has, which is for a whole GPU.
    """

    def __init__(self, seed=1, devices=1, memory=16 << 30, kernels=True, race_check=True, tiles=None):
        if "numba" in sys.modules:
            raise RuntimeError("the driver must be there before Numba is imported")
        options = ("-O2", "-fvisibility=hidden", "-Wl,-soname,libcuda.so.1", "-lpthread", "-ldl")
        self._library = ctypes.CDLL(str(shared_object(HERE / "driver.c", "libcuda.so.1", *options)), ctypes.RTLD_GLOBAL)
        self._library.soft_report.restype = ctypes.c_char_p
        self._library.soft_used.restype = ctypes.c_uint64
        self._library.soft_fail.argtypes = ctypes.c_char_p, ctypes.c_long, ctypes.c_int
        self._translate = TRANSLATE(self._translated) if kernels else TRANSLATE()
        self.seed, self.tiles, self._devices, self._memory, self._race_check = seed, tiles, devices, memory, race_check
        self.configure()
        self._patch_numba()
        if tiles:
            from hbkit.cuda import tiles as scans

            scans.TILES = tiles

    def configure(self, seed=None, memory=None, race_check=None):
        """From now on; what is left out is as the driver was loaded."""
        memory = self._memory if memory is None else memory
        self._library.soft_configure(
            self._devices,
            ctypes.c_uint64(memory),
            ctypes.c_uint64(self.seed if seed is None else seed),
            self._race_check if race_check is None else race_check,
            self._translate,
        )

    def fail(self, name, kth, code):
        """Let the `kth` call from now on (1: the next) of the driver's function `name` give the error `code`.

        "run" and "copy" count kernels and copies as they run: the call that queues one succeeds.
        """
        self._library.soft_fail(name.encode(), kth, code)

    def to_come(self):
        """How many of the faults have not come yet."""
        return self._library.soft_to_come()

    def revive(self):
        """Bring lost devices back, as a new process would; what was queued is dropped, memory stays."""
        self._library.soft_revive()

    @property
    def report(self):
        """What lost a device last, or ''."""
        return self._library.soft_report().decode()

    def used(self, device=0):
        """Bytes of a device's memory that are allocated."""
        return self._library.soft_used(device)

    @staticmethod
    def _translated(ptx, path, n):
        try:
            from . import ptx as translator

            found = os.fsencode(translator.shared_object(ptx.decode())) + b"\0"
            if len(found) > n:
                raise ValueError(f"the path has {len(found)} bytes: {found}")
            ctypes.memmove(path, found, len(found))
            return 0
        except Exception:
            traceback.print_exc()
            return 1

    @staticmethod
    def _patch_numba():
        """Let Numba hand PTX to the driver instead of having it assembled, and keep what it compiles."""
        from numba.cuda.codegen import CUDACodeLibrary
        from numba.cuda.cudadrv.driver import ObjectCode
        from numba.cuda.dispatcher import CUDADispatcher

        def get_cubin(self, cc=None):
            (text,) = self.get_asm_strs(cc=cc)
            return ObjectCode.from_ptx(text.encode(), name=self.name)

        def init(self, kernel, *args, **kwargs):
            original(self, kernel, *args, **kwargs)
            if kernel.__module__.startswith("hbkit."):
                self._cache = Compiled(kernel)

        original, CUDADispatcher.__init__ = CUDADispatcher.__init__, init
        CUDACodeLibrary.get_cubin = get_cubin
