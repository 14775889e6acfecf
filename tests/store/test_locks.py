"""A lock that is given in turn."""

import threading
import time

import pytest

from hbkit.store.locks import Turns


def test_turns_are_given_in_the_order_of_asking():
    lock, order, threads = Turns(), [], []

    def take(i):
        with lock:
            order.append(i)

    with lock:
        for i in range(8):
            threads.append(threading.Thread(target=take, args=(i,)))
            threads[-1].start()
            while len(lock._waiting) < i + 2:
                time.sleep(0)
    with lock:  # who has had it comes after those who wait
        order.append("again")
    for thread in threads:
        thread.join()
    assert order == [*range(8), "again"]


def test_turns_go_on_when_one_that_waits_gives_up(monkeypatch):
    lock = Turns()
    with lock:

        def interrupted(*args):
            raise KeyboardInterrupt

        with monkeypatch.context() as m:
            m.setattr(lock._changed, "wait", interrupted)
            with pytest.raises(KeyboardInterrupt):
                lock.__enter__()
    with lock:
        assert len(lock._waiting) == 1
