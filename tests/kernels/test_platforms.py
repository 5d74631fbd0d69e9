"""Which branches are traced, and which one a program keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from zzhnet_jax.kernels.platforms import by_platform

BRANCHES = {"cpu": 2.0, "tpu": 3.0, "cuda": 5.0, "default": 7.0}


@pytest.fixture
def scaled():
    """A function that scales by a number of its platform, and the platforms it was traced for."""
    traced = []

    def branch(name):
        def scale(x):
            traced.append(name)
            return BRANCHES[name] * x

        return scale

    return lambda x: by_platform(x, **{name: branch(name) for name in BRANCHES}), traced


def described(platform, kind=""):
    """A mesh of one device that need not be here."""
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    return AbstractMesh((1,), ("device",), (AxisType.Auto,), abstract_device=device)


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [
        (described("cpu"), "cpu"),
        (described("tpu", "TPU v5 lite"), "tpu"),
        (described("gpu", "NVIDIA H100 80GB HBM3"), "cuda"),
        (described("gpu", "AMD Instinct MI300X"), "default"),
    ],
    ids=["cpu", "tpu", "nvidia", "amd"],
)
def test_only_the_branch_of_a_known_platform_is_traced(mesh, expected, scaled):
    function, traced = scaled
    with use_abstract_mesh(mesh):
        jaxpr = jax.make_jaxpr(jax.grad(function))(1.0)
    assert set(traced) == {expected}
    assert jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, 1.0) == [BRANCHES[expected]]


def test_every_branch_is_traced_where_the_platform_is_not_known(scaled):
    function, traced = scaled
    program = jax.jit(function).trace(jax.ShapeDtypeStruct((), jnp.float32))
    assert set(traced) == set(BRANCHES)
    for platform in ("cpu", "tpu", "cuda"):
        text = program.lower(lowering_platforms=(platform,)).as_text()
        kept = [name for name, factor in BRANCHES.items() if f"dense<{factor:.6e}>" in text]
        assert kept == [platform]


def test_a_compiled_function_is_traced_again_for_another_platform(scaled):
    function, traced = scaled
    function = jax.jit(function)
    devices = np.array(jax.local_devices(backend="cpu")[:1])
    with jax.set_mesh(jax.sharding.Mesh(devices, ("device",), axis_types=(AxisType.Auto,))):
        assert function(1.0) == BRANCHES["cpu"]
    with use_abstract_mesh(described("tpu")):
        function.trace(1.0)
    assert traced == ["cpu", "tpu"]
