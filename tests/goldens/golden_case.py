"""One array file of the PyTorch originals, and how a network is held against it."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from zzhnet_jax.conversion.rules import from_state_dict, to_state_dict
from zzhnet_jax.models import functional
from zzhnet_jax.models.torch_names import Rule

NORMS = {"ln": "layer", "ln2d": "layer", "bn": "batch"}
DIALECTS = {"cm": "changemamba", "vm": "vmamba"}
# Halves the time of these tests, which compile far longer than they run.
FAST_COMPILATION = {"xla_backend_optimization_level": 0}

Arrays = Mapping[str, np.ndarray]


class Case:
    """One file: its arrays, its config, and comparison at its tolerance."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as file:
            self.arrays = dict(file)
        self.config = json.loads(str(self.arrays.pop("config")))
        self.tolerance = max(20 * self.config["noise_rel_max"], 1e-5)

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        return {k[len(prefix) :]: v for k, v in self.arrays.items() if k.startswith(prefix)}

    def compare(self, name: str, got: np.ndarray, expected: np.ndarray) -> None:
        got = np.asarray(got)
        assert got.shape == expected.shape, f"{name}: shape {got.shape}, reference {expected.shape}"
        scale = np.abs(expected).max(initial=0) or 1
        error = np.abs(got - expected).max(initial=0) / scale
        assert error <= self.tolerance, (
            f"{name}: {error:.2e} of max|ref|, allowed {self.tolerance:.2e}"
        )

    def compare_outputs(self, got: Arrays, prefix: str = "out/") -> None:
        expected = self.group(prefix)
        assert set(got) == set(expected), f"{prefix}: {set(got) ^ set(expected)}"
        for name, reference in expected.items():
            self.compare(prefix + name, got[name], reference)

    def compare_gradients(self, got: Arrays, prefix: str) -> None:
        """Files of large networks hold the gradients of some parameters only."""
        expected = self.group(prefix)
        assert set(expected) <= set(got), f"{prefix}: {set(expected) - set(got)}"
        for name, reference in expected.items():
            self.compare(prefix + name, got[name], reference)


def to_last(x: jax.Array, layout: str) -> jax.Array:
    return jnp.moveaxis(x, 1, -1) if layout == "bchw" else x


def from_last(x: jax.Array, layout: str) -> jax.Array:
    return jnp.moveaxis(x, -1, 1) if layout == "bchw" else x


def check_module(
    case: Case,
    build: Callable[[nnx.Rngs], nnx.Module],
    rules: tuple[Rule, ...],
    call: Callable[[nnx.Module, Mapping[str, jax.Array]], dict[str, jax.Array]],
) -> None:
    """Loads `sd/`, runs `call` on `in/`; compares `out/` and, by the cotangents, every gradient."""
    graphdef, *template = functional.abstract(build)
    params, stats, _ = from_state_dict(case.group("sd/"), tuple(template), rules)

    @partial(jax.jit, compiler_options=FAST_COMPILATION)
    def run(params, inputs, cotangents):
        def forward(params, inputs):
            return call(functional.merge(graphdef, params, stats), inputs)

        outputs, pull = jax.vjp(forward, params, inputs)
        return outputs, pull(cotangents)

    outputs, (d_params, d_inputs) = run(params, case.group("in/"), case.group("cot/"))
    case.compare_outputs(outputs)
    case.compare_gradients(d_inputs, "grad/in/")
    case.compare_gradients(to_state_dict(jax.device_get(d_params), {}, rules), "grad/sd/")
