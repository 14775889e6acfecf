"""Each optimizer against a float64 oracle written from its paper, over several steps."""

import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbkit.embedding import (
    SGD,
    Adagrad,
    AdagradDecay,
    Adam,
    AdamW,
    Constant,
    Cosine,
    Exponential,
    Ftrl,
    RowWiseAdagrad,
    RowWiseAdam,
    Table,
    Warmup,
)
from hbkit.errors import InvalidArgument


def rate(o, t):
    return o.lr(t) if callable(o.lr) else o.lr


def prepared(o, w, g):
    """Clipped by value, then by norm, then with the L2 term."""
    if o.clip_value:
        g = np.clip(g, -o.clip_value, o.clip_value)
    if o.clip_norm:
        g = g * min(1, o.clip_norm / max(np.sqrt((g * g).sum()), 1e-300))
    return g if isinstance(o, (AdamW, RowWiseAdam)) else g + o.weight_decay * w


def sgd(o, w, s, g, t):
    s["m"] = o.momentum * s.get("m", 0) + g
    return w - rate(o, t) * (g + o.momentum * s["m"] if o.nesterov else s["m"])


def adagrad(o, w, s, g, t):
    s["n"] = s.get("n", o.initial_accumulator) + g * g
    root = np.sqrt(s["n"] + o.eps) if o.keras_eps else np.sqrt(s["n"]) + o.eps
    return w - rate(o, t) / (1 + (t - 1) * o.lr_decay) * g / root


def rowwise_adagrad(o, w, s, g, t):
    s["n"] = s.get("n", o.initial_accumulator) + (g * g).mean()
    return w - rate(o, t) * g / (math.sqrt(s["n"]) + o.eps)


def adagrad_decay(o, w, s, g, t):
    n, had = s.get("n", np.full_like(g, o.initial_accumulator)), s.get("had", 0)
    if t // o.decay_steps > had:
        n, s["had"] = np.maximum(n * o.decay_rate, o.initial_accumulator), had + 1
    s["n"] = n + g * g
    return w - rate(o, t) * g / np.sqrt(s["n"])


def adam(o, w, s, g, t, square=lambda g: g * g):
    b1, b2 = o.betas
    s["t"] = s.get("t", 0) + 1
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    s["v"] = b2 * s.get("v", 0) + (1 - b2) * square(g)
    n = s["t"] if o.correction == "row" else t
    if isinstance(o, (AdamW, RowWiseAdam)):
        w = w * (1 - rate(o, t) * o.weight_decay)
    root = np.sqrt(1 - b2**n)
    eps = o.eps / root if o.keras_eps else o.eps
    return w - rate(o, t) * (s["m"] / (1 - b1**n)) / (np.sqrt(s["v"]) / root + eps)


def rowwise_adam(o, w, s, g, t):
    return adam(o, w, s, g, t, lambda g: (g * g).mean())


def ftrl(o, w, s, g, t):
    old = s.get("n", np.full_like(g, o.initial_accumulator))
    s["n"] = old + g * g
    lr = rate(o, t)
    s["z"] = s.get("z", 0) + g - (np.sqrt(s["n"]) - np.sqrt(old)) / lr * w
    z = s["z"]
    return np.where(abs(z) <= o.l1, 0, (np.sign(z) * o.l1 - z) / ((o.beta + np.sqrt(s["n"])) / lr + 2 * o.l2))


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
    (SGD(lr=0.1, momentum=0.9, nesterov=True), sgd),
    (SGD(lr=Warmup(Exponential(0.1, 0.5), 3), clip_norm=1.5), sgd),
    (Adagrad(lr=0.1, lr_decay=0.1, weight_decay=0.1), adagrad),
    (Adagrad(lr=0.1, eps=0.5, keras_eps=True, clip_value=0.7), adagrad),
    (RowWiseAdagrad(lr=Cosine(0.1, 4), weight_decay=0.1, clip_value=0.9, clip_norm=1.0), rowwise_adagrad),
    (AdagradDecay(lr=0.1, decay_steps=2, decay_rate=0.5), adagrad_decay),
    (Adam(lr=0.01, correction="row"), adam),
    (Adam(lr=0.01, eps=1e-3, correction="row", keras_eps=True, weight_decay=0.1), adam),
    (Adam(lr=0.01, eps=1e-3, keras_eps=True), adam),
    (AdamW(lr=Cosine(0.1, 4, 0.01), correction="row"), adam),
    (RowWiseAdam(lr=0.01, weight_decay=0.1, clip_norm=2.0), rowwise_adam),
    (Ftrl(lr=Exponential(0.1, 0.5), l1=0.05, beta=0.5), ftrl),
]


@pytest.mark.parametrize(("optimizer", "oracle"), CASES, ids=lambda c: type(c).__name__ if not callable(c) else "")
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
            want[key] = oracle(optimizer, want[key], states[key], prepared(optimizer, want[key], g), step)
    np.testing.assert_allclose(table.lookup(keys), want, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("lr", [0, -1, math.nan, math.inf])
def test_optimizer_refuses_a_bad_learning_rate(lr):
    with pytest.raises(InvalidArgument, match="lr="):
        Adagrad(lr=lr)


def test_ftrl_refuses_to_divide_by_zero():
    with pytest.raises(InvalidArgument):
        Ftrl(initial_accumulator=0)


@pytest.mark.parametrize(
    "bad",
    [
        lambda: SGD(nesterov=True),
        lambda: SGD(momentum=1.0),
        lambda: Adagrad(weight_decay=-0.1),
        lambda: Adagrad(clip_norm=0),
        lambda: Adagrad(clip_value=math.inf),
        lambda: RowWiseAdagrad(keras_eps=True),
        lambda: AdagradDecay(decay_rate=1.0),
        lambda: AdagradDecay(decay_steps=0),
        lambda: Adam(betas=(0.9, 1.0)),
        lambda: Adam(correction="key"),
        lambda: RowWiseAdam(correction="row"),
        lambda: Adagrad(lr=lambda t: -1.0).hyper(1),
        lambda: Ftrl(lr=lambda t: 0.0).hyper(1),
    ],
)
def test_optimizer_refuses_what_makes_no_sense(bad):
    with pytest.raises(InvalidArgument):
        bad()


def test_schedules_have_their_shapes_and_can_be_pickled():
    steps = range(1, 9)
    cases = [
        (Warmup(0.4, 4), [0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4, 0.4]),
        (Cosine(1.0, 4, 0.2), [1.0, 0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2, 0.6, 0.2 + 0.8 * (1 - math.sqrt(0.5)) / 2]),
        (Exponential(1.0, 0.25, 2), [1.0, 0.5, 0.25, 0.125]),
        (Exponential(1.0, 0.25, 2, staircase=True), [1.0, 1.0, 0.25, 0.25, 0.0625]),
        (Warmup(Exponential(1.0, 0.5), 2), [0.5, 1.0, 1.0, 0.5, 0.25]),
    ]
    for schedule, want in cases:
        optimizer = pickle.loads(pickle.dumps(Adagrad(lr=schedule)))
        assert optimizer == Adagrad(lr=schedule)
        got = [float(optimizer.hyper(t)[0]) for t in steps][: len(want)]
        np.testing.assert_allclose(got, want, rtol=1e-6)
    assert Adagrad(lr=lambda t: 1 / t).hyper(4)[0] == 0.25
