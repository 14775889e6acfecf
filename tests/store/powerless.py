"""A disk in memory that loses power: what was not synced is kept, dropped, reordered or torn, as a real one may."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import numpy as np

from hbkit.store.disk import EndOfFile

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
