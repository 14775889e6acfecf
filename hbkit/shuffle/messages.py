"""Messages between ranks: a header before each says where its sender is, so that ranks that disagree find out.

::

    checksum u64 | stream i32, kind i32, round i64, step i64 | status i32, 0 i32, weight f64 | payload

The checksum is of all that follows it. A rank that fails where it would fill a message sends its reason instead, of the
size that the others wait for: so all of them raise at the same message, and the channel stays in order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from hbkit._ext.hash import hash_bytes
from hbkit._ext.segment import retained
from hbkit.errors import TransportError
from hbkit.shuffle.exchange import Bytes, Int64s, Transport, failed

__all__ = ["CLOSED", "FAILED", "OUT", "READY", "Channel", "Message", "Stamp"]

KINDS = ("settings", "keys", "rows", "gradients")
READY, OUT, FAILED, CLOSED = range(4)  # status of a rank: has a batch, has no more, raised, wants no more

HEADER = np.dtype(
    [
        ("checksum", "<u8"),
        ("stream", "<i4"),
        ("kind", "<i4"),
        ("round", "<i8"),
        ("step", "<i8"),
        ("status", "<i4"),
        ("zero", "<i4"),
        ("weight", "<f8"),
    ]
)
SUM_NBYTES = 8
REASON_NBYTES = 160  # least payload where others know its size: so much of a reason always fits


class Stamp(NamedTuple):
    """Where a message belongs: what its sender and its receiver have to agree on."""

    kind: str
    stream: int = 0
    round: int = 0
    step: int = 0

    def __str__(self) -> str:
        return f"{self.kind} of round {self.round} of stream {self.stream}, step {self.step}"


class Message(NamedTuple):
    """What one rank sent, or would have sent to itself.

    Attributes
    ----------
    status : READY, OUT or CLOSED
    weight : float
    payload : uint8[n]
        Empty of this rank's own.
    """

    status: int
    weight: float
    payload: Bytes


class Channel:
    """A transport with headers on it.

    Attributes
    ----------
    number : int
    n_rounds : int
        For the user of the channel to count.
    sent : Counter
        ``kind + "_messages"`` and ``kind + "_nbytes"``, headers included.
    """

    def __init__(self, transport: Transport, number: int) -> None:
        self.transport, self.number, self.n_rounds = transport, number, 0
        self.sent: Counter[str] = Counter()

    def exchange(
        self,
        stamp: Stamp,
        sizes: Sequence[int] | Int64s,
        fill: Callable[[list[Bytes]], object],
        expected: Sequence[int] | Int64s | None = None,
        status: int = READY,
        weight: float = 0.0,
    ) -> list[Message]:
        """Send each other rank a payload of ``sizes[rank]`` bytes, which ``fill(payloads)`` writes; what each sent.

        Parameters
        ----------
        sizes, expected : int64[size]
            Bytes to each rank, and from each, where that is known. This rank's own entry does not count.
        fill : callable
            What it raises is raised here, once all others know of it.

        Raises
        ------
        TransportError
            Another rank failed, or is at another message; or what came is corrupt. Names it.
        """
        t = self.transport
        others = np.arange(t.size) != t.rank
        least = 0 if expected is None else REASON_NBYTES
        counts = np.where(others, np.maximum(sizes, least) + HEADER.itemsize, 0)
        if expected is not None:
            expected = np.where(others, np.maximum(expected, least) + HEADER.itemsize, 0)
        try:
            data: Bytes = retained((int(counts.sum()),), np.uint8)
        except MemoryError as e:
            t.abort(f"{type(e).__name__}: {e}")
            raise
        failure: Exception | None = None
        try:
            blocks = np.split(data, np.cumsum(counts)[:-1])
            fill([block[HEADER.itemsize :] for block in blocks])
        except Exception as e:
            failure, status = e, FAILED
            reason = np.frombuffer(f"{type(e).__name__}: {e}".encode(), np.uint8)
            if expected is None:
                counts = np.where(others, len(reason) + HEADER.itemsize, 0)
                data = np.empty(int(counts.sum()), np.uint8)
                blocks = np.split(data, np.cumsum(counts)[:-1])
            for block in blocks:
                payload, text = block[HEADER.itemsize :], reason[: max(len(block) - HEADER.itemsize, 0)]
                payload[: len(text)], payload[len(text) :] = text, 0
        header = np.zeros(1, HEADER)
        header[0] = (0, stamp.stream, KINDS.index(stamp.kind), stamp.round, stamp.step, status, 0, weight)
        peers = np.flatnonzero(others).tolist()
        for r in peers:
            blocks[r][: HEADER.itemsize] = header.view(np.uint8)
        for r, checksum in zip(peers, _checksums(data, counts[others]), strict=True):
            blocks[r][:SUM_NBYTES] = checksum
        self.sent[f"{stamp.kind}_messages"] += t.size - 1
        self.sent[f"{stamp.kind}_nbytes"] += len(data)
        try:
            if t.size > 1:
                data, counts = t.all_to_all(data, counts, expected)
            messages = self._read(stamp, header, data, counts, others)
        except TransportError as e:
            t.abort(str(e))
            raise e from failure
        if failure is not None:
            raise failure
        for peer, message in enumerate(messages):
            if message.status == FAILED:
                why = message.payload.tobytes().rstrip(b"\0").decode(errors="replace")
                raise failed(f"rank {peer} failed at {stamp}: {why}", t.rank, peer=peer)
        return messages

    def all_gather(self, data: bytes) -> list[bytes]:
        """What each rank gave, in their order, whole."""
        size = self.transport.size

        def fill(payloads: list[Bytes]) -> None:
            for payload in payloads:
                payload[:] = np.frombuffer(data, np.uint8)[: len(payload)]

        messages = self.exchange(Stamp("settings"), [len(data)] * size, fill)
        return [data if r == self.transport.rank else m.payload.tobytes() for r, m in enumerate(messages)]

    def _read(self, stamp: Stamp, header: np.ndarray, data: Bytes, counts: Int64s, others: np.ndarray) -> list[Message]:
        """The messages, once they are found to be whole and of this exchange."""
        rank = self.transport.rank
        own = Message(int(header["status"][0]), float(header["weight"][0]), data[:0])
        messages = [own] * len(counts)
        short = np.flatnonzero(others & (counts < HEADER.itemsize))
        if len(short):
            raise failed(f"what rank {short[0]} sent is corrupt: {counts[short[0]]} bytes", rank, peer=short[0])
        ends = np.cumsum(counts)
        for r, checksum in zip(np.flatnonzero(others), _checksums(data, counts[others]), strict=True):
            block = data[ends[r] - counts[r] : ends[r]]
            if not np.array_equal(block[:SUM_NBYTES], checksum):
                raise failed(f"what rank {r} sent is corrupt: its checksum differs, at {stamp}", rank, peer=r)
            came = block[: HEADER.itemsize].view(HEADER)[0]
            where = Stamp(KINDS[came["kind"]], *(int(came[name]) for name in ("stream", "round", "step")))
            if where != stamp:
                raise failed(f"rank {r} is at {where} where this rank is at {stamp}", rank, peer=r)
            messages[r] = Message(int(came["status"]), float(came["weight"]), block[HEADER.itemsize :])
        return messages

    def close(self) -> None:
        """Leave the channel. Idempotent."""
        self.transport.close()


def _checksums(data: Bytes, counts: Int64s) -> Bytes:
    """Of each block of data, but for its first bytes: uint8[n, SUM_NBYTES]."""
    ends = np.cumsum(counts)
    splits = np.empty(2 * len(counts) + 1, np.int64)
    splits[:-1:2], splits[1::2], splits[-1] = ends - counts, ends - counts + SUM_NBYTES, len(data)
    checksums: Bytes = hash_bytes(data, splits)[1::2].copy().view(np.uint8).reshape(-1, SUM_NBYTES)
    return checksums
