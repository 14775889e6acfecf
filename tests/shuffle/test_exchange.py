"""The loopback exchange: order, channels, and every way in which a rank may fail the others."""

import threading
import time

import numpy as np
import pytest
from faults import FAULTS, Faulty, Killed, run_ranks
from hypothesis import given
from hypothesis import strategies as st

from hbkit.errors import Closed, HbkitError, InvalidArgument, TransportError
from hbkit.shuffle import Loopback

EMPTY = np.zeros(0, np.uint8)


def counts(*n):
    return np.array(n, np.int64)


@given(st.integers(1, 4), st.integers(0, 2**32), st.booleans())
def test_loopback_delivers_every_byte_in_rank_order(size, seed, told):
    rng = np.random.default_rng(seed)
    n = rng.integers(0, 5, (size, size))
    data = [rng.integers(0, 256, c.sum()).astype(np.uint8) for c in n]

    def act(t):
        for _ in range(3):
            got = t.all_to_all(data[t.rank], n[t.rank], n[:, t.rank] if told else None)
        return got

    parts = [np.split(d, np.cumsum(c)[:-1]) for d, c in zip(data, n, strict=True)]
    for r, (out, came) in enumerate(run_ranks(act, Loopback.group(size))):
        assert came.tolist() == n[:, r].tolist()
        assert out.tolist() == np.concatenate([parts[s][r] for s in range(size)]).tolist()


def test_loopback_owns_what_it_sent_and_gathers_in_rank_order():
    def act(t):
        mine = np.full(2, t.rank, np.uint8)
        got, _ = t.all_to_all(mine, counts(1, 1))
        mine[:] = 9
        return got.tolist(), t.all_gather(b"ab"[: t.rank + 1])

    assert run_ranks(act, Loopback.group(2)) == [([0, 1], [b"a", b"ab"])] * 2


def test_loopback_channels_do_not_mix():
    def act(t):
        other, got = t.split(), []
        thread = threading.Thread(target=lambda: got.extend(other.all_gather(b"k") for _ in range(100)))
        thread.start()
        rows = [t.all_gather(b"r") for _ in range(100)]
        thread.join()
        other.close()
        return rows == [[b"r"] * 3] * 100 and got == [[b"k"] * 3] * 100 and t.all_gather(b"") == [b""] * 3

    assert run_ranks(act, Loopback.group(3)) == [True] * 3


def test_loopback_abort_ends_everyone_on_every_channel_with_the_reason():
    def act(t):
        other = t.split()
        if t.rank == 1:
            t.abort("out of disk")
        for channel in (other, t):
            with pytest.raises(TransportError, match=r"rank 1: out of disk.*snapshot"):
                channel.all_to_all(EMPTY, counts(0, 0))

    assert run_ranks(act, Loopback.group(2)) == [None, None]


def test_loopback_names_the_rank_that_is_late_or_left():
    a, b = Loopback.group(2, timeout=0.05)
    with pytest.raises(TransportError, match=r"rank 1 did not come in 0.05 s.*peer 1"):
        a.all_to_all(EMPTY, counts(0, 0))
    with pytest.raises(TransportError, match="rank 1 did not come"):
        b.all_gather(b"")
    a, b = Loopback.group(2)
    b.close()
    with pytest.raises(TransportError, match="rank 1 left"):
        a.all_gather(b"")
    with pytest.raises(Closed):
        b.all_gather(b"")


def test_loopback_refuses_bad_counts_other_calls_and_unexpected_bytes():
    with pytest.raises(InvalidArgument):
        Loopback.group(2)[0].all_to_all(np.zeros(3, np.uint8), counts(1, 1))
    got = run_ranks(lambda t: t.all_gather(b"") if t.rank else t.split(), Loopback.group(2))
    assert "rank 1 called all_gather where this rank called split" in str(got[0])
    got = run_ranks(lambda t: t.all_to_all(EMPTY, counts(0, 0), counts(0, 3 * t.rank)), Loopback.group(2, 0.5))
    assert "0 bytes came where 3 were expected" in str(got[1]) and "peer 1" in str(got[1])


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_strikes_once_and_the_others_end_in_time(fault):
    def act(t):
        other = t.split()
        got = [channel.all_to_all(np.zeros(2, np.uint8), counts(1, 1), counts(1, 1)) for channel in (t, other, t)]
        return sum(int(data.sum()) for data, _ in got)

    ends = Loopback.group(2, timeout=0.1)
    faulty = Faulty(ends[0], fault, at=1)
    began = time.monotonic()
    got = run_ranks(act, [faulty, ends[1]])
    assert faulty.plan.struck and time.monotonic() - began < 2 * 0.1 + 1
    if fault == "corrupt":
        assert sum(got) == 1
    else:
        assert isinstance(got[1], TransportError) and isinstance(got[0], (HbkitError, Killed, int))
