"""Tables when memory runs out: each allocation of a call fails in turn, and the table is as it was."""

import ctypes
import itertools

import numpy as np
import pytest

import hbkit.embedding as e
from hbkit._ext.pool import fail_allocation
from hbkit.embedding.initializers import Initializer
from hbkit.store.line import Chunk


class Handler(ctypes.Structure):
    """NumPy's ``PyDataMem_Handler`` (NEP 49), by which every array's memory comes and goes.

    ``fail(n)``: the nth array's memory from now on is not to be had; 0: all is. It returns what was left of before.
    """

    _fields_ = [
        ("name", ctypes.c_char * 127),
        ("version", ctypes.c_uint8),
        ("ctx", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("malloc", "calloc", "realloc", "free")),
    ]

    def __init__(self):
        at, size, api = ctypes.c_void_p, ctypes.c_size_t, ctypes.pythonapi
        api.PyCapsule_New.restype, api.PyCapsule_GetPointer.restype = ctypes.py_object, at
        api.PyCapsule_New.argtypes = [at, ctypes.c_char_p, at]
        api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
        table = ctypes.cast(api.PyCapsule_GetPointer(np._core._multiarray_umath._ARRAY_API, None), ctypes.POINTER(at))
        self._set = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(table[304])  # PyDataMem_SetHandler
        usual = ctypes.PYFUNCTYPE(ctypes.py_object)(table[305])()  # PyDataMem_GetHandler
        usual = Handler.from_address(api.PyCapsule_GetPointer(usual, b"mem_handler"))
        self.left, self._functions = 0, []
        for name, arguments in (("malloc", [size]), ("calloc", [size, size]), ("realloc", [at, size])):
            real = ctypes.PYFUNCTYPE(at, at, *arguments)(getattr(usual, name))
            fake = ctypes.CFUNCTYPE(at, at, *arguments)(
                lambda *given, real=real: None if self._fails() else real(*given)
            )
            self._functions.append(fake)
            setattr(self, name, ctypes.cast(fake, at))
        self.free = usual.free  # may be called while an exception is on its way, which Python code would not survive
        self.name, self.version = b"hbkit_test", 1
        self._capsule = api.PyCapsule_New(ctypes.addressof(self), b"mem_handler", None)

    def _fails(self):
        if self.left == 0:
            return False
        self.left -= 1
        return self.left == 0

    def fail(self, nth):
        left, self.left = self.left, nth
        return left

    def __enter__(self):
        self._before = self._set(self._capsule)
        return self

    def __exit__(self, *exception):
        self._set(self._before)


ARRAYS = Handler()


class Doubled(Initializer):
    """An initializer that the slabs cannot draw themselves."""

    def __call__(self, table, keys, dim):
        return np.repeat(keys[:, None] * np.float32(2), dim, axis=1).astype(np.float32)


NORMAL = e.Normal(0, 0.1, seed=1)
ROW = 1 << 12  # floats, so that 128 lines make a chunk of the store
TABLES = {
    "adagrad": {"optimizer": e.Adagrad()},
    "no metadata": {"optimizer": e.SGD(momentum=0.9), "metadata": False, "eviction": [e.L2Below(0.1)]},
    "adam, padding": {"optimizer": e.Adam(), "padding_key": 1},
    "row-wise, narrow": {"optimizer": e.RowWiseAdagrad(), "dtype": "float16"},
    "ftrl, narrow": {"optimizer": e.Ftrl(), "dtype": "bfloat16"},
    "counted": {"optimizer": e.RowWiseAdam(), "admission": e.CountAdmission(2)},
    "bloom": {"optimizer": e.AdamW(), "admission": e.BloomAdmission(2, 50)},
    "default": {"optimizer": e.AdagradDecay(), "default": 0.5, "admission": e.CountAdmission(2)},
    "default drawn": {"default": NORMAL, "admission": e.CountAdmission(2), "eviction": [e.MaxRows(20)]},
    "columns": {"columns": {"a": e.Column(1, optimizer=e.SGD()), "b": e.Column(2, initializer=NORMAL)}},
    "skip": {"nonfinite": "skip", "eviction": [e.MaxRows(30), e.IdleSteps(2)]},
    "not drawn": {"initializer": Doubled()},
    "grows": {"dim": ROW, "optimizer": e.SGD()},
    "grows, counted": {"dim": ROW, "optimizer": e.RowWiseAdagrad(), "admission": e.CountAdmission(1)},
}


def state(table):
    """All that a table knows, and the memory that it holds but for indexes."""
    rows = [column.tobytes() for chunk in table.store.scan() for column in chunk]
    counts = {} if table.admission is None else {k: v.tobytes() for k, v in table.admission.state().items()}
    stats = {k: v for k, v in table.stats().items() if k not in ("index_nbytes", "admission_nbytes")}
    return rows, counts, stats, table.store.latest_step()


def calls(dim):
    """What is done to a table, one after the other: functions of it."""
    rng = np.random.default_rng(0)
    keys = [rng.integers(0, 60, 90), rng.integers(40, 100, 90), rng.integers(0, 200, 300)]
    grads = [rng.normal(size=(len(k), dim)).astype(np.float32) for k in keys]
    # More keys than there is room for: the index grows, and the slabs where rows are wide.
    many = np.arange(1000, 1000 + (200 if dim == ROW else 3000)).repeat(2)
    for k, g in zip(keys, grads, strict=True):
        yield lambda t, k=k: t.lookup(k, train=True)
        yield lambda t, k=k, g=g: t.update(k, g)
    yield lambda t: t.lookup(keys[0])
    yield lambda t: t.lookup(many, train=True)

    def put(t):
        key = np.arange(90, 110)
        row, some = np.ones((20, dim), np.float32), np.full(20, 7)
        t.store.put(Chunk(key, some, some, row, np.ones((20, t.optimizer.n_state(dim)), np.float32)))

    yield put
    yield lambda t: t.evict(t.step + 2)
    yield lambda t: t.store.erase(many[::3].copy())
    yield lambda t: t.lookup(many + 1, train=True)


@pytest.mark.parametrize("fail", [fail_allocation, ARRAYS.fail], ids=["core", "arrays"])
@pytest.mark.parametrize("options", TABLES.values(), ids=TABLES.keys())
def test_table_is_as_it_was_where_an_allocation_fails(options, fail):
    options = {"initializer": NORMAL, "eviction": [e.L2Below(0.1)], **options}
    if "columns" not in options:
        options.setdefault("dim", 3)

    def after(some):
        table = e.Table("t", **options)
        for call in some:
            call(table)
        return table

    t, twin = after([]), after([])
    done, n_failed = list(calls(t.dim)), 0
    for i, call in enumerate(done):
        want, before = call(twin), state(t)
        for nth in itertools.count(1):
            with ARRAYS:
                fail(nth)
                try:
                    got = call(t)
                except MemoryError:
                    assert fail(0) == 0
                    assert state(t) == before, f"call {i}, allocation {nth}"
                    t.store.validate()
                    continue
                left = fail(0)
            assert np.array_equal(got, want) and state(t) == state(twin), f"call {i}, allocation {nth}"
            t.store.validate()
            if left:
                break
            t = after(done[:i])  # it could do without that one: what comes behind it?
        n_failed += nth - 1
        for what in ("index_nbytes", "admission_nbytes"):  # shards that have grown may stay so
            assert t.stats()[what] <= 2 * twin.stats()[what]
    assert n_failed > len(done)


def test_tables_together_are_as_they_were_where_an_allocation_fails():
    """A batch makes its rows in all tables that draw them in place, and counts its keys there, or in none."""
    options = [{"dim": ROW, "optimizer": e.SGD()}, {"dim": 3}, {"dim": 3, "metadata": False}]
    rng = np.random.default_rng(0)
    steps = [{f"t{i}": rng.integers(0, n, 300) for i in range(3)} for n in (100, 200, 10**6)]

    def after(n):
        c = e.Collection([e.Table(f"t{i}", **given) for i, given in enumerate(options)])
        for batch in steps[:n]:
            c.stage(batch).outputs()
            c._training.close()
        return c

    for n, batch in enumerate(steps):
        c, twin = after(n), after(n + 1)
        before, want = ([state(t) for t in one.tables.values()] for one in (c, twin))
        for nth in itertools.count(1):
            staged = c.stage(batch)
            fail_allocation(nth)
            try:
                staged.outputs()
            except MemoryError:
                assert fail_allocation(0) == 0
            fail_allocation(0)
            staged.close()
            now = [state(t) for t in c.tables.values()]
            for table in c.tables.values():
                table.store.validate()
            if now != before:
                assert now == want
                break
        assert nth > 5
