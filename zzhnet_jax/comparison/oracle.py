"""The float64 oracle: outputs, gradients, and how far rounding alone may move each of them.

It is numpy, its gradient is written out by hand, and it shares no code with any implementation.

**The bound.** Every result is a sum of products. Replace every factor by its magnitude, and let
each of a product's operations enlarge it by (1 + u), u being the unit roundoff of the arithmetic
(2^-24 for float32); what the sum of magnitudes grows by is the most that rounding can move the
result, whatever the inputs and however the sums are grouped (the standard model of floating-point
arithmetic: Higham, "Accuracy and Stability of Numerical Algorithms", chapters 2 and 3). So the
oracle is run three times: plainly, on magnitudes with u = 0, and on magnitudes with u; the bound is
the difference of the last two, value by value, plus the rounding to the output's dtype. It holds no
constant that was fitted to an implementation. The operations counted stand in `_Counts`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .cases import ARGUMENTS, Arrays, Case, dtype_named
from .recurrence import previous, recurrence, recurrence_backward

_FLOAT32_ROUNDOFF = 2.0**-24
_FLOAT32_TINY = float(np.finfo(np.float32).tiny)
_SOFTPLUS_THRESHOLD = 20.0


class _Counts:
    """Roundings that the bound allows for, in units of u."""

    ELEMENTARY = 4  # exp, log1p, logistic: 2 units in the last place, what vendors state
    STEP = 2 * ELEMENTARY  # log1p(exp(x))
    ARGUMENT = 3  # delta A, and the change of base inside the exponential
    DECAY = ELEMENTARY + 2  # the exponential, its product with the state, the sum
    DRIVE = 3  # delta u B, and the sum
    PRODUCT = 3  # any other product of up to three factors

    @staticmethod
    def long_sum(terms: int) -> float:
        """Roundings of a sum over time and batch.

        In the worst case one a term; as their signs are unrelated they grow like the square root,
        here taken eight standard deviations wide (Higham and Mary, 2019).
        """
        return min(terms, 8 * np.sqrt(terms))


@dataclass(frozen=True)
class Reference:
    """What every implementation is held to.

    Attributes:
      values: float64 "y", "state" (after the last step) and, if asked for, the gradient of every
        argument under its name.
      bounds: for each, the largest error that rounding explains.
    """

    values: Arrays
    bounds: Arrays


def reference(case: Case, *, gradients: bool) -> Reference:
    """Computes the oracle for a case.

    Args:
      case: its arguments and cotangent.
      gradients: also give gradients.
    """
    plain = _run(case, gradients, unit=None)
    exact = _run(case, gradients, unit=0.0)
    rounded = _run(case, gradients, unit=_FLOAT32_ROUNDOFF)
    bounds = {}
    for name, value in plain.items():
        dtype = dtype_named("float32" if name == "state" else _dtype_of(case, name))
        bound = rounded[name] - exact[name]
        bounds[name] = bound + _output_rounding(dtype, np.abs(value) + bound)
    return Reference(plain, bounds)


def _dtype_of(case: Case, name: str) -> str:
    return str(case.arguments[name].dtype) if name in case.arguments else case.dtype


def _output_rounding(dtype: np.dtype, magnitude: np.ndarray) -> np.ndarray:
    """Half a unit in the last place, and what is lost where numbers are too small to represent."""
    info = _finfo(dtype)
    small = info.smallest_subnormal if dtype == np.float16 else info.tiny
    return magnitude * float(info.eps) / 2 + float(small)


def _finfo(dtype: np.dtype) -> np.finfo:
    import jax.numpy as jnp  # numpy's own does not know bfloat16

    return jnp.finfo(dtype)


def _run(case: Case, gradients: bool, *, unit: float | None) -> Arrays:
    """All results, group by group and sequence by sequence, so that little memory is needed.

    Args:
      case: the case.
      gradients: also give gradients.
      unit: None for the values; otherwise magnitudes are taken, and enlarged by (1 + unit) for
        each rounding.
    """
    _, b, length, d, g, n = case.shape
    p = d // g
    given = {name: np.asarray(x, np.float64) for name, x in case.arguments.items()}
    cotangent = np.asarray(case.cotangent, np.float64)
    total = {"y": np.empty((b, length, d)), "state": np.empty((b, d, n))}
    if gradients:
        total |= {name: np.zeros(given[name].shape) for name in ARGUMENTS if name in given}
    for i in range(b):
        for k in range(g):
            channels = slice(k * p, (k + 1) * p)
            part = _Slice(
                u=given["u"][i, :, channels],
                delta=given["delta"][i, :, channels],
                A=given["A"][channels],
                B=given["B"][i, :, k],
                C=given["C"][i, :, k],
                D=given["D"][channels] if "D" in given else np.zeros(p),
                bias=given["delta_bias"][channels] if "delta_bias" in given else None,
                cotangent=cotangent[i, :, channels],
                softplus=case.delta_softplus,
                batch=b,
                unit=unit,
            )
            results = part.run(gradients)
            total["y"][i, :, channels] = results["y"]
            total["state"][i, channels] = results["state"]
            for name in total.keys() - {"y", "state"}:
                if name in ("u", "delta"):
                    total[name][i, :, channels] = results[name]
                elif name in ("B", "C"):
                    total[name][i, :, k] = results[name]
                else:
                    total[name][channels] += results[name]
    return total


@dataclass
class _Slice:
    """One group of one sequence: u, delta (l, p), A (p, n), B, C (l, n), D, bias (p,)."""

    u: np.ndarray
    delta: np.ndarray
    A: np.ndarray
    B: np.ndarray
    C: np.ndarray
    D: np.ndarray
    bias: np.ndarray | None
    cotangent: np.ndarray
    softplus: bool
    batch: int
    unit: float | None

    def grow(self, roundings: np.ndarray | float) -> np.ndarray | float:
        """(1 + unit) to the given power; 1 where plain values are wanted."""
        return np.exp(roundings * self.unit) if self.unit else 1.0

    def magnitude(self, x: np.ndarray) -> np.ndarray:
        """|x| for the bound, x for the values."""
        return x if self.unit is None else np.abs(x)

    def run(self, gradients: bool) -> Arrays:
        """Everything that this part of the arguments gives."""
        step, slope, relative = self.step_sizes()
        exponent = step[..., None] * self.A
        roundings = _Counts.DECAY + np.abs(exponent) * (_Counts.ARGUMENT + relative[..., None])
        decay = np.exp(exponent) * self.grow(roundings)
        if self.unit:
            decay += _FLOAT32_TINY  # what a decay that underflows may lose
        u, B, C, D, step = map(self.magnitude, (self.u, self.B, self.C, self.D, step))
        driven = step * u * self.grow(relative + _Counts.DRIVE)
        states = recurrence(decay, driven[..., None] * B[:, None])
        inner = self.grow(self.A.shape[1] + _Counts.PRODUCT)
        y = np.einsum("lpn,ln->lp", states, C) * inner + D * u * self.grow(_Counts.PRODUCT)
        results = {"y": y, "state": states[-1]}
        if gradients:
            results |= self.gradients(step, slope, decay, driven, states)
        return results

    def step_sizes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Step sizes, their derivatives by delta, and their relative error in roundings."""
        raw = self.delta if self.bias is None else self.delta + self.bias
        added = float(self.bias is not None)
        if not self.softplus:
            return raw, np.ones_like(raw), np.full_like(raw, added)
        step = np.where(raw > _SOFTPLUS_THRESHOLD, raw, np.logaddexp(0, raw))
        slope = np.where(raw > _SOFTPLUS_THRESHOLD, 1.0, 1 / (1 + np.exp(-np.minimum(raw, 700))))
        relative = _Counts.STEP + added * np.abs(raw) * slope / step
        # The derivative is rounded too, and its argument was: d log(slope) / d raw = 1 - slope.
        slope = slope * self.grow(_Counts.ELEMENTARY + added * np.abs(raw) * (1 - slope))
        return step, slope, relative

    def gradients(
        self,
        step: np.ndarray,
        slope: np.ndarray,
        decay: np.ndarray,
        driven: np.ndarray,
        states: np.ndarray,
    ) -> Arrays:
        """The adjoint of `run`: gradients of sum(y * cotangent), from what `run` computed."""
        channels, n = self.A.shape
        u, A, B, C, D, cotangent = map(
            self.magnitude, (self.u, self.A, self.B, self.C, self.D, self.cotangent)
        )
        product, over_states = self.grow(_Counts.PRODUCT), self.grow(n + _Counts.PRODUCT)
        over_channels = self.grow(channels + _Counts.PRODUCT)
        over_time = self.grow(_Counts.long_sum(self.batch * len(u)) + _Counts.PRODUCT)

        reaching = recurrence_backward(decay, product * cotangent[..., None] * C[:, None])
        of_exponent = reaching * decay * previous(states) * product
        of_driven = np.einsum("lpn,ln->lp", reaching, B) * over_states
        of_step = u * of_driven + np.einsum("lpn,pn->lp", of_exponent, A) * over_states
        of_delta = of_step * slope * product
        return {
            "u": step * of_driven * product + D * cotangent * product,
            "delta": of_delta,
            "A": np.einsum("lpn,lp->pn", of_exponent, step) * over_time,
            "B": np.einsum("lpn,lp->ln", reaching, driven) * over_channels,
            "C": np.einsum("lpn,lp->ln", states, cotangent) * over_channels,
            "D": np.einsum("lp,lp->p", u, cotangent) * over_time,
            "delta_bias": of_delta.sum(0) * over_time,
        }


def names(values: Iterable[str]) -> tuple[str, ...]:
    """Names of results in the order in which they are shown."""
    given = set(values)
    return tuple(name for name in ("y", "state", *ARGUMENTS) if name in given)
