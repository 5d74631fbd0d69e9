"""Trains a small network, or nano, on rendered scenes; for tests that need their own process.

small_run.py RUN_DIR [--steps 12] [--kill-at 7] [--meshes data=8 ...] [--nano] ...
"""

import argparse
import dataclasses
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from zzhnet_jax.cli import run
from zzhnet_jax.data.config import AugmentConfig, DataConfig, SyntheticConfig
from zzhnet_jax.data.sources import open_source
from zzhnet_jax.models.registry import ModelCard
from zzhnet_jax.training.config import (
    DistributedConfig,
    ExperimentConfig,
    LossConfig,
    MeshConfig,
    ModelSpec,
    OptimConfig,
    TrainConfig,
)
from zzhnet_jax.training.logging import MetricsLog
from zzhnet_jax.training.loop import train
from zzhnet_jax.training.processes import connect
from zzhnet_jax.training.validation import validate


@dataclasses.dataclass(frozen=True)
class SmallConfig:
    width: int = 48
    drop: float = 0.2


class SmallNetwork(nnx.Module):
    """Convolutions, with what makes training awkward: batch statistics and dropout."""

    def __init__(self, config: SmallConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.card = ModelCard("small", 2)
        width = config.width
        self.first = nnx.Conv(6, width, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(width, use_running_average=True, rngs=rngs)
        self.second = nnx.Conv(width, width, (3, 3), rngs=rngs)
        self.head = nnx.Conv(width, 8, (1, 1), rngs=rngs)
        self.drop = nnx.Dropout(config.drop, deterministic=True)

    def __call__(self, pre, post, *, key=None):
        x = jnp.concatenate([pre, post], -1)
        x = nnx.relu(self.norm(self.first(x)))
        x = self.drop(nnx.relu(self.second(x)), rngs=key)
        b, h, w, _ = x.shape
        x = self.head(x).reshape(b, h, w, 2, 2, 2)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, 2)


def build(rngs: nnx.Rngs, config: SmallConfig = SmallConfig()) -> SmallNetwork:
    return SmallNetwork(config, rngs=rngs)


def experiment(run_dir, **train_fields) -> ExperimentConfig:
    """Eight pairs a step of 20 scenes, validated on 5."""
    fields = {
        "steps": 12,
        "log_every": 1,
        "validate_every": 10,
        "checkpoint_every": 5,
    } | train_fields
    return ExperimentConfig(
        run_dir=str(run_dir),
        data=DataConfig(
            source="synthetic",
            batch_size=8,
            crop_size=32,
            augmentation=AugmentConfig(),
            synthetic=SyntheticConfig(size=48, train_pairs=20, val_pairs=5, test_pairs=1),
        ),
        train=TrainConfig(loss=LossConfig(cross_entropy=1.0, lovasz=0.5), pictures=2, **fields),
        optim=OptimConfig(learning_rate=1e-3, ema_decay=0.9),
    )


def kill_at(step: int, checkpoint: Path) -> None:
    """Ends this process without warning when `step` is logged and `checkpoint` is whole."""
    row = MetricsLog.row

    def row_then_die(self, number, split, values):
        row(self, number, split, values)
        if number == step:
            while not checkpoint.exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    MetricsLog.row = row_then_die


def pause(seconds: float) -> None:
    """Takes its time over every logged step, so that something can happen meanwhile."""
    row = MetricsLog.row

    def row_then_rest(self, number, split, values):
        row(self, number, split, values)
        time.sleep(seconds)

    MetricsLog.row = row_then_rest


def main(arguments) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--checkpoint-every", type=int, default=5)
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--meshes", nargs="+", help="a run for each, in a folder of that name")
    parser.add_argument("--nano", action="store_true")
    parser.add_argument("--file-limit", type=int)
    parser.add_argument("--mesh", default="data=-1", help="of a single run")
    parser.add_argument("--coordinator")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    parser.add_argument("--validate", action="store_true", help="judge fresh weights, print it")
    parser.add_argument("--pause", type=float, default=0, help="seconds after every logged step")
    given = parser.parse_args(arguments)
    config = experiment(given.run_dir, steps=given.steps, checkpoint_every=given.checkpoint_every)
    builder = build
    if given.nano:
        # What takes less to compile: one encoder for both dates, one CSSM, the scan traced fastest.
        overrides = {"depths": (1, 1, 1, 1), "width": 8, "decoder_width": 8}
        overrides |= {"num_shared_stages": 4, "cssm_stages": (3,), "head": "bilinear"}
        overrides |= {"block": {"ssm": {"scan_implementation": "sequential"}}}
        config = dataclasses.replace(config, model=ModelSpec("zzhnet_nano", overrides=overrides))
        builder = None
    if given.kill_at:
        kill_at(given.kill_at, given.run_dir / "checkpoints" / "5")
    if given.file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (given.file_limit, resource.RLIM_INFINITY))
    if given.pause:
        pause(given.pause)
    connect(DistributedConfig(given.coordinator, given.num_processes, given.process_id))
    if given.validate:
        result = validate(
            build(nnx.Rngs(0)), open_source(config.data, "val"), config.data, pictures=0
        )
        print("figures", json.dumps(result.metrics))
        return 0
    if given.meshes is None:
        train(dataclasses.replace(config, mesh=mesh_of(given.mesh)), build=builder)
    for mesh in given.meshes or []:
        run_dir = str(given.run_dir / mesh)
        train(dataclasses.replace(config, run_dir=run_dir, mesh=mesh_of(mesh)), build=builder)
    return 0


def mesh_of(text) -> MeshConfig:
    """From "data=2,fsdp=4"."""
    axes = dict(axis.split("=") for axis in text.split(","))
    return MeshConfig(**{name: int(size) for name, size in axes.items()})


if __name__ == "__main__":
    # TensorBoard's writer imports PyTorch where that is installed, for 3 s and nothing.
    sys.modules["torch"] = None
    sys.exit(run(main, sys.argv[1:]))
