"""Pool: memory comes back when its last reference dies, and only then."""

import gc
import threading

import numpy as np
import pytest

from hbkit._ext.pool import Pool
from hbkit.errors import InvalidArgument


def test_pool_gives_back_when_the_last_view_dies():
    pool = Pool()
    a = np.frombuffer(pool.take(100_000), np.float32)
    address = a.ctypes.data
    view = a[10:20]
    del a
    gc.collect()
    assert pool.live_nbytes > 0 and pool.idle_nbytes == 0
    view[:] = 1
    del view
    gc.collect()
    assert pool.live_nbytes == 0 and pool.idle_nbytes > 0
    assert np.frombuffer(pool.take(90_000), np.uint8).ctypes.data == address
    assert pool.stats()["n_reused"] == 1


@pytest.mark.parametrize("align", [8, 64, 4096])
def test_pool_buffers_are_aligned_apart_and_writable(align):
    pool = Pool()
    arrays = [np.frombuffer(pool.take(n, align), np.uint8) for n in (1, 63, 4096, 5000)]
    for i, a in enumerate(arrays):
        assert a.ctypes.data % align == 0 and a.flags.writeable
        a[:] = i
    assert all((a == i).all() for i, a in enumerate(arrays))


def test_pool_outlived_by_its_buffers():
    a = np.frombuffer(Pool().take(1000), np.uint8)
    gc.collect()
    a[:] = 7
    assert (a == 7).all()


def test_pool_retains_no_more_than_it_may():
    pool = Pool(retain_nbytes=10_000)
    buffers = [pool.take(8192) for _ in range(5)]
    del buffers
    gc.collect()
    assert 0 < pool.idle_nbytes <= 10_000


def test_pool_from_many_threads():
    pool = Pool()

    def work():
        for i in range(500):
            np.frombuffer(pool.take(1 + i * 37), np.uint8)[:] = 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert pool.live_nbytes == 0 and pool.n_taken == 2000


@pytest.mark.parametrize(("nbytes", "align"), [(-1, 64), (10, 3), (10, 4)])
def test_pool_refuses_what_it_cannot_give(nbytes, align):
    with pytest.raises(InvalidArgument):
        Pool().take(nbytes, align)


def test_pool_empty_buffer():
    assert np.frombuffer(Pool().take(0), np.uint8).size == 0
