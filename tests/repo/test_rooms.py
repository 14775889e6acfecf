"""The arrows between rooms that import-linter cannot see: in Cython, and below the level of modules."""

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXT = ROOT / "hbkit" / "_ext"
CYTHON = sorted(EXT.glob("*.p[yx][xdi]"))
ADAPTERS = sorted((ROOT / "backends").rglob("*.py"))

_IMPORT = re.compile(r"^[ \t]*(?:from[ \t]+(\S+)[ \t]+c?import\b|c?import[ \t]+([^\n#(]+))", re.MULTILINE)
C_HEADERS = {f"{name}.h" for name in ("errno", "limits", "math", "stddef", "stdint", "stdlib", "string", "sys/mman")}
_EXTERN = re.compile(r"^[ \t]*cdef[ \t]+extern[ \t]+from[ \t]+[\"']([^\"']+)[\"']", re.MULTILINE)


def cython_imports(source: str) -> list[str]:
    """Modules that a Cython source imports or cimports."""
    found = []
    for origin, names in _IMPORT.findall(source):
        found += [origin] if origin else [n.split(" as ")[0].strip() for n in names.split(",")]
    return found


def cython_violations(source: str) -> list[str]:
    """What an extension uses beyond _ext, errors, NumPy, C, Python and Cython."""
    allowed = {"cpython", "cython", "libc", "numpy", *sys.stdlib_module_names}
    bad = []
    for module in cython_imports(source):
        in_house = module.startswith((".", "hbkit._ext")) or module == "hbkit.errors"
        if not in_house and module.split(".")[0] not in allowed:
            bad.append(module)
    headers = {h.strip("<>") for h in _EXTERN.findall(source)}
    return bad + sorted(headers - C_HEADERS - {p.name for p in EXT.glob("*.h")})


@pytest.mark.parametrize("path", CYTHON, ids=lambda p: p.name)
def test_extension_uses_only_what_lies_below(path):
    assert cython_violations(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "from hbkit.ragged import Ragged",
        "    import hbkit.store",
        "cimport hbkit.store.slabs as slabs",
        "from hbkit.store cimport slabs",
        "import os, torch",
        "from tensorflow import Tensor",
        'cdef extern from "../store/slabs.h":',
        'cdef extern from "arrow/api.h" nogil:',
    ],
)
def test_cython_violations_catches(source):
    assert cython_violations(source)


@pytest.mark.parametrize(
    "source",
    [
        "from libc.stdint cimport int64_t",
        "cimport numpy as cnp",
        "from hbkit._ext.isa cimport kernels",
        "from . cimport isa",
        "from hbkit.errors import Corrupt",
        "import os",
        'cdef extern from "kernels.h" nogil:',
        'cdef extern from "<math.h>":',
    ],
)
def test_cython_violations_lets_pass(source):
    assert cython_violations(source) == []


def adapter_violations(source: str) -> list[str]:
    """Dotted names of hbkit in an adapter's source that are not public.

    Public is what the ``__all__`` of a module on the way names, or a submodule without an underscore; the CUDA kernels
    and the command line are not for adapters.
    """
    used: list[str] = []
    bound: dict[str, str] = {}
    nodes = list(ast.walk(ast.parse(source)))
    for node in nodes:
        if isinstance(node, ast.Import):
            for a in node.names:
                if a.name.split(".")[0] == "hbkit":
                    used.append(a.name)
                    bound[a.asname or "hbkit"] = a.name if a.asname else "hbkit"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hbkit":
            for a in node.names:
                used.append(f"{node.module}.{a.name}")
                bound[a.asname or a.name] = f"{node.module}.{a.name}"

    def dotted(node: ast.AST) -> str | None:
        if isinstance(node, ast.Name):
            return bound.get(node.id)
        if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
            return f"{owner}.{node.attr}"
        return None

    used += [name for node in nodes if isinstance(node, ast.Attribute) and (name := dotted(node))]
    return sorted({name for name in used if not _is_public(name)})


def _is_public(name: str) -> bool:
    where = importlib.import_module("hbkit")
    for i, part in enumerate(name.split(".")[1:], start=2):
        if part == "*" or part.startswith("_") or name.startswith(("hbkit.cuda", "hbkit.cli")):
            return False
        try:
            where = importlib.import_module(".".join(name.split(".")[:i]))
        except ModuleNotFoundError:
            return part in getattr(where, "__all__", ())  # beyond it, attributes of a public object
    return True


@pytest.mark.parametrize("path", ADAPTERS, ids=lambda p: str(p.relative_to(ROOT / "backends")))
def test_adapter_uses_only_public_names(path):
    assert adapter_violations(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "from hbkit._ext import hash",
        "import hbkit._ext.hash",
        "import hbkit\nhbkit._ext.hash.hash_ints(keys)",
        "import hbkit as hb\nhb.ragged._check(x)",
        "from hbkit.cuda import launch",
        "import hbkit.cuda",
        "from hbkit.cli import main",
        "from hbkit import *",
        "from hbkit.errors import no_such_name",
        "from hbkit import errors\nerrors.no_such_name",
        "def f():\n    from hbkit import _ext",
    ],
)
def test_adapter_violations_catches(source):
    assert adapter_violations(source)


@pytest.mark.parametrize(
    "source",
    [
        "import hbkit\nhbkit.errors.Corrupt('x')",
        "from hbkit.errors import Corrupt",
        "from hbkit import errors\nraise errors.Corrupt('x')",
        "import torch._dynamo\ntorch._dynamo.reset()",
        "import hbkit\nhbkit.Ragged.concat([])",
    ],
)
def test_adapter_violations_lets_pass(source):
    assert adapter_violations(source) == []
