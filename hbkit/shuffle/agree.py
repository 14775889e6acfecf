"""Whether all ranks were set up alike."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Protocol

from hbkit.errors import SchemaMismatch


class Gathers(Protocol):
    """A `Transport`, or what gathers over one."""

    def all_gather(self, data: bytes) -> list[bytes]: ...


def agree(transport: Gathers, settings: Mapping[str, object], what: str) -> None:
    """Compare the settings of all ranks, which all of them give; `what` they are is said in the error.

    Raises
    ------
    SchemaMismatch
        A rank's differ from rank 0's: on every rank, with the lines that differ, as a diff.
    TransportError
        See `Transport.all_gather`.
    """
    lines = [f"{name}: {value}" for name, value in settings.items()]
    first, *others = (json.loads(answer) for answer in transport.all_gather(json.dumps(lines).encode()))
    for rank, other in enumerate(others, 1):
        if other != first:
            diff = list(difflib.unified_diff(first, other, "rank 0", f"rank {rank}", n=0, lineterm=""))
            raise SchemaMismatch(
                f"ranks 0 and {rank} differ in {what}: {' '.join(line for line in diff if not line.startswith('@@'))}",
                remedy="start all ranks with the same settings",
            )
