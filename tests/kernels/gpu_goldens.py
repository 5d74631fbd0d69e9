"""Recorded PyTorch scans that the GPU kernels are held to; no test module, see `gpu_cases`."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from zzhnet_jax.kernels.selective_scan.base import Tile

OWN = Path(__file__).parents[1] / "goldens" / "kernels"
SHARED = os.environ.get("ZZHNET_GOLDENS")
TILE = Tile(8, 8, 1)
ORDER = ("u", "delta", "A", "B", "C", "D", "delta_bias", "initial_state")

GOLDENS = {
    "scan_n1_softplus_large": OWN,
    "scan_n16_noD": OWN,
    "selective_scan_a": OWN,
    **dict.fromkeys(
        ("scan_n16_l49", "scan_n1_l37", "scan_n4_l64", "scan_n4_plain_nosoftplus"),
        Path(SHARED, "change_detection") if SHARED else None,
    ),
}


def excess(scan, name, **options):
    """The error of each recorded result, in units of what is allowed: 1 is the most."""
    with np.load(GOLDENS[name] / f"{name}.npz") as file:
        a = dict(file)
    config = json.loads(str(a.pop("config", "{}")))
    run = _mamba if name == "selective_scan_a" else _vmamba
    got, expected = run(scan, a, config, tile=TILE, **options)
    allowed = max(20 * config.get("noise_rel_max", 0), 1e-5)
    return {
        key: float(np.abs(np.asarray(got[key]) - x).max() / np.abs(x).max() / allowed)
        for key, x in expected.items()
    }


def _length_second(x):
    return jnp.moveaxis(jnp.asarray(x), -1, 1)


def _vmamba(scan, a, config, **options):
    given = {k.removeprefix("in/"): v for k, v in a.items() if k.startswith("in/")}

    def forward(given):
        arranged = {k: _length_second(v) if k in "u delta B C" else v for k, v in given.items()}
        arrays = (jnp.asarray(arranged[k]) if k in arranged else None for k in ORDER)
        flags = dict(delta_softplus=config["delta_softplus"], reverse=False)
        return jnp.moveaxis(scan(*arrays, **flags, **options)[0], 1, -1)

    y, pull = jax.vjp(jax.jit(forward), given)
    (gradients,) = pull(jnp.asarray(a["cot/y"]))
    expected = {k.removeprefix("grad/in/"): v for k, v in a.items() if k.startswith("grad/in/")}
    assert expected.keys() == gradients.keys()
    return gradients | {"y": y}, expected | {"y": a["out/y"]}


def _mamba(scan, a, config, **options):
    """Mamba's scan with one group; its gate y silu(z) is no part of the operator."""
    names = [k.removeprefix("grad/var/") for k in a if k.startswith("grad/var/")]
    given = {k: jnp.asarray(a[f"in/{k}_var" if k in "BC" else f"in/{k}"]) for k in names}

    def loss(given):
        B, C = (_length_second(given[k][:, None]) for k in "BC")
        arrays = (_length_second(given["u"]), _length_second(given["delta"]), given["A"], B, C)
        flags = dict(delta_softplus=True, reverse=False)
        y, state = scan(*arrays, given["D"], given["delta_bias"], None, **flags, **options)
        y = jnp.moveaxis(y, 1, -1) * jax.nn.silu(given.get("z", a["in/z"]))
        return jnp.vdot(y, a["in/gw"]), {"y": y, "state": state}

    gradients, results = jax.jit(jax.grad(loss, has_aux=True))(given)
    expected = {k: a[f"grad/var/{k}"] for k in names}
    return gradients | results, expected | {"y": a["out/var"], "state": a["out/var_state"]}
