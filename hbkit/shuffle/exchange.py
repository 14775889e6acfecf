"""The exchange between ranks, on engines that others keep: a transport is all the core needs to know of them."""

from __future__ import annotations

import threading
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hbkit.errors import InvalidArgument, TransportError

Bytes = npt.NDArray[np.uint8]
Int64s = npt.NDArray[np.int64]


class Transport(Protocol):
    """One rank's end of a group.

    Attributes
    ----------
    rank, size : int
        This rank, and how many there are.
    """

    rank: int
    size: int

    def all_to_all(self, data: Bytes, counts: Int64s) -> tuple[Bytes, Int64s]:
        """Send ``counts[r]`` bytes of `data` (in rank order) to each rank r; what came, in rank order, and its counts.

        Every rank must call it. Raises TransportError when a rank is lost or aborted.
        """
        ...

    def abort(self, reason: str) -> None:
        """End the group: every rank's current or next call raises TransportError with this reason."""
        ...


class Loopback:
    """Ranks as threads of one process: for tests, and for one rank alone.

    Examples
    --------
    >>> ranks = Loopback.group(2)    # one Transport a thread
    """

    def __init__(self, rank: int, size: int, room: _Room) -> None:
        self.rank, self.size, self._room = rank, size, room

    @classmethod
    def group(cls, size: int, timeout: float = 60.0) -> list[Loopback]:
        """Transports of a group of `size` ranks; a rank that waits longer than `timeout` seconds raises."""
        room = _Room(size, timeout)
        return [cls(rank, size, room) for rank in range(size)]

    def all_to_all(self, data: Bytes, counts: Int64s) -> tuple[Bytes, Int64s]:
        """See `Transport.all_to_all`."""
        counts = np.asarray(counts, np.int64)
        if counts.shape != (self.size,) or (counts < 0).any() or counts.sum() != len(data):
            raise InvalidArgument(
                f"counts {counts.tolist()} of {len(data)} bytes",
                remedy=f"give {self.size} counts that add up to the bytes",
            )
        room, ends = self._room, np.cumsum(counts)
        room.sent[self.rank] = [data[end - n : end] for n, end in zip(counts, ends, strict=True)]
        room.meet()
        got = [room.sent[r][self.rank] for r in range(self.size)]
        out = np.concatenate(got) if got else np.empty(0, np.uint8)
        room.meet()  # nobody overwrites what another still reads
        return out, np.array([len(g) for g in got], np.int64)

    def abort(self, reason: str) -> None:
        """See `Transport.abort`."""
        self._room.reason = self._room.reason or f"rank {self.rank}: {reason}"
        self._room.barrier.abort()


class _Room:
    """What the ranks of a loopback group share."""

    def __init__(self, size: int, timeout: float) -> None:
        self.sent: list[list[Bytes]] = [[] for _ in range(size)]
        self.barrier = threading.Barrier(size, timeout=timeout)
        self.reason = ""

    def meet(self) -> None:
        try:
            self.barrier.wait()
        except threading.BrokenBarrierError:
            raise TransportError(
                f"the exchange was aborted: {self.reason or 'a rank did not come in time'}",
                remedy="see the first rank's error; restart from the last snapshot",
            ) from None
