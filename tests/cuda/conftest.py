"""Lanes: tests of kernels that take `lane` run in two kinds of make-believe here, and on a GPU where there is one.

"cudasim" is Numba's simulator, which runs the Python of a kernel. "soft" is a CUDA driver in software (soft/): all is
as on a GPU, Numba CUDA and what it compiles a kernel to, but for who runs that. Both are chosen before Numba is loaded.
So a file with lanes runs itself once more in processes of their own, by tests that call `in_simulator(__file__)` and
`on_soft_devices(__file__)`; there its lane is theirs. The lane "cpu" checks the oracle alone.
"""

import os
import random
import sys

import numpy as np
import pytest
import soft

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
SOFT = soft.driver  # the software driver, where it is loaded


def missing(lane):
    """Why a lane can't run in this process, or None."""
    if SOFT:
        return None if lane == "soft" else "devices are those of the software driver"
    if lane == "soft":
        return "the software driver has a process of its own"
    if lane == "cpu":
        return "the oracle needs no simulator" if SIMULATED else None
    if lane == "cudasim":
        return None if SIMULATED else "the simulator runs in a process of its own"
    if SIMULATED:
        return "this is the simulator"
    try:
        from numba import cuda
    except ImportError:
        return "Numba is not installed"
    return None if cuda.is_available() else "no CUDA device"


@pytest.fixture(scope="module", params=["cpu", "cudasim", "soft", "cuda"])
def lane(request):
    """The lane: "cpu", "cudasim", "soft" or "cuda"; skipped by name where it is not there."""
    why = missing(request.param)
    if why:
        pytest.skip(f"lane {request.param}: {why}")
    return request.param


@pytest.fixture(scope="module")
def device(lane):
    """The lane's device; None in the lane "cpu"."""
    if lane == "cpu":
        return None
    from hbkit.cuda.device import Device

    if SIMULATED:  # threads wait for each other at each vote, and would do so for 5 ms
        sys.setswitchinterval(1e-4)
    return Device()


@pytest.fixture(autouse=True)
def well():
    """A test that loses a software device does not lose it for others."""
    yield
    if SOFT and SOFT.report:
        SOFT.revive()


@pytest.fixture(params=[0, 1])
def any_order(lane, request, monkeypatch):
    """In the simulator, blocks and threads start in a random order, and threads change places often.

    So they do on software devices always; here by two seeds.
    """
    if lane == "soft":
        SOFT.configure(seed=SOFT.seed + 1000 * request.param)
        yield
        SOFT.configure()
        return
    if lane != "cudasim":
        if request.param:
            pytest.skip(f"lane {lane}: the order of threads is not chosen")
        yield
        return
    from numba.cuda.simulator import kernel

    rng = random.Random(request.param)

    class Shuffled:
        """NumPy as the simulator uses it, but for the order in which it goes through a grid or block."""

        def __getattr__(self, name):
            return getattr(np, name)

        def ndindex(self, *shape):
            points = list(np.ndindex(*shape))
            rng.shuffle(points)
            return points

    monkeypatch.setattr(kernel, "np", Shuffled())
    sys.setswitchinterval(1e-6 if request.param else 1e-4)
    yield
    sys.setswitchinterval(1e-4)
