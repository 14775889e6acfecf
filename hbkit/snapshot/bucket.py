"""A snapshot as objects of a service: put under names of their writer's own, and the manifest last, if it is not there.

Objects are whole or absent, but nothing can be renamed and nobody can be kept out by a lock. So writers do not meet in
a directory: each draws 64 bits for the name of its own. They meet at the manifest, ``<commit>.json``, which is put on
the condition that there is none: the service decides who has made the commit, and the others are told `Locked`.

The answer to that put may be lost. Then the manifest is read back: it is equal to what was put, byte for byte, only
where it is this writer's, since it names the writer's directory.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any, Protocol, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from pyarrow import fs as pafs

from hbkit.errors import Corrupt, HbkitError, InvalidArgument, Locked, NotFound, StorageError, Unsupported
from hbkit.parquet import fetch
from hbkit.parquet.source import RemoteSource, resolve
from hbkit.snapshot.files import RESTORE, FileEntry, Output, Sink
from hbkit.snapshot.manifest import COMMIT, DIRECTORY
from hbkit.snapshot.place import Draft, Place

__all__ = ["Bucket"]

PART = 16 << 20  # bytes of a part of a large object; a service allows 10,000 of them, so 156 GiB
N_PARTS = 4  # parts under way at a time: what an upload holds in memory is at most N_PARTS + 1 of them
AGE = 24 * 3600.0  # seconds since the last upload to a directory after which its writer counts as dead
WITHDRAWN = b"removed\n"  # what stands in a manifest's place, so that no slow writer puts another there
CONDITIONAL = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")  # schemes whose services put on a condition

T = TypeVar("T")
_REFUSED = "check the service, the connection and permissions"
_STATUS = re.compile(r"status code: (\d{3})")


class Bucket(Place):
    """The objects below a URI.

    Parameters
    ----------
    uri : str
        Of a directory, as ``hbkit.parquet`` takes them: pyarrow's own with their options, or fsspec's.

    Notes
    -----
    Any number of writers may save to ``s3://``, ``gs://`` and ``az://`` at a time. They need obstore, which takes
    credentials from the URI, the environment or the machine, not from configuration files. To other URIs there must be
    one writer at a time: their services cannot put on a condition.

    What a dead writer has uploaded belongs to no commit. `prune` removes it when nothing has been added to it for a
    day, so a save must not be silent for longer; parts of an object that was never completed are the service's to
    remove (a lifecycle rule for incomplete uploads).
    """

    def __init__(self, uri: str) -> None:
        self.name = uri
        base, question, options = uri.partition("?")
        self._base, self._options = base.rstrip("/"), question + options
        self._opened: tuple[int, Any, str] = (-1, None, "")

    def _files(self) -> tuple[Any, str]:
        """pyarrow's file system, and the directory in it; a forked process has its own."""
        if self._opened[0] != os.getpid():
            filesystem, inner = resolve(self._base + self._options, repeats=False)
            self._opened = os.getpid(), filesystem, inner.rstrip("/")
        return self._opened[1:]

    def where(self, path: str) -> str:
        return f"{self._base}/{path}{self._options}"

    def open(self, path: str) -> RemoteSource:
        filesystem, inner = self._files()
        return RemoteSource(self.where(path), filesystem, f"{inner}/{path}")

    def commits(self) -> list[str]:
        names = [info.base_name for info in self._list(recursive=False) if info.size != len(WITHDRAWN)]
        return sorted(name[:-5] for name in names if name.endswith(".json") and COMMIT.fullmatch(name[:-5]))

    def _list(self, recursive: bool) -> list[Any]:
        filesystem, inner = self._files()
        if isinstance(filesystem, pafs.PyFileSystem):
            filesystem.handler.fs.invalidate_cache()  # fsspec's own memory of what was there
        selector = pafs.FileSelector(inner, recursive=recursive, allow_not_found=True)
        found: list[Any] = run(partial(filesystem.get_file_info, selector), self.name)
        return found

    def read(self, path: str, limit: int) -> bytes:
        try:
            source = self.open(path)
        except InvalidArgument as e:
            raise NotFound("no such file", file=self.where(path), remedy="check the path") from e
        try:
            return bytes(source.read([(0, min(limit, source.nbytes))])[0])
        finally:
            source.close()

    def check(self, entry: FileEntry) -> None:
        file = self.where(entry.path)
        try:
            source = self.open(entry.path)
        except (NotFound, InvalidArgument) as e:
            raise Corrupt("a file of the snapshot is missing", file=file, remedy=RESTORE) from e
        try:
            if source.nbytes != entry.nbytes:
                raise Corrupt(
                    f"the file has {source.nbytes} bytes, its manifest says {entry.nbytes}", file=file, remedy=RESTORE
                )
            digest = entry.new_digest()
            step = fetch.LARGEST
            for begin in range(0, entry.nbytes, N_PARTS * step):
                end = min(begin + N_PARTS * step, entry.nbytes)
                for view in source.read([(at, min(step, end - at)) for at in range(begin, end, step)]):
                    digest.update(view)
        finally:
            source.close()
        if digest.hexdigest() != entry.digest:
            raise Corrupt("the file's checksum is wrong", file=file, remedy=RESTORE)

    def _service(self) -> Service:
        filesystem, inner = self._files()
        if self._base.partition("://")[0] in CONDITIONAL:
            with refused(self.name):
                return _Conditional(self._base + self._options, filesystem, inner)
        return _Plain(filesystem, inner)

    def prepare(self) -> None:
        service, path = self._service(), f".hbkit-{secrets.token_hex(8)}"
        with refused(self.name):
            output = service.open(path)
            try:
                output.write(b"hbkit")
                output.sync()
            finally:
                output.close()
        run(partial(service.delete, path), self.name)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Nothing: whoever removes commits must see to it that nobody saves against others than the newest."""
        yield

    @contextmanager
    def draft(self) -> Iterator[Draft]:
        commit = self.next_commit()
        draft = _BucketDraft(self, self._service(), commit, f"{commit}-{secrets.token_hex(8)}")
        try:
            yield draft
        finally:
            draft.clean()

    @contextmanager
    def join(self, commit: str, directory: str) -> Iterator[Draft]:
        yield _BucketDraft(self, self._service(), commit, directory)

    def withdraw(self, commit: str) -> None:
        path = f"{commit}.json"
        with refused(self.where(path)), Sink(self._service().open(path)) as sink:
            sink.write(WITHDRAWN)
            sink.sync()

    def remove(self, paths: Iterable[str]) -> None:
        service = self._service()
        for path in paths:
            run(partial(service.delete, path), self.name)

    def leftovers(self, kept: Mapping[str, str]) -> list[str]:
        newest: dict[str, float] = {}
        _, inner = self._files()
        for info in self._list(recursive=True):
            directory, _, below = info.path[len(inner) :].lstrip("/").partition("/")
            withdrawn = not below and directory.endswith(".json") and info.size == len(WITHDRAWN)
            if (DIRECTORY.fullmatch(directory) or withdrawn) and info.type == pafs.FileType.File:
                at = info.mtime.timestamp() if info.mtime else time.time()
                newest[directory] = max(newest.get(directory, 0.0), at)
        known = set(kept.values())
        new = set(self.commits()) - kept.keys()  # made meanwhile, from any of these directories
        old = time.time() - AGE
        return sorted(d for d, at in newest.items() if at < old and d not in known and d[:9] not in new)


class _BucketDraft(Draft):
    def __init__(self, place: Bucket, service: Service, commit: str, directory: str) -> None:
        self.commit, self.directory = commit, directory
        self._place, self._service = place, service
        self._unreferenced = True

    @contextmanager
    def create(self, path: str) -> Iterator[Sink]:
        with refused(self._place.where(path)), Sink(self._service.open(path)) as sink:
            yield sink
            sink.sync()

    def publish(self, manifest: bytes) -> None:
        path = f"{self.commit}.json"
        file = self._place.where(path)
        self._unreferenced, failure = False, None
        try:
            if run(partial(self._service.create, path, manifest), file, len(manifest)):
                return
        except StorageError as e:
            failure = e
        try:
            there = self._place.read(path, len(manifest) + 1)
        except (NotFound, StorageError) as e:
            raise StorageError(
                f"no answer says whether {self.commit} was made: {(failure or e).problem}",
                file=file,
                remedy="look with hbkit.snapshot.log once the service answers, and save again if it is not there",
            ) from (failure or e)
        if there != manifest:
            self._unreferenced = True
            raise Locked(
                f"another writer has committed {self.commit} meanwhile", file=self._place.name, remedy="save again"
            )

    def clean(self) -> None:
        """Remove what was uploaded, where no commit can come to name it. What fails is left to `Place.leftovers`."""
        if self._unreferenced:
            with suppress(HbkitError):
                self._place.remove([self.directory])


class Service(Protocol):
    """What writes and removes objects; paths are relative to the place. Raises OSErrors as `run` sorts them."""

    def open(self, path: str) -> Output:
        """A new object, which is there when `Output.sync` has returned; closed before that, it is not."""
        ...

    def create(self, path: str, data: bytes) -> bool:
        """Put an object unless there is one of its name; whether it was put now."""
        ...

    def delete(self, path: str) -> None:
        """Delete an object and all that are below its name; what is not there is gone."""
        ...


class _Conditional:
    """Through obstore."""

    def __init__(self, uri: str, filesystem: Any, inner: str) -> None:
        try:
            import obstore
        except ImportError as e:
            raise Unsupported(
                f"saving to {uri.partition('://')[0]}:// needs obstore", file=uri, remedy="pip install 'hbkit[s3]'"
            ) from e
        self._obstore, self._uri = obstore, uri
        timeout = fetch.TIMEOUT + PART / fetch.SLOWEST
        retries = {
            "max_retries": fetch.ATTEMPTS - 1,
            "retry_timeout": timedelta(seconds=fetch.DEADLINE + timeout),
            "backoff": {
                "init_backoff": timedelta(seconds=fetch.BACKOFF),
                "max_backoff": timedelta(seconds=fetch.LONGEST),
                "base": 2,
            },
        }
        with self.translated():
            self._once = _store(uri, filesystem, inner, timeout, {"max_retries": 0})  # `run` repeats its requests
            self._patient = _store(uri, filesystem, inner, timeout, retries)

    def open(self, path: str) -> Output:
        return _Upload(self, path, self._uri)

    def put(self, path: str, data: bytearray) -> None:
        """Put an object that is not large."""
        with self.translated():
            self._obstore.put(self._once, path, memoryview(data), use_multipart=False)

    def writer(self, path: str) -> Any:
        """obstore's writer of a large object, which repeats what fails by itself."""
        return self._obstore.open_writer(self._patient, path, buffer_size=PART, max_concurrency=N_PARTS)

    def size(self, path: str) -> int:
        """Bytes of an object, -1 where it is not there."""
        try:
            with self.translated():
                return int(self._obstore.head(self._once, path)["size"])
        except FileNotFoundError:
            return -1

    def create(self, path: str, data: bytes) -> bool:
        try:
            with self.translated():
                self._obstore.put(self._once, path, data, mode="create")
        except FileExistsError:
            return False
        return True

    def delete(self, path: str) -> None:
        with suppress(FileNotFoundError), self.translated():
            below = [o["path"] for page in self._obstore.list(self._once, f"{path}/") for o in page]
            self._obstore.delete(self._once, below or [path])

    @contextmanager
    def translated(self) -> Iterator[None]:
        """What obstore raises as an OSError that says whether another attempt is worth it."""
        ob = self._obstore.exceptions
        try:
            yield
        except (ob.AlreadyExistsError, ob.PreconditionError) as e:
            raise FileExistsError(_line(e)) from e
        except ob.NotFoundError as e:
            raise FileNotFoundError(_line(e)) from e
        except (ob.PermissionDeniedError, ob.UnauthenticatedError) as e:
            raise PermissionError(_line(e)) from e
        except (ob.InvalidPathError, ob.NotSupportedError, ob.UnknownConfigurationKeyError) as e:
            raise NotImplementedError(_line(e)) from e
        except ob.BaseError as e:
            error = OSError(_line(e))
            if found := _STATUS.search(str(e)):
                error.status = int(found[1])  # type: ignore[attr-defined]  # hbkit.parquet.fetch looks there
            raise error from e


def _store(uri: str, filesystem: Any, inner: str, timeout: float, retries: Any) -> Any:
    """obstore's client for the directory of a URI, which means to it what it means to pyarrow."""
    from obstore import store

    options: Any = {"timeout": timedelta(seconds=timeout)}
    parts = urlsplit(uri)
    if parts.scheme != "s3":
        if os.environ.get("AWS_ENDPOINT_URL_S3", "").startswith("http://"):
            options["allow_http"] = True
        return store.from_url(
            uri.partition("?")[0].replace("gcs://", "gs://"), client_options=options, retry_config=retries
        )
    given = dict(parse_qsl(parts.query))
    config: dict[str, Any] = {"region": given.get("region") or filesystem.region}
    if "endpoint_override" in given:
        scheme = given.get("scheme", "https")
        config["endpoint"] = f"{scheme}://{given['endpoint_override']}"
        options["allow_http"] = scheme == "http"
    if parts.username:
        config["access_key_id"] = unquote(parts.username)
        config["secret_access_key"] = unquote(parts.password or "")
    bucket, _, prefix = inner.partition("/")
    return store.S3Store(bucket, prefix=prefix or None, client_options=options, retry_config=retries, **config)


class _Upload:
    """One object: in parts, if it is larger than one."""

    def __init__(self, service: _Conditional, path: str, file: str) -> None:
        self._service, self._path, self._file = service, path, file
        self._held = bytearray()
        self._writer: Any = None
        self._nbytes = 0
        self._unfinished = False  # parts are there that only completing the object makes one that can be deleted

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        self._nbytes += len(view)
        if self._writer is None and self._nbytes <= PART:
            self._held += view
            return
        with self._service.translated():
            if self._writer is None:
                self._writer = self._service.writer(self._path)
                self._writer.write(self._held)
                self._held, self._unfinished = bytearray(), True
            self._writer.write(view)

    def sync(self) -> None:
        if self._writer is None:
            run(partial(self._service.put, self._path, self._held), self._file, self._nbytes)
            return
        self._unfinished = False
        try:
            with self._service.translated():
                self._writer.close()
        except OSError:
            # It may be the answer that was lost: nobody else puts an object of this name.
            if run(partial(self._service.size, self._path), self._file) != self._nbytes:
                raise

    def close(self) -> None:
        if self._unfinished:
            self._unfinished = False
            with suppress(Exception):
                self._writer.close()
                self._service.delete(self._path)


class _Plain:
    """Through a file system of pyarrow or fsspec."""

    def __init__(self, filesystem: Any, inner: str) -> None:
        self._filesystem, self._inner = filesystem, inner

    def open(self, path: str) -> Output:
        full = f"{self._inner}/{path}"
        self._filesystem.create_dir(full.rpartition("/")[0], recursive=True)
        return _Stream(self._filesystem, full)

    def create(self, path: str, data: bytes) -> bool:
        full = f"{self._inner}/{path}"
        if self._filesystem.get_file_info(full).type != pafs.FileType.NotFound:
            return False
        draft = f"{full}-{secrets.token_hex(8)}"
        with self._filesystem.open_output_stream(draft) as stream:
            stream.write(data)
        self._filesystem.move(draft, full)
        return True

    def delete(self, path: str) -> None:
        full = f"{self._inner}/{path}"
        kind = self._filesystem.get_file_info(full).type
        if kind == pafs.FileType.Directory:
            self._filesystem.delete_dir(full)
        elif kind == pafs.FileType.File:
            self._filesystem.delete_file(full)


class _Stream:
    def __init__(self, filesystem: Any, path: str) -> None:
        self._filesystem, self._path = filesystem, path
        self._stream = filesystem.open_output_stream(path)
        self._there = False

    def write(self, data: Any) -> None:
        self._stream.write(data)

    def sync(self) -> None:
        self._stream.close()
        self._there = True

    def close(self) -> None:
        if not self._there:
            with suppress(Exception):
                self._stream.close()
                self._filesystem.delete_file(self._path)
        self._there = True


def _line(e: Exception) -> str:
    return str(e).partition("\n")[0][:300]


def run(call: Callable[[], T], file: str, nbytes: int = 0) -> T:
    """The answer of a request that is repeated as those of hbkit.parquet are. Raises StorageError or NotFound."""
    with refused(file):
        return fetch.run([fetch.Job(call, nbytes)], file)[0]


@contextmanager
def refused(file: str) -> Iterator[None]:
    """What a service refuses as StorageError, or Unsupported."""
    try:
        yield
    except HbkitError:
        raise
    except NotImplementedError as e:
        raise Unsupported(f"the service cannot do this: {e}", file=file, remedy="save to another place") from e
    except OSError as e:
        raise StorageError(f"the service refused: {e.strerror or e}", file=file, remedy=_REFUSED) from e
