"""Where a file's bytes come from: a memory map, or a remote file behind pyarrow.fs or fsspec."""

from __future__ import annotations

import mmap
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, Protocol

import pyarrow as pa
from pyarrow import fs as pafs

from hbkit import errors

__all__ = ["SUFFIXES", "LocalSource", "RemoteSource", "Source", "list_files", "open_source", "unreadable"]

SUFFIXES = (".parquet", ".parq", ".pq")
_WILD = re.compile(r"[*?\[]")


class Source(Protocol):
    """The bytes of one file: random reads, safe from any thread.

    Attributes
    ----------
    path : str
        The path or URI as the user gave it; errors name it.
    nbytes : int
        Size of the file when it was opened.
    remote : bool
        Whether reads are worth coalescing.
    file : pyarrow.NativeFile
        The same bytes as a random access file.
    """

    path: str
    nbytes: int
    remote: bool
    file: Any

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        """The bytes of each ``(offset, nbytes)``; raises Corrupt where a range leaves the file."""

    def close(self) -> None:
        """Forget the file; buffers already handed out stay valid."""


def _check(source: Source, ranges: Sequence[tuple[int, int]]) -> None:
    for offset, nbytes in ranges:
        if offset < 0 or nbytes < 0 or offset + nbytes > source.nbytes:
            raise errors.Corrupt(
                f"bytes {offset}..{offset + nbytes} lie outside the file's {source.nbytes}",
                remedy="the file is truncated or damaged; write it again",
                file=source.path,
            )


class LocalSource:
    """A local file, memory-mapped: reads are views, without a copy."""

    remote = False

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            fd = os.open(path, os.O_RDONLY)
            try:
                self.nbytes = os.fstat(fd).st_size
                # an empty file cannot be mapped
                self._map: Any = mmap.mmap(fd, 0, access=mmap.ACCESS_READ) if self.nbytes else b""
            finally:
                os.close(fd)
        except OSError as e:
            raise _refused(path, e) from e
        self.file = pa.BufferReader(pa.py_buffer(self._map))

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        _check(self, ranges)
        view = memoryview(self._map)
        return [view[offset : offset + nbytes] for offset, nbytes in ranges]

    def close(self) -> None:
        self._map, self.nbytes = b"", 0
        self.file.close()


class RemoteSource:
    """A file of a pyarrow or fsspec file system: every range is one request."""

    remote = True

    def __init__(self, path: str, filesystem: Any, inner: str) -> None:
        self.path = path
        try:
            self.file = filesystem.open_input_file(inner)
            self.nbytes = self.file.size()
        except OSError as e:
            raise _refused(path, e) from e

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        _check(self, ranges)
        try:
            return [memoryview(self.file.read_at(nbytes, offset)) for offset, nbytes in ranges]
        except OSError as e:
            raise _refused(self.path, e) from e

    def close(self) -> None:
        self.file.close()


def open_source(path: str | os.PathLike[str]) -> Source:
    """Open a local path or a ``scheme://`` URI for random reads.

    Raises
    ------
    NotFound
        There is no such file.
    StorageError
        The operating system or the remote service refused.
    Unsupported
        No file system is known for the URI's scheme.
    """
    text = os.fspath(path)
    filesystem, inner = _resolve(text)
    return LocalSource(inner) if filesystem is None else RemoteSource(text, filesystem, inner)


def list_files(path: str | os.PathLike[str], suffixes: Sequence[str] = SUFFIXES) -> list[str]:
    """The files that a path, glob, directory or URI stands for, sorted by name.

    A directory is searched to any depth for names that end in one of ``suffixes``: ``.parquet``, ``.parq`` and
    ``.pq``, unless told otherwise. Names that begin with ``.`` or ``_`` are left out, as Spark and Hive do, but not
    ``_key=value``. ``*`` and ``?`` match within one part of the path, ``**`` any depth.

    Raises
    ------
    NotFound
        Nothing is there, or the directory holds no such file.
    """
    text = os.fspath(path)
    filesystem, inner = _resolve(text)
    prefix = suffix = ""
    if filesystem is None:
        filesystem = pafs.LocalFileSystem()
    else:
        prefix = text.partition("://")[0] + "://"
        if not isinstance(filesystem, pafs.PyFileSystem) and "?" in text:
            suffix = text[text.index("?") :]  # pyarrow's own file systems take their options there
    try:
        kind = filesystem.get_file_info(inner).type
        if kind == pafs.FileType.File:
            return [text]
        if kind == pafs.FileType.Directory:
            base = inner.rstrip("/")
            names = [n for n in _walk(filesystem, base) if n.lower().endswith(tuple(suffixes))]
            names = [n for n in names if not any(_hidden(p) for p in n[len(base) :].split("/"))]
            problem = f"the directory holds no file that ends in {' or '.join(suffixes)}"
            remedy = f"name the files, or end them in {suffixes[0]}"
        elif _WILD.search(inner):
            parts = inner.split("/")
            fixed = next(i for i, part in enumerate(parts) if _WILD.search(part))
            base = "/".join(parts[:fixed]) or ("/" if inner.startswith("/") else ".")
            pattern = re.compile(_glob_regex(inner if fixed or inner.startswith("/") else "./" + inner))
            names = [n for n in _walk(filesystem, base) if pattern.fullmatch(n)]
            problem, remedy = "the glob matches no file", "check the pattern"
        else:
            names, problem, remedy = [], "no such file or directory", "check the path"
    except OSError as e:
        raise _refused(text, e) from e
    if not names:
        raise errors.NotFound(problem, remedy=remedy, file=text)
    return sorted(prefix + n + suffix for n in names)


def _hidden(part: str) -> bool:
    return part.startswith(".") or (part.startswith("_") and "=" not in part)


def _walk(filesystem: Any, base: str) -> list[str]:
    selector = pafs.FileSelector(base, recursive=True, allow_not_found=True)
    return [i.path for i in filesystem.get_file_info(selector) if i.type == pafs.FileType.File]


def _glob_regex(pattern: str) -> str:
    """A glob as a regular expression: ``**/`` any depth, ``*`` and ``?`` within one part, ``[..]`` a set."""
    out = ""
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]]+\]|.", pattern, re.DOTALL):
        fixed = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(token)
        if fixed is None and len(token) > 1:
            fixed = token.replace("[!", "[^")
        out += fixed or re.escape(token)
    return out


def _resolve(text: str) -> tuple[Any, str]:
    """``(file system, path inside it)``; the file system is None for a local path."""
    if "://" not in text:
        return None, text
    if text.startswith("file://"):
        return None, str(pathlib.Path(pafs.FileSystem.from_uri(text)[1]))
    try:
        return pafs.FileSystem.from_uri(text)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        pass
    except OSError as e:
        raise _refused(text, e) from e
    try:
        import fsspec

        inner_fs, inner = fsspec.core.url_to_fs(text)
    except (ImportError, ValueError) as e:
        raise errors.Unsupported(
            f"no file system is known for {text.partition('://')[0]}://",
            remedy="pip install fsspec and the package of that scheme (s3fs, gcsfs, adlfs, ...)",
            file=text,
        ) from e
    except OSError as e:
        raise _refused(text, e) from e
    return pafs.PyFileSystem(pafs.FSSpecHandler(inner_fs)), inner


def _refused(path: str, e: OSError) -> errors.HbkitError:
    if isinstance(e, FileNotFoundError):
        return errors.NotFound("no such file", remedy="check the path", file=path)
    if isinstance(e, IsADirectoryError):
        return errors.InvalidArgument("this is a directory", remedy="name one file", file=path)
    return errors.StorageError(
        f"cannot read the file: {e.strerror or e}", remedy="check permissions and the connection", file=path
    )


def unreadable(e: Exception, what: str, **place: Any) -> errors.HbkitError:
    """The named error for whatever a reader raised on ``what`` at this place."""
    text = str(e).splitlines()[0] if str(e) else type(e).__name__
    # pyarrow raises a bare OSError where the bytes are damaged
    if isinstance(e, OSError) and (e.errno is not None or type(e) is not OSError):
        return errors.StorageError(f"cannot read {what}: {text}", remedy="check the connection and retry", **place)
    if isinstance(e, NotImplementedError):
        return errors.Unsupported(f"cannot read {what}: {text}", remedy="leave it out of fields", **place)
    return errors.Corrupt(f"{what} is damaged: {text}", remedy="write the file again, or leave it out", **place)
