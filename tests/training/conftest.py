"""The small network that the training tests share, and a way to run it in a process of its own."""

import importlib.util
import os
import socket
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
def start_small(tmp_path_factory):
    """Starts small_run.py with arguments; returns the process, its output as text."""
    cache = tmp_path_factory.mktemp("compiled")

    def start(*arguments, devices=1, script=_SCRIPT):
        environment = os.environ | {
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
            + f" --xla_force_host_platform_device_count={devices}",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(_SCRIPT.parents[2]),
        }
        environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
        environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
        command = [sys.executable, str(script), *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=environment, text=True, **pipes)

    return start


def finish(process, timeout=1500):
    """Waits for a process; returns it as `subprocess.run` would."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="session")
def run_small(start_small):
    """Runs small_run.py with arguments; returns the finished process, its output as text."""
    return lambda *arguments, **options: finish(start_small(*arguments, **options))


@pytest.fixture(scope="session")
def start_pair(start_small):
    """Starts small_run.py as two processes of one run; returns both."""

    def start(*arguments, devices):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        together = ["--coordinator", address, "--num-processes", 2, "--process-id"]
        return [start_small(*arguments, *together, i, devices=devices) for i in (0, 1)]

    return start


@pytest.fixture(scope="session")
def run_pair(start_pair):
    """Runs small_run.py as two processes of one run; returns both, finished."""
    return lambda *arguments, devices: [finish(p) for p in start_pair(*arguments, devices=devices)]
