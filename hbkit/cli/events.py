"""Scalars over steps, in the file that TensorBoard reads; written without TensorBoard, so that both frameworks can."""

from __future__ import annotations

import os
import socket
import struct
import time
from pathlib import Path
from typing import Self

from hbkit._ext.tfrecord import crc32c
from hbkit.errors import StorageError

__all__ = ["EventWriter"]


def _masked_crc(data: bytes) -> bytes:
    """CRC-32C as TFRecord masks it."""
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes(out) + bytes([n])


def _message(field: int, data: bytes) -> bytes:
    """A length-delimited field of a Protocol Buffers message."""
    return _varint(field << 3 | 2) + _varint(len(data)) + data


class EventWriter:
    """Appends scalars to a new event file in a directory; without a directory, it drops them.

    Parameters
    ----------
    directory : str or None
        Made if it does not exist.

    Raises
    ------
    StorageError
        The file cannot be written.

    Source: the comments of tensorboard/compat/proto/event.proto and summary.proto; TFRecord's framing.
    """

    def __init__(self, directory: str | None) -> None:
        self._file = None
        if directory is not None:
            name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
            try:
                Path(directory).mkdir(parents=True, exist_ok=True)
                self._file = open(Path(directory) / name, "xb")  # noqa: SIM115  # close() closes it
            except OSError as e:
                raise StorageError(
                    f"cannot write there: {e.strerror}", file=directory, remedy="give another --log-dir"
                ) from e
            self._write(_message(3, b"brain.Event:2"))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write values by name, for a step."""
        if self._file is not None:
            summary = b"".join(
                _message(1, _message(1, name.encode()) + b"\x15" + struct.pack("<f", value))
                for name, value in values.items()
            )
            self._write(b"\x10" + _varint(step) + _message(5, summary))

    def _write(self, fields: bytes) -> None:
        assert self._file is not None
        event = b"\x09" + struct.pack("<d", time.time()) + fields
        length = struct.pack("<Q", len(event))
        self._file.write(length + _masked_crc(length) + event + _masked_crc(event))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
