"""Driver: memory of a CUDA device and the arrays in it, copies, events and launches, by calls of CUDA's driver.

A step of a small batch takes the device less time than Python would need to prepare its launches. So arrays know what a
kernel is given of them, a kernel's parameters are a block of memory that is filled and passed on, and nothing is made
for a launch but that. `bind` is told where the driver's functions are: nothing here is linked with it.

Calls that only begin something keep the interpreter's lock, which may take longer to come back than they take; those
that wait, or move many bytes, give it up. Each call makes the device's primary context, which frameworks use too, the
thread's current one where it is not, and leaves the thread with the one that it had.

To free memory the driver waits for the device. So small pieces that only one stream has used are kept for its next
arrays: what it begins comes after all that used them before.
"""

cimport cython
from cpython.buffer cimport (PyBUF_C_CONTIGUOUS, PyBUF_WRITABLE, Py_buffer, PyBuffer_FillInfo, PyBuffer_Release,
                             PyObject_GetBuffer)
from cpython.number cimport PyNumber_Index
from cpython.slice cimport PySlice_GetIndicesEx
from libc.stdint cimport int64_t, uint64_t, uintptr_t
from libc.string cimport memcpy

from math import prod

import numpy as np

from hbkit.errors import BudgetExceeded, DeviceUnavailable, InvalidArgument

cdef enum:
    MOST_DIMS = 4
    MOST_ARGS = 32
    MOST_PARAMS = 160
    STAGED = 1 << 16  # bytes of a fetch that go by pinned memory
    LEAST_LOG = 8  # log2 of bytes of pieces that are kept
    MOST_LOG = 20
    SPARE = 8  # of each size
    NUMBER = -1  # instead of an array's dimensions
    OUT_OF_MEMORY = 2
    NO_TIMING = 2  # CU_EVENT_DISABLE_TIMING

# The driver's functions, by their names; handles of its objects are pointers, addresses in device memory are numbers.
cdef struct Functions:
    int (*cuDeviceGet)(int *, int) noexcept nogil
    int (*cuDevicePrimaryCtxRetain)(void **, int) noexcept nogil
    int (*cuCtxGetCurrent)(void **) noexcept nogil
    int (*cuCtxSetCurrent)(void *) noexcept nogil
    int (*cuGetErrorName)(int, const char **) noexcept nogil
    int (*cuMemAlloc)(uint64_t *, size_t) noexcept nogil
    int (*cuMemFree)(uint64_t) noexcept nogil
    int (*cuMemHostAlloc)(void **, size_t, unsigned) noexcept nogil
    int (*cuMemFreeHost)(void *) noexcept nogil
    int (*cuMemcpyHtoDAsync)(uint64_t, const void *, size_t, void *) noexcept nogil
    int (*cuMemcpyDtoHAsync)(void *, uint64_t, size_t, void *) noexcept nogil
    int (*cuMemcpyDtoDAsync)(uint64_t, uint64_t, size_t, void *) noexcept nogil
    int (*cuStreamCreate)(void **, unsigned) noexcept nogil
    int (*cuStreamDestroy)(void *) noexcept nogil
    int (*cuStreamSynchronize)(void *) noexcept nogil
    int (*cuStreamWaitEvent)(void *, void *, unsigned) noexcept nogil
    int (*cuEventCreate)(void **, unsigned) noexcept nogil
    int (*cuEventRecord)(void *, void *) noexcept nogil
    int (*cuEventSynchronize)(void *) noexcept nogil
    int (*cuEventDestroy)(void *) noexcept nogil
    int (*cuLaunchKernel)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *,
                          void **, void **) noexcept nogil

FUNCTIONS = (
    "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxGetCurrent", "cuCtxSetCurrent", "cuGetErrorName",
    "cuMemAlloc_v2", "cuMemFree_v2", "cuMemHostAlloc", "cuMemFreeHost",
    "cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuMemcpyDtoDAsync_v2",
    "cuStreamCreate", "cuStreamDestroy_v2", "cuStreamSynchronize", "cuStreamWaitEvent",
    "cuEventCreate", "cuEventRecord", "cuEventSynchronize", "cuEventDestroy_v2",
    "cuLaunchKernel",
)  # as the driver exports them, in the order of `Functions`

cdef Functions cu


def bind(addresses):
    """Say where the functions are: an address for each of FUNCTIONS."""
    cdef uintptr_t *to = <uintptr_t *> &cu
    assert len(addresses) * sizeof(void *) == sizeof(Functions)
    for i, address in enumerate(addresses):
        to[i] = address


cdef void *enter(void *context) noexcept nogil:
    """Make a context current; the one before."""
    cdef void *before = NULL
    cu.cuCtxGetCurrent(&before)
    if before != context:
        cu.cuCtxSetCurrent(context)
    return before


cdef void leave(void *context, void *before) noexcept nogil:
    if before != context:
        cu.cuCtxSetCurrent(before)


cdef int check(int result, str device) except -1:
    cdef const char *name = NULL
    if result:
        cu.cuGetErrorName(result, &name)
        what = name.decode() if name else f"CUDA error {result}"
        raise DeviceUnavailable(
            f"the device failed: {what}", device=device, remedy="check nvidia-smi, or use another store"
        )
    return 0


cdef class Stream:
    """What a device does one after the other, ordered with the legacy default stream; and the door to its memory.

    Parameters
    ----------
    device : str
        As errors name it.
    number : int

    Attributes
    ----------
    handle : int
        The driver's.
    """

    cdef readonly str device
    cdef void *_context
    cdef void *_stream
    cdef list _staged  # pinned memory that no fetch uses
    cdef uint64_t _spare[MOST_LOG + 1][SPARE]
    cdef int _n_spare[MOST_LOG + 1]

    def __init__(self, str device, int number):
        cdef int ordinal
        self.device = device
        check(cu.cuDeviceGet(&ordinal, number), device)
        check(cu.cuDevicePrimaryCtxRetain(&self._context, ordinal), device)
        before = enter(self._context)
        result = cu.cuStreamCreate(&self._stream, 0)
        leave(self._context, before)
        check(result, device)
        self._staged = []

    def __dealloc__(self):
        cdef int log, i
        if self._stream:
            before = enter(self._context)
            for log in range(LEAST_LOG, MOST_LOG + 1):
                for i in range(self._n_spare[log]):
                    cu.cuMemFree(self._spare[log][i])
            cu.cuStreamDestroy(self._stream)  # what is under way goes on to its end
            leave(self._context, before)

    @property
    def handle(self):
        return <uintptr_t> self._stream

    def empty(self, shape, dtype):
        """An uninitialised `Array`.

        Raises
        ------
        BudgetExceeded
            There is not so much memory.
        """
        dtype = np.dtype(dtype)
        cdef Array array = new_array(self, 0, tuple(shape), dtype, None)
        cdef Memory memory
        if array.size:
            memory = Memory.__new__(Memory)
            memory.stream, memory.log = self, LEAST_LOG
            while memory.log <= MOST_LOG and (<size_t> 1 << memory.log) < array.nbytes():
                memory.log += 1
            if memory.log <= MOST_LOG and self._n_spare[memory.log]:
                self._n_spare[memory.log] -= 1
                memory.at = self._spare[memory.log][self._n_spare[memory.log]]
            else:
                self._allocate(memory, array.nbytes() if memory.log > MOST_LOG else <size_t> 1 << memory.log)
            array.ptr, array.owner = memory.at, memory
        return array

    cdef int _allocate(self, Memory memory, size_t nbytes) except -1:
        before = enter(self._context)
        result = cu.cuMemAlloc(&memory.at, nbytes)
        leave(self._context, before)
        if result == OUT_OF_MEMORY:
            raise BudgetExceeded(
                f"no {nbytes} bytes are left in device memory",
                device=self.device,
                remedy="give a smaller cache_budget, or free what else is there (nvidia-smi shows it)",
            )
        return check(result, self.device)

    def of(self, owner):
        """The memory of anything with ``__cuda_array_interface__`` as an `Array`, which keeps it alive.

        What is not contiguous is refused. Where it names a stream, its work is waited for, as the interface asks.
        """
        cdef Array array
        found = getattr(owner, "__cuda_array_interface__", None)
        if found is None:
            raise InvalidArgument(
                f"a {type(owner).__name__} that is not in device memory", device=self.device, remedy="move it there"
            )
        array = new_array(self, found["data"][0] or 0, tuple(found["shape"]), np.dtype(found["typestr"]), owner)
        strides, other = found.get("strides"), found.get("stream")
        if strides is not None and array.size and tuple(strides) != array.strides:
            raise InvalidArgument(
                f"an array of {array.dtype} with strides of {tuple(strides)} bytes for a shape of {array.shape}",
                device=self.device,
                remedy="give a contiguous one",
            )
        if other is not None and other > 1:  # 1 is the legacy default stream
            wait_for(self, <void *> <uintptr_t> other)
        return array

    def pinned(self, nbytes):
        """Uninitialised host memory that the device reads and writes by itself: uint8[nbytes]."""
        return np.frombuffer(Pinned(self, nbytes), np.uint8)

    def mapped(self, array):
        """Pinned memory, given as NumPy's, as an `Array` for kernels: addresses of the host are the device's, too."""
        return new_array(self, array.ctypes.data, array.shape, array.dtype, array)

    def event(self):
        """Something that streams record and wait for."""
        return Event(self)

    def copy(self, to, source):
        """Begin to copy between contiguous arrays of as many bytes, of which one at least is an `Array`."""
        cdef Py_buffer near
        cdef Array far
        cdef int result
        cdef bint up
        if isinstance(to, Array) and isinstance(source, Array):
            check_nbytes((<Array> to).nbytes(), (<Array> source).nbytes(), self.device)
            share(to, self)
            share(source, self)
            before = enter(self._context)
            result = cu.cuMemcpyDtoDAsync((<Array> to).ptr, (<Array> source).ptr, (<Array> to).nbytes(), self._stream)
            leave(self._context, before)
            check(result, self.device)
            return
        up = isinstance(to, Array)
        far = to if up else source
        share(far, self)
        PyObject_GetBuffer(source if up else to, &near, PyBUF_C_CONTIGUOUS | (0 if up else PyBUF_WRITABLE))
        try:
            check_nbytes(far.nbytes(), near.len, self.device)
            check(move(self, far.ptr, near.buf, near.len, up), self.device)
        finally:
            PyBuffer_Release(&near)

    def fetch(self, Array array, out=None):
        """Wait for what was begun, and copy an array, into a contiguous `out` of its shape and dtype."""
        cdef Py_buffer near
        cdef Pinned staged
        cdef size_t nbytes = array.nbytes()
        if out is None:
            out = np.empty(array.shape, array.dtype)
        elif out.shape != array.shape or out.dtype != array.dtype:
            raise InvalidArgument(
                f"{array.dtype}{array.shape} copied into {out.dtype}{out.shape}",
                device=self.device,
                remedy="give an array of the same shape and dtype",
            )
        PyObject_GetBuffer(out, &near, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE)
        try:
            if nbytes <= STAGED:  # the driver would copy as well, and wait for itself
                staged = self._staged.pop() if self._staged else Pinned(self, STAGED)
                check(move(self, array.ptr, staged.at, nbytes, False), self.device)
                wait_for(self, self._stream)
                memcpy(near.buf, staged.at, nbytes)
                self._staged.append(staged)
            else:
                check(move(self, array.ptr, near.buf, nbytes, False), self.device)
                wait_for(self, self._stream)
        finally:
            PyBuffer_Release(&near)
        return out

    def synchronize(self):
        """Wait for what was begun."""
        wait_for(self, self._stream)


cdef int wait_for(Stream stream, void *which) except -1:
    cdef int result
    with nogil:
        before = enter(stream._context)
        result = cu.cuStreamSynchronize(which)
        leave(stream._context, before)
    return check(result, stream.device)


cdef int copying(Stream stream, uint64_t far, void *near, size_t nbytes, bint up) noexcept nogil:
    cdef int result
    before = enter(stream._context)
    if up:
        result = cu.cuMemcpyHtoDAsync(far, near, nbytes, stream._stream)
    else:
        result = cu.cuMemcpyDtoHAsync(near, far, nbytes, stream._stream)
    leave(stream._context, before)
    return result


cdef int move(Stream stream, uint64_t far, void *near, size_t nbytes, bint up) noexcept:
    """Copy between device and host; the driver's result."""
    cdef int result = 0
    if nbytes > STAGED:  # the driver may copy by itself or wait
        with nogil:
            result = copying(stream, far, near, nbytes, up)
    elif nbytes:
        result = copying(stream, far, near, nbytes, up)
    return result


cdef int check_nbytes(size_t to, size_t source, str device) except -1:
    if to != source:
        raise InvalidArgument(f"{source} bytes copied to {to}", device=device, remedy="give arrays of the same size")
    return 0


cdef class Pinned:
    """Pinned host memory, which offers the buffer protocol."""

    cdef void *at
    cdef void *context
    cdef Py_ssize_t nbytes

    def __init__(self, Stream stream, nbytes):
        self.context, self.nbytes = stream._context, nbytes
        before = enter(self.context)
        result = cu.cuMemHostAlloc(&self.at, max(self.nbytes, 1), 0)
        leave(self.context, before)
        if result == OUT_OF_MEMORY:
            raise BudgetExceeded(
                f"no {nbytes} bytes are left of the host's memory that can be pinned",
                device=stream.device,
                remedy="give a smaller cache_budget, or free what else is there",
            )
        check(result, stream.device)

    def __dealloc__(self):
        if self.at:
            before = enter(self.context)
            cu.cuMemFreeHost(self.at)
            leave(self.context, before)

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.at, self.nbytes, 0, flags)


@cython.no_gc  # it is in no circle; and with the collector its stream might go first
cdef class Memory:
    """Device memory of our own. It is freed, or used again, once the device is done with all that was begun."""

    cdef Stream stream
    cdef uint64_t at
    cdef int log  # of its bytes where it is small
    cdef bint shared

    def __dealloc__(self):
        cdef Stream stream = self.stream
        if not self.at:
            return
        if self.log <= MOST_LOG and not self.shared and stream._n_spare[self.log] < SPARE:
            stream._spare[self.log][stream._n_spare[self.log]] = self.at
            stream._n_spare[self.log] += 1
            return
        before = enter(stream._context)
        cu.cuMemFree(self.at)
        leave(stream._context, before)


cdef void share(Array array, Stream stream) noexcept:
    """An array is used by this stream, or by whom nobody knows: then its memory is not kept for its own stream."""
    if array.stream is not stream and isinstance(array.owner, Memory):
        (<Memory> array.owner).shared = True


cdef class Event:
    """A moment of a stream, which other streams and the host may wait for."""

    cdef void *_event
    cdef void *_context
    cdef str _device

    def __init__(self, Stream stream):
        self._context, self._device = stream._context, stream.device
        before = enter(self._context)
        result = cu.cuEventCreate(&self._event, NO_TIMING)
        leave(self._context, before)
        check(result, self._device)

    def __dealloc__(self):
        if self._event:
            before = enter(self._context)
            cu.cuEventDestroy(self._event)
            leave(self._context, before)

    def record(self, Stream stream):
        """It is when the stream is done with what was begun."""
        before = enter(self._context)
        result = cu.cuEventRecord(self._event, stream._stream)
        leave(self._context, before)
        check(result, self._device)

    def wait(self, Stream stream):
        """What the stream begins from now on comes after it."""
        before = enter(self._context)
        result = cu.cuStreamWaitEvent(stream._stream, self._event, 0)
        leave(self._context, before)
        check(result, self._device)

    def synchronize(self):
        """Wait for it; not at all where it was never recorded."""
        cdef int result
        with nogil:
            before = enter(self._context)
            result = cu.cuEventSynchronize(self._event)
            leave(self._context, before)
        check(result, self._device)


cdef class Array:
    """A contiguous array in device memory; what it is made of lives as long as it does.

    It is made by a `Stream`, which is where its own copies run.

    Attributes
    ----------
    ptr : int
        Address in device memory.
    shape : tuple of int
    dtype : numpy.dtype
    size : int
    """

    cdef readonly uint64_t ptr
    cdef readonly tuple shape
    cdef readonly object dtype
    cdef readonly Py_ssize_t size
    cdef Stream stream
    cdef object owner
    cdef Py_ssize_t itemsize
    cdef int n_dims, code
    cdef Py_ssize_t dims[MOST_DIMS]

    cdef Py_ssize_t nbytes(self) noexcept nogil:
        return self.size * self.itemsize

    @property
    def ndim(self):
        return self.n_dims

    @property
    def strides(self):
        cdef uint64_t params[5 + 2 * MOST_DIMS]
        put(self, params)
        return tuple([params[5 + self.n_dims + i] for i in range(self.n_dims)])

    @property
    def __cuda_array_interface__(self):
        share(self, None)
        data = (self.ptr, False)
        return {"shape": self.shape, "typestr": self.dtype.str, "data": data, "strides": None, "version": 3}

    def __len__(self):
        if self.n_dims == 0:
            raise TypeError("an array without dimensions has no length")
        return self.dims[0]

    def __getitem__(self, item):
        cdef Py_ssize_t first, last, step, n, each
        if not isinstance(item, slice) or self.n_dims == 0:
            raise TypeError(f"a device array is sliced along its first axis, not indexed by {item!r}")
        PySlice_GetIndicesEx(item, self.dims[0], &first, &last, &step, &n)
        if step != 1:
            raise TypeError(f"a device array is sliced without steps, not by {item!r}")
        each = self.size // self.dims[0] if self.dims[0] else 0
        cdef Array part = Array.__new__(Array)
        part.ptr, part.size = self.ptr + first * each * self.itemsize, n * each
        part.shape = (n,) if self.n_dims == 1 else (n, *self.shape[1:])
        part.dtype, part.stream, part.owner = self.dtype, self.stream, self.owner
        part.itemsize, part.n_dims, part.code, part.dims = self.itemsize, self.n_dims, self.code, self.dims
        part.dims[0] = n
        return part

    def reshape(self, *shape):
        """The same memory in another shape, given as one tuple or as numbers, of which one may be -1: what is left."""
        if len(shape) == 1 and isinstance(shape[0], tuple):
            shape = shape[0]
        if -1 in shape:
            rest = -prod(shape)
            shape = tuple([self.size // rest if n == -1 and rest > 0 else n for n in shape])
        cdef Array other = new_array(self.stream, self.ptr, shape, self.dtype, self.owner)
        if other.size != self.size:
            raise InvalidArgument(f"an array of {self.shape} in a shape of {shape}", remedy="give one as large")
        return other

    def view(self, dtype):
        """The same memory in another dtype; the last axis is as much longer or shorter."""
        dtype = np.dtype(dtype)
        last = self.n_dims - 1
        nbytes = self.dims[last] * self.itemsize if last >= 0 else 1
        if nbytes % dtype.itemsize:
            raise InvalidArgument(f"rows of {nbytes} bytes as {dtype}", remedy="give a dtype that divides them")
        shape = (*self.shape[:last], nbytes // dtype.itemsize)
        return new_array(self.stream, self.ptr, shape, dtype, self.owner)

    def copy_to_host(self, out=None):
        """`Stream.fetch`."""
        return self.stream.fetch(self, out)

    def copy_to_device(self, source):
        """`Stream.copy` of another array here."""
        self.stream.copy(self, source)


cdef Array new_array(Stream stream, uint64_t at, tuple shape, object dtype, object owner):
    cdef Array array = Array.__new__(Array)
    cdef int i
    if len(shape) > MOST_DIMS:
        raise InvalidArgument(f"an array of {len(shape)} dimensions", remedy=f"give up to {MOST_DIMS}")
    array.stream, array.ptr, array.shape, array.dtype, array.owner = stream, at, shape, dtype, owner
    array.itemsize, array.code = dtype.itemsize, code_of(dtype)
    array.size, array.n_dims = 1, len(shape)
    for i in range(array.n_dims):
        array.dims[i] = shape[i]
        if array.dims[i] < 0:
            raise InvalidArgument(f"a shape of {shape}", remedy="give lengths from 0 on")
        array.size *= array.dims[i]
    return array


cdef int code_of(dtype) except -1:
    """What tells dtypes apart."""
    return ord(dtype.kind) << 8 | dtype.itemsize


cdef class Kernel:
    """A compiled kernel with a place for its parameters.

    An array of d dimensions is 5 + 2 d parameters, as Numba's kernels are given it: two pointers that are for the host,
    elements, bytes of an element, address, shape, strides in bytes.

    Parameters
    ----------
    name : str
    function : int
        The driver's handle.
    types : tuple of (dtype or None, int)
        Of each argument: dtype and dimensions of an array, or (None, 0) of an int64.
    owner : object
        What keeps the code in the device.
    """

    cdef readonly str name
    cdef readonly object owner
    cdef void *_function
    cdef tuple _types
    cdef int _n_args
    cdef int _dims[MOST_ARGS]
    cdef int _codes[MOST_ARGS]
    cdef uint64_t _values[MOST_PARAMS]
    cdef void *_params[MOST_PARAMS]

    def __init__(self, str name, uintptr_t function, tuple types, object owner):
        cdef int i, n_params = 0
        self.name, self._function, self._types, self.owner = name, <void *> function, types, owner
        self._n_args = len(types)
        assert self._n_args <= MOST_ARGS
        for i in range(self._n_args):
            dtype, n_dims = types[i]
            self._dims[i] = NUMBER if dtype is None else n_dims
            self._codes[i] = 0 if dtype is None else code_of(dtype)
            n_params += 1 if dtype is None else 5 + 2 * n_dims
        assert n_params <= MOST_PARAMS
        for i in range(n_params):
            self._params[i] = &self._values[i]

    def __call__(self, Stream stream, unsigned grid, unsigned block, tuple args, Array error):
        """Launch it with `args`, and `error` as the last one; does not wait.

        Raises
        ------
        InvalidArgument
            An argument does not fit its type.
        """
        cdef uint64_t *to = self._values
        cdef Array array
        cdef int i
        if len(args) != self._n_args - 1:
            raise InvalidArgument(f"{len(args)} arguments of {self.name}", remedy=f"give {self._n_args - 1}")
        for i in range(self._n_args):
            value = error if i == self._n_args - 1 else args[i]
            if self._dims[i] == NUMBER:
                try:
                    to[0] = <uint64_t> <int64_t> PyNumber_Index(value)  # a float would be cut
                except (TypeError, OverflowError):
                    raise self._misfit(i, value) from None
                to += 1
            else:
                if not isinstance(value, Array):
                    raise self._misfit(i, value)
                array = <Array> value
                if array.n_dims != self._dims[i] or array.code != self._codes[i]:
                    raise self._misfit(i, value)
                share(array, stream)
                to += put(array, to)
        before = enter(stream._context)
        result = cu.cuLaunchKernel(
            self._function, grid, 1, 1, block, 1, 1, 0, stream._stream, self._params, NULL
        )
        leave(stream._context, before)
        check(result, stream.device)

    cdef object _misfit(self, int i, object value):
        dtype, n_dims = self._types[i]
        wanted = "int64" if dtype is None else f"a device array of {dtype} of {n_dims} dimensions"
        what = f"{value.dtype}{value.shape}" if hasattr(value, "shape") else repr(value)
        return InvalidArgument(f"argument {i} of {self.name} is {what}", remedy=f"give {wanted}")


cdef int put(Array array, uint64_t *to) noexcept:
    """Write an array's parameters; how many they are."""
    cdef int d = array.n_dims, i
    cdef uint64_t step = array.itemsize
    to[0] = to[1] = 0
    to[2], to[3], to[4] = array.size, array.itemsize, array.ptr
    for i in range(d - 1, -1, -1):
        to[5 + i] = array.dims[i]
        to[5 + d + i] = step
        step *= array.dims[i]
    return 5 + 2 * d
