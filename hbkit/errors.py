"""The closed set of errors that hbkit raises on its own account.

Every error says in one line what is wrong, where (file, column, row group, ...) and what to do about it. Each
also derives from the built-in exception a caller would expect, so ``except ValueError`` keeps working.
"""

from __future__ import annotations

__all__ = [
    "BudgetExceeded",
    "Closed",
    "Corrupt",
    "DeviceUnavailable",
    "HbkitError",
    "InvalidArgument",
    "Locked",
    "NotFound",
    "NullFound",
    "SchemaMismatch",
    "StorageError",
    "TransportError",
    "UnknownColumn",
    "Unsupported",
]


class HbkitError(Exception):
    """Base of all errors of hbkit: a problem, the place it was met, and a remedy, in one line.

    Parameters
    ----------
    problem : str
        What is wrong, without a final full stop.
    remedy : str
        What the user can do about it.
    **place
        Where: ``file=``, ``column=``, ``row_group=``, ``table=``, ``feature=``, ... kept in ``.place``.
    """

    def __init__(self, problem: str, *, remedy: str = "", **place: object) -> None:
        self.problem = problem
        self.remedy = remedy
        self.place = {k: v for k, v in place.items() if v is not None}
        where = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in self.place.items())
        text = problem + (f" ({where})" if where else "") + (f": {remedy}" if remedy else "")
        super().__init__(" ".join(text.split()))

    def __str__(self) -> str:  # KeyError would show the message's repr
        return str(self.args[0])


class InvalidArgument(HbkitError, ValueError):
    """An argument has a wrong value, shape or dtype."""


class NotFound(HbkitError, FileNotFoundError):
    """A file, directory, glob or snapshot matches nothing."""


class UnknownColumn(HbkitError, KeyError):
    """A column (or feature, or table) that does not exist was named."""


class SchemaMismatch(HbkitError, ValueError):
    """Two files, or a file and a request, disagree about a column's type."""


class NullFound(HbkitError, ValueError):
    """A null stands where none is allowed."""


class Corrupt(HbkitError, ValueError):
    """Bytes from outside break their format: truncated, bit-flipped or hostile."""


class Unsupported(HbkitError, NotImplementedError):
    """A valid input or request that hbkit does not handle."""


class BudgetExceeded(HbkitError, MemoryError):
    """A memory or disk budget is too small for the least that is needed."""


class StorageError(HbkitError, OSError):
    """The operating system refused a read or write: disk full, I/O error, permission."""


class Locked(HbkitError, OSError):
    """Another writer holds the path."""


class Closed(HbkitError, RuntimeError):
    """The object was used after it was closed, or out of order."""


class DeviceUnavailable(HbkitError, RuntimeError):
    """No such accelerator, no driver, or the device was lost."""


class TransportError(HbkitError, RuntimeError):
    """An exchange between ranks failed or was aborted."""
