"""What all ranks do together over any transport: sums, and the comparison of their settings."""

import numpy as np
import pytest
from faults import run_ranks
from hypothesis import given
from hypothesis import strategies as st

from hbkit.errors import SchemaMismatch
from hbkit.shuffle import Loopback, agree, sum_over


@given(st.integers(1, 5), st.integers(0, 20), st.integers(0, 2**32))
def test_sum_over_adds_in_rank_order_on_every_rank(size, n, seed):
    values = np.random.default_rng(seed).normal(size=(size, n)).astype(np.float32)
    expected = values[0].copy()
    for other in values[1:]:
        expected += other
    for got in run_ranks(lambda t: sum_over(t, values[t.rank]), Loopback.group(size)):
        assert got.dtype == np.float32 and got.tobytes() == expected.tobytes()


def test_agree_raises_on_every_rank_what_differs():
    alike = {"dim": 16, "wire": "int8"}
    assert run_ranks(lambda t: agree(t, alike, "tables"), Loopback.group(3)) == [None] * 3
    got = run_ranks(lambda t: agree(t, {**alike, "dim": 32} if t.rank == 2 else alike, "tables"), Loopback.group(3))
    for error in got:
        assert isinstance(error, SchemaMismatch)
        assert "ranks 0 and 2 differ in tables: --- rank 0 +++ rank 2 -dim: 16 +dim: 32" in str(error)


@pytest.mark.parametrize("missing", ["dim", "wire"])
def test_agree_tells_of_a_setting_that_one_rank_lacks(missing):
    alike = {"dim": 16, "wire": "int8"}
    own = {name: value for name, value in alike.items() if name != missing}
    got = run_ranks(lambda t: agree(t, own if t.rank else alike, "tables"), Loopback.group(2))
    assert all(f"-{missing}: {alike[missing]}" in str(error) for error in got)
