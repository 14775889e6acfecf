"""The CUDA driver in software does what CUDA documents, late where it may be late, and says what is misused."""

import threading

import numpy as np
import pytest
import soft

SOFT = soft.driver
SEEDS = range(1, 41)


def test_driver_in_a_process(on_soft_devices):
    on_soft_devices(__file__)


@pytest.fixture
def cu():
    """The driver's functions as Python has them, with device 0 current: each gives its results, or raises `Failed`."""
    if SOFT is None:
        pytest.skip("the software driver has a process of its own")
    from cuda.bindings import driver

    class Calls:
        def __getattr__(self, name):
            def call(*args):
                code, *results = getattr(driver, name)(*args)
                if code:
                    raise Failed(code.name.removeprefix("CUDA_ERROR_"))
                return results[0] if len(results) == 1 else results

            return call

    calls = Calls()
    calls.cuInit(0)
    calls.cuCtxPushCurrent(calls.cuDevicePrimaryCtxRetain(0))
    yield calls
    SOFT.revive()
    SOFT.configure()
    calls.cuCtxPopCurrent()


class Failed(Exception):
    pass


def pinned(cu, values):
    """Pinned memory with some bytes, as an array."""
    import ctypes

    at = cu.cuMemHostAlloc(len(values), 0)
    array = np.ctypeslib.as_array((ctypes.c_uint8 * len(values)).from_address(int(at)))
    array[:] = values
    return array


def at(array):
    return array.ctypes.data


def held(cu, memory, n=1):
    out = np.empty(n, np.uint8)
    cu.cuMemcpyDtoH(at(out), memory, n)
    return out.tolist()


def outcomes(run, seeds=SEEDS):
    """What `run` gives over many seeds."""
    found = set()
    for seed in seeds:
        SOFT.configure(seed=seed)
        found.add(run())
    return found


def test_a_pinned_buffer_is_read_when_the_copy_runs(cu):
    memory, stream, buffer = cu.cuMemAlloc(8), cu.cuStreamCreate(1), pinned(cu, [0])

    def reused(wait):
        buffer[0] = 1
        cu.cuMemcpyHtoDAsync(memory, at(buffer), 1, stream)
        if wait:
            cu.cuStreamSynchronize(stream)
        buffer[0] = 2
        cu.cuStreamSynchronize(stream)
        return held(cu, memory)[0]

    assert outcomes(lambda: reused(False)) == {1, 2}
    assert outcomes(lambda: reused(True)) == {1}


def test_a_pinned_buffer_is_written_when_the_copy_runs(cu):
    memory, stream, buffer = cu.cuMemAlloc(8), cu.cuStreamCreate(0), pinned(cu, [0])
    cu.cuMemsetD8(memory, 5, 8)
    cu.cuCtxSynchronize()

    def read():
        buffer[0] = 0
        cu.cuMemcpyDtoHAsync(at(buffer), memory, 1, stream)
        early = buffer[0]
        cu.cuStreamSynchronize(stream)
        assert buffer[0] == 5
        return early

    assert outcomes(read) == {0, 5}


def test_pageable_memory_is_taken_at_once_and_waited_for(cu):
    memory, stream = cu.cuMemAlloc(8), cu.cuStreamCreate(1)
    near = np.zeros(1, np.uint8)

    def there_and_back():
        near[0] = 3
        cu.cuMemcpyHtoDAsync(memory, at(near), 1, stream)
        near[0] = 4
        cu.cuMemcpyDtoHAsync(at(near), memory, 1, stream)
        return near[0]

    assert outcomes(there_and_back) == {3}


def test_streams_are_ordered_by_events_alone(cu):
    memory, (a, b) = cu.cuMemAlloc(8), (cu.cuStreamCreate(0) for _ in range(2))
    event = cu.cuEventCreate(2)

    def last(ordered):
        cu.cuMemsetD8Async(memory, 1, 1, a)
        cu.cuEventRecord(event, a)
        cu.cuMemsetD8Async(memory, 9, 1, a)  # after the record: b is not told to wait for it
        cu.cuMemsetD8Async(memory, 1, 1, a)
        if ordered:
            cu.cuEventRecord(event, a)
        cu.cuStreamWaitEvent(b, event, 0)
        cu.cuMemsetD8Async(memory, 2, 1, b)
        cu.cuCtxSynchronize()
        return held(cu, memory)[0]

    assert outcomes(lambda: last(True)) == {2}
    assert outcomes(lambda: last(False)) == {1, 2}


def test_the_default_stream_waits_for_blocking_streams_and_they_for_it(cu):
    memory, streams = cu.cuMemAlloc(8), {flags: cu.cuStreamCreate(flags) for flags in (0, 1)}

    def around(stream):
        cu.cuMemsetD8Async(memory, 1, 1, stream)
        cu.cuMemsetD8(memory, 2, 1)
        cu.cuMemsetD8Async(memory + 1, 2, 1, 0)
        cu.cuMemcpyDtoDAsync(memory + 2, memory, 2, stream)
        cu.cuCtxSynchronize()
        found = tuple(held(cu, memory + 2, 2))
        cu.cuMemsetD8(memory, 0, 8)
        cu.cuCtxSynchronize()
        return found

    memory = int(memory)
    cu.cuMemsetD8(memory, 0, 8)
    cu.cuCtxSynchronize()
    assert outcomes(lambda: around(streams[0])) == {(2, 2)}
    assert len(outcomes(lambda: around(streams[1]))) > 1


def test_polling_gets_there(cu):
    memory, stream, event = cu.cuMemAlloc(8), cu.cuStreamCreate(1), cu.cuEventCreate(2)
    assert not cu.cuEventQuery(event)  # never recorded: nothing to wait for, as CUDA has it
    cu.cuStreamWaitEvent(stream, event, 0)
    cu.cuEventSynchronize(event)
    for _ in range(40):
        cu.cuMemsetD8Async(memory, 1, 1, stream)
    cu.cuEventRecord(event, stream)
    refused = 0
    while True:
        try:
            cu.cuEventQuery(event)
            break
        except Failed as e:
            assert str(e) == "NOT_READY"
            refused += 1
    assert refused > 5
    cu.cuStreamQuery(stream)


def test_seed_0_runs_all_at_once(cu):
    SOFT.configure(seed=0)
    memory, stream, buffer = cu.cuMemAlloc(8), cu.cuStreamCreate(1), pinned(cu, [7])
    cu.cuMemcpyHtoDAsync(memory, at(buffer), 1, stream)
    buffer[0] = 8
    assert held(cu, memory) == [7]
    cu.cuStreamQuery(stream)


def test_times_of_events(cu):
    stream, a, b, c = cu.cuStreamCreate(1), cu.cuEventCreate(0), cu.cuEventCreate(0), cu.cuEventCreate(2)
    with pytest.raises(Failed, match="INVALID_HANDLE"):
        cu.cuEventElapsedTime(a, b)  # never recorded
    for event in (a, b, c):
        cu.cuEventRecord(event, stream)
    cu.cuStreamSynchronize(stream)
    assert cu.cuEventElapsedTime(a, b) >= 0
    with pytest.raises(Failed, match="INVALID_HANDLE"):
        cu.cuEventElapsedTime(a, c)  # takes no time


def test_fresh_memory_is_not_zero_and_starts_where_cuda_promises(cu):
    offsets = set()
    for _ in range(40):
        memory = cu.cuMemAlloc(100)
        assert held(cu, memory, 100) == [0x5A] * 100
        offsets.add(int(memory) % 4096)
        assert int(memory) % 256 == 0
    assert len(offsets) > 4


def test_memory_that_is_not_there_is_refused(cu):
    memory, near, buffer = cu.cuMemAlloc(100), np.zeros(200, np.uint8), pinned(cu, [0] * 100)
    for to, n in ((memory, 101), (int(memory) + 100, 1), (int(memory) - 1, 1), (at(near), 1), (0, 1)):
        with pytest.raises(Failed, match="INVALID_VALUE"):
            cu.cuMemcpyHtoD(to, at(near), n)
        with pytest.raises(Failed, match="INVALID_VALUE"):
            cu.cuMemsetD8(to, 0, n)
    with pytest.raises(Failed, match="INVALID_VALUE"):
        cu.cuMemcpyHtoD(memory, at(buffer), 101)
    with pytest.raises(Failed, match="INVALID_VALUE"):
        cu.cuMemsetD32(int(memory) + 2, 0, 1)
    assert [int(a) for a in cu.cuMemGetAddressRange(int(memory) + 5)] == [int(memory), 100]
    cu.cuMemFree(memory)
    with pytest.raises(Failed, match="INVALID_VALUE"):
        cu.cuMemcpyDtoH(at(near), memory, 1)
    for wrong in (memory, int(memory) + 1, at(near), at(buffer)):
        with pytest.raises(Failed, match="INVALID_VALUE"):
            cu.cuMemFree(wrong)
    cu.cuMemFreeHost(at(buffer))
    with pytest.raises(Failed, match="INVALID_VALUE"):
        cu.cuMemFreeHost(at(buffer))
    with pytest.raises(Failed, match="INVALID_VALUE"):
        cu.cuMemAlloc(0)


def test_registered_memory_is_pinned_until_it_is_not(cu):
    near, memory, stream = np.zeros(100, np.uint8), cu.cuMemAlloc(8), cu.cuStreamCreate(1)
    cu.cuMemHostRegister(at(near), 100, 0)

    def late():
        near[0] = 1
        cu.cuMemcpyHtoDAsync(memory, at(near), 1, stream)
        near[0] = 2
        cu.cuStreamSynchronize(stream)
        return held(cu, memory)[0]

    assert outcomes(late) == {1, 2}
    cu.cuMemHostUnregister(at(near))
    assert outcomes(late) == {1}
    with pytest.raises(Failed, match="INVALID_VALUE"):
        cu.cuMemHostUnregister(at(near))


def test_freeing_waits_for_what_is_queued(cu):
    stream, buffer = cu.cuStreamCreate(1), pinned(cu, [0])
    for seed in SEEDS:
        SOFT.configure(seed=seed)
        memory = cu.cuMemAlloc(8)
        buffer[0] = 0
        cu.cuMemsetD8Async(memory, seed, 8, stream)
        cu.cuMemcpyDtoHAsync(at(buffer), memory, 1, stream)
        cu.cuMemFree(memory)
        assert buffer[0] == seed


def test_handles_that_are_destroyed_are_refused(cu):
    memory, stream, event = cu.cuMemAlloc(8), cu.cuStreamCreate(1), cu.cuEventCreate(2)
    cu.cuMemsetD8Async(memory, 6, 1, stream)
    cu.cuStreamDestroy(stream)  # what is queued runs
    cu.cuEventDestroy(event)
    cu.cuCtxSynchronize()
    assert held(cu, memory) == [6]
    other = cu.cuStreamCreate(1)
    for call in (
        lambda: cu.cuStreamSynchronize(stream),
        lambda: cu.cuStreamDestroy(stream),
        lambda: cu.cuMemsetD8Async(memory, 6, 1, stream),
        lambda: cu.cuEventDestroy(event),
        lambda: cu.cuEventRecord(event, other),
        lambda: cu.cuStreamWaitEvent(other, event, 0),
        lambda: cu.cuEventSynchronize(event),
    ):
        with pytest.raises(Failed, match="INVALID_HANDLE"):
            call()


def test_memory_is_as_large_as_was_set(cu):
    before = SOFT.used()
    SOFT.configure(memory=before + 1000)
    memory = cu.cuMemAlloc(600)
    assert [int(n) for n in cu.cuMemGetInfo()] == [400, before + 1000]
    for n in (401, 2**62):
        with pytest.raises(Failed, match="OUT_OF_MEMORY"):
            cu.cuMemAlloc(n)
    cu.cuMemFree(memory)
    assert SOFT.used() == before
    cu.cuMemFree(cu.cuMemAlloc(1000))


def test_a_call_fails_where_it_was_told_to(cu):
    SOFT.fail("cuMemAlloc", 2, 2)
    cu.cuMemAlloc(1)
    with pytest.raises(Failed, match="OUT_OF_MEMORY"):
        cu.cuMemAlloc(1)
    cu.cuMemAlloc(1)


@pytest.mark.parametrize("code", [700, 719])
def test_a_lost_device_stays_lost(cu, code):
    memory, stream, near = cu.cuMemAlloc(8), cu.cuStreamCreate(1), np.zeros(1, np.uint8)
    name = {700: "ILLEGAL_ADDRESS", 719: "LAUNCH_FAILED"}[code]
    SOFT.fail("copy", 1, code)
    cu.cuMemcpyHtoDAsync(memory, at(near), 1, stream)
    with pytest.raises(Failed, match=name):
        cu.cuStreamSynchronize(stream)
    for call in (lambda: cu.cuMemAlloc(8), lambda: cu.cuStreamSynchronize(stream), lambda: cu.cuMemFree(memory)):
        with pytest.raises(Failed, match=name):
            call()
    assert "on purpose" in SOFT.report
    cu.cuCtxPushCurrent(cu.cuDevicePrimaryCtxRetain(1))
    cu.cuMemAlloc(8)  # the other is well
    cu.cuCtxPopCurrent()
    SOFT.revive()
    cu.cuMemFree(memory)


def test_devices_have_memory_and_streams_of_their_own(cu):
    assert cu.cuDeviceGetCount() == 2
    with pytest.raises(Failed, match="INVALID_DEVICE"):
        cu.cuDeviceGet(2)
    memory, stream, event = cu.cuMemAlloc(8), cu.cuStreamCreate(1), cu.cuEventCreate(2)
    before = SOFT.used(0), SOFT.used(1)
    cu.cuCtxPushCurrent(cu.cuDevicePrimaryCtxRetain(1))
    cu.cuMemAlloc(100)
    assert (SOFT.used(0), SOFT.used(1)) == (before[0], before[1] + 100)
    with pytest.raises(Failed, match="INVALID_HANDLE"):
        cu.cuMemsetD8Async(memory, 0, 1, stream)
    with pytest.raises(Failed, match="INVALID_HANDLE"):
        cu.cuEventRecord(event, 0)
    cu.cuCtxPopCurrent()


def test_without_a_context_calls_that_need_one_fail(cu):
    event, said = cu.cuEventCreate(2), []

    def elsewhere():  # each thread has contexts of its own
        cu.cuEventSynchronize(event)  # it knows its own
        with pytest.raises(Failed, match="INVALID_CONTEXT"):
            cu.cuMemAlloc(8)
        said.append("done")

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert said == ["done"]


def test_functions_that_are_not_there_are_named(cu):
    with pytest.raises(RuntimeError, match="cuGraphCreate"):
        cu.cuGraphCreate(0)
