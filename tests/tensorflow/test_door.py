"""The door: which Keras it takes, and that it brings no other framework."""

import os
import subprocess
import sys

import pytest


def run(code, **env):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **env}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=env, capture_output=True, text=True, check=False
    )


def test_door_gives_the_public_names_and_no_other_framework():
    code = (
        "import sys, hbkit.tensorflow as hb\n"
        "found = [n for n in sorted(hb.__all__) if hasattr(hb, n)]\n"
        "print(found, callable(hb.pipeline), 'torch' in sys.modules)"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    names = "['data', 'distributed', 'metrics', 'models', 'nn', 'pipeline', 'training']"
    assert done.stdout.strip() == f"{names} True False"


@pytest.mark.parametrize("backend", ["torch", "jax", "no_such"])
def test_door_refuses_another_keras_backend_before_it_loads(backend):
    code = (
        "import sys\nfrom hbkit import errors\n"
        "try:\n    import hbkit.tensorflow\n"
        "except errors.Unsupported as e:\n    print(e)\n"
        "print('torch' in sys.modules)"
    )
    done = run(code, KERAS_BACKEND=backend)
    assert done.returncode == 0, done.stderr
    message, torch = done.stdout.splitlines()
    assert repr(backend) in message and "KERAS_BACKEND=tensorflow" in message and torch == "False"
