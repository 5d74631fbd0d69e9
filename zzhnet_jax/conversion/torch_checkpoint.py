"""Loads a PyTorch checkpoint as numpy arrays, without PyTorch and without running any of it."""

import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from zzhnet_jax.conversion.torch_file import TorchFile
from zzhnet_jax.conversion.torch_legacy import read_legacy
from zzhnet_jax.conversion.torch_records import TensorRef, printable
from zzhnet_jax.conversion.torch_safetensors import is_safetensors, read_safetensors
from zzhnet_jax.conversion.torch_zip import read_zip
from zzhnet_jax.errors import ConversionError

ENTRIES = ("model", "state_dict", "model_state_dict", "model_ema")
"""Where training scripts keep the weights, in the order in which they are looked for."""

WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that DataParallel, averaged models and torch.compile put before every name."""

_SLACK = 1 << 24


def load_torch_state_dict(path: str | Path, *, entry: str | None = None) -> dict[str, np.ndarray]:
    """Reads the weights of a `.pth`, `.pt` or `.safetensors` file.

    The file is described by a pickle, which is read as data (see `torch_pickle`), so a file from a
    stranger is safe to open. Optimizer state, epochs and configurations beside the weights are left
    alone, as are values in the state dict that are no tensors.

    Args:
      path: a file written by `torch.save` (zip or legacy format) or in the safetensors format.
      entry: which entry of the saved dict holds the weights, for example "model_ema" for the
        averaged ones. By default the first of "model", "state_dict", "model_state_dict" and
        "model_ema" that is there, or the dict itself if it holds tensors.

    Returns:
      Tensor name -> array in the file's own dtype (bfloat16 through `ml_dtypes`), without `module.`
      prefixes. The arrays are read-only and mostly views of the mapped file, so they cost no memory
      until used; do not overwrite the file while they live.

    Raises:
      ConversionError: the file is missing, damaged, hostile, or holds no weights. The message names
        the file, the reason and the remedy.
    """
    try:
        file = _open(Path(path))
        return _arrays(file, _select(file.content, entry))
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}") from error


def _open(path: Path) -> TorchFile:
    """Maps the file and reads its description, in whichever of the layouts it has."""
    try:
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise ConversionError("the file is empty; download it again")
            buffer = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            head = buffer[:512].tobytes()
            if head.startswith(b"PK"):
                return read_zip(file, buffer)
    except FileNotFoundError as error:
        raise ConversionError("no such file; check the path") from error
    except OSError as error:
        raise ConversionError(f"cannot be read: {error.strerror}") from error
    if is_safetensors(head, len(buffer)):
        return read_safetensors(buffer)
    if head[:1] in (b"\x80", b"c", b"("):  # PROTO, or what a pickle without one begins with
        return read_legacy(buffer)
    raise ConversionError(_what_else(head))


def _what_else(head: bytes) -> str:
    """Names the usual things that are saved as .pth by mistake."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"<"):
        return (
            "it is a web page, not a checkpoint: the download failed; download it again (logged "
            "in, if the host asks for it)"
        )
    if text.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; run `git lfs pull`, or download the file itself"
    if head[257:262] == b"ustar":
        return "it has the tar layout of PyTorch before 0.1.10; load it there and save it again"
    if head.startswith(b"\x1f\x8b"):
        return "it is compressed with gzip; unpack it with gunzip first"
    return (
        f"it begins with {printable(repr(head[:16]))}, as no PyTorch or safetensors file does; "
        "check that this is the checkpoint"
    )


def _select(content: Any, entry: str | None) -> Mapping[Any, Any]:
    """Finds the state dict in the saved object."""
    if not isinstance(content, Mapping):
        raise ConversionError("it holds no dict; save model.state_dict() with torch.save")
    chosen = _entry_of(content) if entry is None else content.get(entry)
    if isinstance(chosen, Mapping):
        if chosen is not content:
            chosen = _entry_of(chosen)
        if _is_state_dict(chosen):
            return chosen
    names = [printable(name) for name, value in content.items() if _is_state_dict(value)]
    what = (
        "no state dict was found" if entry is None else f"entry {printable(entry)} has no tensors"
    )
    raise ConversionError(
        f"{what}; choose the entry that holds the weights: {', '.join(names)}"
        if names
        else f"{what}; save model.state_dict() with torch.save"
    )


def _entry_of(content: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The first usual entry with tensors in it or one level further down; else the dict itself."""
    for name in ENTRIES:
        value = content.get(name)
        if isinstance(value, Mapping) and any(
            map(_is_state_dict, [value, *(value.get(inner) for inner in ENTRIES)])
        ):
            return value
    return content


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, TensorRef) for v in value.values())


def _arrays(file: TorchFile, state: Mapping[Any, Any]) -> dict[str, np.ndarray]:
    """Brings the tensors out of the file, if they are no larger than it can account for.

    Tied and expanded tensors may add up to more than the file, but not to many times as much.
    """
    refs = {name: value for name, value in state.items() if isinstance(value, TensorRef)}
    total, limit = sum(ref.nbytes for ref in refs.values()), 4 * file.size + _SLACK
    if total > limit:
        raise ConversionError(
            f"its tensors claim {total} bytes, in a file of {file.size}: the header is not to be "
            "believed; download it again"
        )
    arrays: dict[str, np.ndarray] = {}
    for name, ref in refs.items():
        plain = _unwrapped(str(name))
        if plain in arrays:
            raise ConversionError(
                f"tensor {printable(plain)} is there twice, with and without a `module.` prefix"
            )
        try:
            arrays[plain] = file.array(ref)
        except (ConversionError, ValueError) as error:
            raise ConversionError(
                f"tensor {printable(plain)}: {error}; download the file again"
            ) from error
    return arrays


def _unwrapped(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name
