"""Takes 20 steps of small real networks on one device and on meshes of eight; a process of its own.

mesh_losses.py OUT NETWORK PARTS: writes the losses of every mesh, and what each device held, as
JSON; batches are computed in PARTS.
"""

import dataclasses
import json
import sys

import jax
import numpy as np

from zzhnet_jax.data.config import DataConfig
from zzhnet_jax.models import registry
from zzhnet_jax.models.cost import replace_everywhere
from zzhnet_jax.training.config import (
    ExperimentConfig,
    LossConfig,
    MeshConfig,
    ModelSpec,
    OptimConfig,
    TrainConfig,
)
from zzhnet_jax.training.program import Program
from zzhnet_jax.training.sharding import make_mesh, put_batch

STEPS, CROP = 20, 32
PART = 8  # pairs of a part: one for each device
NETWORKS = {
    # Without drop path, whose draws differ between a batch and its parts.
    "zzhnet": ModelSpec(
        "zzhnet_nano",
        overrides={
            "depths": (1, 1, 1, 1),
            "width": 8,
            "decoder_width": 8,
            "drop_path_rate": 0.0,
            "num_shared_stages": 4,
            "cssm_stages": (3,),
            "head": "bilinear",
        },
    ),
    "mambabcd": ModelSpec(
        "mambabcd_tiny",
        overrides={
            # Four blocks are a loop.
            "encoder": {"depths": (4,), "dims": 8, "drop_path_rate": 0.0},
            "decoder_width": 8,
            "decoder_drop_path": 0.0,
            "arrangements": ("interleave",),
        },
    ),
}
# Those that take least: one has short walks in many blocks, the other a single loop of blocks.
SCANS = {"zzhnet": "sequential", "mambabcd": "chunked"}
MESHES = [
    MeshConfig(data=1),
    MeshConfig(data=8),
    MeshConfig(data=1, fsdp=8),
    MeshConfig(data=2, fsdp=2, tensor=2),
    MeshConfig(data=4, spatial=2),
]


def build(network):
    """The network, without a switch between the scans of platforms to compile."""
    spec = NETWORKS[network]
    config = registry.override(registry.preset(spec.name), spec.overrides)
    config = replace_everywhere(config, "scan_implementation", SCANS[network])
    return lambda rngs: registry.build(spec.name, config, spec.num_classes, rngs=rngs)


def experiment(network, mesh, batch, accumulation):
    return ExperimentConfig(
        model=NETWORKS[network],
        data=DataConfig(batch_size=batch, crop_size=CROP),
        train=TrainConfig(steps=100, accumulation=accumulation, loss=LossConfig(cross_entropy=1)),
        optim=OptimConfig(learning_rate=2e-4, ema_decay=0.9),
        mesh=mesh,
    )


def batches(batch):
    """Random images in which what brightened is change."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        pre, post = rng.normal(size=(2, batch, CROP, CROP, 3)).astype(np.float32)
        label = ((post - pre).mean(-1) > 0.3).astype(np.int32)
        label[rng.random(label.shape) < 0.1] = 255
        # Examples with unlike numbers of labelled pixels, so that means of means would be wrong.
        label[::3, : CROP // 2] = 255
        yield {"pre": pre, "post": post, "label": label}


def initial_state(abstract):
    """Random weights, scales and biases near one: a network's own take long to compile."""
    rng = np.random.default_rng(1)
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    params = {}
    for name, leaf in sorted(abstract.params.items()):
        draw = rng.normal(size=leaf.shape).astype(np.float32)
        params[name] = 1 + 0.1 * draw if name == "undecayed" else 0.2 * draw
    state = dataclasses.replace(state, params=params, ema=params)
    return jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), state, abstract)


def run(program, pairs):
    step = program.lower().compile()
    state = initial_state(program.maker.abstract)
    key, losses, stats = jax.random.key(1), [], []
    for batch in batches(pairs):
        state, metrics = step(state, put_batch(batch, program.mesh), key)
        losses.append(float(metrics["loss"]))
        # After one step: a bias before a norm has a gradient of rounding errors alone, which Adam
        # turns into steps of full length, and running means follow it.
        stats = stats or [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(state.batch_stats)]
    return {"losses": losses, "held": share_of_one_device(state), "stats": stats}


def share_of_one_device(state):
    """The largest share that one device holds of parameters, optimizer state and average."""
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state, state.ema)))
    held = {}
    for leaf in jax.tree.leaves((state.params, state.opt_state, state.ema)):
        for shard in leaf.addressable_shards:
            held[shard.device.id] = held.get(shard.device.id, 0) + shard.data.nbytes
    return max(held.values()) / whole


def main(out, network, parts):
    results = {}
    parts = int(parts)
    batch = parts * PART
    for mesh in MESHES:
        alone = mesh == MESHES[0]
        # Without batch statistics, parts have the losses of a whole batch.
        whole = alone and network == "zzhnet"
        config = experiment(network, mesh, batch, 1 if whole else parts)
        axes = {k: v for k, v in dataclasses.asdict(mesh).items() if k != "shard_optimizer"}
        name = ",".join(f"{axis}={size}" for axis, size in axes.items() if size > 1) or "one"
        devices = make_mesh(mesh, jax.devices()[:1] if alone else None)
        results[f"{name} x{parts}"] = run(Program(config, devices, build(network)), batch)
    with open(out, "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
