"""A disk in memory that loses power: what was not synced is kept, dropped, reordered or torn, as a real one may."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import numpy as np

from hbkit.store.disk import Disk, EndOfFile

PAGE = 4096


class PowerLoss(BaseException):
    """The machine is off."""


class File:
    def __init__(self):
        self.durable, self.now = b"", bytearray()
        self.pending = []  # ("write", offset, bytes) and ("cut", size), since the last sync

    def write(self, offset, data):
        self.now[len(self.now) :] = bytes(max(0, offset - len(self.now)))
        self.now[offset : offset + len(data)] = data

    def survive(self, rng):
        """What is left of it: any of the pages written since the last sync, each whole or torn at a sector."""
        self.now = bytearray(self.durable)
        pages = []
        for kind, at, data in self.pending:
            if kind == "cut":
                pages.append((kind, at, None))
            else:
                pages += [("write", at + i, data[i : i + PAGE]) for i in range(0, len(data), PAGE)]
        luck = rng.choice([0.0, 0.5, 0.9, 1.0])
        kept = [p for p in pages if rng.random() < luck]
        if rng.random() < 0.5:
            rng.shuffle(kept)
        for kind, at, data in kept:
            if kind == "cut":
                del self.now[at:]
            elif rng.random() < 0.2:
                n = rng.randrange(len(data) // 512 + 1) * 512
                self.write(at, data[:n])
            else:
                self.write(at, data)
        self.durable, self.pending = bytes(self.now), []


class MemoryDisk:
    """`hbkit.store.disk.Disk` in memory. Every call counts; `at(n, what)` runs `what()` before the n-th."""

    engine, direct = "memory", True

    def __init__(self):
        self.names, self.durable_names = {}, {}  # name -> File
        self.renames = []  # directory operations since its last sync: functions of a dict
        self.handles, self.n_handles, self.locked = {}, 0, False
        self.calls = 0
        self.fault = None  # function of the call's number and name; raises
        self.capacity = 2**40

    def _call(self, name):
        self.calls += 1
        if self.fault is not None:
            self.fault(self.calls, name)

    def lose_power(self, rng):
        """Turn it off and on again."""
        names = dict(self.durable_names)
        some = self.renames[: rng.randrange(len(self.renames) + 1)]
        if rng.random() < 0.3:  # a file system that does not keep their order
            some = [r for r in self.renames if rng.random() < 0.5]
        for change in some:
            change(names)
        self.names, self.durable_names, self.renames = names, dict(names), []
        for file in {id(f): f for f in names.values()}.values():
            file.survive(rng)
        self.handles, self.locked, self.fault = {}, False, None

    def make_directory(self, path):
        self._call("make_directory")

    def lock(self, path):
        self._call("lock")
        if self.locked:
            raise BlockingIOError
        self.locked = True
        return -1

    def open(self, path, create=False, direct=False):
        self._call("open")
        name = Path(path).name
        if create and name not in self.names:
            file = self.names[name] = File()
            self.renames.append(lambda names: names.__setitem__(name, file))
        elif create:
            self.names[name].now.clear()
            self.names[name].pending.append(("cut", 0, None))
        elif name not in self.names:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        self.n_handles += 1
        self.handles[self.n_handles] = self.names[name]
        return self.n_handles

    def rest(self):
        pass

    def close(self, handle):
        if handle == -1:
            self.locked = False
        else:
            self.handles.pop(handle, None)

    def write(self, handle, data, offset):
        file, data = self.handles[handle], bytes(data)
        try:
            self._call("write")
        except OSError:  # a part may be there
            data = data[: len(data) // 2]
            file.write(offset, data)
            file.pending.append(("write", offset, data))
            raise
        if sum(len(f.now) for f in self.names.values()) + len(data) > self.capacity:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file.write(offset, data)
        file.pending.append(("write", offset, data))

    def read(self, handles, offsets, lengths, out):
        self._call("read")
        at = 0
        for i, (handle, offset, length) in enumerate(
            zip(handles.tolist(), offsets.tolist(), lengths.tolist(), strict=True)
        ):
            data = self.handles[handle].now[offset : offset + length]
            if len(data) < length:
                e = EndOfFile()
                e.request = i
                raise e
            out[at : at + length] = np.frombuffer(bytes(data), np.uint8)
            at += length

    def sync(self, handle):
        file = self.handles[handle]
        try:
            self._call("sync")
        except OSError:  # the pages are clean now, and some of them are not on the disk
            file.pending = [p for i, p in enumerate(file.pending) if i % 2]
            file.durable = _after(file.durable, file.pending)
            file.pending = []
            raise
        file.durable, file.pending = bytes(file.now), []

    def sync_directory(self, path):
        self._call("sync_directory")
        self.durable_names, self.renames = dict(self.names), []

    def truncate(self, handle, nbytes):
        self._call("truncate")
        file = self.handles[handle]
        del file.now[nbytes:]
        file.pending.append(("cut", nbytes, None))

    def rename(self, path, to):
        self._call("rename")
        old, new = Path(path).name, Path(to).name

        def change(names):
            if old in names:
                names[new] = names.pop(old)

        change(self.names)
        self.renames.append(change)

    def unlink(self, path):
        self._call("unlink")
        name = Path(path).name
        if name not in self.names:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        del self.names[name]
        self.renames.append(lambda names: names.pop(name, None))

    def list(self, path):
        self._call("list")
        return list(self.names)

    def size(self, path):
        self._call("size")
        name = Path(path).name
        return len(self.names[name].now) if name in self.names else -1

    def free(self, path):
        self._call("free")
        return self.capacity - sum(len(f.now) for f in self.names.values())


def _after(data, pending):
    file = File()
    file.now = bytearray(data)
    for kind, at, piece in pending:
        if kind == "cut":
            del file.now[at:]
        else:
            file.write(at, piece)
    return bytes(file.now)


def seeded(*parts):
    """A generator of its own for each case."""
    return random.Random(repr(parts))


class Folder:
    def __init__(self):
        self.durable, self.now = {}, {}  # name -> File or Folder
        self.pending = []  # (name, what it is from now on, or None), since the last sync

    def set(self, name, node):
        self.pending.append((name, node))
        self.now[name] = node
        if node is None:
            del self.now[name]

    def survive(self, rng, done):
        """What is left of it and of what it holds: any of the names changed since the last sync, in any order."""
        if self in done:
            return
        done.add(self)
        some = self.pending[: rng.randrange(len(self.pending) + 1)]
        if rng.random() < 0.3:
            some = [change for change in self.pending if rng.random() < 0.5]
        self.now = dict(self.durable)
        for name, node in some:
            self.now[name] = node
        self.now = {name: node for name, node in self.now.items() if node is not None}
        self.durable, self.pending = dict(self.now), []
        for node in self.now.values():
            if isinstance(node, Folder):
                node.survive(rng, done)
            elif node not in done:
                done.add(node)
                node.survive(rng)


class Tape(Disk):
    """The disk of the operating system, and what was done to it."""

    def __init__(self, *args, **kwargs):
        super().__init__(direct=False, ring=False)
        self.calls, self.paths = [], {}

    def make_directory(self, path):
        for p in reversed([path, *path.parents]):
            if not p.is_dir():
                self.calls.append(("make_directory", p))
        super().make_directory(path)

    def open(self, path, create=False, direct=False):
        handle = super().open(path, create, direct)
        self.paths[handle] = path
        if create:
            self.calls.append(("open", path))
        return handle

    def write(self, handle, data, offset):
        self.calls.append(("write", self.paths[handle], offset, bytes(data)))
        super().write(handle, data, offset)

    def sync(self, handle):
        self.calls.append(("sync", self.paths[handle]))
        super().sync(handle)

    def sync_directory(self, path):
        self.calls.append(("sync_directory", path))
        super().sync_directory(path)

    def rename(self, path, to):
        self.calls.append(("rename", path, to))
        super().rename(path, to)

    def unlink(self, path):
        self.calls.append(("unlink", path))
        super().unlink(path)

    def remove_tree(self, path, ignore_errors=False):
        for here, folders, files in os.walk(path, topdown=False):
            self.calls += [("unlink", Path(here) / name) for name in files + folders]
        if path.exists():
            self.calls.append(("unlink", path))
        super().remove_tree(path, ignore_errors)


class Replay:
    """A disk in memory on which the calls of a tape are done again, until the power fails.

    Parameters
    ----------
    base : Path
        A directory, whose content is taken as durable; calls on files elsewhere are none of its business.
    """

    def __init__(self, base):
        self.base = base
        self.root = self._copy(base)

    def _copy(self, path):
        node = Folder() if path.is_dir() else File()
        if path.is_dir():
            node.now = {p.name: self._copy(p) for p in path.iterdir()}
            node.durable = dict(node.now)
        else:
            node.durable = path.read_bytes()
            node.now = bytearray(node.durable)
        return node

    def _find(self, path):
        node = self.root
        for name in path.relative_to(self.base).parts:
            node = node.now[name]
        return node

    def do(self, kind, path, *rest):
        if kind == "make_directory":
            self._find(path.parent).set(path.name, Folder())
        elif kind == "open":
            self._find(path.parent).set(path.name, File())
        elif kind == "write":
            file, (offset, data) = self._find(path), rest
            file.write(offset, data)
            file.pending.append(("write", offset, data))
        elif kind == "sync":
            file = self._find(path)
            file.durable, file.pending = bytes(file.now), []
        elif kind == "sync_directory":
            folder = self._find(path)
            folder.durable, folder.pending = dict(folder.now), []
        elif kind == "rename":
            node = self._find(path)
            self._find(rest[0].parent).set(rest[0].name, node)
            self._find(path.parent).set(path.name, None)
        else:
            assert kind == "unlink"
            self._find(path.parent).set(path.name, None)

    def lose_power(self, rng, to):
        """What is there when it is on again, as a new directory `to`."""
        self.root.survive(rng, set())
        self._write(self.root, to)

    def _write(self, node, to):
        if isinstance(node, Folder):
            to.mkdir()
            for name, below in node.now.items():
                self._write(below, to / name)
        else:
            to.write_bytes(node.now)
