"""Kernels of the optimizers: one step in place on distinct lines, by the sums of their gradients.

A line is ``[row | state]``; the state, float32, begins at float `at`. The order of operations is that of
``_ext/kernels.c``, operation by operation.

- Element by element: 2^shift threads share a line, four columns each at a time, and sum its gradients as they go.
- Row-wise: the 16 threads that share a line hold one of its 16 partial sums each, and add them as a tree. They take
  gradients that were summed, since they need them twice.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hbkit.cuda.arith import add, cuda, device, div, mul, sqrt, sub, swap
from hbkit.cuda.device import BAD_SLOT, COOPERATING
from hbkit.cuda.narrow import NEAREST, ROWS, ZERO, load, noise4, store
from hbkit.cuda.sums import GRADIENTS, gradient


@device
def sgd(w: Any, m: Any, v: Any, g: Any, h: Any) -> Any:
    """h: lr."""
    return sub(w, mul(h[0], g)), m, v


@device
def momentum(w: Any, m: Any, v: Any, g: Any, h: Any) -> Any:
    """h: lr, momentum, 1 for Nesterov's."""
    m = add(mul(h[1], m), g)
    if h[2] == ZERO:
        return sub(w, mul(h[0], m)), m, v
    return sub(w, mul(h[0], add(g, mul(h[1], m)))), m, v


@device
def adagrad(w: Any, m: Any, v: Any, g: Any, h: Any) -> Any:
    """h: lr, eps beside the root, eps under the root."""
    m = add(m, mul(g, g))
    return sub(w, mul(h[0], div(g, add(sqrt(add(m, h[2])), h[1])))), m, v


@device
def adam(w: Any, m: Any, v: Any, g: Any, h: Any) -> Any:
    """h: lr / (1 - beta1^t), 1 - beta1, beta2, 1 - beta2, sqrt(1 - beta2^t), eps, 1 - lr * weight_decay."""
    m = add(m, mul(sub(g, m), h[1]))
    v = add(mul(h[2], v), mul(mul(h[3], g), g))
    return sub(mul(w, h[6]), mul(h[0], div(m, add(div(sqrt(v), h[4]), h[5])))), m, v


@device
def ftrl(w: Any, m: Any, v: Any, g: Any, h: Any) -> Any:
    """h: lr, l1, 2 * l2 + beta / lr. m is z, v the sum of squares."""
    total = add(v, mul(g, g))
    root = sqrt(total)
    z = add(m, sub(g, mul(div(sub(root, sqrt(v)), h[0]), w)))
    clipped = z
    if z > h[1]:
        clipped = h[1]
    elif z < -h[1]:
        clipped = -h[1]
    return div(sub(clipped, z), add(div(root, h[0]), h[2])), z, total


def _by_element(step: Any, n_state: int, load_row: Any, store_row: Any, rounds: bool, vec: bool) -> Any:
    def kernel(
        rows: Any,
        lines: Any,
        slots: Any,
        values: Any,
        picked: Any,
        scale: Any,
        order: Any,
        starts: Any,
        partials: Any,
        keys: Any,
        hyper: Any,
        seed: Any,
        t: Any,
        at: Any,
        shift: Any,
        error: Any,
    ) -> None:
        dim = values.shape[1]
        h = hyper[0], hyper[1], hyper[2], hyper[3], hyper[4], hyper[5], hyper[6]
        mine = 4 * (cuda.grid(1) & ((1 << shift) - 1))
        for i in range(cuda.grid(1) >> shift, slots.shape[0], cuda.gridsize(1) >> shift):
            slot = slots[i]
            if slot < -1 or slot >= lines.shape[0]:
                error[0] = BAD_SLOT
                continue
            if slot < 0:
                continue
            for j in range(mine, dim, 4 << shift):
                w0, w1, w2, w3 = load_row(rows, slot, j, dim, vec)
                m0, m1, m2, m3 = ZERO, ZERO, ZERO, ZERO
                v0, v1, v2, v3 = ZERO, ZERO, ZERO, ZERO
                if n_state > 0:
                    m0, m1, m2, m3 = load(lines, slot, at + j, at + dim, vec)
                if n_state > 1:
                    v0, v1, v2, v3 = load(lines, slot, at + dim + j, at + 2 * dim, vec)
                g0, g1, g2, g3 = gradient(values, picked, scale, order, starts, partials, i, j, dim, vec, error)
                w0, m0, v0 = step(w0, m0, v0, g0, h)
                w1, m1, v1 = step(w1, m1, v1, g1, h)
                w2, m2, v2 = step(w2, m2, v2, g2, h)
                w3, m3, v3 = step(w3, m3, v3, g3, h)
                noise = noise4(seed, keys[i], t, j) if rounds else NEAREST
                store_row(rows, slot, j, dim, vec, w0, w1, w2, w3, noise)
                if n_state > 0:
                    store(lines, slot, at + j, at + dim, vec, m0, m1, m2, m3)
                if n_state > 1:
                    store(lines, slot, at + dim + j, at + 2 * dim, vec, v0, v1, v2, v3)

    return kernel


@device
def sum_squares(values: Any, i: Any, part: Any) -> Any:
    """Of a row (none: i < 0), by 16 threads: thread `part` sums every 16th, then all add the sums as one tree."""
    total = ZERO
    if i >= 0:
        for j in range(part, values.shape[1], COOPERATING):
            total = add(total, mul(values[i, j], values[i, j]))
    for mask in (8, 4, 2, 1):
        total = add(total, swap(total, mask))
    return total


def _by_row(has_moment: bool, load_row: Any, store_row: Any, rounds: bool, vec: bool) -> Any:
    def kernel(
        rows: Any,
        lines: Any,
        slots: Any,
        values: Any,
        keys: Any,
        hyper: Any,
        seed: Any,
        t: Any,
        at: Any,
        error: Any,
    ) -> None:
        dim = values.shape[1]
        h = hyper[0], hyper[1], hyper[2], hyper[3], hyper[4], hyper[5], hyper[6]
        part, group = cuda.threadIdx.x % COOPERATING, cuda.threadIdx.x // COOPERATING
        together = cuda.blockDim.x // COOPERATING
        for first in range(cuda.blockIdx.x * together, slots.shape[0], cuda.gridDim.x * together):
            i, slot = first + group, -1
            if i < slots.shape[0]:
                slot = slots[i]
            if slot < -1 or slot >= lines.shape[0]:
                error[0] = BAD_SLOT
                slot = -1
            state = at + dim if has_moment else at
            total = lines[slot, state] if slot >= 0 else ZERO
            mean = div(sum_squares(values, i if slot >= 0 else -1, part), np.float32(dim))
            cuda.syncthreads()  # all have read the state that one of them will write
            if slot >= 0:
                if has_moment:
                    total = add(mul(h[2], total), mul(h[3], mean))
                    by = add(div(sqrt(total), h[4]), h[5])
                else:
                    total = add(total, mean)
                    by = div(h[0], add(sqrt(total), h[1]))
                for j in range(4 * part, dim, 4 * COOPERATING):
                    w0, w1, w2, w3 = load_row(rows, slot, j, dim, vec)
                    g0, g1, g2, g3 = load(values, i, j, dim, vec)
                    if has_moment:
                        m0, m1, m2, m3 = load(lines, slot, at + j, at + dim, vec)
                        m0, m1 = add(m0, mul(sub(g0, m0), h[1])), add(m1, mul(sub(g1, m1), h[1]))
                        m2, m3 = add(m2, mul(sub(g2, m2), h[1])), add(m3, mul(sub(g3, m3), h[1]))
                        store(lines, slot, at + j, at + dim, vec, m0, m1, m2, m3)
                        w0 = sub(mul(w0, h[6]), mul(h[0], div(m0, by)))
                        w1 = sub(mul(w1, h[6]), mul(h[0], div(m1, by)))
                        w2 = sub(mul(w2, h[6]), mul(h[0], div(m2, by)))
                        w3 = sub(mul(w3, h[6]), mul(h[0], div(m3, by)))
                    else:
                        w0, w1 = sub(w0, mul(by, g0)), sub(w1, mul(by, g1))
                        w2, w3 = sub(w2, mul(by, g2)), sub(w3, mul(by, g3))
                    noise = noise4(seed, keys[i], t, j) if rounds else NEAREST
                    store_row(rows, slot, j, dim, vec, w0, w1, w2, w3, noise)
                if part == 0:
                    lines[slot, state] = total

    return kernel


# By name: the step and how many floats of state it keeps a column; or whether a row-wise rule keeps a moment.
BY_ELEMENT = {"sgd": (sgd, 0), "momentum": (momentum, 1), "adagrad": (adagrad, 1), "adam": (adam, 2), "ftrl": (ftrl, 2)}
BY_ROW = {"rowwise_adagrad": False, "rowwise_adam": True}
_AFTER = "int64[::1], float32[::1], int64, int64, int64"  # keys, hyper, seed, step, at
RULES: dict[tuple[str, str, bool], Any] = {}  # by name, dtype, and whether columns are read and written in fours
SIGNATURES: dict[Any, str] = {}
for _dtype, (_load, _store) in ROWS.items():
    for _vec in (False, True):
        _rest = _load, _store, _dtype != "float32", _vec
        _rows = "float32[:,::1]" if _dtype == "float32" else "uint16[:,::1]"
        for _name, (_step, _n_state) in BY_ELEMENT.items():
            _kernel = RULES[_name, _dtype, _vec] = _by_element(_step, _n_state, *_rest)
            _arguments = f"{_rows}, float32[:,::1], int64[::1], {GRADIENTS}, {_AFTER}, int64"
            SIGNATURES[_kernel] = f"void({_arguments}, int32[::1])"
        for _name, _moment in BY_ROW.items():
            _kernel = RULES[_name, _dtype, _vec] = _by_row(_moment, *_rest)
            _arguments = f"{_rows}, float32[:,::1], int64[::1], float32[:,::1], {_AFTER}"
            SIGNATURES[_kernel] = f"void({_arguments}, int32[::1])"
for (_name, _dtype, _vec), _kernel in RULES.items():
    _kernel.__name__ = f"{_name}_{_dtype}{'_fours' if _vec else ''}"
