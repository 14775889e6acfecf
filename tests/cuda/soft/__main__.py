"""Run a Python file or module on software devices: ``python tests/cuda/soft bench/gpu.py --small``, ``... -m pytest``.

SOFT_CUDA_SEED chooses the order in which streams and threads run, SOFT_CUDA_DEVICES how many devices there are,
SOFT_CUDA_TILES how many warps share a scan, where not as many as on a GPU.
"""

import os
import runpy
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
import soft  # noqa: E402 - it is found by the path that the line above sets

settings = {name: os.environ.get(f"SOFT_CUDA_{name.upper()}") for name in ("seed", "devices", "tiles")}
soft.load(**{"devices": 2, **{name: int(value) for name, value in settings.items() if value is not None}})
del sys.argv[0]
if sys.argv[0] == "-m":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
