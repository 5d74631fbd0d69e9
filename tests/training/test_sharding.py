"""Where arrays lie, from shapes alone, on a mesh of devices that need not be there."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from zzhnet_jax.errors import ConfigError
from zzhnet_jax.models import functional
from zzhnet_jax.models.placement import Placement
from zzhnet_jax.training.config import ExperimentConfig, MeshConfig, ModelSpec
from zzhnet_jax.training.program import model_builder
from zzhnet_jax.training.rules import DEFAULT_RULES, rules_for
from zzhnet_jax.training.sharding import check_batch, computed, stored

AXES = ("data", "fsdp", "tensor", "spatial")


def axes(sharding):
    """Mesh axes of each axis, several joined by "+"; whole axes at the end left out."""
    parts = ["+".join(p) if isinstance(p, tuple) else p for p in sharding.spec]
    while parts and not parts[-1]:
        parts.pop()
    return tuple(part or None for part in parts)


def mesh_of(**sizes):
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)


@pytest.mark.parametrize(
    ("path", "shape", "kept", "used"),
    [
        ("blocks.0.op.in_proj.kernel", (64, 128), ("fsdp", "tensor"), (None, "tensor")),
        ("blocks.0.op.out_proj.kernel", (128, 64), ("tensor", "fsdp"), ("tensor",)),
        ("cssm.0.scan.in_proj.kernel", (64, 128), ("fsdp", "tensor"), (None, "tensor")),
        ("blocks.0.mlp.fc2.kernel", (256, 64), ("tensor", "fsdp"), ("tensor",)),
        ("blocks.0.op.scan.A_log", (4, 128, 16), (None, "tensor+fsdp"), (None, "tensor")),
        ("head.kernel", (3, 3, 96, 32), (None, None, "fsdp"), ()),
        ("decayed", (4096,), ("fsdp",), ()),
        ("norm.scale", (96,), (), ()),
        ("blocks.0.op.in_proj.kernel", (63, 129), (), ()),
    ],
)
def test_parameters_follow_the_table(path, shape, kept, used):
    mesh = mesh_of(fsdp=4, tensor=2)
    assert axes(stored(path, shape, mesh, DEFAULT_RULES, over=("fsdp",))) == kept
    assert axes(computed(path, shape, mesh, DEFAULT_RULES)) == used


def test_the_optimizers_state_may_be_split_over_data_too():
    mesh = mesh_of(data=4)
    where = stored("x.kernel", (64, 128), mesh, DEFAULT_RULES, over=("fsdp", "data"))
    assert axes(where) == (None, "data")
    assert axes(stored("x.kernel", (64, 128), mesh, DEFAULT_RULES, over=("fsdp",))) == ()


@pytest.mark.parametrize("network", ["zzhnet_nano", "mambabcd_tiny"])
def test_every_rule_finds_parameters_in_a_real_network(network):
    _, params, _ = functional.abstract(model_builder(ModelSpec(network)))
    paths = [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]
    ]
    found = {rule for rule in map(rules_for(network).of, paths) if rule is not None}
    assert {rule.pattern for rule in found} >= {
        r"in_proj\.kernel", r"out_proj\.kernel", r"mlp\.fc1\.kernel", r"mlp\.fc2\.kernel",
        r"scan\.x_proj", r"scan\.dt_proj", r"scan\.(dt_bias|A_log|D)",
    }  # fmt: skip
    assert all("_proj" not in path or rules_for(network).of(path) for path in paths)


def test_the_table_can_be_shown():
    rows = DEFAULT_RULES.rows()
    assert ("parameter", r"mlp\.fc1\.kernel", "fsdp, tensor") in rows
    assert ("activation", "rows", "spatial") in rows


def test_activations_are_split_by_the_names_of_their_axes_where_that_is_even():
    place = Placement(mesh_of(data=2, fsdp=2, spatial=2), DEFAULT_RULES.activations)
    spec = place.spec("batch rows columns channels", (8, 8, 6, 3))
    assert spec == PartitionSpec(("data", "fsdp"), ("spatial",), None, None)
    assert place.spec("batch rows columns", (6, 5, 4)) == PartitionSpec(None, None, None)


def test_uneven_batches_and_crops_are_refused():
    data = ExperimentConfig().data
    assert (data.batch_size, data.crop_size) == (8, 256)
    check_batch(ExperimentConfig(), mesh_of(data=2, fsdp=4, spatial=2))
    with pytest.raises(ConfigError, match=r"data\.batch_size = 8: .* mesh\.data x mesh\.fsdp = 3"):
        check_batch(ExperimentConfig(), mesh_of(data=3))
    with pytest.raises(ConfigError, match=r"data\.crop_size = 256: .* mesh\.spatial = 3"):
        check_batch(ExperimentConfig(), mesh_of(spatial=3))
    with pytest.raises(ConfigError, match=r"data\.crop_size = 256: .* at least 16 times it"):
        check_batch(ExperimentConfig(), mesh_of(spatial=32))


def test_few_rows_are_not_split():
    """XLA gets gradients of convolutions wrong where a device has one or two rows."""
    place = Placement(mesh_of(spatial=4), DEFAULT_RULES.activations)
    assert place.spec("rows columns", (16, 16)) == PartitionSpec(("spatial",), None)
    assert place.spec("rows columns", (8, 16)) == PartitionSpec(None, None)


def test_one_axis_may_take_what_is_left():
    assert MeshConfig(data=2, fsdp=1, tensor=1, spatial=-1).spatial == -1
    with pytest.raises(ConfigError, match=r"mesh\.spatial = -1: .*mesh\.fsdp is -1 too"):
        MeshConfig(data=2, fsdp=-1, spatial=-1)
    assert np.prod([getattr(MeshConfig(data=1), axis) for axis in AXES]) == 1
