"""Settings of the whole suite, made before anything imports JAX."""

import os
from pathlib import Path

# Almost all the time of these tests is compilation: half of it is saved by not optimising code that
# runs once, and all of it when the same programs were compiled before.
_CACHE = Path(__file__).resolve().parents[1] / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
