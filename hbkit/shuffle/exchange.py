"""The exchange between ranks, on engines that others keep: a transport is all the core needs to know of them."""

from __future__ import annotations

import threading
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hbkit.errors import Closed, InvalidArgument, TransportError

Bytes = npt.NDArray[np.uint8]
Int64s = npt.NDArray[np.int64]


class Transport(Protocol):
    """One rank's end of a channel between ranks.

    All ranks make the same calls in the same order on a channel, each from one thread at a time. A call that some rank
    does not join raises TransportError within `timeout`, at the others; so does every call after it.

    Attributes
    ----------
    rank, size : int
        This rank, and how many there are.
    timeout : float, seconds
    """

    rank: int
    size: int
    timeout: float

    def all_to_all(self, data: Bytes, counts: Int64s, expected: Int64s | None = None) -> tuple[Bytes, Int64s]:
        """Send ``counts[r]`` bytes of `data` (in rank order) to each rank r; what came, in rank order, and its counts.

        Parameters
        ----------
        data : uint8[sum of counts]
            The caller's again when the call returns.
        counts : int64[size]
        expected : int64[size], optional
            How many bytes will come from each rank, where the caller knows: this saves the exchange of counts. All
            ranks give it, or none.

        Raises
        ------
        TransportError
            A rank is lost, late or aborted, or sent another number of bytes than was expected.
        """
        ...

    def all_gather(self, data: bytes) -> list[bytes]:
        """What each rank gave, in their order; a `hbkit.snapshot` saves over it, too."""
        ...

    def split(self) -> Transport:
        """Another channel over the same ranks, for another thread; every rank must call it."""
        ...

    def abort(self, reason: str) -> None:
        """End the group: every rank's current or next call, on any channel, raises TransportError with this reason.

        As soon as the engine can tell them. The first reason stands. From any thread.
        """
        ...

    def close(self) -> None:
        """Leave this channel; the others over the same ranks stay. Idempotent."""
        ...


def failed(problem: str, rank: int, **place: object) -> TransportError:
    """The error of an exchange, as `rank` met it."""
    return TransportError(
        problem, rank=rank, **place, remedy="see the first rank's error; restart all ranks from the last snapshot"
    )


def check_counts(data: Bytes, counts: Int64s, size: int) -> Int64s:
    """`counts` as int64[size]. InvalidArgument where they do not divide the bytes of `data`."""
    counts = np.asarray(counts, np.int64)
    if counts.shape != (size,) or (counts < 0).any() or counts.sum() != len(data):
        raise InvalidArgument(
            f"counts {counts.tolist()} of {len(data)} bytes", remedy=f"give {size} counts that add up to the bytes"
        )
    return counts


def check_came(came: Int64s, expected: Int64s | None, rank: int) -> None:
    """TransportError where a rank sent another number of bytes than was expected."""
    if expected is not None and not np.array_equal(came, expected):
        peer = int(np.flatnonzero(came != expected)[0])
        raise failed(f"{came[peer]} bytes came where {expected[peer]} were expected", rank, peer=peer)


class Loopback:
    """Ranks as threads of one process: for tests, and for one rank alone.

    Examples
    --------
    >>> ranks = Loopback.group(2)    # one Transport a thread
    """

    def __init__(self, rank: int, size: int, timeout: float, room: _Room) -> None:
        self.rank, self.size, self.timeout, self._room = rank, size, timeout, room
        self._n_calls = 0
        self._closed = False

    @classmethod
    def group(cls, size: int, timeout: float = 60.0) -> list[Loopback]:
        """Transports of a group of `size` ranks; a rank that waits longer than `timeout` seconds raises."""
        room = _Room(_House())
        return [cls(rank, size, timeout, room) for rank in range(size)]

    def all_to_all(self, data: Bytes, counts: Int64s, expected: Int64s | None = None) -> tuple[Bytes, Int64s]:
        """See `Transport.all_to_all`."""
        counts = check_counts(data, counts, self.size)
        sent = np.split(np.array(data, np.uint8), np.cumsum(counts)[:-1])
        got = [parts[self.rank] for parts in self._meet("all_to_all", sent)]
        came = np.array([len(part) for part in got], np.int64)
        check_came(came, expected, self.rank)
        return np.concatenate(got), came

    def all_gather(self, data: bytes) -> list[bytes]:
        """See `Transport.all_gather`."""
        return self._meet("all_gather", bytes(data))

    def split(self) -> Loopback:
        """See `Transport.split`."""
        room = self._meet("split", _Room(self._room.house))[0]
        return Loopback(self.rank, self.size, self.timeout, room)

    def abort(self, reason: str) -> None:
        """See `Transport.abort`."""
        house = self._room.house
        with house.change:
            house.reason = house.reason or f"rank {self.rank}: {reason}"
            house.change.notify_all()

    def close(self) -> None:
        """See `Transport.close`."""
        self._closed = True
        with self._room.house.change:
            self._room.left.add(self.rank)
            self._room.house.change.notify_all()

    def _meet(self, call: str, gift: Any) -> list[Any]:
        """What all ranks gave at their call of this number."""
        if self._closed:
            raise Closed("the channel is closed", rank=self.rank, remedy="make a new group")
        room, house = self._room, self._room.house
        with house.change:
            gifts = room.calls.setdefault(self._n_calls, {})

            def settled() -> bool:
                return len(gifts) == self.size or bool(house.reason) or any(r not in gifts for r in room.left)

            if not house.reason:
                gifts[self.rank] = call, gift
                house.change.notify_all()
                house.change.wait_for(settled, self.timeout)
            if len(gifts) < self.size:
                if house.reason:
                    raise failed(f"the exchange was aborted: {house.reason}", self.rank)
                absent = [r for r in range(self.size) if r not in gifts]
                why = "left" if set(absent) & room.left else f"did not come in {self.timeout:g} s"
                problem = f"rank {', '.join(map(str, absent))} {why} for {call}"
                house.reason = f"rank {self.rank}: {problem}"
                house.change.notify_all()
                raise failed(problem, self.rank, peer=absent[0])
            others = {r: called for r, (called, _) in gifts.items() if called != call}
            if others:
                peer, called = min(others.items())
                raise failed(f"rank {peer} called {called} where this rank called {call}", self.rank, peer=peer)
            room.calls.pop(self._n_calls - 1, None)  # everyone is past it
            self._n_calls += 1
            return [gifts[r][1] for r in range(self.size)]


class _House:
    """What all channels of a group share."""

    def __init__(self) -> None:
        self.change = threading.Condition()
        self.reason = ""


class _Room:
    """What the ranks share on one channel."""

    def __init__(self, house: _House) -> None:
        self.house = house
        self.calls: dict[int, dict[int, tuple[str, Any]]] = {}  # number of the call: what each rank gave
        self.left: set[int] = set()
