"""Changes to a checkpoint, made only when asked for, so that it can start another network."""

import re
from collections.abc import Collection, Mapping
from typing import Literal

import numpy as np

Adaptation = Literal["encoder", "head", "position", "stem"]
"""What may be adapted.

"encoder" puts a classifier's hierarchy into every encoder of a change network and leaves the rest
of that network as initialised. "head" leaves a classifier layer as initialised when the number of
classes differs. "position" resizes the position embedding. "stem" repeats the first convolution's
bands when the network takes more of them, or fewer.
"""

StateDict = dict[str, np.ndarray]

_HEAD = re.compile(r"(classifier\.)?head\.(weight|bias)|(main|aux)_clf(_cd)?\.(weight|bias)")
_STEM = re.compile(r"(encoder(_[12])?\.)?patch_embed\.(0|proj)\.weight")
_POSITION = re.compile(r"(encoder(_[12])?\.)?pos_embed")
_CLASSIFIER = re.compile(r"classifier\..*|norm\.(weight|bias)|head\.(weight|bias)")


def into_encoders(state_dict: Mapping[str, np.ndarray], encoders: Collection[str]) -> StateDict:
    """A classifier's hierarchy under the name of each encoder, without the classifier's own layers.

    Args:
      state_dict: a VMamba classifier's tensors.
      encoders: names of the change network's encoders, such as ("encoder",).
    """
    return {
        f"{encoder}.{name}": array
        for encoder in encoders
        for name, array in state_dict.items()
        if not _CLASSIFIER.fullmatch(name)
    }


def fit(
    state_dict: Mapping[str, np.ndarray],
    wanted: Mapping[str, tuple[int, ...]],
    adaptations: Collection[Adaptation],
) -> tuple[StateDict, list[str]]:
    """Gives tensors of another shape the wanted one, as far as that was asked for.

    Args:
      state_dict: PyTorch name -> array.
      wanted: the PyTorch shapes of the network's places for those tensors that do not fit.
      adaptations: what may be adapted.

    Returns:
      The state dict, in which a head that does not fit is left out, and a sentence for each change.
    """
    adapted, changes = dict(state_dict), []
    for name, shape in wanted.items():
        array = state_dict[name]
        if "head" in adaptations and _HEAD.fullmatch(name):
            del adapted[name]
            changes.append(f"{name} {array.shape} left out: the network has {shape[0]} classes")
        elif "stem" in adaptations and _STEM.fullmatch(name) and array.shape[2:] == shape[2:]:
            adapted[name] = inflate_bands(array, shape[1])
            changes.append(f"{name}: {array.shape[1]} bands repeated to make {shape[1]}")
        elif "position" in adaptations and _POSITION.fullmatch(name):
            adapted[name] = resize_bicubic(array, (shape[2], shape[3]))
            changes.append(f"{name}: resized from {array.shape[2:]} to {shape[2:]} patches")
    return adapted, changes


def inflate_bands(weight: np.ndarray, bands: int) -> np.ndarray:
    """A first convolution for another number of bands.

    Bands are repeated in turn, each copy with its share of the weight, or folded in turn if there
    are to be fewer; so an image whose bands are all alike gives the same response as before.

    Args:
      weight: (out, old bands, h, w).
      bands: their new number.

    Returns:
      (out, bands, h, w), float32.
    """
    old = weight.shape[1]
    turns = np.arange(max(old, bands))
    mixing = np.zeros((old, bands), np.float32)
    mixing[turns % old, turns % bands] = 1
    mixing /= np.maximum(mixing.sum(axis=1, keepdims=True), 1)
    return np.einsum("oihw,ij->ojhw", weight.astype(np.float32), mixing)


def resize_bicubic(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bicubic interpolation as PyTorch's `interpolate` does it (a = -0.75, corners not aligned).

    Args:
      image: (1, c, h, w).
      size: new height and width.

    Returns:
      (1, c, *size), float32.
    """
    rows, columns = (
        _cubic_matrix(old, new) for old, new in zip(image.shape[2:], size, strict=True)
    )
    return np.einsum("yh,xw,bchw->bcyx", rows, columns, image.astype(np.float64)).astype(np.float32)


def _cubic_matrix(old: int, new: int) -> np.ndarray:
    """(new, old) weights of the four nearest samples of each new one; the border is repeated."""
    a = -0.75
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(centres).astype(int)
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        t = np.abs(centres - (first + tap))
        near = ((a + 2) * t - (a + 3)) * t**2 + 1
        far = ((t - 5) * t + 8) * t * a - 4 * a
        columns = np.clip(first + tap, 0, old - 1)
        np.add.at(matrix, (np.arange(new), columns), np.where(t <= 1, near, far))
    return matrix
