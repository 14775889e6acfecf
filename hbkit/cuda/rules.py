"""Kernels of the optimizers: one step in place on distinct lines, by the sums of their gradients.

A line is ``[row | state]``. A launch steps the columns [column, end) of its row by one rule, whose state, float32,
begins at float `at` of the line. The order of operations is that of ``_ext/kernels.c``, operation by operation.

- Element by element: 2^shift threads share a line, four columns each at a time, and sum its gradients as they go.
- Row-wise: the 16 threads that share a line hold one of its 16 partial sums each, and add them as a tree. They take
  gradients that were summed before, and clipped and decayed by `change`, since they need them twice.
- What differs from line to line (the correction of an Adam that counts the line's own updates, a decay that is due, by
  what a gradient is clipped to its norm) is found by a launch before, of `own`. So it needs no kernels of its own.

No two threads write one place: slots are distinct, and a column of a line, with its state, is one thread's alone. What
a thread reads of its columns nobody else writes. A row-wise line's one float of state is read by its 16 threads before
the barrier, and written by one of them after it. `own` reads and writes a line's count in one and the same thread, and
the kernel that steps the line comes after it on the stream. Narrow columns of one 32-bit word may be of two threads:
each writes 16 bits of its own.

Lines and columns are counted by 32 bits, which leaves registers for more warps (`hbkit.cuda.rows`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hbkit.cuda.arith import add, cuda, device, div, div64, load4, mul, mul64, sign, sqrt, sqrt64, store4, sub, sub64
from hbkit.cuda.device import BAD_SLOT, COOPERATING
from hbkit.cuda.narrow import NEAREST, ROWS, ZERO, load, noise4, noise_from, store
from hbkit.cuda.sums import GRADIENTS, gradient
from hbkit.cuda.warp import xor

# A row of hyper-parameters: 0 to 6 of the rule itself, then those that every rule may take.
FACTOR, WEIGHT_DECAY, CLIP_VALUE, CLIP_NORM, N_HYPER = 7, 8, 9, 10, 12
ADAGRAD_DECAY, ROW_STEP_ADAM = 6, 7  # rules of _ext/kernels.h that count for each line
ONE, MOST_STEPS = np.float32(1), np.float32(2**24)
ONE64 = np.float64(1)


@device
def line_of(slots: Any, i: Any, n: Any, n_lines: Any, error: Any) -> Any:
    """Slot i of n; -1 beyond n, and for what is out of bounds: int32."""
    if i >= n:
        return np.int32(-1)
    slot = slots[i]
    if slot < -1 or slot >= n_lines:
        error[0] = BAD_SLOT
        return np.int32(-1)
    return np.int32(slot)


@device
def hyper_of(hyper: Any, i: Any) -> Any:
    """Hyper-parameters of line i, where each has its own, or of all. Read where they are used: registers are few."""
    row = i if hyper.shape[0] > 1 else 0
    a, b, c, d = load4(hyper, row, 0)
    e, f, g, factor = load4(hyper, row, 4)
    decay, most, _, _ = load4(hyper, row, WEIGHT_DECAY)
    return a, b, c, d, e, f, g, factor, decay, most


@device
def clipped(g: Any, most: Any) -> Any:
    """A gradient clipped by value; 0: it is not."""
    if most > ZERO:
        if g > most:
            return most
        if g < -most:
            return -most
    return g


@device
def changed(g: Any, w: Any, h: Any) -> Any:
    """A gradient clipped by value and by the row's norm (by a factor of 1 where it is short enough), with L2 decay."""
    g = mul(clipped(g, h[9]), h[7])
    if h[8] != ZERO:
        g = add(g, mul(h[8], w))
    return g


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
    """h: lr, eps beside the root, eps under the root, and where sums decay (AdagradDecay) by what, and their least."""
    if h[3] != ZERO:
        m = mul(m, h[3])
        if m < h[4]:
            m = h[4]
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
    noise_of = noise4 if vec else noise_from  # in fours, columns begin at a multiple of four

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
        column: Any,
        end: Any,
        shift: Any,
        error: Any,
    ) -> None:
        # State of column j is at float at + j of the line, more of it as many floats on as there are columns.
        at, more = np.int32(at - column), np.int32(at + end - 2 * column)
        n, end = np.int32(slots.shape[0]), np.int32(end)
        i = np.int32(cuda.grid(1) >> shift)
        while i < n:
            slot = line_of(slots, i, n, lines.shape[0], error)
            j = np.int32(column + 4 * (cuda.grid(1) & ((1 << shift) - 1)))
            while slot >= 0 and j < end:
                w0, w1, w2, w3 = load_row(rows, slot, j, end, vec)
                m0, m1, m2, m3 = ZERO, ZERO, ZERO, ZERO
                v0, v1, v2, v3 = ZERO, ZERO, ZERO, ZERO
                if n_state > 0:
                    m0, m1, m2, m3 = load(lines, slot, np.int32(at + j), at + end, vec)
                if n_state > 1:
                    v0, v1, v2, v3 = load(lines, slot, np.int32(more + j), more + end, vec)
                g0, g1, g2, g3 = gradient(values, picked, scale, order, starts, partials, i, j, end, vec, error)
                h = hyper_of(hyper, i)
                g0, g1, g2, g3 = changed(g0, w0, h), changed(g1, w1, h), changed(g2, w2, h), changed(g3, w3, h)
                w0, m0, v0 = step(w0, m0, v0, g0, h)
                w1, m1, v1 = step(w1, m1, v1, g1, h)
                w2, m2, v2 = step(w2, m2, v2, g2, h)
                w3, m3, v3 = step(w3, m3, v3, g3, h)
                noise = noise_of(seed, keys[i], t, j) if rounds else NEAREST
                store_row(rows, slot, j, end, vec, w0, w1, w2, w3, noise)
                if n_state > 0:
                    store(lines, slot, np.int32(at + j), at + end, vec, m0, m1, m2, m3)
                if n_state > 1:
                    store(lines, slot, np.int32(more + j), more + end, vec, v0, v1, v2, v3)
                j = np.int32(j + (4 << shift))
            i = np.int32(i + (cuda.gridsize(1) >> shift))

    return kernel


@device
def sum_squares(values: Any, i: Any, first: Any, end: Any, most: Any) -> Any:
    """Of columns of a row clipped by value (no row: i < 0), by 16 threads.

    Each sums every 16th square, from its `first` column on, then all add the sums as one tree.
    """
    total = ZERO
    j = np.int32(first)
    while i >= 0 and j + 3 * COOPERATING < end:  # four are read at once, and added in order
        a, b = clipped(values[i, j], most), clipped(values[i, j + COOPERATING], most)
        c, d = clipped(values[i, j + 2 * COOPERATING], most), clipped(values[i, j + 3 * COOPERATING], most)
        total = add(add(add(add(total, mul(a, a)), mul(b, b)), mul(c, c)), mul(d, d))
        j = np.int32(j + 4 * COOPERATING)
    while i >= 0 and j < end:
        g = clipped(values[i, j], most)
        total = add(total, mul(g, g))
        j = np.int32(j + COOPERATING)
    for mask in (8, 4, 2, 1):
        total = add(total, xor(total, mask))
    return total


def _by_row(has_moment: bool, load_row: Any, store_row: Any, rounds: bool, vec: bool) -> Any:
    noise_of = noise4 if vec else noise_from

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
        column: Any,
        end: Any,
        error: Any,
    ) -> None:
        n, end, count, at = np.int32(slots.shape[0]), np.int32(end), np.int32(end - column), np.int32(at)
        part, group = np.int32(cuda.threadIdx.x % COOPERATING), np.int32(cuda.threadIdx.x // COOPERATING)
        together = np.int32(cuda.blockDim.x // COOPERATING)
        first = np.int32(cuda.blockIdx.x * together)
        while first < n:
            i = np.int32(first + group)
            first = np.int32(first + cuda.gridDim.x * together)
            slot = line_of(slots, i, n, lines.shape[0], error)
            state = np.int32(at + count) if has_moment else at
            total = lines[slot, state] if slot >= 0 else ZERO
            squares = sum_squares(values, i if slot >= 0 else np.int32(-1), np.int32(column + part), end, ZERO)
            mean = div(squares, np.float32(count))
            cuda.syncthreads()  # all have read the state that one of them will write
            if slot >= 0:
                h = hyper_of(hyper, 0)
                if has_moment:
                    total = add(mul(h[2], total), mul(h[3], mean))
                    by = add(div(sqrt(total), h[4]), h[5])
                else:
                    total = add(total, mean)
                    by = div(h[0], add(sqrt(total), h[1]))
                j, k = np.int32(column + 4 * part), np.int32(at + 4 * part)
                while j < end:
                    w0, w1, w2, w3 = load_row(rows, slot, j, end, vec)
                    g0, g1, g2, g3 = load(values, i, j, end, vec)
                    if has_moment:
                        m0, m1, m2, m3 = load(lines, slot, k, at + count, vec)
                        m0, m1 = add(m0, mul(sub(g0, m0), h[1])), add(m1, mul(sub(g1, m1), h[1]))
                        m2, m3 = add(m2, mul(sub(g2, m2), h[1])), add(m3, mul(sub(g3, m3), h[1]))
                        store(lines, slot, k, at + count, vec, m0, m1, m2, m3)
                        w0 = sub(mul(w0, h[6]), mul(h[0], div(m0, by)))
                        w1 = sub(mul(w1, h[6]), mul(h[0], div(m1, by)))
                        w2 = sub(mul(w2, h[6]), mul(h[0], div(m2, by)))
                        w3 = sub(mul(w3, h[6]), mul(h[0], div(m3, by)))
                    else:
                        w0, w1 = sub(w0, mul(by, g0)), sub(w1, mul(by, g1))
                        w2, w3 = sub(w2, mul(by, g2)), sub(w3, mul(by, g3))
                    noise = noise_of(seed, keys[i], t, j) if rounds else NEAREST
                    store_row(rows, slot, j, end, vec, w0, w1, w2, w3, noise)
                    j, k = np.int32(j + 4 * COOPERATING), np.int32(k + 4 * COOPERATING)
                if part == 0:
                    lines[slot, state] = total

    return kernel


@device
def power(x: Any, n: Any) -> Any:
    """x^n by squaring, as the C kernels have it."""
    out = ONE64
    while n > 0:
        if n & 1:
            out = mul64(out, x)
        n >>= 1
        x = mul64(x, x)
    return out


@device
def correction(kept: Any, n: Any) -> Any:
    """1 - (1 - kept)^n."""
    return sub64(ONE64, power(sub64(ONE64, np.float64(kept)), n))


def change(
    rows: Any, slots: Any, values: Any, hyper: Any, column: Any, end: Any, shift: Any, out: Any, error: Any
) -> None:
    """``out[i]`` = gradient i as `changed`, where slots[i] is not -1. `rows` may be empty where nothing decays."""
    n, end = np.int32(slots.shape[0]), np.int32(end)
    i = np.int32(cuda.grid(1) >> shift)
    while i < n:
        h = hyper_of(hyper, i)
        j = np.int32(column + (cuda.grid(1) & ((1 << shift) - 1)))
        while slots[i] >= 0 and j < end:
            w = rows[i, j] if rows.shape[0] > 0 else ZERO
            out[i, j] = changed(values[i, j], w, h)
            j = np.int32(j + (1 << shift))
        i = np.int32(i + (cuda.gridsize(1) >> shift))


def own(
    lines: Any,
    slots: Any,
    values: Any,
    hyper: Any,
    rule: Any,
    at: Any,
    column: Any,
    end: Any,
    owned: Any,
    error: Any,
) -> None:
    """``owned[i]`` = hyper-parameters of line ``slots[i]``, by those of all.

    `rule` is that of _ext/kernels.h: of ADAGRAD_DECAY and ROW_STEP_ADAM the line's count goes on. `values` are the sums
    of gradients, needed where they are clipped by their norm. 16 threads share a line.
    """
    most, norm = hyper[0, CLIP_VALUE], hyper[0, CLIP_NORM]
    n = np.int32(slots.shape[0])
    part, group = np.int32(cuda.threadIdx.x % COOPERATING), np.int32(cuda.threadIdx.x // COOPERATING)
    together = np.int32(cuda.blockDim.x // COOPERATING)
    first = np.int32(cuda.blockIdx.x * together)
    while first < n:
        i = np.int32(first + group)
        first = np.int32(first + cuda.gridDim.x * together)
        slot = line_of(slots, i, n, lines.shape[0], error)
        factor = ONE
        if norm > ZERO:
            row = i if slot >= 0 else np.int32(-1)
            length = sqrt(sum_squares(values, row, np.int32(column + part), np.int32(end), most))
            if length > norm:
                factor = div(norm, length)
        if slot >= 0 and part == 0:
            h0, h1, h2, h3, h4, h5 = hyper[0, 0], hyper[0, 1], hyper[0, 2], hyper[0, 3], hyper[0, 4], hyper[0, 5]
            if rule == ADAGRAD_DECAY:  # to those of Adagrad
                place = at + end - column
                done, due = lines[slot, place], h1
                h1, h2, h3, h4 = ZERO, ZERO, ONE, ZERO
                if due > done:  # one is made up for at a time
                    h3, h4 = hyper[0, 2], hyper[0, 3]
                    lines[slot, place] = add(done, ONE)
            elif rule == ROW_STEP_ADAM:  # to those of Adam
                place = at + 2 * (end - column)
                t = lines[slot, place]
                if t < MOST_STEPS:
                    t = add(t, ONE)
                lines[slot, place] = t
                n_steps = np.int64(MOST_STEPS)  # corrected no more by then
                if t >= ZERO and t < MOST_STEPS:
                    n_steps = np.int64(t)
                h0 = np.float32(div64(np.float64(h0), correction(h1, n_steps)))
                root = np.float32(sqrt64(correction(h3, n_steps)))
                if h4 != ZERO:
                    h5 = div(h5, root)
                h4 = root
            store4(owned, i, 0, h0, h1, h2, h3)
            store4(owned, i, 4, h4, h5, hyper[0, 6], factor)
            store4(owned, i, WEIGHT_DECAY, hyper[0, WEIGHT_DECAY], most, norm, ZERO)


# By name: the step and how many floats of state it keeps a column; or whether a row-wise rule keeps a moment.
BY_ELEMENT = {"sgd": (sgd, 0), "momentum": (momentum, 1), "adagrad": (adagrad, 1), "adam": (adam, 2), "ftrl": (ftrl, 2)}
BY_ROW = {"rowwise_adagrad": False, "rowwise_adam": True}
_AFTER = "int64[::1], float32[:,::1], int64, int64, int64, int64, int64"  # keys, hyper; seed, step, at, column, end
RULES: dict[tuple[str, str, bool], Any] = {}  # by name, dtype, and whether columns are read and written in fours
SIGNATURES: dict[Any, str] = {
    own: "void(float32[:,::1], int64[::1], float32[:,::1], float32[:,::1], int64, int64, int64, int64, float32[:,::1],"
    " int32[::1])",
    change: "void(float32[:,::1], int64[::1], float32[:,::1], float32[:,::1], int64, int64, int64, float32[:,::1],"
    " int32[::1])",
}
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

sign(SIGNATURES)
