"""What a run should know about the machine, and the on-disk cache of compiled programs."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("zzhnet-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def describe_environment() -> dict[str, Any]:
    """Versions and devices, for the record."""
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "devices": [f"{len(devices)} x {devices[0].device_kind}"],
        "processes": jax.process_count(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # used from a clone that was never installed
        return None


def enable_compilation_cache(directory: str | None) -> None:
    """Keeps compiled programs on disk, unless JAX has been told already where to keep them.

    Args:
      directory: made if missing; None leaves the cache off.
    """
    chosen = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if directory is None or chosen is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(Path(directory).expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(value, indent=2) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
