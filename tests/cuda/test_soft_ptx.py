"""The machine that kernels run on without a GPU: instructions, meetings of threads, memory and races."""

import ctypes
import itertools
import math
import os
import re
import shutil
import struct

import numpy as np
import pytest
import soft
from soft import ptx

pytestmark = pytest.mark.skipif(
    not shutil.which(os.environ.get("CC", "cc")), reason="no C compiler builds kernels here"
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
    pointers.
    """

    def load(text):
        library = ctypes.CDLL(ptx.shared_object(text))
        n = ctypes.c_int.in_dll(library, "soft_n_kernels").value
        found = (Kernel * n).in_dll(library, "soft_kernels")

        def of(kernel):
            def run(*arguments, grid=1, block=1, seed=0, race_check=1):
                arrays = [a for a in arguments if isinstance(a, np.ndarray)]
                for i in range(64):
                    at, nbytes = (arrays[i].ctypes.data, arrays[i].nbytes) if i < len(arrays) else (0, 0)
                    stub.give(i, ctypes.c_uint64(at), ctypes.c_uint64(nbytes))
                words = []
                for a in arguments:
                    words.append(a.ctypes.data if isinstance(a, np.ndarray) else a)
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


def permuted(a, b, how):
    """Each digit of `how` chooses a byte; from 8 on, its sign."""
    both, out = (a | b << 32).to_bytes(8, "little"), []
    for digit in (how & 15, how >> 4 & 15, how >> 8 & 15, how >> 12 & 15):
        byte = both[digit % 8]
        out.append((255 if byte > 127 else 0) if digit > 7 else byte)
    return int.from_bytes(bytes(out), "little")


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
    yield "prmt.b32", ["b32"] * 3, "b32", permuted
    yield "selp.f32", ["b32", "b32", "pred"], "b32", lambda x, y, p: x if p else y
    integers = [f"{sign}{n}" for sign in "su" for n in (8, 16, 32, 64)]
    for to, of in itertools.product(integers, integers):
        if to[1:] != "8":
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
    columns = [
        [x & 1 if kind == "pred" else read(x, kind) for x in column]
        for column, kind in zip(columns, kinds, strict=True)
    ]
    with np.errstate(all="ignore"):
        want = np.array([bits(oracle(*row), result) for row in zip(*columns, strict=True)], np.uint64)
    wrong = np.flatnonzero(want != out[k])
    assert not wrong.size, [([column[i] for column in columns], hex(out[k][i]), hex(want[i])) for i in wrong[:3]]


def test_vectors_and_narrow_values_are_loaded_and_stored(machine):
    of = """
        ld.global.v4.u8 {%r1, %r2, %r3, %r4}, [%a];
        ld.global.s8 %r5, [%a+3];
        st.global.v2.u32 [%b], {%r1, %r5};
        ld.global.v2.f32 {%f1, %f2}, [%a+8];
        st.global.v4.f32 [%b+16], {%f2, %f1, %f2, 0f3F800000};
        ld.global.s16 %rd1, [%a+2];
        st.global.u64 [%b+32], %rd1;
        ld.global.u16 %rd1, [%a+2];
        st.global.u64 [%b+40], %rd1;
        st.global.u8 [%b+48], %rd1;
        st.global.v4.u8 [%b+52], {%r4, %r3, %r2, %r1};
        mov.b64 %rd2, {%r1, %r5};
        mov.b64 {%r6, %r7}, %rd2;
        st.global.v2.b32 [%b+56], {%r7, %r6};
    """
    source = struct.pack("<4B4x2f", 1, 2, 0x80, 0xFF, 2.5, -3.0)
    a, b = np.frombuffer(source, np.uint8).copy().view(np.int64), int64s(8)
    assert machine(module(k=of))["k"](a, b, 0, 0) == (0, "")
    want = struct.pack(
        "<Ii8x4fqqB3x4BIi", 1, -1, -3.0, 2.5, -3.0, 1.0, -128, 0xFF80, 0x80, 0xFF, 0x80, 2, 1, 0xFFFF_FFFF, 1
    )
    assert b.tobytes() == want


def test_what_a_launch_is_told(machine):
    of = """
        mov.u32 %r1, %tid.x;
        mov.u32 %r2, %ctaid.x;
        mov.u32 %r3, %ntid.x;
        mov.u32 %r4, %nctaid.x;
        mov.u32 %r5, %laneid;
        mad.lo.s32 %r1, %r1, 100, %r5;
        mad.lo.s32 %r1, %r2, 100000, %r1;
        mad.lo.s32 %r3, %r3, 1000, %r4;
        st.global.v2.u32 [%at_a], {%r1, %r3};
    """
    a = int64s(150)
    kernels = machine(module(k=of))
    for seed in SEEDS:
        assert kernels["k"](a, 0, 0, 0, grid=3, block=50, seed=seed) == (0, "")
        block, thread = np.divmod(np.arange(150), 50)
        assert a.tolist() == (block * 100000 + thread * 100 + thread % 32 + ((50 * 1000 + 3) << 32)).tolist()


def test_unknown_ptx_is_refused_by_line():
    for line, why in (
        ("frobnicate.b32 %r1, %r2;", "no such instruction"),
        ("add.f32 %f1, %f2, %f3;", "no such instruction"),  # ptxas may fuse it
        ("sqrt.approx.f32 %f1, %f2;", "no such instruction"),
        ("ld.local.u32 %r1, [%a];", "no such instruction"),
        ("bar.sync 1, 64;", "no such instruction"),
        ("mov.u32 %r1, %clock;", "not declared"),
        ("mov.u32 %r1, somewhere;", "no such operand"),
    ):
        text = module(k=f"ret;\n{line}")
        at = text[: text.index(line)].count("\n") + 1
        with pytest.raises(ptx.Untranslated, match=rf"k, line {at} `.*{why}"):
            ptx.translate(text)
    with pytest.raises(ptx.Untranslated, match=r"line 4: '?\.func"):
        ptx.translate(".version 8.0\n.target sm_90\n.address_size 64\n.func f()\n{\nret;\n}\n")


# ---- meetings ----

# Lanes that come late, each by its own number of steps, which is the thread's number times 7 modulo 32.
LATE = """
    mov.u32 %r40, %laneid;
    mul.lo.s32 %r41, %r40, 7;
    and.b32 %r41, %r41, 31;
Late:
    ld.global.u64 %rd40, [%at_a];
    sub.s32 %r41, %r41, 1;
    setp.ge.s32 %p8, %r41, 0;
    @%p8 bra Late;
"""
SHUFFLES = {
    "idx": lambda lane, b, width: lane // width * width + b % width,
    "up": lambda lane, b, width: lane - b if lane % width >= b else None,
    "down": lambda lane, b, width: lane + b if lane % width + b < width else None,
    "bfly": lambda lane, b, width: lane ^ b if (lane ^ b) // width <= lane // width else None,
}


@pytest.mark.parametrize("mode", SHUFFLES)
def test_shuffles(machine, mode):
    """b and c (the segments, as CUDA packs them) come from memory; a lane whose source is none keeps its own value."""
    of = f"""{LATE}
        ld.global.u32 %r1, [%at_a];
        ld.global.u32 %r2, [%b];
        ld.global.u32 %r3, [%c];
        shfl.sync.{mode}.b32 %r4|%p1, %r1, %r2, %r3, -1;
        selp.b32 %r5, 1, 0, %p1;
        st.global.v2.b32 [%at_d], {{%r4, %r5}};
    """
    kernel = machine(module(k=of))["k"]
    values = int64s(64) + np.random.default_rng(0).integers(0, 2**31, 64)
    for seed, width, b in itertools.product((0, 1, 2), (32, 16, 8, 1), (0, 1, 3, 16, 31)):
        got = int64s(64)
        c = (32 - width) << 8 | (0 if mode == "up" else 31)
        assert kernel(values, int64s(1, b), int64s(1, c), got, block=64, seed=seed) == (0, "")
        for i in range(64):
            source = SHUFFLES[mode](i % 32, b, width)
            want = values[i] if source is None else values[i // 32 * 32 + source]
            assert (got[i] & 0xFFFF_FFFF, got[i] >> 32) == (want, source is not None), (i, width, b)


def test_votes_and_matches_of_a_part_of_a_warp(machine):
    """Odd and even lanes vote apart, at places of their own; the last warp has 20 lanes, its lane 3 leaves first."""
    of = (
        LATE
        + """
        setp.eq.s32 %p7, %r40, 3;
        ld.global.u64 %rd1, [%at_a];
        cvt.u32.u64 %r1, %rd1;
        setp.ne.s32 %p1, %r1, 0;
        setp.gt.u64 %p2, %t, 31;
        and.pred %p7, %p7, %p2;
        @%p7 ret;
        and.b32 %r2, %r40, 1;
        setp.eq.s32 %p3, %r2, 1;
        @%p3 bra Odd;
        vote.sync.ballot.b32 %r3, %p1, 0x55555555;
        vote.sync.any.pred %p4, %p1, 0x55555555;
        vote.sync.all.pred %p5, %p1, 0x55555555;
        match.any.sync.b64 %r5, %rd1, 0x55555555;
        bra Both;
    Odd:
        vote.sync.ballot.b32 %r3, !%p1, 0xAAAAAAAA;
        vote.sync.any.pred %p4, %p1, 0xAAAAAAAA;
        vote.sync.all.pred %p5, %p1, 0xAAAAAAAA;
        match.any.sync.b32 %r5, %r1, 0xAAAAAAAA;
    Both:
        selp.b32 %r6, 1, 0, %p4;
        selp.b32 %r7, 2, 0, %p5;
        or.b32 %r6, %r6, %r7;
        st.global.v2.b32 [%at_b], {%r3, %r5};
        st.global.b32 [%at_c], %r6;
    """
    )
    kernel = machine(module(k=of))["k"]
    rng = np.random.default_rng(0)
    for seed in SEEDS:
        values = rng.integers(0, 3, 52) + (rng.integers(0, 2, 52) << 32)
        values[0:32:2] |= 1
        got, said = int64s(52), int64s(52)
        assert kernel(values, got, said, 0, block=52, seed=seed) == (0, "")
        for i in range(52):
            lanes = [j for j in range(i // 32 * 32, min(i // 32 * 32 + 32, 52)) if j % 2 == i % 2 and j != 35]
            low = [int(values[j]) & 0xFFFF_FFFF for j in range(52)]
            votes = sum((bool(low[j]) ^ (i % 2)) << j % 32 for j in lanes)
            whole = low if i % 2 else values.tolist()
            same = sum((whole[j] == whole[i]) << j % 32 for j in lanes)
            any_all = any(low[j] for j in lanes) | all(low[j] for j in lanes) << 1
            if i != 35:
                assert (got[i] & 0xFFFF_FFFF, got[i] >> 32 & 0xFFFF_FFFF, said[i]) == (votes, same, any_all), i


# Each thread adds its block's words of `a`, which the block has put into shared memory; the last warp is late.
BLOCK_SUM = (
    ".shared .align 8 .b8 held[800];\n"
    + LATE
    + """
    mov.u64 %rd1, held;
    mad.lo.s64 %rd2, %t, 8, %rd1;
    ld.global.u64 %rd3, [%at_a];
    st.shared.u64 [%rd2], %rd3;
    bar.sync 0;
    mov.u64 %rd4, 0;
    mov.u32 %r1, 0;
    mov.u32 %r2, %ntid.x;
Add:
    ld.shared.u64 %rd5, [%rd1];
    add.s64 %rd4, %rd4, %rd5;
    add.s64 %rd1, %rd1, 8;
    add.s32 %r1, %r1, 1;
    setp.lt.s32 %p1, %r1, %r2;
    @%p1 bra Add;
    st.global.u64 [%at_b], %rd4;
"""
)


def test_barriers_of_blocks_in_any_order(machine):
    kernels = machine(module(sums=BLOCK_SUM, torn=BLOCK_SUM.replace("held", "torn_held").replace("bar.sync 0;", "")))
    values, got = np.random.default_rng(0).integers(0, 2**40, 500), int64s(500)
    for seed in SEEDS:
        assert kernels["sums"](values, got, 0, 0, grid=5, block=100, seed=seed) == (0, "")
        assert got.tolist() == np.repeat(values.reshape(5, 100).sum(1), 100).tolist()
        error, report = kernels["torn"](values, got, 0, 0, grid=5, block=100, seed=seed)
        assert error == LAUNCH_FAILED and "race" in report and "shared.u64" in report
    assert kernels["torn"](values, got, 0, 0, grid=5, block=100, race_check=0) == (0, "")
    assert got[99] != values[:100].sum() or got[0] != got[99]


MEETINGS = module(
    alone="mov.u32 %r1, %laneid;\nsetp.eq.s32 %p1, %r1, 5;\n@%p1 bar.warp.sync -1;\n@%p1 ret;\nbar.sync 0;",
    other="mov.u32 %r1, %laneid;\nsetp.eq.s32 %p1, %r1, 5;\n@%p1 bra Other;\nvote.sync.any.pred %p2, %p1, -1;\nret;\n"
    "Other:\nvote.sync.all.pred %p2, %p1, -1;",
    mask="bar.warp.sync 0xfffffffe;",
    ended="mov.u32 %r1, %laneid;\nsetp.eq.s32 %p1, %r1, 5;\n@%p1 ret;\nbar.warp.sync -1;\nbar.sync 0;\n"
    "st.global.u64 [%at_a], %i;",
    parted="mov.u32 %r1, %laneid;\nsetp.eq.s32 %p1, %r1, 5;\n@%p1 bra Other;\nbar.sync 0;\nret;\nOther:\nbar.sync 0;",
    spins="Again:\nld.global.u64 %rd1, [%a];\nsetp.eq.s64 %p1, %rd1, 0;\n@%p1 bra Again;",
)


def test_meetings_that_cannot_be(machine):
    kernels = machine(MEETINGS)
    for seed in (0, 1):
        for name, text in (
            ("alone", "deadlock: 64 threads wait; .*line"),  # for each other: at a warp's barrier, and the block's
            ("other", r"deadlock: 64 threads wait; .*vote\.sync"),
            ("mask", "its own lane 0 is not in its mask 0xfffffffe"),
            ("parted", "its warp waits at another barrier, line"),
        ):
            error, report = kernels[name](int64s(64), 0, 0, 0, block=64, seed=seed)
            assert error == LAUNCH_FAILED
            assert re.search(text, report), report
        a = int64s(64)
        assert kernels["ended"](a, 0, 0, 0, block=64, seed=seed) == (0, "")  # who has ended is not waited for
        assert a.tolist() == [0 if i % 32 == 5 else i for i in range(64)]
    error, report = kernels["spins"](int64s(1), 0, 0, 0, race_check=0)
    assert error == LAUNCH_FAILED and "no end: no thread has ended in " in report


def test_a_seed_is_an_order(machine):
    of = "atom.global.add.u64 %rd1, [%b], 1;\nst.global.u64 [%at_a], %rd1;"
    kernel = machine(module(k=of))["k"]
    seen = []
    for seed in (0, 0, 1, 1, 2, 2):
        a = int64s(300)
        assert kernel(a, int64s(1), 0, 0, grid=6, block=50, seed=seed) == (0, "")
        seen.append(a.tolist())  # when each thread came
    assert seen[0::2] == seen[1::2] and seen[0] == list(range(300))
    assert sorted(seen[2]) == sorted(seen[4]) == seen[0] and seen[2] != seen[4] != seen[0] != seen[2]


# ---- memory ----

TOUCHES = module(
    load="ld.global.u64 %rd1, [%b];",
    store="mov.u64 %rd1, 7;\nst.global.u64 [%b], %rd1;",
    four="ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%b];",
    add="atom.global.add.u32 %r1, [%b], 1;",
    near=".shared .align 4 .b8 few[64];\nld.shared.u32 %r1, [%b];",
)


def test_memory_that_is_not_there(machine):
    kernels = machine(TOUCHES)
    held = np.zeros(2048, np.int64)
    a = held[512:1024]
    at = a.ctypes.data // 16 * 16
    end = a.ctypes.data + a.nbytes
    for name, nbytes in (("load", 8), ("store", 8), ("four", 16), ("add", 4)):
        assert kernels[name](a, end // 16 * 16 - 16, 0, 0) == (0, "")
        for wrong in (end, a.ctypes.data // 16 * 16 - 16, 0, 2**64 - 16, end + 4096):
            error, report = kernels[name](a, wrong - 2**64 if wrong >= 2**63 else wrong, 0, 0)
            assert error == ILLEGAL_ADDRESS and f"{nbytes} bytes at" in report
            assert (
                "where no live allocation is" in report and report.startswith(f"{name}, line ") and "global" in report
            )
        error, report = kernels[name](a, at + 32 + nbytes // 2, 0, 0)
        assert error == MISALIGNED and f"is not a multiple of {nbytes}" in report
    assert kernels["near"](a, 60, 0, 0) == (0, "")
    error, report = kernels["near"](a, 64, 0, 0)
    assert error == ILLEGAL_ADDRESS and "4 bytes at 0x40 of 64 in shared memory" in report
    assert kernels["near"](a, 62, 0, 0)[0] == MISALIGNED


ATOMICS = {
    "add": lambda old, new: old + new,
    "min": min,
    "max": max,
    "and": lambda old, new: old & new,
    "or": lambda old, new: old | new,
    "xor": lambda old, new: old ^ new,
    "exch": lambda old, new: new,
}


def test_atomics(machine):
    lines = ".reg .b32 %x32, %y32;\n.reg .b64 %x64, %y64;\nld.global.u64 %x64, [%at_a];\ncvt.u32.u64 %x32, %x64;\n"
    for k, (name, kind) in enumerate(itertools.product(ATOMICS, ("s32", "u32", "s64", "u64"))):
        kind = (
            f"b{kind[1:]}"
            if name in ("and", "or", "xor", "exch")
            else kind.replace("s64", "u64" if name == "add" else "s64")
        )
        lines += f"atom.global.{name}.{kind} %y{kind[1:]}, [%b+{8 * k}], %x{kind[1:]};\n"
    lines += "red.global.add.u64 [%c], 1;\natom.global.cas.b64 %rd2, [%c+8], 5, %x64;\n"
    lines += "atom.global.cas.b32 %r1, [%c+16], 5, 9;"
    kernel = machine(module(k=lines))["k"]
    for seed in SEEDS:
        values = np.random.default_rng(seed).integers(-(2**63), 2**63, 64)
        start = np.random.default_rng(9).integers(-(2**63), 2**63, 28)
        got, c = start.copy(), np.array([0, 5, 5], np.int64)
        assert kernel(values, got, c, 0, grid=2, block=32, seed=seed) == (0, "")
        for k, (name, kind) in enumerate(itertools.product(ATOMICS, ("s32", "u32", "s64", "u64"))):
            old = read(int(start[k]) & 2**64 - 1, kind)
            for value in values.tolist():
                old = read(ATOMICS[name](old, read(value & 2**64 - 1, kind)) & 2**64 - 1, kind)
            high = int(start[k]) & 2**64 - 2**32 if kind.endswith("32") else 0
            found = int(got[k]) & 2**64 - 1
            if name == "exch":
                assert found in {high | v & 2 ** width(kind) - 1 for v in values.tolist()}
            else:
                assert found == high | bits(old, kind), (name, kind)
        assert c[0] == 64 and c[1] in values and c[2] == 9


def test_a_plain_read_may_be_late(machine):
    """What another block changed atomically, before a change that was seen, is seen or not; by atomics it is."""
    of = """
        mov.u32 %r1, %ctaid.x;
        setp.eq.s32 %p1, %r1, 1;
        @%p1 bra Reads;
        atom.global.exch.b64 %rd1, [%a], 7;
        atom.global.exch.b32 %r2, [%b], 1;
        ret;
    Reads:
        atom.global.or.b32 %r2, [%b], 0;
        setp.eq.s32 %p2, %r2, 0;
        @%p2 ret;
        ld.global.u64 %rd1, [%a];
        atom.global.or.b64 %rd2, [%a], 0;
        ld.global.u64 %rd3, [%a];
        st.global.u64 [%c], %rd1;
        st.global.u64 [%c+8], %rd2;
        st.global.u64 [%d], %rd3;
    """
    kernel, seen = machine(module(k=of))["k"], set()
    for seed in range(40):
        a, b, c, d = int64s(1), int64s(1), int64s(2, -1), int64s(1)
        assert kernel(a, b, c, d, grid=2, seed=seed) == (0, "")
        if c[1] != -1:  # the other block was first
            assert c[1] == d[0] == 7 and (seed or c[0] == 7)
            seen.add(int(c[0]))
    assert seen == {0, 7}


# ---- races ----

RACES = {
    "write": "st.global.u64 [%b], %i;",
    "same": "mov.u64 %rd1, 7;\nst.global.u64 [%b], %rd1;",
    "read": "ld.global.u64 %rd1, [%b];\nsetp.eq.s64 %p1, %i, 40;\n@%p1 st.global.u64 [%b], %i;",
    "reads": "ld.global.u64 %rd1, [%b];\nst.global.u64 [%at_a], %rd1;",
    "bytes": "add.s64 %rd1, %b, %i;\nld.global.u8 %r1, [%rd1];\nst.global.u8 [%rd1], %i;",
    "halves": "and.b64 %rd1, %i, -2;\nadd.s64 %rd1, %b, %rd1;\nst.global.u16 [%rd1], %i;",
    "atomic": "atom.global.add.u64 %rd1, [%b], %i;",
    "mixed": "atom.global.add.u64 %rd1, [%b], %i;\nsetp.eq.s64 %p1, %i, 40;\n@%p1 st.global.u64 [%b], %i;",
    "peek": "ld.global.u64 %rd1, [%b];\natom.global.add.u64 %rd1, [%b], %i;",
    "barrier": "setp.eq.s64 %p1, %t, 40;\n@%p1 st.global.u64 [%at_a], %i;\nbar.sync 0;\nmad.lo.s64 %rd2, %i, 8, %a;\n"
    "sub.s64 %rd3, %i, %t;\nmad.lo.s64 %rd2, %rd3, 8, %a;\nld.global.u64 %rd1, [%rd2+320];\nbar.sync 0;\n"
    "setp.eq.s64 %p1, %t, 3;\n@%p1 st.global.u64 [%rd2+320], %i;",
    "blocks": "setp.eq.s64 %p1, %i, 0;\n@%p1 st.global.u64 [%a], %i;\nbar.sync 0;\nsetp.eq.s64 %p1, %i, 64;\n"
    "@%p1 ld.global.u64 %rd1, [%a];",
    "lanes": "st.global.u64 [%at_a], %i;\nvote.sync.any.pred %p1, %p1, -1;\nxor.b64 %rd1, %i, 1;\n"
    "mad.lo.s64 %rd1, %rd1, 8, %a;\nld.global.u64 %rd1, [%rd1];",
    "fenced": "st.global.u64 [%at_a], %i;\nbar.warp.sync -1;\nxor.b64 %rd1, %i, 1;\nmad.lo.s64 %rd1, %rd1, 8, %a;\n"
    "ld.global.u64 %rd2, [%rd1];\nvote.sync.any.pred %p1, %p1, -1;\nst.global.u64 [%rd1], %rd2;",
    "warps": "st.global.u64 [%at_a], %i;\nbar.warp.sync -1;\nxor.b64 %rd1, %i, 32;\nmad.lo.s64 %rd1, %rd1, 8, %a;\n"
    "ld.global.u64 %rd2, [%rd1];",
}
RACE = ("write", "read", "halves", "mixed", "blocks", "lanes", "warps")
HARMLESS = ("same", "peek")  # races, but of no consequence


@pytest.fixture(scope="module")
def races(machine):
    return machine(module(**RACES))


@pytest.mark.parametrize("name", RACES)
def test_races_are_found_and_nothing_else(races, name):
    for seed in range(12):
        for race_check in (1, 2):
            a, b = int64s(128), int64s(128)
            error, report = races[name](a, b, 0, 0, grid=2, block=64, seed=seed, race_check=race_check)
            if name in RACE or (name in HARMLESS and race_check == 2):
                assert error == LAUNCH_FAILED and report.startswith(f"{name}, line ") and ": race: " in report
                assert "before, line" in report and "no barrier lies between" in report
            else:
                assert (error, report) == (0, "")
        assert races[name](a, b, 0, 0, grid=2, block=64, seed=seed, race_check=0) == (0, "")
