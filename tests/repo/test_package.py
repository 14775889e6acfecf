"""What is built and installed: every module and kernel, and nothing else; pins that fit the declared ranges."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hbkit

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {"torch", "tensorflow", "tensorflow-cpu", "cuda", "plot", "logs", "s3", "all", "dev"}


def expected() -> set[str]:
    """Files of the packages as they must be installed; an extension's name ends at its first dot."""
    found = set()
    for source in (ROOT, ROOT / "backends"):
        for package in ("hbkit", "hbkit_torch", "hbkit_tensorflow"):
            for path in (source / package).rglob("*"):
                if path.suffix in (".py", ".typed"):
                    found.add(path.relative_to(source).as_posix())
                elif path.suffix == ".pyx":
                    found.add(path.relative_to(source).with_suffix(".so").as_posix())
    return found


def contents(names: list[str]) -> set[str]:
    """Names in a wheel or an installation, without metadata and caches, comparable with `expected`."""
    kept = [n for n in names if n.startswith("hbkit") and ".dist-info/" not in n and "__pycache__" not in n]
    return {re.sub(r"\.[^/]*\.so$", ".so", n) for n in kept}


def test_installed_package_is_complete():
    if Path(hbkit.__file__).is_relative_to(ROOT / "hbkit"):
        pytest.skip("hbkit is imported from the checkout, not installed")
    assert contents([f.as_posix() for f in importlib.metadata.files("hbkit") or []]) == expected()


def test_metadata_names_every_extra():
    assert set(PROJECT["optional-dependencies"]) == EXTRAS
    assert set(importlib.metadata.metadata("hbkit").get_all("Provides-Extra")) == EXTRAS


def test_constraints_pin_every_requirement_within_its_range():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(r.name): r for r in (Requirement(x) for x in lines if x and not x.startswith("#"))}
    needed = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
    for requirement in map(Requirement, needed):
        if requirement.name == "hbkit":
            continue
        assert canonicalize_name(requirement.name) in pins, f"{requirement.name} is not in constraints.txt"
        (pin,) = pins[canonicalize_name(requirement.name)].specifier
        assert pin.operator == "==" and requirement.specifier.contains(pin.version), f"{requirement} excludes {pin}"


@pytest.mark.slow
def test_sdist_builds_a_complete_wheel(tmp_path):
    for tool in ("build", "Cython"):
        pytest.importorskip(tool)
    # From a copy, since building an sdist writes its metadata beside the sources.
    source = tmp_path / "source"
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "out", "tests", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(ROOT, source, ignore=unwanted)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (sdist,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")

    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert contents(names) == expected()
    assert {n.split("/")[0] for n in names} == {
        "hbkit",
        "hbkit_torch",
        "hbkit_tensorflow",
        f"hbkit-{hbkit.__version__}.dist-info",
    }
    with tarfile.open(sdist) as archive:
        members = [m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()]
    assert {"LICENSE", "README.md", "setup.py", "pyproject.toml", "hbkit/_ext/kernels.c"} <= set(members)
    assert [m for m in members if m.startswith(("tests/", "bench/", "docs/")) or m.endswith((".parquet", ".so"))] == []
