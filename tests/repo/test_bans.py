"""No code in data: the product holds nothing that can run what it reads (Promise 6)."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = sorted(p for room in ("hbkit", "backends") for p in (ROOT / room).rglob("*.py"))
CYTHON = sorted(p for p in (ROOT / "hbkit").rglob("*.p[yx][xdi]"))

MODULES = ("pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle")
NAMES = {f"builtins.{name}" for name in ("eval", "exec", "compile")} | {
    "numpy.load",
    "torch.load",
    "torch.save",
    "yaml.load",
}
IMPORTERS = {"__import__", "importlib.import_module", "builtins.__import__"}


def violations(source: str) -> list[str]:
    """Banned modules, functions and arguments that a Python source uses, under any alias."""
    found: list[str] = []
    bound: dict[str, str] = {}  # local name -> dotted name it stands for

    def module(name: str) -> None:
        if name.split(".")[0] in MODULES:
            found.append(name)

    def dotted(node: ast.AST) -> str:
        if isinstance(node, ast.Attribute):
            return f"{dotted(node.value)}.{node.attr}"
        if isinstance(node, ast.Name):
            return bound.get(node.id, f"builtins.{node.id}" if f"builtins.{node.id}" in NAMES else node.id)
        return "?"

    nodes = list(ast.walk(ast.parse(source)))
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    parameters = {node.arg for node in nodes if isinstance(node, ast.arg)}  # `compile`, a flag, is no use of compile()
    for node in nodes:
        if isinstance(node, ast.Import):
            for a in node.names:
                module(a.name)
                bound[a.asname or a.name.split(".")[0]] = a.name if a.asname else a.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            module(node.module or "")
            for a in node.names:
                bound[a.asname or a.name] = f"{node.module}.{a.name}"
    found += [name for name in bound.values() if name in NAMES]
    for node in nodes:
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load) and dotted(node) in NAMES:
            if id(node) in called or not (isinstance(node, ast.Name) and node.id in parameters):
                found.append(dotted(node))
        elif isinstance(node, ast.Call):
            for keyword in node.keywords:
                is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg == "allow_pickle" and not is_false:
                    found.append("allow_pickle")
            if dotted(node.func) in IMPORTERS and node.args and isinstance(node.args[0], ast.Constant):
                module(str(node.args[0].value))
    return found


_MODULES = "|".join(MODULES)
_TEXT = re.compile(
    rf"^\s*(?:from|import|cimport)\s+(?:{_MODULES})\b"
    r"|(?<![.\w])(?:eval|exec|compile)\s*\("
    r"|allow_pickle|auto_pickle"
    r"|\b(?:np|numpy|torch|yaml)\.load\b|\btorch\.save\b",
    re.MULTILINE,
)


def text_violations(source: str) -> list[str]:
    """The same for Cython, which `ast` does not read: by its text."""
    return _TEXT.findall(source)


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: str(p.relative_to(ROOT)))
def test_product_python_uses_nothing_banned(path):
    assert violations(path.read_text()) == []


@pytest.mark.parametrize("path", CYTHON, ids=lambda p: str(p.relative_to(ROOT)))
def test_product_cython_uses_nothing_banned(path):
    assert text_violations(path.read_text()) == []


def test_product_files_are_found():
    assert PYTHON and CYTHON


BAD = [
    *(f"import {module}" for module in MODULES),
    *(f"from {module} import loads" for module in MODULES),
    "import os, pickle as p",
    "def f():\n    import joblib.numpy_pickle",
    "import importlib\nimportlib.import_module('pickle')",
    "from importlib import import_module\nimport_module('dill')",
    "__import__('marshal')",
    "eval('1')",
    "exec('1')",
    "compile('1', '', 'eval')",
    "run = eval",
    "def f(compile):\n    return compile('1', '', 'eval')",
    "import builtins\nbuiltins.exec('1')",
    "open_array(f, allow_pickle=True)",
    "open_array(f, allow_pickle=flag)",
    "import numpy as np\nnp.load(f)",
    "import numpy\nnumpy.load(f)",
    "from numpy import load",
    "import yaml\nyaml.load(f)",
    "from yaml import load as read",
    "import torch\ntorch.load(f)",
    "import torch as t\nt.save(x, f)",
    "def f():\n    from torch import save",
]
GOOD = [
    "import re\nre.compile('x')",
    "import torch\ntorch.compile(model)",
    "model.compile(loss=None)",
    "model.eval()",
    "def f(model, compile=False):\n    return model.build(jit=compile)",
    "open_array(f, allow_pickle=False)",
    "import json\njson.load(f)",
    "snapshot.load(path, tables)",
    "from hbkit import snapshot\nsnapshot.load(path)",
]


@pytest.mark.parametrize("source", BAD)
def test_violations_catches(source):
    assert violations(source)


@pytest.mark.parametrize("source", GOOD)
def test_violations_lets_pass(source):
    assert violations(source) == []


@pytest.mark.parametrize(
    "source",
    [s for s in BAD if not re.search(r"importlib|__import__|builtins|= eval|as |from (?:numpy|torch|yaml)", s)],
)
def test_text_violations_catches(source):
    assert text_violations(source)


@pytest.mark.parametrize("source", [s for s in GOOD if "allow_pickle" not in s])
def test_text_violations_lets_pass(source):
    assert text_violations(source) == []
