"""Arrays in device memory and launches past Numba: the same parameters, in the right context, or a named error."""

import ctypes
import re
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from narrow import Far

from hbkit.errors import BudgetExceeded, DeviceUnavailable, InvalidArgument


def test_launches_on_soft_devices(on_soft_devices):
    on_soft_devices(__file__)


@pytest.fixture
def real(device, lane):
    """The device of a lane that has CUDA's driver or one in software."""
    if lane in ("cpu", "cudasim"):
        pytest.skip(f"lane {lane}: no driver is called")
    return device


@pytest.fixture
def launched(real):
    """What launches gave the driver: (handle, grid, block, stream, parameters' addresses) each. None runs."""
    from hbkit._ext import driver
    from hbkit.cuda.driver import addresses

    calls, n = [], ctypes.c_uint
    kind = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.c_void_p, *[n] * 7, ctypes.c_void_p, *[ctypes.POINTER(ctypes.c_void_p)] * 2
    )

    @kind
    def record(handle, *rest):
        grid, block, stream, params = rest[:3], rest[3:6], rest[7], rest[8]
        calls.append((handle, grid, block, stream, params))
        values.extend(ctypes.cast(params[i], ctypes.POINTER(ctypes.c_uint64))[0] for i in range(n_params[0]))
        return 0

    n_params, values = [0], []
    driver.bind([*addresses()[:-1], ctypes.cast(record, ctypes.c_void_p).value])
    yield SimpleNamespace(calls=calls, n_params=n_params, values=values)
    driver.bind(addresses())


def of_numba(types, args):
    """Parameters of a launch as Numba makes them: 8 bytes each."""
    from numba import cuda
    from numba.cuda.dispatcher import _Kernel

    found = []
    for kind, value in zip(types, args, strict=True):
        theirs, begin = cuda.as_cuda_array(value) if hasattr(value, "ptr") else value, len(found)
        _Kernel._prepare_args(SimpleNamespace(extensions=[]), kind, theirs, 0, [], found)
        if getattr(value, "size", 1) == 0:
            found[begin + 4] = value.ptr  # no address matters; Numba's is 0
    return [(v.value if hasattr(v, "value") else int(v)) & (1 << 64) - 1 for v in found]


@pytest.mark.parametrize("seed", range(3))
def test_parameters_are_those_that_numba_gives(real, launched, seed):
    from numba.cuda import types
    from numba.cuda.core import sigutils

    from hbkit._ext.driver import Kernel
    from hbkit.cuda.driver import types_of
    from hbkit.cuda.kernels import SIGNATURES

    rng = np.random.default_rng(seed)
    for kernel, signature in SIGNATURES.items():
        args, own = [], types_of(signature)
        for dtype, n_dims in own:
            if dtype is None:
                args.append(int(rng.integers(-(2**63), 2**63 - 1)))
            else:
                whole = real.empty(tuple(rng.integers(0, 9, n_dims).tolist()), dtype)
                args.append(whole[int(rng.integers(0, 4)) :])
        kinds, _ = sigutils.normalize_signature(signature)
        want = of_numba(kinds, args)
        launched.n_params[0], launched.values[:] = len(want), []
        Kernel(kernel.__name__, 77, own, None)(real._stream, 5, 128, tuple(args[:-1]), args[-1])
        assert launched.values == want
        handle, grid, block, stream, _ = launched.calls.pop()
        assert (handle, grid, block, stream) == (77, (5, 1, 1), (128, 1, 1), real._stream.handle)
        assert isinstance(kinds[-1], types.Array)


def test_arguments_that_do_not_fit_are_refused_by_name(real):
    from hbkit.cuda.buckets import mark

    def launch(*args):
        real.launch(mark, 3, *args)

    keys, entries = real.send(np.zeros(8, np.int64)), real.send(np.zeros((8, 2), np.int64))
    for wrong, says in (
        ((keys, entries, keys), "3 arguments of mark"),
        ((keys, entries, keys, keys), "argument 3 of mark is int64(8,): give int64"),
        ((keys, entries, keys, 0.5), "argument 3 of mark is 0.5"),
        ((keys, entries, keys, 2**63), "argument 3 of mark is 9223372036854775808"),
        ((keys, entries, keys, -(2**63) - 1), "argument 3 of mark is -9223372036854775809"),
        ((keys, keys, keys, 1), "argument 1 of mark is int64(8,): give a device array of int64 of 2 dimensions"),
        ((keys, entries.view(np.uint64), keys, 1), "argument 1 of mark is uint64(8, 2)"),
        ((keys, entries.view(np.float64), keys, 1), "argument 1 of mark is float64(8, 2)"),
        ((keys, entries.view(np.int32), keys, 1), "argument 1 of mark is int32(8, 4)"),
        ((keys, entries, np.zeros(8, np.int64), 1), "argument 2 of mark is int64(8,)"),
        ((keys, entries, None, 1), "argument 2 of mark is None"),
    ):
        with pytest.raises(InvalidArgument, match=re.escape(says)):
            launch(*wrong)
    launch(keys, entries, keys, np.int64(1))  # NumPy's numbers are numbers
    real.sync()


def test_number_of_another_type_is_refused_before_it_is_compiled(lane):
    pytest.importorskip("numba_cuda")
    if lane == "cudasim":
        pytest.skip("lane cudasim: Numba prepares the arguments")
    from hbkit.cuda.driver import types_of

    assert types_of("void(int64, uint8[::1], float32[:,::1])") == ((None, 0), (np.uint8, 1), (np.float32, 2))
    with pytest.raises(InvalidArgument, match=r"float32.*give it int64"):
        types_of("void(float32, int32[::1])")


# --- arrays -----------------------------------------------------------------------------------------------------


def test_arrays_do_what_narrow_ones_do_and_no_more(real):
    rng = np.random.default_rng(1)

    def both(shape, dtype=np.float32):
        near = rng.integers(0, 99, shape).astype(dtype)
        return real.send(near), Far(near)

    def same(call):
        for shape in ((6,), (6, 4), (0,), (0, 4), (1, 8)):
            a, b = both(shape)
            try:
                want = call(b)
            except (AssertionError, TypeError, ValueError, AttributeError) as e:
                with pytest.raises((TypeError, ValueError, AttributeError)):
                    call(a)
                assert e is not None
                continue
            got = call(a)
            if isinstance(want, Far):
                assert [getattr(got, k) for k in names] == [getattr(want, k) for k in names]
                got, want = got.copy_to_host(), want.copy_to_host()
            assert np.array_equal(got, want)

    names = ("shape", "dtype", "size", "ndim")
    for call in (
        len,
        lambda a: a[1:3],
        lambda a: a[:],
        lambda a: a[-2:],
        lambda a: a[4:99],
        lambda a: a[3:1],
        lambda a: a[1:5][1:3],
        lambda a: a[2],
        lambda a: a[::2],
        lambda a: a[1:2, 1:2],
        lambda a: a[[1, 2]],
        lambda a: a.reshape(a.size),
        lambda a: a.reshape(2, 3),
        lambda a: a.reshape(-1),
        lambda a: a.reshape(3, -1),
        lambda a: a.reshape((-1, 4)),
        lambda a: a.reshape(-1, 0),
        lambda a: a.reshape(-1, -1),
        lambda a: a.reshape(-2, -3),
        lambda a: a.reshape(7, -1),
        lambda a: a.reshape((a.size, 1)),
        lambda a: a.view(np.uint16),
        lambda a: a.view(np.int64),
        lambda a: a[:1].view(np.uint8).reshape(4, 4),
        lambda a: a.copy_to_host(),
        lambda a: a.copy_to_host(np.empty(a.shape, a.dtype)),
        lambda a: a + 1,
        lambda a: list(a),
        lambda a: a.__setitem__(0, 1),
        lambda a: a.sum(),
        lambda a: a.fill(0),
    ):
        same(call)
    public = {name for name in dir(real.none(np.int64)) if not name.startswith("_")}
    assert public - {name for name in dir(Far) if not name.startswith("_")} == {"ptr", "copy_to_device"}


def test_memory_lives_as_long_as_an_array_of_it(real, lane):
    if lane != "soft":
        pytest.skip(f"lane {lane}: others use the device's memory, too")
    from soft import driver

    before, n = driver.used(), 1 << 18
    part = real.send(np.arange(n)).reshape(n // 8, 8)[3:4].view(np.int32)
    assert driver.used() > before
    assert real.fetch(part).view(np.int64).tolist() == [list(range(24, 32))]
    del part
    assert driver.used() == before


def test_small_memory_is_used_again_where_one_stream_used_it(real, lane):
    from hbkit.cuda.buckets import age
    from hbkit.cuda.device import Device

    other = Device()

    def one(use=lambda array: None):
        array = real.send(np.arange(50))
        use(array)
        return array.ptr

    def copies(array):
        real.copy_in([(array, np.frombuffer(real.pinned(400), np.int64))], real.event())

    def launches(device):
        return lambda array: device.launch(age, 4, array[:8].reshape(4, 2))

    at = one()
    assert one() == one(launches(real)) == one() == at
    for use in (copies, launches(other), lambda array: array.__cuda_array_interface__):
        assert one(use) == at  # and then it is freed
        freed, at = at, one()
        if lane == "soft":  # where no address is given out twice
            assert at != freed
    kept = [real.send(np.full(50, i)) for i in range(20)]
    assert len({array.ptr for array in kept}) == 20
    assert [int(real.fetch(array)[49]) for array in kept] == list(range(20))


def test_arrays_of_others_are_taken_where_they_are_contiguous(real):
    ours = real.send(np.arange(12, dtype=np.float32).reshape(3, 4))
    waited = real.event()

    def given(**changes):
        return SimpleNamespace(__cuda_array_interface__={**ours.__cuda_array_interface__, **changes})

    for other in (given(), given(strides=(16, 4)), given(stream=1), given(stream=real._copies.handle)):
        there = real.array(other, np.float32)
        assert there.ptr == ours.ptr and np.array_equal(real.fetch(there), real.fetch(ours))
    assert real.array(given(shape=(0, 4), data=(None, False), strides=(16, 4))).size == 0
    with pytest.raises(InvalidArgument, match=r"strides of \(4, 12\)"):
        real.array(given(shape=(4, 3), strides=(4, 12)))
    with pytest.raises(InvalidArgument, match="a list that is not in device memory"):
        real.array([1, 2])
    with pytest.raises(InvalidArgument, match="give one of int64"):
        real.array(given(), np.int64)
    waited.record(real._stream)
    waited.synchronize()


def test_copies_between_arrays_that_differ_are_refused(real):
    a, near = real.send(np.zeros(4, np.int64)), np.zeros(3, np.int64)
    for call in (lambda: real.write(a, near), lambda: real.write(a, a[:2]), lambda: a.copy_to_device(near)):
        with pytest.raises(InvalidArgument, match="bytes copied to 32"):
            call()
    with pytest.raises(InvalidArgument, match="the same shape and dtype"):
        real.fetch(a, np.zeros(4, np.float64))
    with pytest.raises(ValueError, match="contiguous"):
        real.fetch(a, np.zeros((4, 2), np.int64)[:, 0])
    with pytest.raises(ValueError, match="read-only"):
        out = np.zeros(4, np.int64)
        out.setflags(write=False)
        real.fetch(a, out)
    big = np.arange(100_000)  # goes past the pinned memory of small fetches
    assert np.array_equal(real.fetch(real.send(big)), big)
    with pytest.raises(BudgetExceeded, match="cache_budget"):
        real.empty((2**44,), np.int64)


# --- contexts, threads, devices ---------------------------------------------------------------------------------


def test_a_thread_keeps_the_context_that_it_had(real, lane):
    from cuda.bindings import driver

    from hbkit.cuda.device import Device

    def current():
        return int(driver.cuCtxGetCurrent()[1])

    def use(device, found):
        before = current()
        a = device.send(np.arange(8))
        b = device.empty((8,), np.int64)
        device.write(b, a)
        found.append(device.fetch(b).tolist() == list(range(8)) and current() == before)

    found = []
    use(real, found)
    thread = threading.Thread(target=use, args=(real, found))  # which has none
    thread.start()
    thread.join()
    if driver.cuDeviceGetCount()[1] > 1:
        other = Device("cuda:1")
        use(other, found)
        context = driver.cuDevicePrimaryCtxRetain(1)[1]
        driver.cuCtxPushCurrent(context)
        use(real, found)  # while the thread's is the other one
        use(other, found)
        driver.cuCtxPopCurrent()
    assert len(found) >= 2 and all(found)


def test_kernels_run_on_the_device_that_they_are_launched_on(real):
    from hbkit.cuda.device import Device
    from hbkit.cuda.lists import spread_lists

    devices = [real, real]
    try:
        devices[1] = Device("cuda:1")
    except DeviceUnavailable as e:
        assert "there are 1 CUDA devices" in str(e)
    for device in devices:
        rows = device.empty((5,), np.int64)
        spread_lists(device, np.array([0, 2, 5]), None, None, 10, 3, rows, None)
        assert device.fetch(rows).tolist() == [10, 10, 13, 13, 13]


def test_threads_may_wait_at_once(real):
    from hbkit.cuda.lists import spread_lists

    wrong = []

    def work(first):
        for i in range(20):
            rows = real.empty((5,), np.int64)
            spread_lists(real, np.array([0, 2, 5]), None, None, first + i, 3, rows, None)
            if real.fetch(rows).tolist() != [first + i] * 2 + [first + i + 3] * 3:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(1000 * k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_kernel_is_compiled_once_for_all_tables(real):
    from hbkit.cuda.buckets import age
    from hbkit.cuda.device import Device
    from hbkit.cuda.driver import compiled

    entries = real.send(np.zeros((4, 2), np.int64))
    real.launch(age, 4, entries)
    n = compiled.cache_info().misses
    other = Device()
    other.launch(age, 4, other.send(np.zeros((4, 2), np.int64)))
    other.sync()
    assert compiled.cache_info().misses == n


def test_a_lost_device_is_named(real, lane):
    if lane != "soft":
        pytest.skip(f"lane {lane}: the device would be lost")
    from soft import driver

    driver.fail("cuLaunchKernel", 1, 700)
    from hbkit.cuda.buckets import age

    with pytest.raises(DeviceUnavailable, match=r"CUDA_ERROR_ILLEGAL_ADDRESS \(device cuda:0\)"):
        real.launch(age, 4, real.send(np.zeros((4, 2), np.int64)))
    driver.revive()
    real.sync()


def test_memory_that_is_not_there_is_a_budget_error(real, lane):
    if lane != "soft":
        pytest.skip(f"lane {lane}: the host has more")
    from soft import driver

    for function, make, says in (
        ("cuMemAlloc", lambda: real.empty((1 << 20,), np.int64), "no 8388608 bytes are left in device memory"),
        ("cuMemHostAlloc", lambda: real.pinned(99), "no 99 bytes are left of the host's memory that can be pinned"),
    ):
        driver.fail(function, 1, 2)
        with pytest.raises(BudgetExceeded, match=f"{says}.*cache_budget"):
            make()
        assert len(make())
