"""The ranks of ``hbkit train``: the processes that torchrun started, or those of a TensorFlow cluster."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hbkit.cli import console
from hbkit.cli.building import adapter
from hbkit.errors import InvalidArgument, Unsupported
from hbkit.shuffle import Transport

__all__ = ["Agreed", "gathered", "ranks", "shard_of"]


@contextmanager
def ranks(backend: str, timeout: float) -> Iterator[Transport | None]:
    """This process's end of the group that it was started in; None where it was started alone.

    What a rank raises within ends all of them. Ranks other than 0 show nothing but their errors.

    Raises
    ------
    Unsupported
        torchrun started a training by TensorFlow.
    InvalidArgument
        TF_CONFIG is no JSON object.
    TransportError
        Ranks did not come.
    """
    by_torchrun = {"RANK", "WORLD_SIZE"} <= os.environ.keys()
    if backend == "tensorflow" and by_torchrun:
        raise Unsupported("torchrun with --backend tensorflow", remedy="use --backend torch, or set TF_CONFIG instead")
    if not (by_torchrun if backend == "torch" else _in_cluster()):
        yield None
        return
    transport: Transport = adapter(backend).distributed.GroupTransport(timeout=timeout)
    console.mute(transport.rank > 0)
    try:
        yield transport
    except Exception as e:
        transport.abort(f"{type(e).__name__}: {e}")
        raise
    finally:
        console.mute(False)
        transport.close()


def _in_cluster() -> bool:
    text = os.environ.get("TF_CONFIG") or "{}"
    try:
        return bool(json.loads(text).get("cluster"))
    except (ValueError, AttributeError):
        raise InvalidArgument(
            f"TF_CONFIG is {text[:60]!r}", remedy="set it as tf.distribute wants it, or not"
        ) from None


def shard_of(transport: Transport | None) -> tuple[int, int]:
    """Which shard of the data is this rank's."""
    return (0, 1) if transport is None else (transport.rank, transport.size)


def gathered(transport: Transport | None, value: Any) -> list[Any]:
    """What each rank gives, as JSON has it."""
    if transport is None:
        return [value]
    return [json.loads(answer) for answer in transport.all_gather(json.dumps(value).encode())]


class Agreed:
    """What rank 0 finds, for all ranks, which are asked about four times a second, at the same steps."""

    OFTEN = 0.25  # seconds

    def __init__(self, transport: Transport | None) -> None:
        self._transport = transport
        self._wait = self._left = 1  # calls from one question to the next, and until that
        self._last = time.monotonic()

    def __call__(self, answer: bool, ask: bool = False) -> bool:
        """Rank 0's `answer`; no, while it is not asked: `ask` asks at once, and is the same on all ranks."""
        if self._transport is None:
            return answer
        self._left -= 1
        if self._left > 0 and not ask:
            return False
        now = time.monotonic()
        wait = round(self._wait * self.OFTEN / max(now - self._last, 1e-3))
        answer, wait = gathered(self._transport, [answer, min(max(wait, 1), 2 * self._wait)])[0]
        self._wait = self._left = wait
        self._last = now
        return answer
