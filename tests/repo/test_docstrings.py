"""Every public function, class and method says what it is."""

import ast
import importlib
import inspect
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ["data", "embedding", "errors", "metrics", "parquet", "ragged", "serving", "shuffle", "snapshot", "store"]
ADAPTERS = sorted((ROOT / "backends").rglob("*.py"))


def undocumented(module: types.ModuleType) -> list[str]:
    """Names in a module's ``__all__``, and public methods of its classes, that have no docstring of their own.

    A method may inherit its docstring; a class may not, and the signature that dataclasses write is none.
    """
    found = []
    for name in module.__all__:
        thing = getattr(module, name)
        doc = thing.__doc__ or ""
        if isinstance(thing, type):
            if not doc or doc.startswith(f"{name}(") or "__doc__" not in vars(thing):
                found.append(name)
            for member, value in vars(thing).items():
                callable_ = isinstance(value, types.FunctionType | property | classmethod | staticmethod)
                if callable_ and not member.startswith("_") and not inspect.getdoc(getattr(thing, member)):
                    found.append(f"{name}.{member}")
        elif isinstance(thing, types.FunctionType) and not doc:
            found.append(name)
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_public_names_of_the_core_have_docstrings(room):
    assert undocumented(importlib.import_module(f"hbkit.{room}")) == []


def test_rooms_are_all_public_modules_of_hbkit():
    import hbkit

    modules = {name for name in hbkit.__all__ if isinstance(getattr(hbkit, name), types.ModuleType)}
    assert modules | {"ragged"} == set(ROOMS)


@pytest.mark.parametrize("path", ADAPTERS, ids=lambda p: str(p.relative_to(ROOT / "backends")))
def test_public_names_of_adapters_have_docstrings(path):
    # By their source, since the two cannot be imported into one process.
    body = ast.parse(path.read_text()).body
    public = {
        name
        for node in body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        for name in ast.literal_eval(node.value)
    }
    definitions = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in public]
    assert [node.name for node in definitions if not ast.get_docstring(node)] == []


def test_undocumented_catches():
    module = types.ModuleType("module")
    source = (
        "__all__ = ['f', 'C', 'D', 'P', 'E']\n"
        "from dataclasses import dataclass\n"
        "def f(): ...\n"
        "def g(): ...\n"
        "class C:\n"
        "    'c'\n"
        "    def m(self): ...\n"
        "    def _n(self): ...\n"
        "class D(C): ...\n"
        "@dataclass\n"
        "class P:\n"
        "    x: int\n"
        "class E:\n"
        "    'e'\n"
        "    def m(self): 'm'\n"
        "    @property\n"
        "    def p(self): ...\n"
    )
    exec(source, module.__dict__)
    assert undocumented(module) == ["f", "C.m", "D", "P", "E.p"]
