"""What a network costs before anyone runs it: parameters, operations, activation memory.

Everything is counted from abstract shapes; nothing is computed, compiled or allocated.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr

from zzhnet_jax.models import functional, registry

# Primitives that move or compare values but compute none.
_FREE = frozenset(
    "reshape broadcast_in_dim transpose slice dynamic_slice dynamic_update_slice concatenate pad"
    " squeeze rev convert_element_type gather scatter select_n copy split iota stop_gradient"
    " copy_p optimization_barrier expand_dims bitcast_convert_type".split()
)


@dataclass(frozen=True)
class Cost:
    """Costs of one forward pass.

    Attributes:
      parameters: trained values.
      macs: multiply-adds of convolutions and matrix products alone, the figure that papers on
        change detection call FLOPs.
      flops: every floating-point operation, two per multiply-add, with the selective scan counted
        step by step.
      activation_bytes: what a training step keeps for the backward pass, parameters excluded,
        before the compiler fuses anything.
    """

    parameters: int
    macs: int
    flops: int
    activation_bytes: int


def network_cost(
    name: str,
    *,
    height: int = 256,
    width: int = 256,
    num_classes: int = 2,
    overrides: dict[str, Any] | None = None,
) -> Cost:
    """Counts the cost of one image pair (or image) of the given size through a network.

    Raises:
      ConfigError: no such network or field.
    """
    config = registry.override(registry.preset(name), overrides or {})
    config = replace_everywhere(config, "scan_implementation", "sequential")

    def build(rngs: nnx.Rngs) -> nnx.Module:
        return registry.build(name, config, num_classes, rngs=rngs)

    graphdef, params, stats = functional.abstract(build)
    image = jax.ShapeDtypeStruct(
        (1, height, width, getattr(config, "encoder", config).in_chans), jnp.float32
    )
    images = (image,) * registry.num_images(name)

    def forward(params: functional.Tree, *images: jax.Array) -> Any:
        return functional.apply(graphdef, params, stats_zeros(stats), *images)[0]

    macs, others = _count(jax.make_jaxpr(forward)(params, *images).jaxpr)
    residuals = jax.eval_shape(
        lambda p, *x: jax.vjp(lambda p: forward(p, *x), p)[1], params, *images
    )
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals)]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return Cost(count, macs, 2 * macs + others, max(sum(sizes) - 4 * count, 0))


def stats_zeros(stats: functional.Tree) -> functional.Tree:
    """Zeros in the shapes of abstract batch statistics."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), stats)


def replace_everywhere(config: Any, field: str, value: Any) -> Any:
    """A copy of a nested frozen config in which every field called `field` has this value."""
    changes = {}
    for f in dataclasses.fields(config):
        old = getattr(config, f.name)
        if f.name == field:
            changes[f.name] = value
        elif dataclasses.is_dataclass(old):
            changes[f.name] = replace_everywhere(old, field, value)
    return dataclasses.replace(config, **changes)


def _count(jaxpr: Jaxpr) -> tuple[int, int]:
    """Multiply-adds and other floating-point operations of a jaxpr."""
    macs = others = 0
    for eqn in jaxpr.eqns:
        inner = [_count(j) for value in eqn.params.values() for j in _jaxprs(value)]
        if eqn.primitive.name == "cond":
            inner = [max(inner, key=lambda cost: 2 * cost[0] + cost[1])]
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        macs += times * sum(cost[0] for cost in inner)
        others += times * sum(cost[1] for cost in inner)
        if not inner:
            own = _own_cost(eqn)
            macs, others = macs + own[0], others + own[1]
    return macs, others


def _own_cost(eqn: Any) -> tuple[int, int]:
    output = eqn.outvars[0].aval
    name = eqn.primitive.name
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return output.size * math.prod(eqn.invars[0].aval.shape[i] for i in contracted), 0
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval
        channels_out = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
        return output.size * (kernel.size // channels_out), 0
    if name in _FREE or not jnp.issubdtype(output.dtype, jnp.floating):
        return 0, 0
    if name.startswith("reduce_"):
        return 0, eqn.invars[0].aval.size
    return 0, output.size


def _jaxprs(value: Any) -> list[Jaxpr]:
    if isinstance(value, ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, Jaxpr):
        return [value]
    if isinstance(value, (tuple, list)):
        return [jaxpr for item in value for jaxpr in _jaxprs(item)]
    return []
