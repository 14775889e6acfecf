"""Where a file's bytes come from: a memory map, or a remote file behind pyarrow.fs or fsspec."""

from __future__ import annotations

import mmap
import os
import pathlib
import re
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import islice
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
from pyarrow import fs as pafs

from hbkit import errors
from hbkit.parquet import fetch

__all__ = [
    "SUFFIXES",
    "LocalSource",
    "RemoteSource",
    "Source",
    "list_files",
    "list_modified",
    "open_source",
    "resolve",
    "unreadable",
]

SUFFIXES = (".parquet", ".parq", ".pq")
LEAST = 4096  # bytes of a remote request: pyarrow's S3 files find no room for the service's reasons in less
TAIL = 64 * 1024  # bytes at a remote file's end that are read together: they hold most footers
T = TypeVar("T")
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
    """

    path: str
    nbytes: int
    remote: bool

    @property
    def file(self) -> Any:
        """The same bytes as a ``pyarrow.NativeFile``; take one for each thread."""

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        """The bytes of each ``(offset, nbytes)``, read-only; raises Corrupt where a range leaves the file."""

    def stats(self) -> dict[str, int]:
        """What was asked of a service so far: ``n_requests``, ``n_retries`` among them, and ``n_bytes`` received."""

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
        self._file = pa.BufferReader(pa.py_buffer(self._map))

    @property
    def file(self) -> Any:
        return self._file

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        _check(self, ranges)
        view = memoryview(self._map)
        return [view[offset : offset + nbytes] for offset, nbytes in ranges]

    def stats(self) -> dict[str, int]:
        return {"n_requests": 0, "n_retries": 0, "n_bytes": 0}

    def close(self) -> None:
        self._map, self.nbytes = b"", 0
        self._file.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalSource, (self.path,)


class RemoteSource:
    """A file of a pyarrow or fsspec file system, read in few requests that are repeated when they fail.

    ``read`` raises StorageError when the service fails for good, NotFound when the file is gone. What it returns are
    slices of the bodies received, so a slice keeps up to ``fetch.LARGEST`` bytes alive; a range larger than that is
    received in parts, into memory of its own.

    Notes
    -----
    Limits and delays are in ``hbkit.parquet.fetch``. Who opens a Parquet file asks for its end, then for more of its
    end: the last ``TAIL`` bytes, or the footer if that is larger, come with the first such request and are kept until
    other files have taken their place.
    """

    remote = True

    def __init__(self, path: str, filesystem: Any, inner: str) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._stats = {"n_requests": 0, "n_retries": 0, "n_bytes": 0}
        self._tail: tuple[int, memoryview] | None = None
        opened: list[_Opened] = self._run([fetch.Job(partial(_open, filesystem, inner))])
        self._read_at, self.nbytes, self._close = opened[0]

    @property
    def file(self) -> Any:
        # a new one each time: pyarrow lets only one thread at a time into a file that is written in Python
        return pa.PythonFile(_Cursor(self), mode="r")

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        _check(self, ranges)
        at, tail = self._tail or (self.nbytes, memoryview(b""))
        fetched = iter(self._fetch([self._around(*r) for r in ranges if r[1] and r[0] < at]))
        views = []
        for offset, nbytes in ranges:
            begin, view = (at, tail) if offset >= at or not nbytes else next(fetched)
            views.append(view[offset - begin : offset - begin + nbytes] if nbytes else memoryview(b""))
        return views

    def _around(self, offset: int, nbytes: int) -> tuple[int, int]:
        # SPEC: the footer ends 8 bytes before the file does; nothing else in the file reaches as far
        if offset + nbytes < self.nbytes - 8:
            nbytes = max(nbytes, min(LEAST, self.nbytes))
            return min(offset, self.nbytes - nbytes), nbytes
        begin = min(offset, max(0, self.nbytes - TAIL))
        return begin, self.nbytes - begin

    def _fetch(self, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, memoryview]]:
        """``(offset, bytes)`` of each range."""
        blocks, where = fetch.coalesce(ranges)
        parts = [
            [(at, min(fetch.LARGEST, begin + nbytes - at)) for at in range(begin, begin + nbytes, fetch.LARGEST)]
            for begin, nbytes in blocks
        ]
        jobs = [
            fetch.Job(partial(self._receive, *part), part[1], bytes=f"{part[0]}..{sum(part)}")
            for block in parts
            for part in block
        ]
        bodies = iter(self._run(jobs))
        views = [
            next(bodies) if len(block) == 1 else memoryview(b"".join(islice(bodies, len(block)))) for block in parts
        ]
        out = []
        for (offset, nbytes), w in zip(ranges, where, strict=True):
            begin = offset - blocks[w][0]
            out.append((offset, views[w][begin : begin + nbytes]))
            # what begins with the file is the file, not its footer
            if offset + nbytes == self.nbytes and nbytes <= (fetch.LARGEST if offset else TAIL):
                self._keep(*out[-1])
        return out

    def _receive(self, offset: int, nbytes: int) -> memoryview:
        body = memoryview(self._read_at(offset, nbytes)).toreadonly()
        with self._lock:
            self._stats["n_bytes"] += len(body)
        if len(body) > nbytes:
            raise errors.Unsupported(
                "the service ignores byte ranges", remedy="copy the file to a local disk first", file=self.path
            )
        if len(body) < nbytes:
            raise EOFError(f"the answer has {len(body)} of {nbytes} bytes")
        return body

    def _keep(self, offset: int, view: memoryview) -> None:
        self._tail = offset, view
        _with_tail.append(weakref.ref(self))
        while len(_with_tail) > N_TAILS:
            oldest = _with_tail.popleft()()
            if oldest is not None and oldest is not self:
                oldest._tail = None

    def _run(self, jobs: list[fetch.Job[T]]) -> list[T]:
        try:
            return fetch.run(jobs, self.path)
        except errors.HbkitError:
            raise
        except Exception as e:
            raise _refused(self.path, e) from e
        finally:
            with self._lock:
                self._stats["n_requests"] += sum(job.n_attempts for job in jobs)
                self._stats["n_retries"] += sum(max(job.n_attempts - 1, 0) for job in jobs)

    def stats(self) -> dict[str, int]:
        with self._lock:
            return dict(self._stats)

    def close(self) -> None:
        self.nbytes, self._tail = 0, None
        self._close()

    def __reduce__(self) -> tuple[Any, ...]:
        return open_source, (self.path,)


N_TAILS = 16  # files whose end is kept, the most recently opened ones
_with_tail: deque[weakref.ref[RemoteSource]] = deque()


class _Cursor:
    """A source as the file object that pyarrow asks for."""

    closed = False

    def __init__(self, source: Source) -> None:
        self._source, self._at = source, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._source.nbytes}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, n: int = -1) -> memoryview:
        left = max(self._source.nbytes - self._at, 0)
        [view] = self._source.read([(self._at, left if n < 0 else min(n, left))])
        self._at += len(view)
        return view

    def close(self) -> None:
        self.closed = True


# read_at(offset, nbytes), the size, and what to call in the end
_Opened = tuple[Callable[[int, int], Any], int, Callable[[], None]]


def _open(filesystem: Any, inner: str) -> _Opened:
    if isinstance(filesystem, pafs.PyFileSystem) and isinstance(filesystem.handler, pafs.FSSpecHandler):
        # not a file of fsspec's: it would read ahead, and one request at a time
        inner_fs = filesystem.handler.fs
        info = inner_fs.info(inner)
        if info["type"] == "directory":
            raise IsADirectoryError(inner)
        if info["size"] is None:
            raise NotImplementedError("the service does not say how long the file is")
        return lambda at, n: inner_fs.cat_file(inner, start=at, end=at + n), info["size"], lambda: None
    file = filesystem.open_input_file(inner)

    def read_at(offset: int, nbytes: int) -> Any:
        # pyarrow's S3 files believe that the body is as long as was asked for, and leave the rest of the buffer as it
        # was: a random mark at the buffer's end shows how much of it
        body = np.empty(nbytes, np.uint8)
        mark = np.frombuffer(os.urandom(16)[:nbytes], np.uint8)
        body[-mark.size :] = mark
        n = file.get_stream(offset, nbytes).readinto(body)
        left = int(np.cumprod((body[-mark.size :] == mark)[::-1]).sum())
        if 0 < left < min(nbytes, 4):  # chance, most likely: ask for these few again
            again = read_at(offset + nbytes - left, left)
            body[nbytes - left :][: again.size] = again
            left -= again.size
        return body[: min(n, nbytes - left)]

    return read_at, file.size(), file.close


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
    filesystem, inner = resolve(text, repeats=False)
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
    found, problem, remedy = _listed(text, suffixes)
    if not found:
        raise errors.NotFound(problem, remedy=remedy, file=text)
    return sorted(name for name, _ in found)


def list_modified(path: str | os.PathLike[str], suffixes: Sequence[str] = SUFFIXES) -> list[tuple[int, str]]:
    """The same files, none where nothing is there, by when they were last changed: (nanoseconds since 1970, name).

    The time is 0 where the file system does not tell it, as those of fsspec: then the order is that of the names.
    """
    found, _, _ = _listed(os.fspath(path), suffixes)
    return sorted((time or 0, name) for name, time in found)


def _listed(text: str, suffixes: Sequence[str]) -> tuple[list[tuple[str, int | None]], str, str]:
    """Names and times of the files that a path stands for; and if there are none, what is wrong, and the remedy."""
    filesystem, inner = resolve(text)
    prefix = suffix = ""
    if filesystem is None:
        filesystem = pafs.LocalFileSystem()
    else:
        prefix = text.partition("://")[0] + "://"
        if not isinstance(filesystem, pafs.PyFileSystem) and "?" in text:
            suffix = text[text.index("?") :]  # pyarrow's own file systems take their options there
    try:
        info = filesystem.get_file_info(inner)
        if info.type == pafs.FileType.File:
            return [(text, info.mtime_ns)], "", ""
        if info.type == pafs.FileType.Directory:
            base = inner.rstrip("/")
            files = [i for i in _walk(filesystem, base) if i.path.lower().endswith(tuple(suffixes))]
            files = [i for i in files if not any(_hidden(p) for p in i.path[len(base) :].split("/"))]
            problem = f"the directory holds no file that ends in {' or '.join(suffixes)}"
            remedy = f"name the files, or end them in {suffixes[0]}"
        elif _WILD.search(inner):
            parts = inner.split("/")
            fixed = next(i for i, part in enumerate(parts) if _WILD.search(part))
            base = "/".join(parts[:fixed]) or ("/" if inner.startswith("/") else ".")
            pattern = re.compile(_glob_regex(inner if fixed or inner.startswith("/") else "./" + inner))
            files = [i for i in _walk(filesystem, base) if pattern.fullmatch(i.path)]
            problem, remedy = "the glob matches no file", "check the pattern"
        else:
            files, problem, remedy = [], "no such file or directory", "check the path"
    except OSError as e:
        raise _refused(text, e) from e
    return [(prefix + i.path + suffix, i.mtime_ns) for i in files], problem, remedy


def _hidden(part: str) -> bool:
    return part.startswith(".") or (part.startswith("_") and "=" not in part)


def _walk(filesystem: Any, base: str) -> list[pafs.FileInfo]:
    selector = pafs.FileSelector(base, recursive=True, allow_not_found=True)
    return [i for i in filesystem.get_file_info(selector) if i.type == pafs.FileType.File]


def _glob_regex(pattern: str) -> str:
    """A glob as a regular expression: ``**/`` any depth, ``*`` and ``?`` within one part, ``[..]`` a set."""
    out = ""
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]]+\]|.", pattern, re.DOTALL):
        fixed = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(token)
        if fixed is None and len(token) > 1:
            fixed = token.replace("[!", "[^")
        out += fixed or re.escape(token)
    return out


def resolve(text: str, repeats: bool = True) -> tuple[Any, str]:
    """``(file system, path inside it)`` of a path or URI; the file system is None for a local path.

    Without ``repeats``, a file system that would repeat its requests by itself does not.
    """
    if "://" not in text:
        return None, text
    if text.startswith("file://"):
        return None, str(pathlib.Path(pafs.FileSystem.from_uri(text)[1]))
    try:
        # this may ask the service for the bucket's region
        return fetch.run([fetch.Job(partial(_from_uri, text, repeats))], text)[0]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        pass
    except errors.HbkitError:
        raise
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


_S3_URI = re.compile(r"s3://(?P<bucket>(?:[^/?#@]*@)?[^/?#@]+)(?P<key>(?:/[\w.=*-]+)*)(?P<options>\?[^#]*)?", re.ASCII)


def _from_uri(text: str, repeats: bool) -> tuple[Any, str]:
    # a key that needs no unquoting; others have a client made for themselves
    if found := _S3_URI.fullmatch(text):
        client = _s3(f"s3://{found['bucket']}{found['options'] or ''}", repeats, os.getpid())
        return client, found["bucket"].rpartition("@")[2] + found["key"]
    return pafs.FileSystem.from_uri(text)


@lru_cache(16)
def _s3(uri: str, repeats: bool, pid: int) -> Any:
    """pyarrow's client for a bucket, one for all files: to make one waits for the requests of all others to end.

    Made from a URI, it repeats what fails thirty times, five times a second whatever the service says, and the process
    cannot end before a stalled request has come to the end of that. A forked process must have its own.
    """
    client, _ = pafs.FileSystem.from_uri(uri)
    if repeats:
        return client
    make, (options,) = client.__reduce__()
    return make({**options, "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=1)})


def _refused(path: str, e: Exception) -> errors.HbkitError:
    # pyarrow says it in words where the file was there when it was opened
    if isinstance(e, FileNotFoundError) or re.search(r"AWS Error (RESOURCE_NOT_FOUND|NO_SUCH_)", str(e)):
        return errors.NotFound("no such file", remedy="check the path", file=path)
    if isinstance(e, IsADirectoryError):
        return errors.InvalidArgument("this is a directory", remedy="name one file", file=path)
    return errors.StorageError(
        f"cannot read the file: {getattr(e, 'strerror', None) or e}",
        remedy="check permissions and the connection",
        file=path,
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
