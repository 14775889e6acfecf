"""Fixtures and settings that all rooms' tests share."""

import os
import pathlib

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "hbkit", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("hbkit")

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED = pathlib.Path(os.environ.get("HBKIT_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def shared():
    """``shared("data/ml-1m")``: a path of real data, or a skip that names what is absent."""

    def find(name: str) -> pathlib.Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"real data absent: {name} is not beside this checkout (set HBKIT_SHARED)")
        return path

    return find
