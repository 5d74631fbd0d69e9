"""Settings of the whole suite, made before anything imports JAX."""

import os
from importlib.metadata import version
from pathlib import Path

# Almost all the time of these tests is compilation: half of it is saved by not optimising code that
# runs once, and all of it when the same programs were compiled before.
_CACHE = Path(__file__).resolve().parents[1] / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
_FLAGS = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if version("jaxlib").startswith("0.10."):
    # Its older emitters make less code of a fusion; later versions have none but the new ones.
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
if not Path("/dev/nvidia0").exists():  # a GPU's kernels are tested as users run them
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS])
# Results are compared to a few roundings: no accelerator may round factors to fewer bits.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
# Several test processes share a GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
