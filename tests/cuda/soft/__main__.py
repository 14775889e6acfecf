"""Run a Python file or module on software devices: ``python tests/cuda/soft bench/gpu.py --small``, ``... -m pytest``.

SOFT_CUDA_SEED chooses the order in which streams and threads run, SOFT_CUDA_DEVICES how many devices there are.
"""

import os
import runpy
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
import soft

soft.load(int(os.environ.get("SOFT_CUDA_SEED", "1")), int(os.environ.get("SOFT_CUDA_DEVICES", "2")))
del sys.argv[0]
if sys.argv[0] == "-m":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
