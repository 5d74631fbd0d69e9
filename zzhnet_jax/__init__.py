"""Change detection between remote-sensing images with state-space vision networks, in JAX."""

from typing import Any

__version__ = "0.1.0.dev0"

# Resolved on first use, so that `import zzhnet_jax.data` stays free of JAX.
_LAZY = {
    "create_model": "zzhnet_jax.models.registry",
    "list_models": "zzhnet_jax.models.registry",
    "load_model": "zzhnet_jax.models.io",
    "save_model": "zzhnet_jax.models.io",
    "predict": "zzhnet_jax.inference.predictor",
}
__all__ = [*_LAZY]


def __getattr__(name: str) -> Any:
    """Imports a public name where it is defined."""
    if name not in _LAZY:
        raise AttributeError(f"module 'zzhnet_jax' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
