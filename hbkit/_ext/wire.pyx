"""Rows as bytes on the wire, and back; see `hbkit.shuffle.quantize`, which says what the bytes mean."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from hbkit._ext.isa cimport HB_WIRE_SCRATCH, hb_fp_enter, hb_fp_leave, hb_fp_state, hb_packing, kernels
from hbkit.errors import InvalidArgument

WIRES = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3}


def row_nbytes(int64_t dim, str wire):
    """Bytes that a row of `dim` columns takes: int."""
    if wire not in WIRES or dim < 1:
        raise InvalidArgument(f"no wire {wire!r} of dim {dim}", remedy=f"use one of {', '.join(WIRES)}")
    return dim + 2 if wire == "int8" else dim * (4 if wire == "float32" else 2)


cdef _fit(str what, int64_t nbytes, int64_t n, int64_t dim, str wire):
    if nbytes != n * <int64_t>row_nbytes(dim, wire):
        raise InvalidArgument(f"{what} of {nbytes} bytes for {n} rows of dim {dim} as {wire}",
                              remedy=f"give {n * row_nbytes(dim, wire)} bytes")


def pack(const float[:, ::1] rows, str wire, uint8_t[::1] out, const int64_t[::1] keys=None, uint64_t seed=0,
         uint32_t step=0, float[:, ::1] residual=None):
    """Write rows float32[n, dim] to `out`, uint8[n * row_nbytes]: at random by (seed, keys int64[n], step) where keys
    are given. `residual`, float32[n, dim], is added to the rows and then holds what is lost of them."""
    cdef hb_packing p
    cdef hb_fp_state fp
    p.n, p.dim = rows.shape[0], rows.shape[1]
    _fit("out", out.shape[0], p.n, p.dim, wire)
    if keys is not None and keys.shape[0] != p.n:
        raise InvalidArgument(f"{keys.shape[0]} keys of {p.n} rows", remedy="give a key a row")
    if residual is not None and (residual.shape[0] != p.n or residual.shape[1] != p.dim):
        raise InvalidArgument(f"a residual of shape ({residual.shape[0]}, {residual.shape[1]})",
                              remedy=f"give float32 of shape ({p.n}, {p.dim})")
    if p.n == 0:
        return
    p.wire, p.seed, p.step, p.rows = WIRES[wire], seed, step, &rows[0, 0]
    p.keys, p.residual, p.scratch = NULL, NULL, NULL
    if keys is not None:
        p.keys = &keys[0]
    if residual is not None:
        p.residual = &residual[0, 0]
    if keys is not None or residual is not None:
        p.scratch = malloc(HB_WIRE_SCRATCH(p.dim))
        if p.scratch == NULL:
            raise MemoryError
    with nogil:
        fp = hb_fp_enter()
        kernels().wire.pack(&p, &out[0])
        hb_fp_leave(fp)
    free(p.scratch)


def unpack(const uint8_t[::1] data, str wire, float[:, ::1] out):
    """Write the rows of a block to `out`, float32[n, dim]."""
    cdef int64_t n = out.shape[0], dim = out.shape[1]
    cdef int code
    cdef hb_fp_state fp
    _fit("a block", data.shape[0], n, dim, wire)
    if n == 0:
        return
    code = WIRES[wire]
    with nogil:
        fp = hb_fp_enter()
        kernels().wire.unpack(&data[0], n, dim, code, &out[0, 0])
        hb_fp_leave(fp)
