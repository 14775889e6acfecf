"""The manifest of a commit: what JSON says about its tables and files, and every check of that JSON.

The file is ``{"blake2b": <digest of what follows>, "manifest": {...}}``, byte for byte as `encode` writes it: a
manifest that differs in one bit, be it white space, is corrupt. Someone who means harm can compute a digest, so types,
names, paths and counts are checked as well; paths are not free but follow from the names.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, TypeVar
from urllib.parse import quote

from hbkit._ext.slabs import ROW_DTYPES
from hbkit.errors import Corrupt, InvalidArgument, Unsupported
from hbkit.snapshot.files import DIGEST_NBYTES, RESTORE, FileEntry
from hbkit.store.keys import KEY_DTYPES, as_keys

VERSION = 3  # 1 has neither default nor padding_key, 2 neither directory nor squashed
MAX_NBYTES = 64 << 20
MAX_WIDTH = 1 << 20

COMMIT = re.compile(r"c[0-9]{8}", re.ASCII)
DIRECTORY = re.compile(r"(c[0-9]{8})(-[0-9a-f]{16})?", re.ASCII)

_HEAD, _MIDDLE, _TAIL = b'{\n"blake2b": "', b'",\n"manifest": ', b"\n}\n"
_DIGEST = re.compile(rf"[0-9a-f]{{{2 * DIGEST_NBYTES}}}", re.ASCII)
_FILE_NAME = re.compile(r"[a-z]+-[0-9]{5}\.parquet", re.ASCII)
_T = TypeVar("_T")


@dataclass(frozen=True)
class TableEntry:
    """One table in a commit.

    Attributes
    ----------
    dim, n_state : int
        Floats of a row and of its state.
    dtype, key_dtype : str
    optimizer, initializer : dict
        ``name`` of the class, and its fields.
    step : int
        The table's own step.
    since : int or None
        The parent's step of this table, where the files hold only what changed since; None where they hold all rows.
    n_rows : int
        Rows of the table at this commit, those of the parents included.
    rows, erased, admission_files : list of FileEntry
    admission : str or None
        Class of the admission filter.
    default : None, float, list of float or dict
        What keys without a row read: zeros, one number in all columns, a row, or an initializer as above.
    padding_key : int or None
        The key that reads zeros whatever the default is.
    """

    dim: int
    n_state: int
    dtype: str
    key_dtype: str
    optimizer: dict[str, Any]
    initializer: dict[str, Any]
    step: int
    since: int | None
    n_rows: int
    rows: list[FileEntry]
    erased: list[FileEntry]
    admission: str | None
    admission_files: list[FileEntry]
    default: Any = None
    padding_key: Any = None

    @property
    def files(self) -> list[FileEntry]:
        """All files of the table in this commit."""
        return self.rows + self.erased + self.admission_files


@dataclass(frozen=True)
class Manifest:
    """One commit.

    Attributes
    ----------
    version : int
        Of the format.
    commit : str
        ``c00000001`` and up.
    parent : str or None
        The commit that tables with `TableEntry.since` build on.
    step : int
    tables : dict of str to TableEntry
    state : dict
        JSON values by name.
    state_files : dict of str to FileEntry
        Bytes by name.
    directory : str
        Where the commit's files are: named after it, ``-`` and 16 hexadecimal digits following where writers must not
        meet in one. Empty in old versions, which have ``<commit>``.
    squashed : str
        Digest of the commit that this one holds the same rows as, in full; empty where it is none's.
    """

    version: int
    commit: str
    parent: str | None
    step: int
    tables: dict[str, TableEntry]
    state: dict[str, Any]
    state_files: dict[str, FileEntry]
    directory: str = ""
    squashed: str = ""

    @property
    def files(self) -> list[FileEntry]:
        """All files of the commit."""
        return [f for t in self.tables.values() for f in t.files] + list(self.state_files.values())


def file_name(name: str) -> str:
    """A table's or state's name as a file name; raises InvalidArgument where it cannot be one."""
    try:
        quoted = quote(name, safe="")
    except (TypeError, UnicodeEncodeError):
        quoted = ""
    if not isinstance(name, str) or not quoted or quoted.startswith(".") or len(quoted) > 200:
        raise InvalidArgument(f"name {name!r:.80} cannot be a file name", remedy="give a short name, no dot first")
    return quoted


def table_directory(directory: str, name: str) -> str:
    """Where a commit keeps a table's files, relative to the snapshot."""
    return f"{directory}/tables/{file_name(name)}"


def state_path(directory: str, name: str) -> str:
    """Where a commit keeps bytes of the state, relative to the snapshot."""
    return f"{directory}/state/{file_name(name)}"


def encode(manifest: Manifest) -> tuple[bytes, str]:
    """The bytes of a manifest's file, and their digest, which identifies the commit wherever it is copied."""
    try:
        text = json.dumps(asdict(manifest), indent=1, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise InvalidArgument(f"the manifest is not JSON: {e}", remedy="give finite numbers, strings, lists") from e
    body = text.encode("ascii")
    if len(body) > MAX_NBYTES - 1024:
        raise InvalidArgument(
            f"a manifest of {len(body)} bytes", remedy="give large parts of the state as bytes instead of JSON values"
        )
    digest = hashlib.blake2b(body, digest_size=DIGEST_NBYTES).hexdigest()
    return _HEAD + digest.encode() + _MIDDLE + body + _TAIL, digest


def decode(data: bytes, commit: str, file: str) -> tuple[Manifest, str]:
    """A manifest and its digest, from the bytes of the file of commit `commit`; raises Corrupt or Unsupported."""
    start = len(_HEAD) + 2 * DIGEST_NBYTES + len(_MIDDLE)
    body = data[start : -len(_TAIL)]
    digest = hashlib.blake2b(body, digest_size=DIGEST_NBYTES).hexdigest()
    if data != _HEAD + digest.encode() + _MIDDLE + body + _TAIL:
        raise Corrupt("the manifest's checksum is wrong", file=file, remedy=RESTORE)
    try:
        raw = json.loads(body, parse_constant=_no_constant)
        if isinstance(raw, dict) and isinstance(raw.get("version"), int) and raw["version"] > VERSION:
            raise Unsupported(f"snapshot format {raw['version']}", file=file, remedy="read it with a newer hbkit")
        manifest = _object(Manifest, raw)
        _check(manifest, commit)
    except (ValueError, RecursionError) as e:  # InvalidArgument and JSONDecodeError are ValueErrors
        raise Corrupt(f"the manifest is broken: {e or type(e).__name__}", file=file, remedy=RESTORE) from e
    return manifest, digest


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _check(manifest: Manifest, commit: str) -> None:
    """What the types do not say; raises ValueError."""
    parent, place = manifest.parent, manifest.directory or commit
    _hold(1 <= manifest.version <= VERSION, "version")
    _hold(manifest.commit == commit, "commit")
    # A parent is older: so there are no cycles.
    _hold(parent is None or (COMMIT.fullmatch(parent) is not None and parent < commit), "parent")
    named = DIRECTORY.fullmatch(place)
    _hold(named is not None and named[1] == commit, f"directory {place!r:.80}")
    for name, table in manifest.tables.items():
        _hold(1 <= table.dim <= MAX_WIDTH and table.n_state <= 4 * MAX_WIDTH, f"dim of table {name!r}")
        _hold(table.dtype in ROW_DTYPES and table.key_dtype in KEY_DTYPES, f"dtype of table {name!r}")
        _hold(isinstance(table.optimizer.get("name"), str), f"optimizer of table {name!r}")
        _hold(table.since is None or parent is not None, f"since of table {name!r}")
        _hold(table.since is not None or not table.erased, f"erased of table {name!r}")
        _hold((table.admission is None) == (not table.admission_files), f"admission of table {name!r}")
        _hold(_is_default(table.default, table.dim), f"default of table {name!r}")
        key = table.padding_key
        _hold(key is None or (type(key) is int and -(2**63) <= key < 2**64), f"padding_key of table {name!r}")
        as_keys([] if key is None else [key], table.key_dtype, name)
        directory = table_directory(place, name)
        for file in table.files:
            head, _, tail = file.path.rpartition("/")
            _hold(head == directory and _FILE_NAME.fullmatch(tail) is not None, f"path {file.path!r:.80}")
    _hold(not manifest.squashed or _DIGEST.fullmatch(manifest.squashed) is not None, "squashed")
    _hold(not manifest.state.keys() & manifest.state_files.keys(), "state")
    for name, file in manifest.state_files.items():
        _hold(file.path == state_path(place, name), f"path {file.path!r:.80}")
    paths = [f.path for f in manifest.files]
    _hold(len(set(paths)) == len(paths), "a path listed twice")
    _hold(all((f.blake2b is None) != (f.blake3 is None) for f in manifest.files), "digests of a file")
    _hold(all(_DIGEST.fullmatch(f.digest) for f in manifest.files), "digest of a file")


def _is_default(default: Any, dim: int) -> bool:
    if default is None or isinstance(default, dict):
        return default is None or isinstance(default.get("name"), str)
    row = default if isinstance(default, list) else [default] * dim
    return len(row) == dim and all(type(x) in (int, float) and abs(x) < 2**128 for x in row)


def _hold(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"bad {what}")


def _object(cls: type[_T], raw: Any) -> _T:
    """`raw` as a dataclass, each field checked by its annotation; raises ValueError."""
    parts = fields(cls)  # type: ignore[arg-type]  # any dataclass
    annotations, required = {f.name: str(f.type) for f in parts}, {f.name for f in parts if f.default is MISSING}
    _hold(isinstance(raw, dict) and required <= raw.keys() <= annotations.keys(), f"{cls.__name__}: its fields")
    try:
        return cls(**{name: _PARSE[annotations[name]](value) for name, value in raw.items()})
    except TypeError as e:
        raise ValueError(f"bad {cls.__name__}: {e}") from None


def _int(raw: Any) -> int:
    if type(raw) is not int or not 0 <= raw < 2**63:
        raise TypeError(f"{raw!r:.40} is no count")
    return raw


def _str(raw: Any) -> str:
    if not isinstance(raw, str):
        raise TypeError(f"{raw!r:.40} is no string")
    return raw


def _dict(raw: Any) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise TypeError(f"{raw!r:.40} is no object")
    return raw


def _files(raw: Any) -> list[FileEntry]:
    if not isinstance(raw, list):
        raise TypeError(f"{raw!r:.40} is no list")
    return [_object(FileEntry, file) for file in raw]


_PARSE: dict[str, Callable[[Any], Any]] = {
    "Any": lambda raw: raw,
    "int": _int,
    "int | None": lambda raw: None if raw is None else _int(raw),
    "str": _str,
    "str | None": lambda raw: None if raw is None else _str(raw),
    "dict[str, Any]": _dict,
    "list[FileEntry]": _files,
    "dict[str, FileEntry]": lambda raw: {name: _object(FileEntry, file) for name, file in _dict(raw).items()},
    "dict[str, TableEntry]": lambda raw: {name: _object(TableEntry, table) for name, table in _dict(raw).items()},
}
