"""What only a driver can give: no device, memory short at each allocation, a device lost at each call in turn."""

import gc
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import soft
from homes import contents

from hbkit import errors
from hbkit.embedding import Adagrad, Table
from hbkit.store import device_cached, host_memory

SOFT = soft.driver
DIM, N_KEYS = 4, 60


def test_faults_on_soft_devices(on_soft_devices):
    on_soft_devices(__file__)


@pytest.fixture(name="driver")
def soft_driver():
    if SOFT is None:
        pytest.skip("the software driver has a process of its own")
    yield SOFT
    SOFT.revive()
    SOFT.configure()
    gc.collect()


def table(below=None, budget="64KiB", device="cuda:0"):
    store = host_memory() if device is None else device_cached(below or host_memory(), budget, device)
    return Table("t", DIM, optimizer=Adagrad(), store=store)


def step(t, seed):
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, N_KEYS, 40)
    t.lookup(keys, train=True)
    t.update(keys, rng.standard_normal((40, DIM)).astype(np.float32))


def each_call(name, code, run):
    """`run` once for each call of the driver's function `name` in it, which fails; what it raised, in order."""
    for k in itertools.count(1):
        SOFT.fail(name, k, code)
        try:
            run()
        except errors.HbkitError as e:
            yield e
        else:
            if SOFT.to_come():  # fewer calls than that
                SOFT.fail(name, 0, 0)
                return
            yield None


@pytest.mark.parametrize("name", ["cuMemAlloc", "cuMemHostAlloc"])
def test_memory_that_runs_out_as_a_table_opens(driver, name):
    table().close()
    gc.collect()
    before, n = driver.used(), 0
    for failed in each_call(name, 2, lambda: table().close()):
        assert isinstance(failed, errors.BudgetExceeded), repr(failed)
        del failed
        n += 1
    gc.collect()
    assert n >= {"cuMemAlloc": 8, "cuMemHostAlloc": 2}[name]
    assert driver.used() <= before + 4096  # Numba frees late, but nothing is kept


def test_memory_that_runs_out_in_a_step_leaves_a_table_that_goes_on(driver):
    host, t, rng = table(device=None), table(budget="4MiB"), np.random.default_rng(3)

    def twice(call, *args):
        """Again where memory was short the first time; whether it was."""
        driver.fail("cuMemAlloc", int(rng.integers(1, 4)), 2)
        try:
            call(*args)
        except errors.BudgetExceeded as e:
            assert "bytes are left" in str(e)
            call(*args)
            return True
        driver.fail("cuMemAlloc", 0, 0)
        return False

    short = {"lookup": 0, "update": 0}
    for i in range(10):
        n = int(60 * 1.5**i)  # more memory than calls before have left
        keys, grads = rng.integers(0, 2000, n), rng.standard_normal((n, DIM)).astype(np.float32)
        short["lookup"] += twice(lambda t, keys: t.lookup(keys, train=True), t, keys)
        short["update"] += twice(t.update, keys, grads)
        host.lookup(keys, train=True)
        host.update(keys, grads)
        assert t.lookup(np.arange(2000)).tobytes() == host.lookup(np.arange(2000)).tobytes()
    assert min(short.values()) > 0, short
    t.close()


LOST = [
    ("run", 719),
    ("copy", 700),
    ("cuLaunchKernel", 719),
    ("cuStreamSynchronize", 700),
    ("cuEventRecord", 999),
]


@pytest.mark.parametrize(("name", "code"), LOST)
def test_a_device_lost_at_each_call_leaves_what_is_below(driver, name, code):
    tables = []

    def run():
        tables.append(t := table())
        step(t, 0)
        t.commit()
        below = contents(t.store.below)
        tables[-1] = t, below
        step(t, 1)
        step(t, 2)
        t.stats()
        t.close()

    n, in_steps = 0, 0
    for failed in each_call(name, code, run):
        n += 1  # one that nobody waits for any more is not raised
        assert failed is None or isinstance(failed, errors.DeviceUnavailable), repr(failed)
        assert failed is None or "cuda:0" in str(failed)
        last = tables.pop() if tables else None
        if failed and isinstance(last, tuple):
            in_steps += 1
            t, below = last
            assert contents(t.store.below) == below
            with pytest.raises((errors.DeviceUnavailable, errors.StorageError)):
                t.commit()
            assert contents(t.store.below) == below
            t.close()
        del failed, last
        driver.revive()
    assert in_steps > n // 4
    run()  # and a new table is as good as ever


def test_a_kernel_that_reads_freed_memory_loses_the_device(driver):
    from hbkit.cuda.device import Device
    from hbkit.cuda.lines import DeviceLines

    device = Device()
    lines, out = DeviceLines(device, 8, 4, 8), np.empty((8, 4), np.float32)
    lines.gather(np.arange(8), out)
    from cuda.bindings import driver as cu

    address = lines.lines.__cuda_array_interface__["data"][0]
    cu.cuCtxSetCurrent(cu.cuDevicePrimaryCtxRetain(0)[1])
    cu.cuMemFree(address)
    with pytest.raises(errors.DeviceUnavailable, match="ILLEGAL_ADDRESS"):
        lines.gather(np.arange(8), out)
    assert "hbkit.cuda.rows" in driver.report


def test_numbers_of_devices(driver):
    from hbkit.cuda.device import Device

    for name in ("cuda", "cuda:0", "cuda:1"):
        assert Device(name).name == name
    with pytest.raises(errors.DeviceUnavailable, match=r"there are 2 CUDA devices.*cuda:2"):
        Device("cuda:2")
    one, two = table(), table(device="cuda:1")
    for t in (one, two):
        before = driver.used(1)
        step(t, 0)
    assert contents(one.store) == contents(two.store) and before > 0


CODE = """
from hbkit import errors
from hbkit.embedding import Table
from hbkit.store import device_cached, host_memory
try:
    Table("t", 4, store=device_cached(host_memory(), "64KiB"))
except errors.DeviceUnavailable as e:
    print(e)
print(Table("t", 4, store=device_cached(host_memory(), "64KiB", device="auto")).stats().get("device"))
"""


def test_a_driver_without_devices(on_soft_devices, tmp_path):
    (tmp_path / "code.py").write_text(CODE)
    run = os.path.join(os.path.dirname(__file__), "soft")
    env = {**os.environ, "SOFT_CUDA_DEVICES": "0"}
    done = subprocess.run([sys.executable, run, "code.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, tier = done.stdout.splitlines()
    assert "no CUDA device or driver was found (device cuda:0): install an NVIDIA driver" in said and tier == "None"
