"""The Pallas scan for TPUs: blocks, races, and compilation for the TPUs there are.

What every implementation is held to is in test_selective_scan.py.
"""

import importlib.util
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from zzhnet_jax.kernels.selective_scan.base import Tile
from zzhnet_jax.kernels.selective_scan.pallas_tpu import (
    backward,
    forward,
    pallas_tpu_scan,
    unsupported,
)
from zzhnet_jax.kernels.selective_scan.pallas_tpu_plan import Plan

sys.path.insert(0, str(Path(__file__).parent))

import gpu_cases
from conftest import scan_arguments

ROOT = Path(__file__).parents[2]
TILE = Tile(8)

# How channels, groups and sequences fall into blocks: see `Plan`.
BLOCKS = {
    "sequences side by side": dict(b=3, length=9, d=256, n=2, groups=1),
    "a ragged tile": dict(b=1, length=19, d=200, n=1, groups=1, reverse=True),
    "groups inside a tile": dict(b=2, length=9, d=130, n=1, groups=5),
    "a group over several blocks": dict(b=1, length=9, d=1536, n=1, groups=1),
    "several groups a block": dict(b=1, length=9, d=1280, n=1, groups=5),
    "groups that straddle tiles": dict(b=1, length=9, d=1100, n=1, groups=2, reverse=True),
    "several sets of states": dict(b=1, length=17, d=8, n=17, groups=1),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name):
    """Values and all gradients against the float64 oracle."""
    scan = partial(pallas_tpu_scan, interpret=True)
    gpu_cases.assert_small(gpu_cases.errors(scan, BLOCKS[name], tile=TILE), BLOCKS[name])


def test_narrow_tile():
    """A block of fewer channels than there are, and of more steps than are kept apart."""
    case = dict(b=1, length=40, d=256, n=1, groups=2)
    scan = partial(pallas_tpu_scan, interpret=True)
    gpu_cases.assert_small(gpu_cases.errors(scan, case, tile=Tile(24, channels=128)), case)


RACES = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)


def test_no_race(capfd):
    """Programs that run at the same time, on two cores, touch nothing in common.

    The halves are called by themselves: the detector's effects do not pass a deferred call.
    """
    case = scan_arguments(b=2, length=9, d=8, n=1, groups=1)
    operands = [jnp.asarray(x) for x in case]
    flags = dict(delta_softplus=True, reverse=False, tile=Tile(8, channels=128))

    def halves(interpret):
        y, state, kept = forward(*operands, **flags, interpret=interpret)
        return y, state, *backward(*operands, kept, y, state, **flags, interpret=interpret)

    for got, expected in zip(halves(RACES), halves(True), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert "RACE DETECTED" not in capfd.readouterr().out


def test_races_are_detected(capfd):
    """Two programs that write the same block, to know that the check above can fail."""

    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...] + pl.program_id(0)

    call = pl.pallas_call(
        kernel,
        grid=(2,),
        in_specs=[pl.BlockSpec((8, 128), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)),
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=RACES,
    )
    jax.block_until_ready(call(jnp.zeros((8, 128))))
    assert "RACE DETECTED" in capfd.readouterr().out


@pytest.mark.parametrize(
    "shape, slots, sequences",
    [
        ((8, 3136, 192, 1, 1), 8, 4),  # VMamba-T, stage 1: two tiles of four sequences
        ((8, 49, 1536, 1, 1), 6, 1),  # stage 4: two blocks of six tiles, none half empty
        ((1, 4096, 768, 4, 1), 6, 1),
        ((3, 64, 96, 1, 16), 3, 3),
    ],
)
def test_slots_are_filled(shape, slots, sequences):
    plan = Plan(*shape, delta_softplus=True, reverse=False)
    assert (plan.slots, plan.sequences) == (slots, sequences)
    assert plan.steps % plan.chunk == 0
    assert (plan.kept - 1) * plan.chunk < shape[1] <= plan.kept * plan.chunk


def test_what_it_cannot_take():
    assert unsupported(*gpu_cases.operand_types(n=64)) is None
    assert "65" in unsupported(*gpu_cases.operand_types(n=65))
    assert "columns" in unsupported(*gpu_cases.operand_types(n=16, groups=24))
    wide = (jax.ShapeDtypeStruct((2, 100, 96), jnp.float64), *gpu_cases.operand_types()[1:])
    assert "float64" in unsupported(*wide)


COMPILE = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from zzhnet_jax.kernels.selective_scan.pallas_tpu import forward
from zzhnet_jax.kernels.selective_scan.pallas_tpu_vjp import backward

target, dtype = sys.argv[1], jnp.dtype(sys.argv[2])
topology = topologies.get_topology_desc(platform="tpu", topology_name=target)
one = NamedSharding(Mesh(np.array(topology.devices)[:1], ("x",)), PartitionSpec())
flags = dict(delta_softplus=True, reverse=True)

def of(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=one)

for b, l, d, g, n in ((2, 100, 200, 4, 1), (1, 64, 1024, 1, 16), (1, 40, 300, 1, 20)):
    f32 = jnp.float32
    operands = (of(dtype, b, l, d), of(dtype, b, l, d), of(f32, d, n), of(dtype, b, l, g, n),
                of(dtype, b, l, g, n), of(f32, d), of(f32, d), of(f32, b, d, n))
    kept = jax.eval_shape(lambda *x: forward(*x, **flags), *operands)[2]
    jax.jit(lambda *x: forward(*x, **flags)).lower(*operands).compile()
    gradients = (of(f32, *kept.shape), of(dtype, b, l, d), of(f32, b, d, n))
    jax.jit(lambda *x: backward(*x, **flags)).lower(*operands, *gradients).compile()
print("compiled")
"""


@pytest.mark.aot
@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        *(("v5e:2x2", dtype) for dtype in ("float32", "bfloat16", "float16")),
        *((target, "bfloat16") for target in ("v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")),
    ],
)
def test_compiles_for(target, dtype):
    """Forward and backward, with ragged blocks, groups inside tiles and many states."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs the TPU compiler: make test-aot has it")
    settings = dict(
        ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_SKIP_MDS_QUERY="1", JAX_PLATFORMS="cpu",
        TPU_ACCELERATOR_TYPE="v5litepod-4", TPU_WORKER_HOSTNAMES="localhost",
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, target, dtype],
        cwd=ROOT, env=os.environ | settings, capture_output=True, text=True,
    )  # fmt: skip
    assert "compiled" in done.stdout, done.stderr[-3000:]
