"""Numba CUDA kernels for rows in device memory, and how they are launched.

Nothing here is imported by ``import hbkit``; Numba itself is imported when a `device.Device` is opened. The same
kernels run in Numba's simulator (``NUMBA_ENABLE_CUDASIM=1``).
"""
