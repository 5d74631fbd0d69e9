"""Block sizes that were measured to be best, in a JSON file: reading, writing, looking up.

The environment variable ZZHNET_TILES names the file; `tuning.py` fills it. An entry holds for one
kind of device, implementation, size and dtype, and wins over the implementation's own choice.
"""

import functools
import json
import os
from pathlib import Path
from typing import Any

import jax

from .base import Tile

PATH_VARIABLE = "ZZHNET_TILES"


def tuned_tile(implementation: str, operands: tuple[Any, ...]) -> Tile | None:
    """The block sizes on record for these operands on this machine's device, or None.

    Args:
      implementation: its name.
      operands: the eight operands of a scan, or anything with their shapes and dtypes.

    Raises:
      ValueError: the file is damaged.
    """
    path = os.environ.get(PATH_VARIABLE)
    if not path or not Path(path).exists():
        return None
    return read_tiles(Path(path)).get(tile_key(implementation, operands))


def tile_key(implementation: str, operands: tuple[Any, ...]) -> str:
    """What an entry is found by: device, implementation, dtype and sizes."""
    u, _, A, B = operands[:4]
    (b, length, d), n, groups = u.shape, A.shape[1], B.shape[2]
    device = jax.devices()[0].device_kind
    return f"{device} | {implementation} | {u.dtype} | b={b} l={length} d={d} g={groups} n={n}"


def read_tiles(path: Path) -> dict[str, Tile]:
    """All entries of a file; none if there is no file.

    Raises:
      ValueError: the file is damaged.
    """
    return _read(path, path.stat().st_mtime_ns) if path.exists() else {}


@functools.lru_cache(maxsize=8)
def _read(path: Path, changed: int) -> dict[str, Tile]:
    """As `read_tiles`; once for each time the file changed."""
    try:
        return {key: Tile(**sizes) for key, sizes in json.loads(path.read_text()).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no file of tiles ({error}): delete it and tune again"
        ) from error


def record_tile(path: Path, key: str, tile: Tile | None) -> None:
    """Writes an entry, or removes it if `tile` is None; the file is whole at every moment."""
    tiles = dict(read_tiles(path))
    tiles.pop(key, None)
    if tile is not None:
        tiles[key] = tile
    text = json.dumps({k: tiles[k]._asdict() for k in sorted(tiles)}, indent=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(text + "\n")
    part.replace(path)
