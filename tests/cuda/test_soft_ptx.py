"""The machine that kernels run on without a GPU: instructions, meetings of threads, memory, races, and real kernels."""

import ctypes
import importlib.util
import itertools
import math
import os
import pathlib
import struct

import numpy as np
import pytest
import soft
from soft import ptx

HERE = pathlib.Path(__file__).parent

pytestmark = pytest.mark.skipif(
    os.environ.get("NUMBA_ENABLE_CUDASIM") == "1", reason="the simulator compiles nothing: no PTX"
)
needs_numba = pytest.mark.skipif(
    not importlib.util.find_spec("numba_cuda"), reason="numba-cuda is not installed: no PTX"
)

STUB = """
#include <stdint.h>
static uint64_t begin[64], end[64];
void give(int i, uint64_t at, uint64_t n) { begin[i] = at, end[i] = at + n; }
int reach(uint64_t at, uint64_t n, int write)
{
    for (int i = 0; i < 64; i++)
        if (at >= begin[i] && at <= end[i] && n <= end[i] - at)
            return 1;
    return 0;
}
"""
SEEDS = range(6)  # 0 is plain order
ILLEGAL_ADDRESS, MISALIGNED, LAUNCH_FAILED = 700, 716, 719


class Launch(ctypes.Structure):
    """`struct launch` of machine.h."""

    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("params", ctypes.c_void_p),
        ("seed", ctypes.c_uint64),
        ("race_check", ctypes.c_int),
        ("reach", ctypes.c_void_p),
        ("report", ctypes.c_char * 512),
    )


class Kernel(ctypes.Structure):
    """`struct kernel` of machine.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("n_params", ctypes.c_int),
        ("param_nbytes", ctypes.POINTER(ctypes.c_uint32)),
        ("run", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Launch))),
    )


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    """What stands for the driver: it knows which memory is allocated."""
    source = tmp_path_factory.mktemp("stub") / "stub.c"
    source.write_text(STUB)
    return ctypes.CDLL(str(soft.shared_object(source, "stub.so", "-O2")))


@pytest.fixture(scope="module")
def machine(stub):
    """``machine(text)`` translates PTX, and gives its kernels by name as functions.

    ``kernel(*arguments, grid=1, block=1, seed=0, race_check=1)`` gives the error and the report. Arrays are passed as
    pointers, or as Numba does with ``flat=True``.
    """

    def load(text):
        library = ctypes.CDLL(ptx.shared_object(text))
        n = ctypes.c_int.in_dll(library, "soft_n_kernels").value
        found = (Kernel * n).in_dll(library, "soft_kernels")

        def of(kernel):
            def run(*arguments, grid=1, block=1, seed=0, race_check=1, flat=False):
                arrays = [a for a in arguments if isinstance(a, np.ndarray)]
                for i in range(64):
                    at, nbytes = (arrays[i].ctypes.data, arrays[i].nbytes) if i < len(arrays) else (0, 0)
                    stub.give(i, ctypes.c_uint64(at), ctypes.c_uint64(nbytes))
                words = []
                for a in arguments:
                    if not isinstance(a, np.ndarray):
                        words.append(a)
                    elif flat:
                        words += [0, 0, a.size, a.itemsize, a.ctypes.data, *a.shape, *a.strides]
                    else:
                        words.append(a.ctypes.data)
                assert len(words) == kernel.n_params
                values = (ctypes.c_int64 * len(words))(*words)
                params = [ctypes.addressof(values) + 8 * i for i in range(len(words))]
                pointers = (ctypes.c_void_p * len(words))(*params)
                launch = Launch(seed=seed, race_check=race_check)
                launch.grid[:], launch.block[:] = [grid, 1, 1], [block, 1, 1]
                launch.params = ctypes.addressof(pointers)
                launch.reach = ctypes.cast(stub.reach, ctypes.c_void_p).value
                error = kernel.run(ctypes.byref(launch))
                return error, launch.report.decode()

            run.library = library
            return run

        return {kernel.name.decode(): of(kernel) for kernel in found}

    return load


def module(**kernels):
    """PTX of kernels by name, each of the lines of its body; their parameters are a, b, c, d.

    %a..%d are these; %i is the thread's number, and %at_a.. the address of the thread's own word of 8 bytes.
    """
    text = ".version 8.0\n.target sm_90\n.address_size 64\n"
    for name, body in kernels.items():
        shared = "\n".join(line for line in body.splitlines() if ".shared .align" in line)
        body = "\n".join(line for line in body.splitlines() if ".shared .align" not in line)
        text += f"{shared}\n.visible .entry {name}(\n" + ",\n".join(f".param .u64 {name}_{p}" for p in "abcd")
        text += ")\n{\n.reg .pred %p<9>;\n.reg .b32 %r<50>;\n.reg .b64 %rd<50>;\n.reg .f32 %f<9>;\n.reg .b64 %i, %t;\n"
        text += "".join(f".reg .b64 %{p}, %at_{p};\nld.param.u64 %{p}, [{name}_{p}];\n" for p in "abcd")
        text += "mov.u32 %r47, %ctaid.x;\nmov.u32 %r48, %ntid.x;\nmov.u32 %r49, %tid.x;\ncvt.u64.u32 %t, %r49;\n"
        text += "mad.lo.s32 %r49, %r47, %r48, %r49;\ncvt.u64.u32 %i, %r49;\n"
        text += "".join(f"mad.lo.s64 %at_{p}, %i, 8, %{p};\n" for p in "abcd")
        text += f"{body}\nret;\n}}\n"
    return text


def int64s(n=1, value=0):
    return np.full(n, value, np.int64)


# ---- instructions, each against Python ----

F32 = [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -2.5, 1e-45, -1e-40, 1.1754944e-38, 3.4028235e38, math.inf, -math.inf]
F32 += [math.nan, 127.5, 32767.5, -32768.5, 65535.9, 2147483648.0, -2147483904.0, 4294967296.0, 9.2233715e18]
F32 += [9.223372e18, -9.223373e18, 1.8446744e19, 3e38, 0.33333334, 16777217.0, 1e10]
F64 = [0.0, -0.0, 1.0, -3.7, 1e300, -1e300, math.inf, math.nan, 0.1, 1e-320, 2.0**63, 2.5, 1 + 2.0**-24, 3e-39]
INTEGERS = [0, 1, 2, 3, 7, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000]
INTEGERS += [0xFFFF_FFFF, 2**32, 0x0123_4567_89AB_CDEF, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 2, 2**24 + 1, 2**53 + 1]
PATTERNS = sorted(
    {*INTEGERS, *(int(x) for x in np.array(F64).view(np.uint64)), *(int(x) for x in np.float32(F32).view(np.uint32))}
    | {0x7FC1_2345, 0xFFA0_0001, 0x7FF8_0000_0000_0001}  # NaNs of other bits
)


def width(kind):
    return int(kind[1:])


def read(bits, kind):
    """The number that the low bits are."""
    n = width(kind)
    bits &= 2**n - 1
    if kind == "f32":
        return np.uint32(bits).view(np.float32)
    if kind == "f64":
        return np.uint64(bits).view(np.float64)
    return bits - 2**n if kind[0] == "s" and bits >> (n - 1) else bits


def bits(x, kind):
    """The bits of a number; those of any NaN are NVIDIA's."""
    if kind == "f32":
        return 0x7FFF_FFFF if np.isnan(x) else int(np.float32(x).view(np.uint32))
    if kind == "f64":
        return 0x7FFF_FFFF_FFFF_FFFF if np.isnan(x) else int(np.float64(x).view(np.uint64))
    return int(x) & 2 ** (1 if kind == "pred" else width(kind)) - 1


def nearest32(i):
    """The float32 nearest to an integer, ties to even, as exact arithmetic has it."""
    size = abs(i)
    cut = max(0, size.bit_length() - 24)
    whole, rest = size >> cut, size & ((1 << cut) - 1)
    half = (1 << cut) >> 1
    whole += rest > half or (rest == half and cut > 0 and whole & 1)
    return np.float32(math.copysign(float(whole << cut), i))


def towards(x, mode):
    """A float's integer, or itself where it has none."""
    if not math.isfinite(x):
        return float(x)
    return {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}[mode](float(x))


def clamped(x, to, of, mode):
    """cvt of a float to an integer."""
    low, high = (-(2 ** (width(to) - 1)), 2 ** (width(to) - 1) - 1) if to[0] == "s" else (0, 2 ** width(to) - 1)
    if math.isnan(x):
        return 0 if of == "f32" and width(to) < 64 else 1 << (width(to) - 1)
    whole = towards(x, mode)
    return low if whole < low else high if whole > high else int(whole)


def extreme(a, b, lower):
    """min and max of floats: a number wins against NaN, and -0 is below 0."""
    if np.isnan(a) or np.isnan(b):
        return b if np.isnan(a) else a
    if a == b:
        return a if bool(np.signbit(a)) == lower else b
    return min(a, b) if lower else max(a, b)


def divided(a, b):
    """Towards zero; by zero: all ones."""
    return -1 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def remainder(a, b):
    return a if b == 0 else a - b * divided(a, b)


def shifted(a, by, n):
    """Left by an amount that is clamped to the width; negative: right."""
    return a << min(by, n) if by >= 0 else a >> min(-by, n)


def inserted(a, b, at, n, size):
    at, n = at & 255, min(n & 255, size)
    mask = ((1 << n) - 1) << at & (2**size - 1)
    return (b & ~mask) | (a << at & mask)


def highest(a, kind, from_above):
    a = ~a if a < 0 else a
    return -1 if a == 0 else (width(kind) - a.bit_length() if from_above else a.bit_length() - 1)


def ordered(how):
    """A comparison of floats that is false where one is NaN; with `u`, true."""
    compare = {"eq": "__eq__", "ne": "__ne__", "lt": "__lt__", "le": "__le__", "gt": "__gt__", "ge": "__ge__"}[how[:2]]

    def compared(a, b):
        if math.isnan(a) or math.isnan(b):
            return how.endswith("u") and len(how) == 3
        return bool(getattr(float(a), compare)(float(b)))

    return compared


def instructions():
    """An instruction, the types that its operands are read as, that of its result, and what it is in Python."""
    for n in (16, 32, 64):
        s, u, b = f"s{n}", f"u{n}", f"b{n}"
        yield f"add.{s}", [s, s], s, lambda x, y: x + y
        yield f"sub.{s}", [s, s], s, lambda x, y: x - y
        yield f"mul.lo.{s}", [s, s], s, lambda x, y: x * y
        yield f"and.{b}", [b, b], b, lambda x, y: x & y
        yield f"or.{b}", [b, b], b, lambda x, y: x | y
        yield f"xor.{b}", [b, b], b, lambda x, y: x ^ y
        yield f"not.{b}", [b], b, lambda x: ~x
        yield f"neg.{s}", [s], s, lambda x: -x
        yield f"shl.{b}", [b, "u32"], b, lambda x, y, n=n: shifted(x, y, n)
        for kind in (s, u):
            yield f"shr.{kind}", [kind, "u32"], kind, lambda x, y, n=n: shifted(x, -y, n)
            yield f"min.{kind}", [kind, kind], kind, min
            yield f"max.{kind}", [kind, kind], kind, max
            yield f"div.{kind}", [kind, kind], kind, divided
            yield f"rem.{kind}", [kind, kind], kind, remainder
            yield f"mul.hi.{kind}", [kind, kind], kind, lambda x, y, n=n: x * y >> n
            yield f"mad.lo.{kind}", [kind] * 3, kind, lambda x, y, z: x * y + z
            for how in ("eq", "ne", "lt", "le", "gt", "ge"):
                yield f"setp.{how}.{kind}", [kind, kind], "pred", ordered_integers(how)
            yield f"selp.{kind}", [kind, kind, "pred"], kind, lambda x, y, p: x if p else y
        yield f"selp.{b}", [b, b, "pred"], b, lambda x, y, p: x if p else y
        yield f"mov.{b}", [b], b, lambda x: x
        yield f"setp.eq.{b}", [b, b], "pred", lambda x, y: x == y
        if n > 16:
            yield f"popc.{b}", [b], "u32", lambda x: x.bit_count()
            yield f"clz.{b}", [b], "u32", lambda x, n=n: n - x.bit_length()
            yield f"brev.{b}", [b], b, lambda x, n=n: int(f"{x:0{n}b}"[::-1], 2)
            yield f"bfi.{b}", [b, b, "u32", "u32"], b, lambda x, y, at, k, n=n: inserted(x, y, at, k, n)
            for kind in (s, u):
                yield f"bfind.{kind}", [kind], "u32", lambda x, kind=kind: highest(x, kind, False)
                yield f"bfind.shiftamt.{kind}", [kind], "u32", lambda x, kind=kind: highest(x, kind, True)
        if n < 64:
            for kind, wide in ((s, f"s{2 * n}"), (u, f"u{2 * n}")):
                yield f"mul.wide.{kind}", [kind, kind], wide, lambda x, y: x * y
    for name, f in (("and", lambda x, y: x & y), ("or", lambda x, y: x | y), ("xor", lambda x, y: x ^ y)):
        yield f"{name}.pred", ["pred", "pred"], "pred", f
    yield "not.pred", ["pred"], "pred", lambda x: 1 - x
    for kind, of in (("f32", np.float32), ("f64", np.float64)):
        yield f"add.rn.{kind}", [kind, kind], kind, lambda x, y: x + y
        yield f"sub.rn.{kind}", [kind, kind], kind, lambda x, y: x - y
        yield f"mul.rn.{kind}", [kind, kind], kind, lambda x, y: x * y
        yield f"div.rn.{kind}", [kind, kind], kind, lambda x, y: x / y
        yield f"sqrt.rn.{kind}", [kind], kind, np.sqrt
        yield f"neg.{kind}", [kind], kind, lambda x: -x
        yield f"abs.{kind}", [kind], kind, abs
        yield f"min.{kind}", [kind, kind], kind, lambda x, y: extreme(x, y, True)
        yield f"max.{kind}", [kind, kind], kind, lambda x, y: extreme(x, y, False)
        for how in ("eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu"):
            yield f"setp.{how}.{kind}", [kind, kind], "pred", ordered(how)
        for mode, to in itertools.product(("rni", "rzi", "rmi", "rpi"), ("s16", "u16", "s32", "u32", "s64", "u64")):
            yield (
                f"cvt.{mode}.{to}.{kind}",
                [kind],
                to,
                lambda x, to=to, kind=kind, mode=mode: clamped(x, to, kind, mode),
            )
        for mode in ("rni", "rzi"):
            yield (
                f"cvt.{mode}.{kind}.{kind}",
                [kind],
                kind,
                lambda x, mode=mode, of=of: of(math.copysign(towards(x, mode), x)),
            )
    yield "cvt.f64.f32", ["f32"], "f64", np.float64
    yield "cvt.rn.f32.f64", ["f64"], "f32", np.float32
    for of in ("s16", "u16", "s32", "u32", "s64", "u64"):
        yield f"cvt.rn.f32.{of}", [of], "f32", nearest32
    yield "selp.f32", ["b32", "b32", "pred"], "b32", lambda x, y, p: x if p else y
    integers = [f"{sign}{n}" for sign in "su" for n in (8, 16, 32, 64)]
    for to, of in itertools.product(integers, integers):
        if "8" != to[1:]:
            yield f"cvt.{to}.{of}", [of], to, lambda x: x


def ordered_integers(how):
    return lambda x, y: {"eq": x == y, "ne": x != y, "lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y}[how]


INSTRUCTIONS = list(instructions())


def one_of_each():
    """PTX that does each instruction on the operands of its thread, and writes result k of thread i to d[k, i]."""
    lines, loaded = [], {}

    def operand(slot, kind):
        register = f"%x{slot}_{kind}"
        if (slot, kind) not in loaded:
            loaded[slot, kind] = register
            n = 32 if kind == "pred" else max(16, width(kind))
            of = kind if kind[0] == "f" else f"b{n}"
            load = f"%x{slot}_b32w" if kind == "pred" else register
            lines.append(f".reg .{of if kind != 'pred' else 'b32'} {load};")
            lines.append(f"ld.global.{of if kind != 'pred' else 'u32'} {load}, [%at_{slot}];")
            if kind == "pred":
                lines.extend(
                    [f".reg .pred {register};", f"and.b32 {load}, {load}, 1;", f"setp.ne.b32 {register}, {load}, 0;"]
                )
        return register

    lines.append(".reg .b64 %out;\nmov.u64 %out, %at_d;\n.reg .b32 %w32;\n.reg .b64 %w64;\n.reg .b16 %w16;")
    lines.append(".reg .f32 %wf32;\n.reg .f64 %wf64;\n.reg .pred %wp;\n.reg .b32 %n;\n.reg .b64 %row;")
    lines.append("mov.u32 %n, %nctaid.x;\nmov.u32 %r1, %ntid.x;\nmul.wide.u32 %row, %n, %r1;\nshl.b64 %row, %row, 3;")
    for text, kinds, result, _ in INSTRUCTIONS:
        names = [operand(slot, kind) for slot, kind in zip("abc" if len(kinds) < 4 else "abcc", kinds, strict=False)]
        w = {"pred": "%wp", "f32": "%wf32", "f64": "%wf64"}.get(result) or f"%w{width(result)}"
        lines.append(f"{text} {w}, {', '.join(names)};")
        if result == "pred":
            lines.append("selp.b32 %w32, 1, 0, %wp;")
        store = "b32" if result == "pred" else result if result[0] == "f" else f"b{width(result)}"
        lines.append(f"st.global.{store} [%out], {'%w32' if result == 'pred' else w};")
        lines.append("add.s64 %out, %out, %row;")
    return module(each="\n".join(lines))


@pytest.fixture(scope="module")
def results(machine):
    """Operands of each thread, and what each instruction made of them: uint64[instructions, threads]."""
    pairs = np.array(list(itertools.product(PATTERNS, PATTERNS)), np.uint64)
    pairs = np.concatenate([pairs, np.random.default_rng(0).integers(0, 2**64, (256, 2), np.uint64)])
    pairs = pairs[: len(pairs) // 128 * 128]
    a, b = (np.ascontiguousarray(column) for column in pairs.T)
    c = np.random.default_rng(1).choice(np.array(PATTERNS, np.uint64), len(a))
    out = np.zeros((len(INSTRUCTIONS), len(a)), np.uint64)
    assert machine(one_of_each())["each"](a, b, c, out, grid=len(a) // 128, block=128) == (0, "")
    return [a.tolist(), b.tolist(), c.tolist()], out


@pytest.mark.parametrize("k", range(len(INSTRUCTIONS)), ids=[text for text, *_ in INSTRUCTIONS])
def test_an_instruction_does_what_python_does(results, k):
    columns, out = results
    _, kinds, result, oracle = INSTRUCTIONS[k]
    columns = [*columns, columns[2]][: len(kinds)]
    columns = [[x & 1 if kind == "pred" else read(x, kind) for x in column] for column, kind in zip(columns, kinds)]
    with np.errstate(all="ignore"):
        want = np.array([bits(oracle(*row), result) for row in zip(*columns)], np.uint64)
    wrong = np.flatnonzero(want != out[k])
    assert not wrong.size, [([column[i] for column in columns], hex(out[k][i]), hex(want[i])) for i in wrong[:3]]
