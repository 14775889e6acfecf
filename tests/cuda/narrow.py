"""A device in host memory that is as narrow as a real one.

Its arrays do what those of `hbkit._ext.driver` do and no more: no arithmetic, no comparisons, slices of the first axis;
new memory holds garbage; kernels refuse what is not contiguous or of another type; NumPy's arrays are copied when they
are given, as if they were sent. So what only runs by grace of NumPy, in the twin or the simulator, fails here.

As a plugin of pytest (``-p narrow``) it takes the place of the twin.
"""

import sys
from types import SimpleNamespace

import numpy as np

from hbkit.cuda import batch, parts, twin
from hbkit.store import device

GARBAGE = 0x5A
WRITE_TO_HOST = ("gather", "pool")  # where `out` is NumPy's


class Far:
    """An array in device memory. Its `__array__` copies it to the host: tests may ask for that, hbkit may not."""

    __hash__ = None

    def __init__(self, array):
        self._array = array

    shape, dtype, size, ndim, strides = (
        property(lambda self, name=name: getattr(self._array, name))
        for name in ("shape", "dtype", "size", "ndim", "strides")
    )

    def __len__(self):
        return len(self._array)

    def __getitem__(self, item):
        assert isinstance(item, slice), f"a device array is sliced along its first axis, not indexed by {item!r}"
        assert item.step is None, "a device array is sliced without steps"
        return Far(self._array[item])

    def reshape(self, *shape):
        return Far(self._array.reshape(*shape))

    def view(self, dtype):
        return Far(self._array.view(dtype))

    def copy_to_host(self, out=None):
        if out is None:
            return self._array.copy()
        out[...] = self._array
        return out

    def refused(self, *_, **__):
        raise TypeError("a device array has no such operation")

    def __array__(self, dtype=None, copy=None):
        asks = sys._getframe(1).f_globals["__name__"]
        assert not asks.startswith("hbkit"), f"{asks} takes a device array for one of NumPy's"
        return self._array.copy()

    __iter__ = __bool__ = __setitem__ = refused
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = refused
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __and__ = __or__ = __invert__ = __neg__ = refused


class NarrowDevice(twin.HostDevice):
    """`HostDevice` with such arrays."""

    def empty(self, shape, dtype):
        out = np.empty(shape, dtype)
        out.reshape(-1).view(np.uint8)[...] = GARBAGE
        return Far(out)

    def send(self, array):
        assert isinstance(array, np.ndarray), f"{type(array)} is sent"
        return Far(array.copy(order="C"))

    def array(self, array, dtype=None):
        inner = getattr(array, "array", None)  # tests wrap what they tell from NumPy's
        if isinstance(inner, (Far, np.ndarray)):
            array = inner if isinstance(inner, Far) else Far(inner)
        if isinstance(array, Far):
            super().array(memoryview(array._array) if array.size else array._array, dtype)  # as no array of NumPy's
            return array
        return self.send(array) if isinstance(array, np.ndarray) else Far(super().array(array, dtype))

    def none(self, dtype, n_dim=1):
        return Far(super().none(dtype, n_dim))

    def fetch(self, array, out=None):
        assert isinstance(array, Far), f"{type(array)} is fetched"
        return array.copy_to_host(out)

    def join(self, arrays, out=None):
        arrays = [near(self.array(a)) for a in arrays]
        return Far(np.concatenate(arrays, out=None if out is None else near(self.array(out))))


def near(value):
    """What a kernel is given."""
    if type(value) in (list, tuple):
        return type(value)(map(near, value))
    if isinstance(value, Placement):
        return batch.Placement(*vars(value).values())
    if isinstance(value, Far):
        assert value._array.flags.c_contiguous, "a kernel is given an array that is not contiguous"
        assert value.dtype in (np.int64, np.int32, np.float32), f"a kernel is given {value.dtype}"
        return value._array
    return value


def far(value):
    """What a call gives in device memory."""
    if isinstance(value, np.ndarray):
        return Far(value)
    if type(value) is tuple:
        return tuple(map(far, value))
    if isinstance(value, (batch.Held, batch.Victims)):
        return type(value)(*map(far, value))
    return value


def near_room(room):
    """A room whose arrays are NumPy's."""
    arrays = {name: near(a) for name, a in vars(room).items() if isinstance(a, Far)}
    return SimpleNamespace(max_ids=room.max_ids, **arrays)


class NarrowDedupe:
    """`HostDedupe` with such arrays."""

    def __init__(self, device, max_keys):
        self._device, self._of = device, twin.HostDedupe(twin.HostDevice(), max_keys)
        self.nbytes = self._of.nbytes

    def begin(self, keys, room):
        return self._of.begin(near(self._device.array(keys)), near_room(room))

    def __call__(self, keys, room):
        n = self.begin(keys, room)
        return batch.Distinct(room, n, int(near(room.found)[batch.N_KEYS]))


class NarrowOrder:
    """`HostOrder` with such arrays."""

    def __init__(self, device, max_ids):
        self._of = twin.HostOrder(twin.HostDevice(), max_ids)
        self.nbytes = self._of.nbytes

    def __call__(self, room, n, n_distinct):
        self._of(near_room(room), n, n_distinct)


class Placement(batch.Placement):
    """One whose arrays are such."""

    @property
    def both(self):
        return Far(super().both)

    def _row(self, row):
        return Far(super()._row(row))


def narrowed(of, *, on_host=()):
    """The class `of`, given and giving arrays of `NarrowDevice`; what the named methods give is NumPy's."""

    class Narrow:
        def __init__(self, device, *args, **kwargs):
            self._device, self._of = device, of(twin.HostDevice(), *args, **kwargs)

        def __len__(self):
            return len(self._of)

        def __getattr__(self, name):
            found = getattr(self._of, name)
            if not callable(found):
                return found

            def given(value):
                if isinstance(value, np.ndarray) and name not in WRITE_TO_HOST:
                    return value.copy(order="C")  # a kernel's changes do not come back
                return near(self._device.array(value) if hasattr(value, "data_ptr") else value)

            def call(*args, **kwargs):
                got = found(*map(given, args), **{k: given(v) for k, v in kwargs.items()})
                if isinstance(got, batch.Placement):
                    return Placement(*vars(got).values())
                if name == "drain":
                    return got[0], Placement(*vars(got[1]).values())
                return got if name in on_host else far(got)

            return call

        @staticmethod
        def nbytes_of(*args):
            return of.nbytes_of(*args)

    return Narrow


def narrow_parts():
    """Parts of such a device."""
    return parts.Parts(
        NarrowDevice(),
        narrowed(twin.HostIndex, on_host=("contents", "erase")),
        narrowed(twin.HostLines, on_host=("incoming", "depart", "leave")),
        NarrowDedupe,
        NarrowOrder,
    )


def pytest_configure():
    """Open such parts where the twin's are asked for."""
    opened = parts.open_parts

    def open_parts(name, allocate=None):
        return narrow_parts() if name == "cpu" else opened(name, allocate)

    parts.open_parts = device.open_parts = open_parts
