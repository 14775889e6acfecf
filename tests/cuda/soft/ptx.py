"""PTX to C, and to a shared object of kernels that run on the machine of ``machine.h``.

What Numba makes of our kernels, and a little more: no function calls, no local or constant memory, no arithmetic whose
rounding is left to the assembler. What it does not know is an `Untranslated`, by line.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import re
import subprocess
from functools import partialmethod
from typing import NamedTuple

HERE = pathlib.Path(__file__).parent
BUILT = HERE.parents[2] / "build" / "soft"
FLAGS = [
    "-O1",
    "-std=gnu11",
    "-shared",
    "-fPIC",
    "-w",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fwrapv",
    "-fno-strict-aliasing",
    "-fno-stack-protector",
    "-U_FORTIFY_SOURCE",
]

C_TYPES = {f"{kind}{bits}": f"{'u' * (kind != 's')}int{bits}_t" for kind in "bus" for bits in (8, 16, 32, 64)}
C_TYPES |= {"f32": "float", "f64": "double", "pred": "int"}
SPECIAL = {f"%tid.{axis}": f"t->tid[{i}]" for i, axis in enumerate("xyz")}
SPECIAL |= {f"%ctaid.{axis}": f"t->block->index[{i}]" for i, axis in enumerate("xyz")}
SPECIAL |= {f"%ntid.{axis}": f"t->m->launch->block[{i}]" for i, axis in enumerate("xyz")}
SPECIAL |= {f"%nctaid.{axis}": f"t->m->launch->grid[{i}]" for i, axis in enumerate("xyz")}
SPECIAL |= {"%laneid": "t->lane"}
COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">"}
COMPARE |= {"hs": ">="}
INFIX = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^", "div": "/"}
ROUND = {"rni": "rint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}
LABEL = re.compile(r"(\$?[A-Za-z_][\w$]*):")


class Untranslated(Exception):
    """PTX that this translator does not know, by line."""


class Variable(NamedTuple):
    """A variable of the module or of shared memory."""

    space: str
    align: int
    nbytes: int


def bits_of(kind: str) -> int:
    """Width of a type in bits."""
    return int(kind[1:])


def is_float(kind: str) -> bool:
    """Whether a type is of floats."""
    return kind in ("f32", "f64")


def c_name(register: str) -> str:
    """The variable of C for a register."""
    return "r_" + register[1:]


def split(text: str) -> list[str]:
    """Operands, which commas separate where they are not in braces or brackets."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)]


class Kernel:
    """One kernel, instruction by instruction.

    Parameters
    ----------
    name : str
    parameters : list of (str, int)
        Names and sizes in bytes.
    variables : dict of str to Variable
        Those of the module.
    """

    def __init__(self, name: str, parameters: list[tuple[str, int]], variables: dict[str, Variable]) -> None:
        self.name, self.parameters, self.variables = name, parameters, variables
        self.of_parameter = {parameter: i for i, (parameter, _) in enumerate(parameters)}
        self.kinds: dict[str, str] = {}  # of registers: by prefix, as `%rd`, or by name
        self.used: dict[str, str] = {}
        self.lines: list[str] = []
        self.places: list[tuple[int, str]] = []
        self.line = 0

    def wrong(self, text: str, why: str) -> Untranslated:
        return Untranslated(f"{plain(self.name)}, line {self.line} `{text[:100]}`: {why}")

    # ---- operands ----

    def kind_of(self, register: str) -> str:
        """The type a register is declared with."""
        kind = self.kinds.get(register) or self.kinds.get(register.rstrip("0123456789"))
        if kind is None:
            raise self.wrong(register, "not declared")
        self.used[register] = kind
        return kind

    def value(self, text: str, kind: str) -> str:
        """C of an operand as a value of a type."""
        to = C_TYPES[kind]
        if text.startswith("!"):
            return f"!{self.value(text[1:], kind)}"
        if text in SPECIAL:
            return f"({to}){SPECIAL[text]}"
        if text.startswith("%"):
            declared, c = self.kind_of(text), c_name(text)
            if declared == kind:
                return c
            if is_float(declared) and not is_float(kind):
                c = f"u{declared[1:]}_of({c})"
            elif is_float(kind):
                return f"{kind}_of({c})"
            return c if kind == "pred" else f"({to}){c}"
        if found := re.fullmatch(r"0f([0-9A-Fa-f]{8})|0d([0-9A-Fa-f]{16})", text):
            of = f"f32_of(0x{found[1]}u)" if found[1] else f"f64_of(0x{found[2]}u)"
            return of if is_float(kind) else f"u{kind[1:]}_of({of})"
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", text):
            number = int(text.rstrip("U"), 0) & 0xFFFF_FFFF_FFFF_FFFF
            return f"{kind}_of({number}u)" if is_float(kind) else f"({to}){number}u"
        if text in self.variables:
            return self.address(text)
        raise self.wrong(text, "no such operand")

    def address(self, name: str) -> str:
        """C of the address of a variable: shared ones lie from 0 on."""
        variable = self.variables[name]
        if variable.space == "global":
            return f"(uint64_t)v_{name}"
        at = 0
        for other, (space, align, nbytes) in self.variables.items():
            if space != "shared":
                continue
            at = -(-at // align) * align
            if other == name:
                break
            at += nbytes
        return f"(uint64_t){at}u"

    def place(self, text: str) -> str:
        """C of an address in brackets."""
        found = re.fullmatch(r"\[\s*([%$\w.]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        if not found:
            raise self.wrong(text, "no such address")
        return f"{self.value(found[1], 'b64')} + {found[2]}ll" if found[2] else self.value(found[1], "b64")

    def put(self, register: str, c: str, kind: str) -> None:
        """Assign a value of a type to a register, which may be wider."""
        if register == "_":
            return
        declared = self.kind_of(register)
        if declared != kind and is_float(declared):
            c = f"{declared}_of({c})"
        elif is_float(kind) and not is_float(declared):
            c = f"u{kind[1:]}_of({c})"
        elif kind != "pred":
            c = f"({C_TYPES[kind]})({c})"
        self.lines.append(f"{c_name(register)} = {c};")

    # ---- instructions ----

    def instruction(self, text: str, line: int) -> None:
        """Translate one instruction."""
        self.line = line
        guard = re.match(r"@(!?)(%\w+)\s+", text)
        bare = text[guard.end() :] if guard else text
        op, _, rest = re.sub(r"\s+", " ", bare).partition(" ")
        name, *suffixes = op.split(".")
        method = getattr(self, f"do_{name}", None)
        if method is None:
            raise self.wrong(text, "no such instruction")
        if guard:
            self.kind_of(guard[2])
            self.lines.append(f"if ({guard[1]}{c_name(guard[2])}) {{")
        try:
            if method(*suffixes, args=split(rest)) is NotImplemented:
                raise self.wrong(text, "no such instruction")
        except (TypeError, KeyError, IndexError, ValueError) as e:
            raise self.wrong(text, f"no such instruction ({e})") from e
        if guard:
            self.lines.append("}")
        if name in ("ld", "st", "atom", "red", "bar", "shfl", "vote", "match") and suffixes[0] != "param":
            self.places.append((line, re.sub(r"\s+", " ", text)))

    def infix(self, name, *suffixes, args):
        *rounding, kind = suffixes
        if is_float(kind) != (rounding == ["rn"]) or (is_float(kind) and name in ("and", "or", "xor")):
            return NotImplemented
        c = f"{self.value(args[1], kind)} {INFIX[name]} {self.value(args[2], kind)}"
        if kind == "pred" and name not in ("and", "or", "xor"):
            return NotImplemented
        self.put(args[0], f"num{kind[1:]}({c})" if is_float(kind) else c, kind)

    do_add, do_sub = partialmethod(infix, "add"), partialmethod(infix, "sub")
    do_and, do_or, do_xor = partialmethod(infix, "and"), partialmethod(infix, "or"), partialmethod(infix, "xor")

    def do_mul(self, mode, kind, *, args):
        if is_float(kind):
            return self.infix("mul", mode, kind, args=args)
        a, b = self.value(args[1], kind), self.value(args[2], kind)
        self.product(args[0], mode, kind, a, b, "")

    def do_mad(self, mode, kind, *, args):
        if is_float(kind):
            return NotImplemented
        wide = f"{kind[0]}{2 * bits_of(kind)}" if mode == "wide" else kind
        a, b, c = self.value(args[1], kind), self.value(args[2], kind), self.value(args[3], wide)
        self.product(args[0], mode, kind, a, b, f" + {c}")

    def product(self, to, mode, kind, a, b, plus):
        """The low or high half of a product, or all of it, plus something."""
        wide = f"{kind[0]}{2 * bits_of(kind)}"
        if mode == "lo":  # 16-bit operands become int, in which unsigned ones could overflow
            self.put(to, f"(uint64_t){a} * (uint64_t){b}{plus}", kind)
        elif mode == "wide":
            self.put(to, f"({C_TYPES[wide]}){a} * ({C_TYPES[wide]}){b}{plus}", wide)
        elif mode == "hi":
            big = "__int128" if kind == "s64" else "unsigned __int128"
            big = big if bits_of(kind) == 64 else C_TYPES[wide]
            self.put(to, f"({C_TYPES[kind]})((({big}){a} * ({big}){b}) >> {bits_of(kind)}){plus}", kind)
        else:
            raise KeyError(mode)

    def do_fma(self, rounding, kind, *, args):
        if rounding != "rn" or not is_float(kind):
            return NotImplemented
        a, b, c = (self.value(arg, kind) for arg in args[1:])
        self.put(args[0], f"num{kind[1:]}(__builtin_fma{'f' * (kind == 'f32')}({a}, {b}, {c}))", kind)

    def quotient(self, name, *suffixes, args):
        kind = suffixes[-1]
        if is_float(kind):
            return self.infix(name, *suffixes, args=args) if name == "div" else NotImplemented
        wide = kind if bits_of(kind) >= 32 else f"{kind[0]}32"
        self.put(args[0], f"{name}_{wide}({self.value(args[1], kind)}, {self.value(args[2], kind)})", kind)

    do_div, do_rem = partialmethod(quotient, "div"), partialmethod(quotient, "rem")

    def do_sqrt(self, rounding, kind, *, args):
        if rounding != "rn":
            return NotImplemented
        c = f"__builtin_sqrt{'f' * (kind == 'f32')}({self.value(args[1], kind)})"
        self.put(args[0], f"num{kind[1:]}({c})", kind)

    def do_neg(self, kind, *, args):
        a = self.value(args[1], kind)
        self.put(args[0], f"num{kind[1:]}(-{a})" if is_float(kind) else f"0 - (uint64_t){a}", kind)

    def do_abs(self, kind, *, args):
        a = self.value(args[1], kind)
        if is_float(kind):
            self.put(args[0], f"num{kind[1:]}(__builtin_fabs{'f' * (kind == 'f32')}({a}))", kind)
        else:
            self.put(args[0], f"{a} < 0 ? 0 - (uint64_t){a} : {a}", kind)

    def do_not(self, kind, *, args):
        self.put(args[0], f"{'!' if kind == 'pred' else '~'}{self.value(args[1], kind)}", kind)

    def extreme(self, name, kind, *, args):
        a, b = self.value(args[1], kind), self.value(args[2], kind)
        c = f"{name}_{kind}({a}, {b})" if is_float(kind) else f"{a} {'<' if name == 'min' else '>'} {b} ? {a} : {b}"
        self.put(args[0], c, kind)

    do_min, do_max = partialmethod(extreme, "min"), partialmethod(extreme, "max")

    def do_shl(self, kind, *, args):
        self.put(args[0], f"{self.shifted('<<', kind, args)} : 0", kind)

    def do_shr(self, kind, *, args):
        over = f"{self.value(args[1], kind)} < 0 ? -1 : 0" if kind[0] == "s" else "0"
        self.put(args[0], f"{self.shifted('>>', kind, args)} : {over}", kind)

    def shifted(self, way, kind, args):
        by = self.value(args[2], "u32")
        return f"{by} < {bits_of(kind)} ? {self.value(args[1], kind)} {way} {by}"

    def do_shf(self, side, mode, kind, *, args):
        low, high, by = self.value(args[1], "u64"), self.value(args[2], "u64"), self.value(args[3], "u32")
        by = f"({by} & 31)" if mode == "wrap" else f"({by} < 32 ? {by} : 32)"
        both = f"({high} << 32 | (uint32_t){low})"
        self.put(args[0], f"{both} << {by} >> 32" if side == "l" else f"{both} >> {by}", kind)

    def do_prmt(self, kind, *, args):
        self.put(args[0], f"permuted({', '.join(self.value(arg, kind) for arg in args[1:])})", kind)

    def do_bfi(self, kind, *, args):
        a, b = self.value(args[1], kind), self.value(args[2], kind)
        at, n = self.value(args[3], "u32"), self.value(args[4], "u32")
        self.put(args[0], f"insert({a}, {b}, {at}, {n}, {bits_of(kind)})", kind)

    def do_bfind(self, *suffixes, args):
        kind, above = suffixes[-1], suffixes[:-1] == ("shiftamt",)
        if len(suffixes) > 1 + above:
            return NotImplemented
        a = self.value(args[1], kind)
        if kind[0] == "s":
            a = f"({a} < 0 ? ~{a} : {a})"
        self.put(args[0], f"found((u{C_TYPES[kind].lstrip('u')}){a}, {bits_of(kind)}, {int(above)})", "u32")

    def do_brev(self, kind, *, args):
        self.put(args[0], f"brev{bits_of(kind)}({self.value(args[1], kind)})", kind)

    def do_clz(self, kind, *, args):
        self.put(args[0], f"clz{bits_of(kind)}({self.value(args[1], kind)})", "u32")

    def do_popc(self, kind, *, args):
        self.put(args[0], f"__builtin_popcountll({self.value(args[1], kind)})", "u32")

    def do_selp(self, kind, *, args):
        a, b, p = self.value(args[1], kind), self.value(args[2], kind), self.value(args[3], "pred")
        self.put(args[0], f"{p} ? {a} : {b}", kind)

    def do_setp(self, how, *suffixes, args):
        kind = suffixes[-1]
        a, b = self.value(args[1], kind), self.value(args[2], kind)
        if is_float(kind) and how in ("num", "nan"):
            c = f"{'!' * (how == 'nan')}({a} == {a} && {b} == {b})"
        elif is_float(kind) and how.endswith("u"):
            c = f"({a} {COMPARE[how[:-1]]} {b} || {a} != {a} || {b} != {b})"
        elif is_float(kind) and how == "ne":  # without u: false where there is a NaN
            c = f"({a} != {b} && {a} == {a} && {b} == {b})"
        else:
            c = f"({a} {COMPARE[how]} {b})"
        to, _, opposite = args[0].partition("|")
        also = f" {INFIX[suffixes[0]]} {self.value(args[3], 'pred')}" if len(suffixes) == 2 else ""
        for register, sign in ((to, ""), (opposite, "!")):
            if register:
                self.put(register.strip(), f"({sign}{c}{also})", "pred")

    def do_cvt(self, *suffixes, args):
        *rounding, to, of = suffixes
        a = self.value(args[1], of)
        how = rounding[0] if len(rounding) == 1 else None
        if len(rounding) > 1:
            return NotImplemented
        if not is_float(to) and not is_float(of):
            c = None if rounding else a
        elif not is_float(of):
            c = f"({C_TYPES[to]}){a}" if how == "rn" else None
        elif not is_float(to):
            name = "to_signed" if to[0] == "s" else "to_unsigned"
            c = f"{name}(__builtin_{ROUND[how]}({a}), {bits_of(to)}, {int(of == 'f64')})"
        elif to == of:
            c = f"num{to[1:]}(__builtin_{ROUND[how]}{'f' * (to == 'f32')}({a}))"
        else:
            c = f"num{to[1:]}(({C_TYPES[to]}){a})" if how == ("rn" if to == "f32" else None) else None
        if c is None:
            return NotImplemented
        self.put(args[0], c, to)

    def do_cvta(self, *suffixes, args):
        if suffixes not in (("to", "global", "u64"), ("global", "u64")):
            return NotImplemented
        self.put(args[0], self.value(args[1], "u64"), "u64")

    def do_mov(self, kind, *, args):
        to, of = args
        if "{" in to or "{" in of:  # a word and its parts, the lowest first
            parts = split((to if "{" in to else of).strip("{}"))
            width = bits_of(kind) // len(parts)
            if "{" in to:
                self.lines.append(f"{{ uint64_t x = {self.value(of, kind)};")
                for i, part in enumerate(parts):
                    self.put(part, f"x >> {i * width}", f"b{width}")
                self.lines.append("}")
            else:
                words = [f"(uint64_t){self.value(p, f'b{width}')} << {i * width}" for i, p in enumerate(parts)]
                self.put(to, " | ".join(words), kind)
        else:
            self.put(to, self.value(of, kind), kind)

    def do_bra(self, *suffixes, args):
        self.lines.append(f"goto {self.label(args[0])};")

    def label(self, name: str) -> str:
        return "L" + name.replace("$", "_")

    def do_ret(self, *, args):
        self.lines.append("return;")

    do_exit = do_ret

    def do_pragma(self, *_, args):
        pass

    def do_nanosleep(self, kind, *, args):
        self.lines.append("give_way(t);")

    # ---- memory and other threads ----

    def touch(self, space, place, nbytes, how, value="0"):
        """C of a pointer to memory that may be touched so."""
        if space not in ("global", "shared"):
            raise KeyError(space)
        return f"{space}(t, {self.place(place)}, {nbytes}, {how}, {value}, {self.line})"

    def do_ld(self, *suffixes, args):
        *flags, kind = suffixes
        if flags == ["param"]:
            name, _, offset = args[1].strip("[] ").partition("+")
            i = self.of_parameter[name]
            self.put(args[0], f"*({C_TYPES[kind]} *)((char *)params[{i}] + {int(offset or 0)})", kind)
            return None
        how, space, n = self.access(flags)
        pointer = self.touch(space, args[1], n * bits_of(kind) // 8, "ATOMIC_READ" if how else "READ")
        self.lines.append(f"{{ {C_TYPES[kind]} *q = {pointer};")
        for i, register in enumerate(split(args[0].strip("{}"))):
            self.put(register, f"q[{i}]", kind)
        self.lines.append("}")

    def do_st(self, *suffixes, args):
        *flags, kind = suffixes
        how, space, n = self.access(flags)
        values = ", ".join(self.value(register, kind) for register in split(args[1].strip("{}")))
        touch = self.touch(space, args[0], n * bits_of(kind) // 8, "ATOMIC" if how else "WRITE", "q")
        self.lines.append(f"{{ {C_TYPES[kind]} q[] = {{{values}}}; {touch}; }}")

    def access(self, flags):
        """Whether loads and stores with such flags are strong, their space, and how many values they move."""
        flags = list(flags)
        strong = "volatile" in flags or "relaxed" in flags
        for flag in (
            "volatile",
            "relaxed",
            "gpu",
            "sys",
            "cta",
            "weak",
            "nc",
            "ca",
            "cg",
            "cs",
            "lu",
            "cv",
            "wb",
            "wt",
        ):
            if flag in flags:
                flags.remove(flag)
        n = int(flags.pop()[1:]) if flags and flags[-1] in ("v2", "v4") else 1
        (space,) = flags or ["global"]  # nothing has a generic address but global memory
        return strong, space, n

    def do_atom(self, *suffixes, args):
        *flags, operation, kind = suffixes
        for flag in ("relaxed", "gpu", "sys", "cta"):
            if flag in flags:
                flags.remove(flag)
        (space,) = flags or ["global"]
        a = self.value(args[2], kind)
        new = {
            "add": f"old + {a}",
            "exch": a,
            "and": f"old & {a}",
            "or": f"old | {a}",
            "xor": f"old ^ {a}",
            "min": f"old < {a} ? old : {a}",
            "max": f"old > {a} ? old : {a}",
            "inc": f"old >= {a} ? 0 : old + 1",
            "dec": f"old == 0 || old > {a} ? {a} : old - 1",
        }
        if operation == "cas":
            new["cas"] = f"old == {a} ? {self.value(args[3], kind)} : old"
        if is_float(kind) and operation not in ("add", "exch"):
            return NotImplemented
        c = f"num{kind[1:]}({new[operation]})" if is_float(kind) and operation == "add" else new[operation]
        self.lines.append(
            f"{{ {C_TYPES[kind]} *q = {self.touch(space, args[1], bits_of(kind) // 8, 'ATOMIC')}, old = *q;"
        )
        self.lines.append(f"*q = {c};")
        self.put(args[0], "old", kind)
        self.lines.append("}")

    def do_red(self, *suffixes, args):
        return self.do_atom(*suffixes, args=["_", *args])

    def do_bar(self, *suffixes, args):
        if suffixes == ("sync",) and args == ["0"]:
            self.lines.append(f"bar_sync(t, {self.line});")
        elif suffixes == ("warp", "sync"):
            self.lines.append(f"together(t, SYNC, {self.value(args[0], 'b32')}, 0, 0, 0, {self.line});")
        else:
            return NotImplemented

    def do_shfl(self, sync, mode, kind, *, args):
        to, _, passes = args[0].partition("|")
        a, b, c, mask = self.value(args[1], kind), *(self.value(arg, "b32") for arg in args[2:])
        way = {"idx": "SHFL_IDX", "up": "SHFL_UP", "down": "SHFL_DOWN", "bfly": "SHFL_BFLY"}[mode]
        self.put(to, f"together(t, {way}, {mask}, {a}, {b}, {c}, {self.line})", kind)
        if passes:
            self.put(passes, "t->passes", "pred")

    def do_vote(self, sync, mode, kind, *, args):
        way = {"ballot": "BALLOT", "any": "ANY", "all": "ALL", "uni": "UNI"}[mode]
        vote, mask = self.value(args[1], "pred"), self.value(args[2], "b32")
        self.put(args[0], f"together(t, {way}, {mask}, {vote}, 0, 0, {self.line})", kind)

    def do_match(self, any_, sync, kind, *, args):
        if any_ != "any":
            return NotImplemented
        a, mask = self.value(args[1], kind), self.value(args[2], "b32")
        self.put(args[0], f"together(t, MATCH_{kind.upper()}, {mask}, {a}, 0, 0, {self.line})", "b32")

    # ---- all of it ----

    def declare(self, text: str) -> None:
        """Note what ``.reg`` declares."""
        kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text).groups()
        for name in split(names):
            self.kinds[name.partition("<")[0]] = kind

    def code(self, i: int) -> str:
        """C of this kernel, the i-th of its module."""
        by_type: dict[str, list[str]] = {}
        for register, kind in self.used.items():
            by_type.setdefault(C_TYPES[kind], []).append(c_name(register))
        registers = "".join(f"{of} {', '.join(names)};\n" for of, names in by_type.items())
        places = "".join(f"{{{line}, {quoted(text)}}}, " for line, text in self.places)
        nbytes = ", ".join(str(n) for _, n in self.parameters) or "0"
        return (
            f"static void body{i}(struct thread *t) {{\nvoid *const *params = t->m->launch->params;\n{registers}"
            + "\n".join(self.lines)
            + "\n}\n"
            f"static const uint32_t nbytes{i}[] = {{{nbytes}}};\n"
            f"static const struct place places{i}[] = {{{places}{{0}}}};\n"
            f"static const struct code code{i} = {{{quoted(plain(self.name))}, body{i}, SHARED, places{i}, own}};\n"
            f"static int run{i}(struct launch *l) {{ return run(l, &code{i}); }}\n"
        )


def plain(name: str) -> str:
    """The name of a function in Python: `hbkit.cuda.dedupe.claim` of ``_ZN5hbkit4cuda6dedupe5claimB2v1...``."""
    parts, rest = [], name.removeprefix("_ZN")
    while rest != name and (found := re.match(r"[1-9]\d*", rest)):
        end = found.end() + int(found[0])
        parts.append(rest[found.end() : end])
        rest = rest[end:]
    return ".".join(parts) or name


def quoted(text: str) -> str:
    """A string of C."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def statements(text: str):
    """Statements, labels and braces of PTX, each with its line."""
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"/\*.*?\*/", lambda found: re.sub(r"[^\n]", " ", found[0]), text, flags=re.DOTALL)
    header = re.compile(r"(?:\.visible\s+|\.weak\s+)*\.(?:entry|func)\b[^{;]*")
    head = re.compile(r"\.(?:version|target|address_size|file|loc)\b[^\n]*")
    vector = re.compile(r"(?:[^;{}]|\{[^{};]*\})*;")
    at, line = 0, 1
    while at < len(text):
        if text[at].isspace():
            line += text[at] == "\n"
            at += 1
            continue
        for pattern in (head, header, LABEL, re.compile(r"[{}]"), vector):
            if found := pattern.match(text, at):
                break
        else:
            raise Untranslated(f"line {line}: {text[at : at + 60]!r}")
        yield line, found[0].strip().rstrip(";").strip()
        line += found[0].count("\n")
        at = found.end()


def translate(ptx: str) -> str:
    """C of a module of kernels, which includes ``machine.h``.

    Raises
    ------
    Untranslated
        By line, what it does not know.
    """
    variables: dict[str, Variable] = {}
    kernels: list[Kernel] = []
    depth = 0
    for line, text in statements(ptx):
        if text == "{":
            depth += 1
        elif text == "}":
            depth -= 1
        elif found := re.search(r"\.entry\s+([\w$]+)\s*(?:\((.*)\))?", text, flags=re.DOTALL):
            of = re.findall(
                r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+|\d+\s+)*)?([\w$]+)(?:\[(\d+)\])?",
                found[2] or "",
            )
            parameters = [(name, bits_of(kind) // 8 * int(n or 1)) for kind, name, n in of]
            kernels.append(Kernel(found[1], parameters, variables))
        elif found := re.fullmatch(
            r"(?:\.visible\s+|\.common\s+|\.weak\s+)*\.(shared|global)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?",
            text,
        ):
            space, align, kind, name, n = found.groups()
            size = bits_of(kind) // 8
            variables[name] = Variable(space, int(align or size), size * int(n or 1))
        elif text.startswith(".reg"):
            kernels[-1].declare(text)
        elif found := LABEL.fullmatch(text):
            kernels[-1].lines.append(f"{kernels[-1].label(found[1])}:;")
        elif text.startswith((".version", ".target", ".address_size", ".file", ".loc", ".pragma", ".max", ".min")):
            pass
        elif text.startswith(".") or not kernels:
            raise Untranslated(f"line {line}: {text[:100]!r}")
        else:
            kernels[-1].instruction(text, line)
    shared = 0
    for space, align, nbytes in variables.values():
        if space == "shared":
            shared = -(-shared // align) * align + nbytes
    own = [(f"v_{name}", v) for name, v in variables.items() if v.space == "global"]
    inside = " || ".join(f"(at >= (uint64_t){c} && at - (uint64_t){c} + n <= {v.nbytes})" for c, v in own) or "0"
    table = ", ".join(f"{{{quoted(k.name)}, {len(k.parameters)}, nbytes{i}, run{i}}}" for i, k in enumerate(kernels))
    return (
        '#include "machine.h"\n'
        + "".join(f"static _Alignas({v.align}) char {c}[{v.nbytes}];\n" for c, v in own)
        + f"enum {{ SHARED = {shared} }};\n"
        f"static int own(uint64_t at, uint64_t n) {{ return {inside}; }}\n"
        + "".join(kernel.code(i) for i, kernel in enumerate(kernels))
        + f"const struct kernel soft_kernels[] = {{{table}}};\n"
        f"const int soft_n_kernels = {len(kernels)};\n"
    )


def shared_object(ptx: str) -> str:
    """Path of a shared object of a module's kernels: ``soft_kernels`` of ``machine.h``; built once."""
    code = translate(ptx)
    machine = (HERE / "machine.h").read_bytes()
    name = hashlib.sha256("\n".join([code, *FLAGS]).encode() + machine).hexdigest()[:32]
    path = BUILT / f"{name}.so"
    if not path.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        made = BUILT / f"{name}.{os.getpid()}"
        source = made.with_suffix(".c")
        source.write_text(code)
        command = [os.environ.get("CC", "cc"), *FLAGS, f"-I{HERE}", str(source), "-o", str(made), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise Untranslated(f"{' '.join(command)}:\n{done.stderr[:2000]}")
        source.unlink()
        os.replace(made, path)
    return str(path)
