"""What all formats share: an input read in two passes, its bytes, lines and cells."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hbkit import errors

Advance = Callable[[int], None]
Batches = Iterator[pa.RecordBatch]
_T = TypeVar("_T")

SAMPLE_NBYTES = 1 << 20
SAMPLE_LINES = 50
BLOCK_NBYTES = 8 << 20
LINE_NBYTES = 64 << 20  # hostile input without line ends must not fill the memory


class Input(ABC):
    """Files of one format.

    Attributes
    ----------
    files : list of str
    nbytes : int
        Their size on disk; what the calls of ``advance`` sum up to in each pass.
    schema : pyarrow.Schema
        Of the batches; settled by ``scan`` where ``must_scan``.
    n_rows : int or None
        Known after ``scan``.
    label : str or None
        The column that the format itself holds to be the label, if it has another name than ``label``.
    """

    must_scan = True
    schema: pa.Schema
    n_rows: int | None = None
    label: str | None = None

    def __init__(self, files: Sequence[str]) -> None:
        self.files = list(files)
        self.nbytes = sum(file_size(path) for path in self.files)

    @abstractmethod
    def scan(self, advance: Advance) -> None:
        """The first pass, where one is needed; ``advance`` is told how many bytes more were read."""

    @abstractmethod
    def batches(self, advance: Advance) -> Batches:
        """The rows."""


class Malformed(Exception):
    """A cell or line breaks its format; the caller knows in which file, and the line from the place ``at``."""

    def __init__(self, problem: str, remedy: str = "correct the line or leave it out", at: int = 0) -> None:
        super().__init__(problem)
        self.problem, self.remedy, self.at = problem, remedy, at


def file_size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError as e:
        raise refused(path, e) from e


def refused(path: str, e: OSError) -> errors.HbkitError:
    if isinstance(e, FileNotFoundError):
        return errors.NotFound("no such file", remedy="check the path", file=path)
    return errors.StorageError(f"cannot read: {e.strerror or e}", remedy="check the file and its rights", file=path)


class _Counted(io.RawIOBase):
    """A file that tells how many bytes were read of it."""

    def __init__(self, path: str, advance: Advance) -> None:
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 closed by `close`
        except OSError as e:
            raise refused(path, e) from e
        self._advance = advance

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n = self._file.readinto(buffer) or 0
        self._advance(n)
        return n

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


@contextlib.contextmanager
def opened(path: str, advance: Advance = lambda n: None) -> Iterator[io.BufferedIOBase]:
    """A file's bytes, unpacked where it is gzip; what goes wrong while they are read is named."""
    with contextlib.ExitStack() as stack:
        raw = io.BufferedReader(stack.enter_context(_Counted(path, advance)), 1 << 20)
        stack.callback(raw.close)
        stream: io.BufferedIOBase = raw
        try:
            if raw.peek(2)[:2] == b"\x1f\x8b":
                stream = stack.enter_context(gzip.GzipFile(fileobj=raw))
            yield stream
        except (gzip.BadGzipFile, EOFError, zlib.error) as e:
            raise errors.Corrupt(f"the gzip data are damaged ({e})", remedy="fetch the file again", file=path) from e
        except errors.HbkitError:
            raise
        except OSError as e:
            raise refused(path, e) from e


def _string_array(block: bytes) -> pa.StringArray:
    """The lines of a block, with their line ends."""
    ends = np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + 1
    if not len(ends) or ends[-1] < len(block):
        ends = np.append(ends, len(block))
    offsets = np.concatenate([[0], ends]).astype(np.int32)
    return pa.StringArray.from_buffers(len(ends), pa.py_buffer(offsets), pa.py_buffer(block))


def line_blocks(path: str, advance: Advance) -> Iterator[tuple[int, pa.StringArray]]:
    """A text file's lines, some megabytes at a time, each time with the number of the first (from 1)."""
    line, carry = 1, b""
    with opened(path, advance) as stream:
        while True:
            data = stream.read(BLOCK_NBYTES)
            cut = data.rfind(b"\n") + 1 if data else 0
            if data and not cut:
                carry += data
                if len(carry) > LINE_NBYTES:
                    raise errors.Corrupt("a line is longer than 64 MiB", remedy="is this text?", file=path, line=line)
                continue
            block, carry = (carry + data[:cut], data[cut:]) if data else (carry, b"")
            if line == 1 and block.startswith(b"\xef\xbb\xbf"):
                block = block[3:]
            if block:
                lines = _string_array(block)
                try:
                    lines.validate(full=True)
                except pa.ArrowInvalid as e:
                    bad = next(i for i, text in enumerate(block.split(b"\n")) if not _is_utf8(text))
                    raise errors.Corrupt(
                        "not UTF-8 text", remedy="re-encode the file", file=path, line=line + bad
                    ) from e
                yield line, lines
                line += len(lines)
            if not data:
                return


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def parsed(path: str, first: int, lines: pa.StringArray, parse: Callable[[pa.StringArray], _T]) -> _T:
    """``parse(lines)``; where it fails, the first line at fault is found by bisection, so one grammar serves both."""
    try:
        return parse(lines)
    except (Malformed, pa.ArrowInvalid):
        low, high = 0, len(lines)  # lines[:low] parse, lines[:high] do not
        while high - low > 1:
            middle = (low + high) // 2
            try:
                parse(lines[low:middle])
                low = middle
            except (Malformed, pa.ArrowInvalid):
                high = middle
        try:
            parse(lines[low:high])
        except Malformed as e:
            raise errors.Corrupt(e.problem, remedy=e.remedy, file=path, line=first + low) from e
        except pa.ArrowInvalid as e:
            raise errors.Corrupt(str(e), remedy="correct the line or leave it out", file=path, line=first + low) from e
        raise


def all_true(mask: Any) -> bool:
    return bool(pc.all(mask, min_count=0).as_py())


def cast(text: Any, kind: pa.DataType, what: str) -> Any:
    """Text as numbers of a type; a Malformed says at which place it fails."""
    try:
        return pc.cast(text, kind)
    except pa.ArrowInvalid as e:
        low, high = 0, len(text)  # the first failure lies in text[low:high]
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if casts(text[low:middle], kind) else (low, middle)
        raise Malformed(f"{what} {shown(text[low].as_py())} is not a number of type {kind}", at=low) from e


def casts(text: Any, kind: pa.DataType) -> bool:
    """Whether all of the text are numbers of a type."""
    try:
        pc.cast(text, kind)
    except pa.ArrowInvalid:
        return False
    return True


def shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def whole_numbers(text: Any, kind: pa.DataType, what: str) -> Any:
    """Unsigned decimal numbers; Arrow alone would also take hexadecimal."""
    digits = pc.match_substring_regex(text, r"^[0-9]+$")
    if not all_true(digits):
        bad = text.filter(pc.invert(digits))[0].as_py()
        raise Malformed(f"{what} {shown(bad)} is not a whole number")
    return cast(text, kind, what)


def words_of(lines: pa.StringArray) -> tuple[pa.StringArray, npt.NDArray[np.int64]]:
    """The words of all lines that have any, one after the other, and their splits; ``#`` starts a comment."""
    if pc.any(pc.match_substring(lines, "#")).as_py():
        lines = pc.replace_substring_regex(lines, r"#.*", "")
    lines = pc.ascii_trim_whitespace(lines)
    words = pc.ascii_split_whitespace(lines.filter(pc.not_equal(lines, "")))
    splits = words.offsets.to_numpy().astype(np.int64)
    return words.flatten(), splits - splits[0]


def pairs_of(words: pa.StringArray, n_parts: int, shape: str) -> list[pa.StringArray]:
    """The parts between the colons."""
    parts = pc.split_pattern(words, ":")
    fits = pc.equal(pc.list_value_length(parts), n_parts)
    if not all_true(fits):
        bad = words.filter(pc.invert(fits))[0].as_py()
        raise Malformed(f"{shown(bad)} is not {shape}")
    flat = parts.flatten()
    return [flat.take(pa.array(np.arange(i, len(flat), n_parts))) for i in range(n_parts)]


def list_array(values: Any, splits: npt.NDArray[np.int64]) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(splits.astype(np.int32)), values)


def listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")


def natural(name: str) -> tuple[str, str]:
    """What to sort names by so that x9 comes before x10."""
    return re.sub(r"[0-9]+", lambda digits: digits[0].zfill(20), name), name


def head(path: str) -> list[str]:
    """The first lines of a text file, without those that the sample cuts."""
    with opened(path) as stream:
        data = stream.read(SAMPLE_NBYTES)
    if b"\0" in data:
        raise errors.Unsupported(
            "neither Parquet, TFRecord nor text",
            remedy="convert Parquet, TFRecord, CSV, TSV, libsvm, libffm, slot or Ali-CCP files",
            file=path,
        )
    lines = data.removeprefix(b"\xef\xbb\xbf").decode(errors="replace").splitlines()
    if len(data) == SAMPLE_NBYTES and len(lines) > 1:
        lines.pop()
    return [line for line in lines if line.strip()][:SAMPLE_LINES]
