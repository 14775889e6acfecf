"""The kernels against naive loops, and every instruction set of this machine against every other, bit for bit."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbkit._ext import isa, random, segment
from hbkit._ext.index import Index
from hbkit._ext.slabs import ROW_DTYPES, Slabs, n_state
from hbkit.errors import InvalidArgument

DIMS = st.sampled_from([1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 64, 257, 300])
# A rule's own, then weight decay and the two clippings.
HYPER = np.array([0.05, 0.5, 0.9, 0.1, 0.7, 1e-8, 0.99, 0, 0.01, 5.0, 20.0], np.float32)


@pytest.fixture
def each_isa():
    """Run a function on every instruction set; the results, to be compared."""
    chosen = isa.name()
    yield lambda run: [run() for name in isa.available() if isa.use(name) is None]
    isa.use(chosen)


def same(results):
    first, *others = [[np.asarray(r).tobytes() for r in (x if isinstance(x, tuple) else (x,))] for x in results]
    return all(first == other for other in others)


def wild(rng, *shape):
    """Floats of all magnitudes, with signed zeros, denormals and infinities among them."""
    x = (rng.normal(size=shape) * 10.0 ** rng.integers(-42, 20, shape)).astype(np.float32)
    x.reshape(-1)[:4] = np.array([0.0, -0.0, 1e-42, -1e-45], np.float32)[: x.size]
    return x


def naive_sum(values, seg, n, rows, scale):
    """Blocks of 64 in batch order, then the blocks in order, in float32."""
    out = np.zeros((n, values.shape[1]), np.float32)
    for s in range(n):
        at = np.flatnonzero(seg == s)
        terms = [(np.float32(1) if scale is None else scale[p]) * values[p if rows is None else rows[p]] for p in at]
        blocks = []
        for i in range(0, len(terms), 64):
            total = terms[i]
            for t in terms[i + 1 : i + 64]:
                total = total + t
            blocks.append(total)
        if blocks:
            total = blocks[0]
            for b in blocks[1:]:
                total = total + b
            out[s] = total
    return out


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(0, 400), st.integers(1, 6), DIMS, st.booleans(), st.booleans())
def test_segment_sum_equals_naive_bit_for_bit(seed, n, n_segments, dim, with_rows, with_scale):
    rng = np.random.default_rng(seed)
    seg = rng.integers(0, n_segments, n)
    m = 5 if with_rows else n
    values = rng.normal(size=(m, dim)).astype(np.float32)
    rows = rng.integers(0, m, n) if with_rows else None
    scale = rng.normal(size=n).astype(np.float32) if with_scale else None
    got = segment.segment_sum(values, seg, n_segments, rows, scale)
    assert got.tobytes() == naive_sum(values, seg, n_segments, rows, scale).tobytes()


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.lists(st.integers(0, 9), max_size=20), DIMS, st.booleans(), st.booleans())
def test_pool_equals_naive(seed, lengths, dim, with_weight, with_scale):
    rng = np.random.default_rng(seed)
    splits = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    n, b = int(splits[-1]), len(lengths)
    rows, inverse = rng.normal(size=(7, dim)).astype(np.float32), rng.integers(0, 7, n)
    weight = rng.normal(size=n).astype(np.float32) if with_weight else None
    scale = rng.normal(size=b).astype(np.float32) if with_scale else None
    out, want = np.full((b, dim), np.nan, np.float32), np.zeros((b, dim), np.float32)
    segment.pool(rows, inverse, splits, out, weight, scale)
    for i in range(b):
        for p in range(splits[i], splits[i + 1]):
            want[i] += rows[inverse[p]] if weight is None else weight[p] * rows[inverse[p]]
        if scale is not None:
            want[i] *= scale[i]
    assert out.tobytes() == want.tobytes()


@pytest.mark.parametrize("bad", ["segment", "negative", "rows", "scale", "count"])
def test_segment_sum_refuses_what_reaches_outside(bad):
    values, seg = np.zeros((4, 3), np.float32), np.array([0, 1, 1, 0])
    with pytest.raises(InvalidArgument):
        match bad:
            case "segment":
                segment.segment_sum(values, seg, 1)
            case "negative":
                segment.segment_sum(values, seg - 1, 2)
            case "rows":
                segment.segment_sum(values, seg, 2, np.array([0, 1, 2, 4]))
            case "scale":
                segment.segment_sum(values, seg, 2, None, np.zeros(3, np.float32))
            case "count":
                segment.segment_sum(values, seg[:3], 2)


@settings(max_examples=30)
@given(st.integers(0, 2**32), DIMS)
def test_kernels_agree_on_all_instruction_sets(seed, dim):
    def run():
        rng = np.random.default_rng(seed)
        n, u = 300, 40
        seg = rng.integers(0, u, n)
        out = [segment.segment_sum(wild(rng, n, dim), seg, u, None, wild(rng, n))]
        pooled = np.empty((60, dim), np.float32)
        splits = np.arange(61, dtype=np.int64) * 5
        segment.pool(wild(rng, u, dim), seg, splits, pooled, wild(rng, n), wild(rng, 60))
        out.append(pooled)
        keys = rng.integers(-(2**63), 2**63 - 1, 50)
        out += [random.initialize(kind, 0.1, 0.7, seed, keys, dim) for kind in random.KINDS]
        out.append(segment.expand(wild(rng, u, dim), seg))
        for rule, dtype in itertools.product(range(8), ROW_DTYPES):
            width = dim + n_state(rule, dim, momentum=True)
            slabs = Slabs(width, 4096, dim=dim, row_dtype=dtype)
            slabs.reserve(u)
            lines = np.abs(wild(rng, u, width))
            slabs.scatter(np.arange(u), lines)
            slots = np.where(rng.random(u) < 0.9, rng.permutation(u), -1)
            hyper = HYPER if rng.random() < 0.5 else HYPER[:8]
            slabs.apply(rule, slots, wild(rng, u, dim), hyper, rng.integers(0, 2**63, u), seed, 3, "skip")
            after = np.empty_like(lines)
            slabs.gather(np.arange(u), after)
            out.append(after)
            rows, sums = np.empty((n, dim), np.float32), np.empty((60, dim), np.float32)
            index = Index()
            index.find_or_insert(np.arange(u))
            slabs.lookup(index, seg, rows)
            slabs.lookup_pooled(index, seg, splits, sums, wild(rng, n), wild(rng, 60))
            out += [rows, sums]
        return tuple(out)

    chosen = isa.name()
    try:
        with np.errstate(all="ignore"):
            results = [run() for name in isa.available() if isa.use(name) is None]
    finally:
        isa.use(chosen)
    assert same(results)


def test_kernels_keep_denormals_whatever_the_thread_flushes(each_isa):
    """TensorFlow's threads set FTZ and DAZ; a kernel must neither be changed by that nor change it."""
    code = """
import ctypes, numpy as np, sys
from hbkit._ext import isa, segment
x, seg = np.full((2, 16), 1e-40, np.float32), np.zeros(2, np.int64)
want = segment.segment_sum(x, seg, 1)
assert want[0, 0] > 0
import subprocess, tempfile, pathlib
d = pathlib.Path(tempfile.mkdtemp())
(d / "f.c").write_text(
    "#include <immintrin.h>\\nvoid flush(void){_mm_setcsr(_mm_getcsr()|0x8040);}\\n"
    "unsigned csr(void){return _mm_getcsr();}")
subprocess.run(["cc", "-shared", "-fPIC", "-o", d / "f.so", d / "f.c"], check=True)
f = ctypes.CDLL(str(d / "f.so"))
f.flush()
before = f.csr() & 0x8040
for name in isa.available():
    isa.use(name)
    assert segment.segment_sum(x, seg, 1).tobytes() == want.tobytes(), name
assert f.csr() & 0x8040 == before == 0x8040
"""
    if "neon" in isa.available():
        pytest.skip("the flags of this test are x86's")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_isa_env_forces_a_path_and_names_an_unknown_one():
    for name in isa.available():
        code = "from hbkit._ext import isa; print(isa.name())"
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "HBKIT_ISA": name}, capture_output=True, text=True
        )
        assert done.stdout.strip() == name
    done = subprocess.run(
        [sys.executable, "-c", "import hbkit._ext.segment"],
        env={**os.environ, "HBKIT_ISA": "v9"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "HBKIT_ISA may be one of" in done.stderr
