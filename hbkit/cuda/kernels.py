"""Kernels over lines ``float32[n_lines, width]`` in device memory, addressed by slot.

Each is a plain function; `Device.launch` compiles it. All are grid-stride loops, and no two threads write one place:

- `gather`, `scatter`, `sgd`, `momentum`, `adagrad`: an item is one float; slots are distinct where lines are written.
- `segment_sum`: an item is one column of one segment, summed by one thread in the order of positions, in blocks of
  `SUM_BLOCK` whose sums are added in order. So the order of additions does not depend on the launch.
- `rowwise_adagrad`: an item is one line; its thread adds the squares in 16 partial sums and those as a tree.

The order of operations is that of ``_ext/kernels.c``, operation by operation; `arith` keeps each one rounded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import float32

from hbkit.cuda.arith import add, cuda, div, mul, sqrt, sub

SUM_BLOCK = 64
PARTIALS = 16
BAD_SLOT = 1
BAD_SEGMENT = 2


def gather(lines: Any, slots: Any, out: Any, error: Any) -> None:
    """``out[i]`` = first floats of line ``slots[i]``; zeros where the slot is -1."""
    n, width = out.shape
    for item in range(cuda.grid(1), n * width, cuda.gridsize(1)):
        i = item // width
        j = item - i * width
        slot = slots[i]
        if slot < -1 or slot >= lines.shape[0]:
            error[0] = BAD_SLOT
        elif slot < 0:
            out[i, j] = np.float32(0)
        else:
            out[i, j] = lines[slot, j]


def scatter(lines: Any, slots: Any, values: Any, error: Any) -> None:
    """Line ``slots[i]`` = ``values[i]``; slots are distinct and >= 0."""
    n, width = values.shape
    for item in range(cuda.grid(1), n * width, cuda.gridsize(1)):
        i = item // width
        j = item - i * width
        slot = slots[i]
        if slot < 0 or slot >= lines.shape[0]:
            error[0] = BAD_SLOT
        else:
            lines[slot, j] = values[i, j]


def segment_sum(values: Any, rows: Any, scale: Any, order: Any, starts: Any, out: Any, error: Any) -> None:
    """``out[s]`` = sum of ``scale[p] * values[rows[p]]`` over p in ``order[starts[s]:starts[s + 1]]``."""
    n, dim = out.shape
    for item in range(cuda.grid(1), n * dim, cuda.gridsize(1)):
        s = item // dim
        j = item - s * dim
        begin = starts[s]
        end = starts[s + 1]
        total = np.float32(0)
        block = np.float32(0)
        for i in range(begin, end):
            p = order[i]
            row = rows[p]
            if row < 0 or row >= values.shape[0]:
                error[0] = BAD_SEGMENT
                break
            x = mul(scale[p], values[row, j])
            at = (i - begin) % SUM_BLOCK
            if at == 0:
                block = x
            else:
                block = add(block, x)
            if at == SUM_BLOCK - 1 or i == end - 1:
                if i - begin < SUM_BLOCK:
                    total = block
                else:
                    total = add(total, block)
        out[s, j] = total


def sgd(lines: Any, slots: Any, grads: Any, hyper: Any, error: Any) -> None:
    """row -= lr g. hyper: lr."""
    n, dim = grads.shape
    for item in range(cuda.grid(1), n * dim, cuda.gridsize(1)):
        i = item // dim
        j = item - i * dim
        slot = slots[i]
        if slot < -1 or slot >= lines.shape[0]:
            error[0] = BAD_SLOT
        elif slot >= 0:
            lines[slot, j] = sub(lines[slot, j], mul(hyper[0], grads[i, j]))


def momentum(lines: Any, slots: Any, grads: Any, hyper: Any, error: Any) -> None:
    """m = mu m + g; row -= lr m. hyper: lr, mu."""
    n, dim = grads.shape
    for item in range(cuda.grid(1), n * dim, cuda.gridsize(1)):
        i = item // dim
        j = item - i * dim
        slot = slots[i]
        if slot < -1 or slot >= lines.shape[0]:
            error[0] = BAD_SLOT
        elif slot >= 0:
            m = add(mul(hyper[1], lines[slot, dim + j]), grads[i, j])
            lines[slot, dim + j] = m
            lines[slot, j] = sub(lines[slot, j], mul(hyper[0], m))


def adagrad(lines: Any, slots: Any, grads: Any, hyper: Any, error: Any) -> None:
    """sum += g g; row -= lr (g / (sqrt(sum) + eps)). hyper: lr, eps."""
    n, dim = grads.shape
    for item in range(cuda.grid(1), n * dim, cuda.gridsize(1)):
        i = item // dim
        j = item - i * dim
        slot = slots[i]
        if slot < -1 or slot >= lines.shape[0]:
            error[0] = BAD_SLOT
        elif slot >= 0:
            g = grads[i, j]
            total = add(lines[slot, dim + j], mul(g, g))
            lines[slot, dim + j] = total
            lines[slot, j] = sub(lines[slot, j], mul(hyper[0], div(g, add(sqrt(total), hyper[1]))))


def rowwise_adagrad(lines: Any, slots: Any, grads: Any, hyper: Any, error: Any) -> None:
    """sum += mean(g g); row -= (lr / (sqrt(sum) + eps)) g. hyper: lr, eps."""
    n, dim = grads.shape
    for i in range(cuda.grid(1), n, cuda.gridsize(1)):
        slot = slots[i]
        if slot < -1 or slot >= lines.shape[0]:
            error[0] = BAD_SLOT
        elif slot >= 0:
            partial = cuda.local.array(PARTIALS, float32)
            for j in range(PARTIALS):
                partial[j] = np.float32(0)
            for j in range(dim):
                partial[j % PARTIALS] = add(partial[j % PARTIALS], mul(grads[i, j], grads[i, j]))
            half = PARTIALS // 2
            while half > 0:
                for j in range(half):
                    partial[j] = add(partial[j], partial[j + half])
                half //= 2
            total = add(lines[slot, dim], div(partial[0], np.float32(dim)))
            lines[slot, dim] = total
            step = div(hyper[0], add(sqrt(total), hyper[1]))
            for j in range(dim):
                lines[slot, j] = sub(lines[slot, j], mul(step, grads[i, j]))


_APPLY = "float32[:,::1], int64[::1], float32[:,::1], float32[::1], int32[::1]"
SIGNATURES = {
    gather: "void(float32[:,::1], int64[::1], float32[:,::1], int32[::1])",
    scatter: "void(float32[:,::1], int64[::1], float32[:,::1], int32[::1])",
    segment_sum: "void(float32[:,::1], int64[::1], float32[::1], int64[::1], int64[::1], float32[:,::1], int32[::1])",
    sgd: f"void({_APPLY})",
    momentum: f"void({_APPLY})",
    adagrad: f"void({_APPLY})",
    rowwise_adagrad: f"void({_APPLY})",
}
