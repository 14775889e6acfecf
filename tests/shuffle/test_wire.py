"""Rows as bytes on the wire, and back."""

import numpy as np
import pytest
import wire_oracle as oracle
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hbkit._ext import isa
from hbkit.errors import InvalidArgument
from hbkit.shuffle import WIRES, Noise, pack, row_nbytes, unpack

ANY = hnp.arrays(np.uint32, st.tuples(st.integers(0, 9), st.integers(1, 70)), elements=st.integers(0, 2**32 - 1)).map(
    lambda b: b.view(np.float32)
)
FINITE = hnp.arrays(
    np.float32,
    st.tuples(st.integers(0, 20), st.integers(1, 70)),
    elements=st.floats(-(2.0**126), 2.0**126, width=32),
)
DIMS = (1, 7, 16, 32, 33, 128, 300)


def noise(n, step=3, rank=0):
    return Noise(seed=5, table="user", rank=rank, step=step, keys=np.arange(n) * 7919 - 5)


def there_and_back(rows, wire, noise=None):
    data = pack(rows, wire, noise=noise)
    assert data.dtype == np.uint8 and data.shape == (len(rows) * row_nbytes(rows.shape[1], wire),)
    return unpack(data, rows.shape[1], wire)


def scales(rows):
    """The scales of int8 rows: float32[n]."""
    n, dim = rows.shape
    return (pack(rows, "int8")[n * dim :].view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def same(a, b):
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.fixture(params=isa.available())
def every_isa(request):
    before = isa.name()
    isa.use(request.param)
    yield
    isa.use(before)


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("dim", DIMS)
def test_bytes_are_those_of_the_oracle(every_isa, dim, wire, random):
    rng = np.random.default_rng(dim)
    rows = rng.normal(0, 1, (70, dim)).astype(np.float32) * (10.0 ** rng.integers(-45, 38, (70, 1))).astype(np.float32)
    rows[:20] = rng.integers(0, 2**32, (20, dim), np.uint64).astype(np.uint32).view(np.float32)
    rows[20], rows[21, 0], rows[22, -1], rows[23, 0], rows[24, 0] = 0, np.nan, np.inf, 2.0**127, -1.7e38
    rows[25:30] = rng.integers(-254, 255, (5, dim)) * np.float32(0.5)  # half steps
    drawn = noise(len(rows)) if random else None
    draws = oracle.bits(drawn.stream(), drawn.step, drawn.keys, dim) if random else None
    with np.errstate(all="ignore"):
        want = oracle.pack(rows, wire, draws)
        data = pack(rows, wire, noise=drawn)
        assert np.array_equal(data, want)
        got, back = unpack(data, dim, wire), oracle.unpack(want, *rows.shape, wire)
        assert same(np.where(np.isnan(got), np.float32(0), got), np.where(np.isnan(back), np.float32(0), back))
        assert np.array_equal(np.isnan(got), np.isnan(back))


@pytest.mark.parametrize("wire", WIRES)
def test_residuals_are_those_of_the_oracle(every_isa, wire):
    rng = np.random.default_rng(5)
    rows, residual = (rng.normal(0, 1, (20, 33)).astype(np.float32) for _ in range(2))
    rows[3, 2] = np.inf
    with np.errstate(all="ignore"):
        want = oracle.pack(rows + residual, wire)
        left = rows + residual - oracle.unpack(want, 20, 33, wire)
    left[3] = 0
    assert np.array_equal(pack(rows, wire, residual=residual), want) and same(residual, left)


@pytest.mark.parametrize("wire", ["int8", "float16"])
def test_a_large_block_is_written_past_the_cache_alike(every_isa, wire):
    rows = np.random.default_rng(6).normal(0, 1, (1 << 16, 64)).astype(np.float32)
    data = pack(rows, wire)
    for first in (0, 1):  # memory at a multiple of 64 bytes, and not
        memory = np.empty(rows.size + 32, np.float32)
        first += -memory.ctypes.data % 64 // 4
        out = memory[first : first + rows.size].reshape(rows.shape)
        assert same(unpack(data, 64, wire, out), oracle.unpack(data, *rows.shape, wire))


@given(FINITE)
def test_int8_is_off_by_at_most_half_a_step(rows):
    got, step = there_and_back(rows, "int8").astype(np.float64), scales(rows).astype(np.float64)
    assert (np.abs(got - rows) <= step[:, None] * 0.50001).all()
    largest = np.abs(rows).max(axis=1, initial=0).astype(np.float64)
    assert (step <= np.maximum(largest / 127 * 1.0079, 2.0**-126)).all()
    assert (got[~rows.any(axis=1)] == 0).all()


@given(FINITE)
def test_int8_rounded_at_random_is_off_by_less_than_a_step(rows):
    got, step = there_and_back(rows, "int8", noise(len(rows))).astype(np.float64), scales(rows).astype(np.float64)
    assert (np.abs(got - rows) <= step[:, None]).all()


@given(ANY)
def test_what_is_not_finite_comes_back_so(rows):
    bad = ~np.isfinite(rows)
    for wire in WIRES:
        for drawn in (None, noise(len(rows))):
            with np.errstate(all="ignore"):
                got = there_and_back(rows, wire, drawn)
            assert not np.isfinite(got[bad]).any(), wire
            if wire == "int8":
                gone = (bad | (np.abs(rows) >= 2.0**127)).any(axis=1)
                assert np.isnan(got[gone]).all() and np.isfinite(got[~gone]).all()


def test_nothing_overflows_in_silence():
    big = np.array([[65504, 65519, 65520, -1e6, 3e38, -3.4e38]], np.float32)
    assert there_and_back(big, "float16").tolist() == [[65504, 65504, np.inf, -np.inf, np.inf, -np.inf]]
    assert (np.abs(there_and_back(big, "bfloat16") / big - 1) < 2**-8).all()
    assert np.isnan(there_and_back(big, "int8")).all()
    assert np.isfinite(there_and_back(big[:, :4], "int8")).all()


def test_small_gradients_keep_their_precision():
    rows = np.random.default_rng(0).normal(0, 1, (50, 16)).astype(np.float32)
    for size in (1e-3, 1e-7, 1e-20, 1e-35):
        small = rows * np.float32(size)
        error = np.abs(there_and_back(small, "int8") - small).max() / np.abs(small).max()
        assert error < 0.5 / 126, size


@pytest.mark.parametrize("wire", WIRES)
def test_rows_do_not_depend_on_those_around_them(wire):
    rows = np.random.default_rng(1).normal(0, 1, (40, 33)).astype(np.float32)
    drawn, some = noise(40), np.array([7, 3, 39, 3, 0])
    whole = there_and_back(rows, wire, drawn)
    assert same(there_and_back(rows[some], wire, drawn._replace(keys=drawn.keys[some])), whole[some])


def test_rounding_at_random_differs_by_step_rank_table_and_seed():
    rows = np.random.default_rng(2).normal(0, 1, (40, 33)).astype(np.float32)
    first = noise(40)
    others = [first._replace(**change) for change in ({"step": 4}, {"rank": 1}, {"table": "item"}, {"seed": 6})]
    assert len({pack(rows, "int8", noise=n).tobytes() for n in (first, first, *others)}) == 5


@pytest.mark.parametrize("wire", ["float16", "bfloat16", "int8"])
def test_rounding_at_random_is_unbiased(wire):
    rows = np.random.default_rng(3).uniform(-1, 1, (8, 20)).astype(np.float32)
    n = 3000
    draws = np.stack([there_and_back(rows, wire, noise(8, step)) for step in range(n)]).astype(np.float64)
    error, spread = draws.mean(axis=0) - rows, draws.std(axis=0) / np.sqrt(n)
    step = scales(rows)[:, None] if wire == "int8" else np.abs(rows) * (2.0**-10 if wire == "float16" else 2.0**-7)
    assert (np.abs(error) <= 5 * step / 2 / np.sqrt(n)).all()
    assert abs(error.sum()) <= 5 * np.sqrt((spread**2).sum())


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("wire", WIRES)
def test_error_feedback_sums_to_the_truth(wire, random):
    rng = np.random.default_rng(4)
    residual, sent, truth = np.zeros((6, 18), np.float32), 0.0, 0.0
    for step in range(50):
        rows = rng.normal(0, 1, (6, 18)).astype(np.float32)
        data = pack(rows, wire, noise=noise(6, step) if random else None, residual=residual)
        sent, truth = sent + unpack(data, 18, wire).astype(np.float64), truth + rows.astype(np.float64)
    assert np.abs(sent + residual - truth).max() < 1e-4
    assert np.abs(residual).max() <= (0.08 if wire != "float32" else 0)
    rows[2, 5] = np.nan
    assert np.isnan(unpack(pack(rows, wire, residual=residual), 18, wire)[2]).any() and np.isfinite(residual).all()


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("dim", DIMS)
def test_given_memory_is_used(wire, dim):
    rows = np.random.default_rng(dim).normal(0, 1, (11, dim)).astype(np.float32)
    memory = np.zeros(len(rows) * row_nbytes(dim, wire) + 3, np.uint8)
    data, out = memory[1:-2], np.empty_like(rows)  # where no value lies at a multiple of its size
    assert pack(rows, wire, out=data) is data and unpack(data, dim, wire, out=out) is out
    assert same(out, there_and_back(rows, wire)) and not memory[[0, -1, -2]].any()


def test_bytes_on_the_wire():
    assert [row_nbytes(128, w) for w in WIRES] == [512, 256, 256, 130]
    assert row_nbytes(128, "int8") / 512 <= 0.27 and row_nbytes(16, "int8") / 64 <= 0.30


def test_wrong_arguments_are_named():
    rows = np.zeros((2, 4), np.float32)
    with pytest.raises(InvalidArgument, match="float64"):
        pack(rows, "float64")
    with pytest.raises(InvalidArgument, match="shape"):
        pack(rows[0], "int8")
    with pytest.raises(InvalidArgument, match="13 bytes"):
        unpack(np.zeros(13, np.uint8), 4, "int8")
    for bad in (rows[:1], rows.astype(np.float64)):
        with pytest.raises(ValueError):
            pack(rows, "int8", residual=bad)
        with pytest.raises(ValueError):
            unpack(pack(rows, "int8"), 4, "int8", out=bad)
    with pytest.raises(InvalidArgument):
        pack(rows, "int8", out=np.zeros(11, np.uint8))
    with pytest.raises(InvalidArgument, match="keys"):
        pack(rows, "int8", noise=noise(3))
