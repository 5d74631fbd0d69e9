"""Cases that the GPU kernels are held to, and the errors of a scan in one of them.

No test module: it also runs where pytest is not, and without the suite's fixtures.
"""

import jax
import jax.numpy as jnp
import numpy as np
from conftest import scan_arguments

from zzhnet_jax.kernels.selective_scan.base import Tile
from zzhnet_jax.kernels.selective_scan.reference import sequential_scan

NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias", "initial_state")
STEPS = 4
TILE = Tile(STEPS, 4, 1)

# Blocks of 4 channels: 5 channels a group need two, the second with one channel in it.
CASES = {
    "one step": dict(length=1, n=1, groups=1, d=4),
    "short": dict(length=7, n=3, groups=4, d=8, reverse=True),
    "one block": dict(length=STEPS, n=1, groups=4, d=20, reverse=True, with_state=False),
    "one more": dict(length=STEPS + 1, n=16, groups=1, d=5, with_D=False),
    "three blocks": dict(length=3 * STEPS, n=1, groups=2, d=10, with_bias=False),
    "many states": dict(length=STEPS + 3, n=64, groups=1, d=4, b=1, reverse=True),
    "huge steps": dict(length=STEPS + 1, n=2, groups=1, d=4, scale=(1e4, 1e-4, -80.0)),
    "huge plain steps": dict(
        length=STEPS + 1, n=2, groups=1, d=4, scale=(1e4, 1e-4, 0.0), softplus=False
    ),
    "bfloat16": dict(length=STEPS + 1, n=3, groups=2, d=8, dtype=jnp.bfloat16),
    "float16": dict(length=STEPS + 1, n=3, groups=2, d=8, dtype=jnp.float16),
}


def on_gpu():
    """Whether kernels run as machine code here; elsewhere they are interpreted."""
    return jax.default_backend() == "gpu"


def assert_small(errors, case):
    """Holds results to a few roundings: of float32, but of their own dtype for half precision."""
    dtype = case.get("dtype", np.float32)
    rounding = 3e-6 if dtype == np.float32 else 2 * float(jnp.finfo(dtype).eps)
    for name, error in errors.items():
        allowed = 3e-6 if name == "state" else rounding
        assert error <= allowed, f"{name}: {error:.1e} of max|oracle|, allowed {allowed:.0e}"


def errors(scan, case, **options):
    """The largest error of y, the last state and every gradient against the float64 oracle."""
    case = dict(case)
    flags = dict(delta_softplus=case.pop("softplus", True), reverse=case.pop("reverse", False))
    scale, dtype = case.pop("scale", None), case.pop("dtype", np.float32)
    arguments = [None if x is None else x.astype(dtype) for x in scan_arguments(**case)]
    if scale:
        rows = np.resize(np.array(scale, np.float32), case["length"])
        arguments[1] = np.abs(arguments[1]) * rows[:, None]
    results = _run(scan, arguments, **flags, **options)
    with jax.enable_x64(True):
        wide = [None if x is None else np.asarray(x, np.float64) for x in arguments]
        expected = {k: np.asarray(x) for k, x in _run(sequential_scan, wide, **flags).items()}
    found = {}
    for name, reference in expected.items():
        got = np.asarray(results[name], np.float64)
        assert got.shape == reference.shape, name
        error = np.abs(got - reference).max() / max(np.abs(reference).max(), 1e-3)
        found[name] = float(error) if np.isfinite(got).all() else float("inf")
    return found


def _run(scan, arguments, **options):
    given = {k: jnp.asarray(x) for k, x in zip(NAMES, arguments, strict=True) if x is not None}

    def loss(given):
        y, state = scan(*(given.get(name) for name in NAMES), **options)
        weigh = [
            jnp.sin(jnp.arange(x.size, dtype=state.dtype)).reshape(x.shape) for x in (y, state)
        ]
        return jnp.vdot(y, weigh[0]) + jnp.vdot(state, weigh[1]), (y, state)

    gradients, (y, state) = jax.jit(jax.grad(loss, has_aux=True))(given)
    return {"y": y, "state": state} | {f"gradient of {k}": v for k, v in gradients.items()}


def operand_types(*, b=2, length=100, d=96, n=1, groups=2, dtype=jnp.float32):
    """The eight operands as types, for compiling."""
    shapes = [(b, length, d)] * 2 + [(d, n)] + [(b, length, groups, n)] * 2 + [(d,)] * 2
    small = (2, 5, 6, 7)  # float32 whatever the others are, as in a network
    return tuple(
        jax.ShapeDtypeStruct(shape, jnp.float32 if i in small else dtype)
        for i, shape in enumerate([*shapes, (b, d, n)])
    )


def vmamba_types(b):
    """Operand types of VMamba-T's first stage with its four routes as groups."""
    return operand_types(b=b, length=56 * 56, d=4 * 192, groups=4)
