"""How fast training batches are made, and what each part of that costs.

    python benchmarks/data_pipeline.py                         # rendered scenes
    python benchmarks/data_pipeline.py --root path/to/dataset  # files, LEVIR layout

A training step has to wait for its batch if making one takes longer than the step.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from zzhnet_jax.data.config import AugmentConfig, DataConfig
from zzhnet_jax.data.pipeline import training_batches
from zzhnet_jax.data.sources import open_source
from zzhnet_jax.data.transforms import augment, normalize
from zzhnet_jax.errors import UserError


def best_milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Shortest processor time of one call: the least disturbed by what else the machine does."""
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        work()
        times.append(time.thread_time() - start)
    return 1000.0 * min(times)


def parts(config: DataConfig) -> dict[str, float]:
    """Milliseconds of one core for each part of making one batch, cache filled."""
    source = open_source(config, "train")
    count = config.batch_size
    pairs = [source[index % len(source)] for index in range(count)]

    def augmented(augmentation: AugmentConfig) -> list[np.ndarray]:
        out = []
        for index, pair in enumerate(pairs):
            pre, post, _ = augment(
                pair["pre"],
                pair["post"],
                pair["label"],
                name=pair["name"],
                crop_size=config.crop_size,
                config=augmentation,
                rng=np.random.default_rng(index),
            )
            out += [pre, post]
        return out

    images = augmented(config.augmentation)
    fresh = open_source(DataConfig(**{**vars(config), "cache_megabytes": 0}), "train")
    return {
        "read or render": best_milliseconds(
            lambda: [fresh[index % len(fresh)] for index in range(count)], 5
        ),
        "crop only": best_milliseconds(lambda: augmented(AugmentConfig.off()), 20),
        "augment": best_milliseconds(lambda: augmented(config.augmentation), 20),
        "normalise": best_milliseconds(
            lambda: [normalize(image, config.mean, config.std) for image in images], 20
        ),
    }


def throughput(config: DataConfig, batches: int) -> float:
    """Milliseconds between batches taken as fast as they come, after the first epoch."""
    source = open_source(config, "train")
    stream = training_batches(source, config, seed=0)
    for _ in range(len(source) // config.batch_size + 1):
        next(stream)
    start = time.perf_counter()
    for _ in range(batches):
        next(stream)
    elapsed = time.perf_counter() - start
    stream.close()
    return 1000.0 * elapsed / batches


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", help="folder of a dataset; rendered scenes if not given")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--crop-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--batches", type=int, default=50)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    try:
        config = DataConfig(
            source="folder" if arguments.root else "synthetic",
            root=arguments.root,
            batch_size=arguments.batch_size,
            crop_size=arguments.crop_size,
            workers=arguments.workers,
        )
        figures = parts(config)
        figures["between batches"] = throughput(config, arguments.batches)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = f"{config.batch_size} pairs of {config.crop_size}x{config.crop_size}"
    print(f"milliseconds for {size}, {config.workers} workers")
    for name, value in figures.items():
        print(f"{name:<16} {value:8.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"batch": size, **figures}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
