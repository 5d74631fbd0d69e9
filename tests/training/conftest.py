"""The small network that the training tests share, and a way to run it in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).with_name("small_run.py")


@pytest.fixture(scope="session")
def small():
    """The module small_run.py: `SmallNetwork`, `build`, `experiment`."""
    spec = importlib.util.spec_from_file_location("small_run", _SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["small_run"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def run_small(tmp_path_factory):
    """Runs small_run.py with arguments; returns the finished process, its output as text."""
    cache = tmp_path_factory.mktemp("compiled")

    def run(*arguments, devices=1, **options):
        environment = os.environ | {
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
            + f" --xla_force_host_platform_device_count={devices}",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(_SCRIPT.parents[2]),
        }
        environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
        environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
        command = [sys.executable, str(_SCRIPT), *map(str, arguments)]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=560, **options
        )

    return run
