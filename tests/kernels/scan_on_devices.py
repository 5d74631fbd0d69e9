"""Scans split over eight forced host devices, each part run by name: `scan_on_devices.py PART`.

No test module: the devices must be forced before JAX starts, so `test_scan_on_devices.py` runs it
in a process of its own.
"""

import re
import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from conftest import INTERPRETED, scan_arguments
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from zzhnet_jax.kernels.cross_scan import selective_scan_2d
from zzhnet_jax.kernels.cross_scan.fused import fused_scan
from zzhnet_jax.kernels.selective_scan import Tile, selective_scan
from zzhnet_jax.kernels.selective_scan.api import IMPLEMENTATIONS
from zzhnet_jax.kernels.selective_scan.base import Kernel
from zzhnet_jax.kernels.selective_scan.mesh_split import OPERANDS, MeshAxes
from zzhnet_jax.kernels.selective_scan.partition import _Body, _Half, differentiable
from zzhnet_jax.kernels.selective_scan.reference import sequential_scan

KEPT = 3


def forward(*operands, tile, interpret, **flags):
    y, state = sequential_scan(*operands, **flags)
    b, d, n = state.shape
    return y, state, jnp.ones((b, KEPT, n, d))


def backward(*arrays, tile, interpret, **flags):
    *operands, kept, y, state = arrays
    b, d, n = state.shape
    assert kept.shape == (b, KEPT, n, d)
    return jax.vjp(lambda *x: sequential_scan(*x, **flags), *operands)[1]((y, state))


# Opaque to XLA as any kernel is, but quick to compile.
KERNEL = Kernel(forward, backward, lambda length, n, tile: KEPT)
OPAQUE = differentiable(KERNEL)
FLAGS = dict(delta_softplus=True, reverse=False)


def given(**sizes):
    arguments = scan_arguments(**{"length": 8, "n": 2} | sizes)
    return {k: jnp.asarray(x) for k, x in zip(OPERANDS, arguments, strict=True)}


def make_mesh(*sizes):
    return jax.make_mesh(sizes, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def specs(groups, channel_parts):
    matrix = P("data") if groups % channel_parts else P("data", None, "model")
    sequence, channel = P("data", None, "model"), P("model")
    values = (sequence, sequence, channel, matrix, matrix, channel, channel, P("data", "model"))
    return dict(zip(OPERANDS, values, strict=True))


def gradient(scan):
    """Compiled: y, the last state and all gradients of a sum that depends on both."""

    def loss(x):
        y, state = scan(*(x[k] for k in OPERANDS))
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(state) * state), (y, state)

    return jax.jit(jax.grad(loss, has_aux=True))


def assert_equal(got, expected, message):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5, err_msg=message)


def collectives(compiled):
    """Bytes that each kind of collective receives, from the compiled text."""
    total = {}
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", compiled.as_text())
    for types, kind in found:
        for dimensions in re.findall(r"f32\[([\d,]*)\]", types):
            size = 4 * int(np.prod([int(x) for x in dimensions.split(",") if x]))
            total[kind] = total.get(kind, 0) + size
    return total


def jit():
    """A kernel in a jitted program on a mesh: nothing but gradients of what is shared travels."""
    for sizes, groups in (((8, 1), 1), ((4, 2), 1), ((2, 4), 4), ((2, 4), 8), ((1, 8), 2)):
        x = given(b=8, d=16, groups=groups)
        placed = {
            k: jax.device_put(x[k], NamedSharding(make_mesh(*sizes), spec))
            for k, spec in specs(groups, sizes[1]).items()
        }
        run = gradient(partial(OPAQUE, **FLAGS)).lower(placed).compile()
        got = run(placed)
        assert_equal(got, gradient(partial(sequential_scan, **FLAGS))(x), f"{sizes} {groups}")
        if groups % sizes[1] == 0 or groups == 1:  # or else B cannot be split as u is
            assert collectives(run).keys() == {"all-reduce"}, (sizes, groups, collectives(run))
            assert got[1][0].sharding.is_equivalent_to(placed["u"].sharding, 3)


def declared():
    """The form for TPUs, where XLA does not call back: split as declared, or as guessed."""
    for sizes, groups in (((8, 1), 1), ((4, 2), 1), ((2, 4), 4), ((1, 8), 2)):
        x = given(b=8, d=16, groups=groups)
        expected = gradient(partial(sequential_scan, **FLAGS))(x)
        for axes in (MeshAxes(("data",), ("model",)), None):
            flags = tuple((FLAGS | dict(tile=None, interpret=False)).items())

            def half(backward, names, results, *values, axes=axes, flags=flags, sizes=sizes):
                body = _Body(_Half(KERNEL, backward, flags), names, results, axes)
                return jax.jit(body.over(make_mesh(*sizes)))(*values)

            y, state, kept = half(False, OPERANDS, ("y", "state", "kept"), *x.values())
            rest = (kept, jnp.cos(y), jnp.cos(state) - jnp.sin(state) * state)
            names = (*OPERANDS, "kept", "y", "state")
            gradients = half(True, names, OPERANDS, *x.values(), *rest)
            gradients = dict(zip(OPERANDS, gradients, strict=True))
            assert_equal((gradients, (y, state)), expected, f"{sizes} {groups} {axes}")


def shard_map(name):
    """Every implementation inside `shard_map`, over batch, channels and both."""
    for sizes, groups in (((8, 1), 1), ((1, 8), 8), ((2, 4), 4)):
        x, layout = given(b=8, d=8, groups=groups), specs(groups, sizes[1])
        expected = gradient(partial(sequential_scan, **FLAGS))(x)
        scan = jax.shard_map(
            lambda *x: public(name, *x),
            mesh=make_mesh(*sizes),
            in_specs=tuple(layout[k] for k in OPERANDS),
            out_specs=(layout["u"], layout["initial_state"]),
            check_vma=name not in INTERPRETED,  # pallas_call's interpreter knows nothing of it
        )
        assert_equal(gradient(scan)(x), expected, f"{name} {sizes}")


def sequence(name):
    """The length split over all devices: equal, and no more travels for longer sequences."""
    mesh = jax.make_mesh((8,), ("space",), axis_types=(AxisType.Auto,))
    along = P(None, "space")
    layout = tuple(along if k in ("u", "delta", "B", "C") else P() for k in OPERANDS)
    for reverse in (False, True):
        travels = []
        for length in (16, 64):
            x = given(length=length, d=8, groups=2)
            scan = jax.shard_map(
                partial(public, name, reverse=reverse, axis_name="space"),
                mesh=mesh,
                in_specs=layout,
                out_specs=(along, P()),
                check_vma=name not in INTERPRETED,
            )
            run = gradient(scan).lower(x).compile()
            expected = gradient(partial(sequential_scan, delta_softplus=True, reverse=reverse))(x)
            assert_equal(run(x), expected, f"{name} {length} {reverse}")
            travels.append(collectives(run))
            if name in INTERPRETED:
                break
        assert travels[0] and all(one == travels[0] for one in travels), travels


def public(name, u, delta, A, B, C, D, delta_bias, initial_state, *, reverse=False, axis_name=None):
    return selective_scan(
        *(u, delta, A, B, C, D), delta_bias=delta_bias, initial_state=initial_state,
        delta_softplus=True, return_final_state=True, reverse=reverse, implementation=name,
        axis_name=axis_name,
    )  # fmt: skip


def fused():
    """The two-dimensional kernels in a jitted program on a mesh: only shared gradients travel."""
    draw, mesh = np.random.default_rng(0).standard_normal, make_mesh(4, 2)
    image, route = P("data", None, None, "model"), P("data", None, None, None, "model")
    weights, matrix = P(None, "model"), P("data")
    layout = [
        *((image, (4, 2, 3, 2)), (route, (4, 2, 3, 4, 2)), (weights, (4, 2, 1))),
        *(
            (matrix, (4, 2, 3, 4, 1)),
            (matrix, (4, 2, 3, 4, 1)),
            (weights, (4, 2)),
            (weights, (4, 2)),
        ),
    ]
    x = [jnp.asarray(draw(shape), jnp.float32) for _, shape in layout]
    x[2] = -jnp.exp(x[2])
    placed = [
        jax.device_put(value, NamedSharding(mesh, spec))
        for value, (spec, _) in zip(x, layout, strict=True)
    ]

    def gradients(scan):
        options = dict(delta_softplus=True, pattern="cross")
        return jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(scan(*x, **options)))))

    def one_by_one(*x, **options):
        *x, bias = x
        return selective_scan_2d(*x, delta_bias=bias, implementation="sequential", **options)

    run = gradients(partial(fused_scan, name="pallas_tpu", interpret=True)).lower(placed).compile()
    assert_equal(run(placed), gradients(one_by_one)(x), "fused")
    assert collectives(run).keys() == {"all-reduce"}, collectives(run)


def interpret():
    """Makes Pallas kernels run here, in small blocks."""
    for name in INTERPRETED:
        item = IMPLEMENTATIONS[name]
        scan = partial(item.scan, interpret=True, tile=Tile(8))
        IMPLEMENTATIONS[name] = replace(item, scan=scan, unavailable=lambda: None, tiled=False)


if __name__ == "__main__":
    interpret()
    part, *arguments = sys.argv[1:]
    arguments = [None if x == "None" else x for x in arguments]
    assert jax.device_count() == 8
    parts = (jit, declared, shard_map, sequence, fused)
    {function.__name__: function for function in parts}[part](*arguments)
    print("passed")
