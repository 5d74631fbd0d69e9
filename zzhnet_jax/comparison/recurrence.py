"""First-order linear recurrences in numpy float64, vectorised over pieces of the time axis.

A loop over every step of a long sequence would take minutes in numpy. Here the steps of all pieces
are taken together, then the pieces are joined one after another: 2 sqrt(l) vector operations.
Regrouping the sums costs accuracy of the order of float64's rounding, which nothing compared with
it can see.
"""

import math

import numpy as np


def recurrence(decay: np.ndarray, drive: np.ndarray) -> np.ndarray:
    """h_t = decay_t h_{t-1} + drive_t from h_{-1} = 0.

    Args:
      decay: float64 (l, ...).
      drive: float64 (l, ...).

    Returns:
      Every h_t, float64 (l, ...).
    """
    length, *rest = drive.shape
    steps = math.isqrt(length - 1) + 1
    pieces = -(-length // steps)
    padding = [(0, pieces * steps - length), *[(0, 0)] * len(rest)]
    states = np.pad(drive, padding).reshape(pieces, steps, *rest)
    decays = np.pad(decay, padding).reshape(pieces, steps, *rest)
    for t in range(1, steps):
        states[:, t] += decays[:, t] * states[:, t - 1]
        decays[:, t] *= decays[:, t - 1]
    for piece in range(1, pieces):
        states[piece] += decays[piece] * states[piece - 1, -1]
    return states.reshape(-1, *rest)[:length]


def recurrence_backward(decay: np.ndarray, drive: np.ndarray) -> np.ndarray:
    """r_t = drive_t + decay_{t+1} r_{t+1} from r_l = 0: what the recurrence passes back.

    Args:
      decay: float64 (l, ...), those of the forward recurrence.
      drive: float64 (l, ...).

    Returns:
      Every r_t, float64 (l, ...).
    """
    later = np.concatenate((decay[1:], np.zeros_like(decay[:1])))
    return recurrence(later[::-1], drive[::-1])[::-1]


def previous(states: np.ndarray) -> np.ndarray:
    """h_{t-1} for every t, zero for the first."""
    return np.concatenate((np.zeros_like(states[:1]), states[:-1]))
