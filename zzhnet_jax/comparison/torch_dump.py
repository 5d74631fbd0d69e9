"""Reads what `dump_torch_scan.py` recorded on a machine with PyTorch's kernel."""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from zzhnet_jax.errors import DataError
from zzhnet_jax.kernels.selective_scan.shapes import ScanShape

from .cases import ARGUMENTS, DTYPES, SEQUENCES, Arrays, Case, Recorded, dtype_named
from .dump_torch_scan import FORMAT


def read_torch_dump(path: Path) -> list[Case]:
    """The recorded scans as cases: with their arguments, and the kernel's results beside them.

    Raises:
      DataError: the file cannot be read, is of another kind, or lacks an array.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        meta = json.loads(str(arrays.pop("meta", "{}")))
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read ({error}); {_remedy()}") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise DataError(f"{path}: not a file of recorded scans; {_remedy()}")
    try:
        return [_case(f"{index}/", scan, arrays, meta) for index, scan in enumerate(meta["scans"])]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: damaged ({error}); {_remedy()}") from None


def _remedy() -> str:
    return "write it with zzhnet_jax/comparison/dump_torch_scan.py"


def _case(prefix: str, scan: Mapping[str, Any], arrays: Arrays, meta: Mapping[str, Any]) -> Case:
    b, length, d, n, g = scan["shape"]
    dtype = scan["dtype"]
    for name in (dtype, scan["y_dtype"]):
        if name not in DTYPES:
            raise ValueError(f"dtype {name!r}")
    shapes = {
        **dict.fromkeys(("u", "delta"), (b, length, d)),
        **dict.fromkeys(("B", "C"), (b, length, g, n)),
        **dict.fromkeys(("D", "delta_bias"), (d,)),
        "A": (d, n),
    }

    def take(key: str, name: str, kind: str) -> np.ndarray:
        array = arrays[prefix + key]
        if array.shape != shapes[name]:
            raise ValueError(f"{prefix}{key} has shape {array.shape}, not {shapes[name]}")
        return array.astype(dtype_named(kind))

    kinds = {name: dtype if name in SEQUENCES else "float32" for name in ARGUMENTS}
    outputs = {name: take(f"grad/{name}", name, kinds[name]) for name in ARGUMENTS}
    outputs["y"] = take("out/y", "u", scan["y_dtype"])
    return Case(
        ScanShape(f"recorded {b},{length},{d},{n},{g}", b, length, d, g, n),
        dtype,
        {name: take(f"in/{name}", name, kinds[name]) for name in ARGUMENTS},
        take("cot", "u", dtype),
        note=f"torch {meta['torch']}, {meta['kernel']} on {meta['device']}",
        recorded={"torch": Recorded(outputs, scan["milliseconds"])},
    )
