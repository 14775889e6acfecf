"""The two adapters are twins: same files, same public names."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

BACKENDS = Path(__file__).parents[2] / "backends"
TWINS = {"hbkit_torch": "torch", "hbkit_tensorflow": "tensorflow"}
FILES = sorted({str(p.relative_to(BACKENDS / twin)) for twin in TWINS for p in (BACKENDS / twin).rglob("*.py")})


def declared(path: Path) -> list[str] | None:
    """`__all__` as the source has it, sorted; None where it has none."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == ["__all__"]:
            return sorted(ast.literal_eval(node.value))
    return None


def test_adapters_have_the_same_files():
    for twin in TWINS:
        assert [name for name in FILES if not (BACKENDS / twin / name).exists()] == []


@pytest.mark.parametrize("name", FILES)
def test_adapters_declare_the_same_public_names(name):
    ours, theirs = (declared(BACKENDS / twin / name) for twin in TWINS)
    assert ours is not None and ours == theirs


def module(name: str) -> str:
    """The module of a file, as its package sees it: "" is the package itself."""
    return ".".join(Path(name).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def imported(package: str, cwd: Path) -> dict[str, list[str]]:
    """Public names that exist when the adapter is imported, for it and each of its modules."""
    modules = [f"{package}.{module(name)}" for name in FILES if module(name)]
    code = (
        "import importlib, json\n"
        f"found = {{m: importlib.import_module(m) for m in {[package, *modules]!r}}}\n"
        "names = {m.partition('.')[2]: sorted(n for n in x.__all__ if hasattr(x, n)) for m, x in found.items()}\n"
        "print(json.dumps(names))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_adapters_have_the_same_names_when_imported(tmp_path):
    for framework in TWINS.values():
        if importlib.util.find_spec(framework) is None:
            pytest.skip(f"{framework} is not installed")
    ours, theirs = (imported(twin, tmp_path) for twin in TWINS)
    assert ours == theirs
    for name in FILES:
        assert ours[module(name)] == declared(BACKENDS / "hbkit_torch" / name)
