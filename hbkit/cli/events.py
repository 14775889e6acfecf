"""Scalars over steps, for TensorBoard."""

from __future__ import annotations

from typing import Any, Self

from hbkit.errors import StorageError, Unsupported

__all__ = ["EventWriter"]


class EventWriter:
    """Appends scalars to a new event file in a directory; without a directory, it drops them.

    Parameters
    ----------
    directory : str or None
        Made if it does not exist.

    Raises
    ------
    Unsupported
        tensorboardX is not installed.
    StorageError
        The file cannot be made.
    """

    def __init__(self, directory: str | None) -> None:
        self._writer: Any = None
        if directory is None:
            return
        try:
            from tensorboardX import SummaryWriter
        except ImportError as e:
            raise Unsupported("TensorBoard logs need tensorboardX", remedy="pip install 'hbkit[logs]'") from e
        try:
            self._writer = SummaryWriter(directory)
        except OSError as e:
            raise StorageError(
                f"cannot write there: {e.strerror}", file=directory, remedy="give another --log-dir"
            ) from e

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write values by name, for a step."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()
