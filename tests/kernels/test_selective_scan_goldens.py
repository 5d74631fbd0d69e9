"""Every implementation against the public PyTorch scans: recorded outputs and gradients.

The smallest files lie in tests/goldens/kernels; the rest are found through ZZHNET_GOLDENS.
"""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zzhnet_jax.kernels.selective_scan import selective_scan

OWN = Path(__file__).parents[1] / "goldens" / "kernels"
SHARED = os.environ.get("ZZHNET_GOLDENS")
CASES = {
    "scan_n1_softplus_large": OWN,
    "scan_n16_noD": OWN,
    **dict.fromkeys(
        ("scan_n16_l49", "scan_n1_l37", "scan_n4_l64", "scan_n4_plain_nosoftplus"),
        Path(SHARED, "change_detection") if SHARED else None,
    ),
}
SEQUENCES = ("u", "delta", "B", "C")  # stored with the length last


def load(folder, name):
    if folder is None:
        pytest.skip(f"{name}.npz: set ZZHNET_GOLDENS to the folder with the reference arrays")
    with np.load(folder / f"{name}.npz") as file:
        arrays = dict(file)
    return arrays, json.loads(str(arrays.pop("config")))


def length_second(x):
    return jnp.moveaxis(jnp.asarray(x), -1, 1)


def assert_close(got, expected, tolerance, name):
    error = np.abs(np.asarray(got) - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"{name}: {error:.1e} of max|ref|, allowed {tolerance:.0e}"


@pytest.mark.parametrize("name", CASES)
def test_vmamba_scan(name, implementation):
    arrays, config = load(CASES[name], name)
    inputs = {k.removeprefix("in/"): v for k, v in arrays.items() if k.startswith("in/")}

    @jax.jit
    def run(inputs, cotangent):
        def forward(inputs):
            arranged = {k: length_second(v) if k in SEQUENCES else v for k, v in inputs.items()}
            softplus = config["delta_softplus"]
            y = selective_scan(**arranged, delta_softplus=softplus, implementation=implementation)
            return jnp.moveaxis(y, 1, -1)

        y, pull = jax.vjp(forward, inputs)
        return y, pull(cotangent)[0]

    y, gradients = run(inputs, arrays["cot/y"])
    tolerance = max(20 * config["noise_rel_max"], 1e-5)
    assert_close(y, arrays["out/y"], tolerance, "y")
    assert gradients.keys() == {k[8:] for k in arrays if k.startswith("grad/in/")}
    for key, gradient in gradients.items():
        assert_close(gradient, arrays[f"grad/in/{key}"], tolerance, f"gradient of {key}")


class TestMambaScan:
    """Mamba's scan with its gate y silu(z), which is no part of the operator, applied here."""

    def scan(self, a, B, C, implementation, *, plain=False):
        options = {} if plain else dict(delta_bias=a["in/delta_bias"], delta_softplus=True)
        y, state = selective_scan(
            *(length_second(a["in/u"]), length_second(a["in/delta"]), a["in/A"], B, C),
            *(() if plain else (a["in/D"],)),
            return_final_state=True, implementation=implementation, **options,
        )  # fmt: skip
        y = jnp.moveaxis(y, 1, -1)
        return (y if plain else y * jax.nn.silu(a["in/z"])), state

    def matrices(self, a, kind):
        """B and C as (b, l, g, n): one group, two groups, or one a channel that never varies."""
        found = [jnp.asarray(a[f"in/{x}_{kind}"]) for x in "BC"]
        if kind == "const":
            b, _, length = a["in/u"].shape
            return [jnp.broadcast_to(x, (b, length, *x.shape)) for x in found]
        return [length_second(x if x.ndim == 4 else x[:, None]) for x in found]

    @pytest.mark.parametrize("kind", ["var", "grp", "const"])
    def test_values(self, kind, implementation):
        a, _ = load(OWN, "selective_scan_a")
        y, state = self.scan(a, *self.matrices(a, kind), implementation)
        name = "grouped" if kind == "grp" else kind
        assert_close(y, a[f"out/{name}"], 1e-5, "y")
        assert_close(state, a[f"out/{name}_state"], 1e-5, "state")

    def test_plain(self, implementation):
        """No bias, softplus, D or gate; the recorded case used the steps' absolute values."""
        a, _ = load(OWN, "selective_scan_a")
        a["in/delta"] = np.abs(a["in/delta"])
        y, _ = self.scan(a, *self.matrices(a, "var"), implementation, plain=True)
        assert_close(y, a["out/var_nobias_nosoftplus_noD_noz"], 1e-5, "y")

    def test_gradients(self, implementation):
        a, _ = load(OWN, "selective_scan_a")
        names = {k.removeprefix("grad/var/") for k in a if k.startswith("grad/var/")}
        source = {k: f"in/{k}_var" if k in ("B", "C") else f"in/{k}" for k in names}

        @jax.jit
        @jax.grad
        def gradient(given):
            arrays = a | {source[k]: v for k, v in given.items()}
            y, _ = self.scan(arrays, *self.matrices(arrays, "var"), implementation)
            return jnp.vdot(y, a["in/gw"])

        gradients = gradient({k: jnp.asarray(a[source[k]]) for k in names})
        for key in names:
            assert_close(gradients[key], a[f"grad/var/{key}"], 1e-5, f"gradient of {key}")
