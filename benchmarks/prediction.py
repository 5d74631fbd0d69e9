"""Time and peak memory of predicting one large pair, by the number of tiles computed at a time.

    python benchmarks/prediction.py
    python benchmarks/prediction.py --run runs/x --side 4096 --batches 1 8

Every batch size runs in a process of its own, since a process's peak memory never falls.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from zzhnet_jax.errors import UserError


def measure(batch: int, side: int, tile: int, overlap: int, run: str | None, name: str) -> dict:
    """Figures of one batch size: seconds with and without compilation, megabytes beyond start."""
    from flax import nnx

    from zzhnet_jax import create_model, load_model
    from zzhnet_jax.inference import Predictor, Tiling

    model = load_model(run) if run else create_model(name, rngs=nnx.Rngs(0))
    pre, post = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    predictor = Predictor(model, tile_size=tile, overlap=overlap, batch_size=batch)
    before = peak_megabytes()
    start = time.perf_counter()
    predictor.probability(pre[:tile, :tile], post[:tile, :tile])
    compiled = time.perf_counter()
    predictor.probability(pre, post)
    end = time.perf_counter()
    tiles = len(Tiling((side, side), tile, overlap))
    return {
        "tile batch": batch,
        "tiles": tiles,
        "first call s": round(compiled - start, 2),
        "seconds": round(end - compiled, 2),
        "ms a tile": round(1000 * (end - compiled) / tiles, 1),
        "peak MB": round(peak_megabytes()),
        "MB before": round(before),
    }


def peak_megabytes() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", help="run or model folder; a fresh network if not given")
    parser.add_argument("--model", default="zzhnet_nano", help="the fresh network's name")
    parser.add_argument("--side", type=int, default=2048, help="height and width of the pair")
    parser.add_argument("--tile-size", type=int, default=256)
    parser.add_argument("--overlap", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    rows = []
    context = multiprocessing.get_context("spawn")
    for batch in args.batches:
        job = (batch, args.side, args.tile_size, args.overlap, args.run, args.model)
        try:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                rows.append(pool.submit(measure, *job).result())
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        if len(rows) == 1:
            print("  ".join(rows[0]))
        print("  ".join(f"{value:>{len(key)}}" for key, value in rows[-1].items()), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
