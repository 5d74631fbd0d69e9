"""The arguments of every comparison: scans of a given shape, and hard cases by name.

Everything is drawn by numpy from a fixed seed and rounded to the dtype of the case, so that the
oracle and every implementation see the same numbers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from zzhnet_jax.kernels.selective_scan.shapes import ScanShape

DTYPES = ("float32", "bfloat16", "float16")
SEQUENCES = ("u", "delta", "B", "C")
PARAMETERS = ("A", "D", "delta_bias")
ARGUMENTS = ("u", "delta", "A", "B", "C", "D", "delta_bias")

Arrays = dict[str, np.ndarray]


def dtype_named(name: str) -> np.dtype:
    """The numpy dtype called "float32", "bfloat16" or "float16"."""
    return np.dtype(jnp.dtype(name))


@dataclass(frozen=True)
class Case:
    """One scan to compare implementations on.

    Attributes:
      shape: sizes, and the name shown.
      dtype: of u, delta, B and C; A, D and delta_bias are float32, as parameters of networks are.
      arguments: keyword arguments of the scan (numpy); D and delta_bias may be missing.
      cotangent: of y, in the same dtype: gradients are those of sum(y * cotangent).
      note: what is hard about it.
      delta_softplus: the scan's flag.
      recorded: results of another program on the same arguments, by its name.
      slow: implementations that take very long on this case, with the reason; they are left out
        unless somebody names them.
    """

    shape: ScanShape
    dtype: str
    arguments: Arrays
    cotangent: np.ndarray
    note: str = ""
    delta_softplus: bool = True
    recorded: Mapping[str, "Recorded"] = field(default_factory=dict)
    slow: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Recorded:
    """What another program computed.

    Attributes:
      outputs: "y", "state" and the gradients, named as the arguments are; those that it gave.
      timings: "forward" and "gradient" -> milliseconds, where it measured them.
    """

    outputs: Arrays
    timings: Mapping[str, float] = field(default_factory=dict)


def make_case(shape: ScanShape, dtype: str = "float32", **changes: Any) -> Case:
    """A case with the statistics of a freshly initialised network.

    u, B and C are normal; the bias makes the steps log-uniform in [0.001, 0.1], delta spreads them
    by half an e-fold; A = -1, -2, ..., -n.

    Args:
      shape: its sizes.
      dtype: of the sequences.
      **changes: fields of the case to set.
    """
    return _rounded(shape, dtype, _draw(shape), **changes)


def _draw(shape: ScanShape) -> Arrays:
    _, b, length, d, g, n = shape
    rng = np.random.default_rng(0)
    normal = rng.standard_normal
    step = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), d))
    return dict(
        u=normal((b, length, d)),
        delta=0.5 * normal((b, length, d)),
        A=-np.broadcast_to(np.arange(1.0, n + 1), (d, n)),
        B=normal((b, length, g, n)),
        C=normal((b, length, g, n)),
        D=np.ones(d),
        delta_bias=np.log(np.expm1(step)),
    )


def _rounded(shape: ScanShape, dtype: str, arrays: Arrays, **fields: Any) -> Case:
    kinds = {name: dtype_named(dtype if name in SEQUENCES else "float32") for name in arrays}
    cotangent = np.random.default_rng(1).standard_normal(arrays["u"].shape)
    return Case(
        shape,
        dtype,
        {name: np.asarray(x).astype(kinds[name]) for name, x in arrays.items()},
        cotangent.astype(dtype_named(dtype)),
        **fields,
    )


_SMALL = ScanShape("", 2, 1024, 32, 4, 4)


def _very_long() -> Case:
    shape = ScanShape("very_long", 1, 2**20, 8, 1, 1)
    reason = "its gradient takes minutes to compile; name it in --implementations to have it"
    return make_case(shape, note="2^20 steps", slow={"associative": reason})


def _large_delta() -> Case:
    arrays = _draw(_SMALL)
    arrays["delta"] = 1e3 * np.abs(arrays["delta"])
    return _named("large_delta", arrays, "steps up to 10^3: the decay underflows to 0")


def _tiny_delta() -> Case:
    arrays = _draw(_SMALL)
    arrays["delta_bias"] = np.full(_SMALL.channels, -18.0)
    return _named("tiny_delta", arrays, "steps near 10^-8: the decay rounds to 1")


def _near_zero_A() -> Case:
    arrays = _draw(_SMALL)
    arrays["A"] = 1e-8 * arrays["A"]
    return _named("near_zero_A", arrays, "A near -10^-8: nothing is forgotten")


def _cancelling() -> Case:
    """Every second input takes back the one before it, and almost nothing decays in between."""
    arrays = _draw(_SMALL)
    for name in ("u", "delta", "B"):
        arrays[name][:, 1::2] = arrays[name][:, ::2]
    arrays["u"][:, 1::2] *= -1
    arrays["A"] = 1e-3 * arrays["A"]
    arrays["D"] = np.zeros(_SMALL.channels)
    return _named("cancelling", arrays, "inputs that cancel in pairs: y is small beside its terms")


def _bf16() -> Case:
    shape = _SMALL._replace(name="bf16")
    return make_case(shape, "bfloat16", note="bfloat16 sequences, float32 state")


def _named(name: str, arrays: Arrays, note: str) -> Case:
    return _rounded(_SMALL._replace(name=name), "float32", arrays, note=note)


HARD_CASES: dict[str, Callable[[], Case]] = {
    "very_long": _very_long,
    "large_delta": _large_delta,
    "tiny_delta": _tiny_delta,
    "near_zero_A": _near_zero_A,
    "cancelling": _cancelling,
    "bf16": _bf16,
}
