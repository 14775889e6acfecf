"""What `import hbkit` brings with it, and what the doors say where a framework is absent."""

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "tensorflow", "keras", "numba", "llvmlite", "pandas", "pyarrow.dataset", "hbkit.cuda")
MAX_MODULES = 300  # Python and NumPy alone are about 170; bench/import_time.py measures the time that this stands for


def run(code: str, cwd) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)


def test_import_brings_no_framework(tmp_path):
    done = run("import hbkit, json, sys; print(json.dumps(sorted(sys.modules)))", tmp_path)
    assert done.returncode == 0, done.stderr
    modules = json.loads(done.stdout)
    assert [m for m in modules if m in HEAVY or m.startswith(tuple(h + "." for h in HEAVY))] == []
    assert len(modules) < MAX_MODULES


def test_import_of_every_core_room_brings_no_framework(tmp_path):
    code = (
        "import hbkit, json, sys\n"
        "import hbkit.data, hbkit.parquet, hbkit.store, hbkit.embedding, hbkit.snapshot, hbkit.metrics, hbkit.ragged\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    brought = set(json.loads(done.stdout))
    assert brought.isdisjoint(set(HEAVY) - {"hbkit.cuda"})
    # Of the CUDA room only what has no Numba in it.
    assert {m for m in brought if m.startswith("hbkit.cuda.")} == {"hbkit.cuda.batch", "hbkit.cuda.parts"}


BLOCKED = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
try:
    import hbkit.{door}
except ImportError as e:
    print(e)
else:
    sys.exit("imported")
"""


@pytest.mark.parametrize(("door", "blocked"), [("torch", {"torch"}), ("tensorflow", {"tensorflow", "keras"})])
def test_door_without_framework_names_the_extra(door, blocked, tmp_path):
    done = run(BLOCKED.format(door=door, blocked=blocked), tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"hbkit[{door}]" in done.stdout
    assert len(done.stdout.splitlines()) == 1
