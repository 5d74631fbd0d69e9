"""How far a result is from the oracle: error figures, and their growth along the sequence."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from .oracle import Reference


@dataclass(frozen=True)
class ErrorFigures:
    """Errors of one array.

    Relative errors and units in the last place leave out values that are exactly zero in the
    oracle. A unit in the last place is the distance between neighbouring numbers of the result's
    own dtype at the oracle's value; half a unit is a correctly rounded result.

    Attributes:
      max_abs, mean_abs: of |x - oracle|.
      max_rel, mean_rel: of |x - oracle| / |oracle|.
      max_ulp, mean_ulp: of |x - oracle| in units in the last place.
      max_of_scale: max|x - oracle| / max|oracle|.
      norm: |x - oracle| / |oracle|, both Euclidean.
      of_bound: the largest |x - oracle| / bound; above 1, rounding does not explain it.
      finite: no value is infinite or not a number.
    """

    max_abs: float
    mean_abs: float
    max_rel: float
    mean_rel: float
    max_ulp: float
    mean_ulp: float
    max_of_scale: float
    norm: float
    of_bound: float
    finite: bool

    @property
    def passed(self) -> bool:
        """Whether rounding explains every error."""
        return self.finite and self.of_bound <= 1


@dataclass(frozen=True)
class Growth:
    """Error of y over the steps from `first` to `last`, both included, counted from 1.

    Attributes:
      first, last: the steps.
      max_of_scale: largest error, relative to max|y| of the whole sequence.
      norm: Euclidean error relative to the Euclidean norm of y over these steps.
      bound_norm: likewise of the bound.
    """

    first: int
    last: int
    max_of_scale: float
    norm: float
    bound_norm: float


def compare_all(results: Mapping[str, np.ndarray], oracle: Reference) -> dict[str, ErrorFigures]:
    """Error figures of every result."""
    return {
        name: compare(x, oracle.values[name], oracle.bounds[name]) for name, x in results.items()
    }


def compare(x: np.ndarray, expected: np.ndarray, bound: np.ndarray) -> ErrorFigures:
    """Error figures of one array.

    Args:
      x: a result, in its own dtype.
      expected: the oracle's, float64.
      bound: the largest error allowed of each value.
    """
    wide = np.asarray(x, np.float64)
    finite = bool(np.isfinite(wide).all())
    error = np.abs(wide - expected)
    size = np.abs(expected)
    scale, length = float(size.max()), float(np.linalg.norm(size))
    there = size > 0
    relative = error[there] / size[there]
    ulps = error[there] / spacing(size[there], np.asarray(x).dtype)
    return ErrorFigures(
        max_abs=float(error.max()),
        mean_abs=float(error.mean()),
        max_rel=float(relative.max(initial=0)),
        mean_rel=float(relative.mean()) if relative.size else 0.0,
        max_ulp=float(ulps.max(initial=0)),
        mean_ulp=float(ulps.mean()) if ulps.size else 0.0,
        max_of_scale=float(error.max()) / scale if scale else 0.0,
        norm=float(np.linalg.norm(error)) / length if length else 0.0,
        of_bound=float(np.max(error / bound)) if finite else math.inf,
        finite=finite,
    )


def spacing(size: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Distance between neighbouring numbers of `dtype` at positive float64 values."""
    info = jnp.finfo(dtype)
    _, exponent = np.frexp(np.maximum(size, float(info.tiny)))
    return np.ldexp(float(info.eps), exponent - 1)


def growth_along_sequence(
    y: np.ndarray, expected: np.ndarray, bound: np.ndarray
) -> tuple[Growth, ...]:
    """Errors of y (b, l, d) over pieces of the sequence, each four times as long as those before.

    Args:
      y: a result.
      expected: the oracle's.
      bound: the largest error allowed of each value.
    """
    error = np.abs(np.asarray(y, np.float64) - expected)
    scale = float(np.abs(expected).max())
    pieces, first, last = [], 0, min(16, y.shape[1])
    while first < y.shape[1]:
        now = slice(first, last)
        length = float(np.linalg.norm(expected[:, now]))
        pieces.append(
            Growth(
                first=first + 1,
                last=last,
                max_of_scale=float(error[:, now].max()) / scale if scale else 0.0,
                norm=float(np.linalg.norm(error[:, now])) / length if length else 0.0,
                bound_norm=float(np.linalg.norm(bound[:, now])) / length if length else 0.0,
            )
        )
        first, last = last, min(4 * last, y.shape[1])
    return tuple(pieces)
