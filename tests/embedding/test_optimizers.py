"""Each optimizer against a float64 oracle written from its paper, over several steps."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbkit.embedding import SGD, Adagrad, Adam, AdamW, Constant, Ftrl, RowWiseAdagrad, RowWiseAdam, Table
from hbkit.errors import InvalidArgument


def sgd(o, w, s, g, t):
    s["m"] = o.momentum * s.get("m", 0) + g
    return w - o.lr * s["m"]


def adagrad(o, w, s, g, t):
    s["n"] = s.get("n", o.initial_accumulator) + g * g
    return w - o.lr * g / (np.sqrt(s["n"]) + o.eps)


def rowwise_adagrad(o, w, s, g, t):
    s["n"] = s.get("n", o.initial_accumulator) + (g * g).mean()
    return w - o.lr * g / (math.sqrt(s["n"]) + o.eps)


def adam(o, w, s, g, t, square=lambda g: g * g):
    b1, b2 = o.betas
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    s["v"] = b2 * s.get("v", 0) + (1 - b2) * square(g)
    w = w * (1 - o.lr * getattr(o, "weight_decay", 0))
    return w - o.lr * (s["m"] / (1 - b1**t)) / (np.sqrt(s["v"] / (1 - b2**t)) + o.eps)


def rowwise_adam(o, w, s, g, t):
    return adam(o, w, s, g, t, lambda g: (g * g).mean())


def ftrl(o, w, s, g, t):
    old = s.get("n", np.full_like(g, o.initial_accumulator))
    s["n"] = old + g * g
    s["z"] = s.get("z", 0) + g - (np.sqrt(s["n"]) - np.sqrt(old)) / o.lr * w
    z = s["z"]
    return np.where(abs(z) <= o.l1, 0, (np.sign(z) * o.l1 - z) / ((o.beta + np.sqrt(s["n"])) / o.lr + 2 * o.l2))


CASES = [
    (SGD(lr=0.1), sgd),
    (SGD(lr=0.1, momentum=0.9), sgd),
    (Adagrad(lr=0.1), adagrad),
    (Adagrad(lr=0.1, eps=1e-3, initial_accumulator=0.5), adagrad),
    (RowWiseAdagrad(lr=0.1), rowwise_adagrad),
    (Adam(lr=0.01), adam),
    (Adam(lr=0.01, betas=(0.8, 0.9), eps=1e-4), adam),
    (AdamW(lr=0.01, weight_decay=0.1), adam),
    (RowWiseAdam(lr=0.01), rowwise_adam),
    (Ftrl(lr=0.1), ftrl),
    (Ftrl(lr=0.1, l1=0.05, l2=0.02, beta=0.5), ftrl),
]


@pytest.mark.parametrize(("optimizer", "oracle"), CASES, ids=lambda c: str(c) if not callable(c) else "")
@settings(max_examples=15)
@given(seed=st.integers(0, 2**32), dim=st.sampled_from([1, 5, 16, 33]))
def test_optimizer_equals_its_float64_oracle(optimizer, oracle, seed, dim):
    rng = np.random.default_rng(seed)
    table = Table("t", dim, optimizer=optimizer, initializer=Constant(0.25))
    keys = np.arange(6)
    table.lookup(keys, train=True)
    want, states = np.full((6, dim), 0.25), [{} for _ in keys]
    for step in range(1, 6):
        touched = np.sort(rng.choice(6, 4, replace=False))
        grads = rng.normal(size=(4, dim)).astype(np.float32)
        table.update(touched, grads)
        for key, g in zip(touched, grads.astype(np.float64), strict=True):
            want[key] = oracle(optimizer, want[key], states[key], g, step)
    np.testing.assert_allclose(table.lookup(keys), want, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("lr", [0, -1, math.nan, math.inf])
def test_optimizer_refuses_a_bad_learning_rate(lr):
    with pytest.raises(InvalidArgument, match="lr="):
        Adagrad(lr=lr)


def test_ftrl_refuses_to_divide_by_zero():
    with pytest.raises(InvalidArgument):
        Ftrl(initial_accumulator=0)
