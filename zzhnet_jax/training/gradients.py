"""Loss and gradient of a batch, at once or in parts that together give the same.

A part holds every k-th example, so that which examples share a part does not depend on how the
batch is split over devices, and no example changes its device. Terms that are means over pixels
add up: each part's mean counts by its share of the weights. Lovasz and Dice are no sums over
examples; for them all parts' logits are computed first, then the loss and its gradient in the
logits, and last the parts once more, each with its part of that gradient.

What no order of computation can give back is BatchNorm's statistics over the whole batch: each
part is normalised by its own. Drop path and dropout draw anew for each part.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from zzhnet_jax.models.functional import Tree

from .config import LossConfig
from .losses import label_weights, segmentation_loss

Batch = Mapping[str, Array]
Terms = dict[str, Array]
# (parameters, batch statistics, part of a batch, key) -> logits, batch statistics
Forward = Callable[[Any, Tree, Batch, jax.Array], tuple[Array, Tree]]
Result = tuple[Array, Terms, Tree, Any]


def loss_and_gradient(
    forward: Forward,
    config: LossConfig,
    params: Any,
    stats: Tree,
    batch: Batch,
    key: jax.Array,
    *,
    parts: int,
    place: Callable[[Any], Any],
) -> Result:
    """The loss of a batch, its terms, new batch statistics and the gradient of the parameters.

    Args:
      forward: the network in training mode.
      config: weights of the loss terms.
      params: parameters, in the structure that `forward` takes.
      stats: batch statistics.
      batch: `pre`, `post` and `label`, each with the examples first.
      key: of this step.
      parts: how many to compute one after another; they divide the batch evenly.
      place: puts a sum of gradients where it is kept, and returns it.
    """
    if parts == 1:

        def objective(params: Any) -> tuple[Array, tuple[Tree, Terms]]:
            logits, after = forward(params, stats, batch, key)
            total, terms = segmentation_loss(logits, batch["label"], config)
            return total, (after, terms)

        (total, (after, terms)), gradient = jax.value_and_grad(objective, has_aux=True)(params)
        return total, terms, after, gradient
    run = _by_logits if config.lovasz or config.dice else _by_sums
    cut = {name: _cut(array, parts) for name, array in batch.items()}
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(parts))
    return run(forward, config, params, stats, cut, keys, place)


def _cut(array: Array, parts: int) -> Array:
    """(b, ...) -> (parts, b / parts, ...): part i has examples i, i + parts, ..."""
    return jnp.swapaxes(array.reshape(-1, parts, *array.shape[1:]), 0, 1)


def _joined(array: Array) -> Array:
    """(b, ...) back from `_cut`."""
    return jnp.swapaxes(array, 0, 1).reshape(-1, *array.shape[2:])


def _by_sums(
    forward: Forward,
    config: LossConfig,
    params: Any,
    stats: Tree,
    cut: Batch,
    keys: jax.Array,
    place: Callable[[Any], Any],
) -> Result:
    """For terms that are means over pixels."""
    whole = label_weights(_joined(cut["label"]), config)

    def add(carry: tuple[Any, Tree, Terms], given: tuple[Batch, jax.Array]) -> Any:
        gradient, stats, sums = carry
        part, key = given
        shares = {
            name: weight / jnp.maximum(whole[name], _TINY)
            for name, weight in label_weights(part["label"], config).items()
        }

        def objective(params: Any) -> tuple[Array, tuple[Tree, Terms]]:
            logits, after = forward(params, stats, part, key)
            _, terms = segmentation_loss(logits, part["label"], config)
            terms = {name: term * shares[name] for name, term in terms.items()}
            total = sum((getattr(config, n) * term for n, term in terms.items()), jnp.float32(0))
            return total, (after, terms)

        (_, (stats, terms)), more = jax.value_and_grad(objective, has_aux=True)(params)
        sums = jax.tree.map(jnp.add, sums, terms)
        return (place(jax.tree.map(jnp.add, gradient, more)), stats, sums), None

    start = place(jax.tree.map(jnp.zeros_like, params)), stats, dict.fromkeys(whole, jnp.float32(0))
    (gradient, stats, terms), _ = jax.lax.scan(add, start, (cut, keys))
    total = sum((getattr(config, name) * term for name, term in terms.items()), jnp.float32(0))
    return total, terms, stats, gradient


_TINY = 1e-30  # where no pixel is labelled every share is 0


def _by_logits(
    forward: Forward,
    config: LossConfig,
    params: Any,
    stats: Tree,
    cut: Batch,
    keys: jax.Array,
    place: Callable[[Any], Any],
) -> Result:
    """For any loss, at the cost of a second forward pass."""
    logits = jax.lax.map(lambda given: forward(params, stats, *given)[0], (cut, keys))

    def objective(logits: Array) -> tuple[Array, Terms]:
        return segmentation_loss(_joined(logits), _joined(cut["label"]), config)

    (total, terms), wanted = jax.value_and_grad(objective, has_aux=True)(logits)

    def add(carry: tuple[Any, Tree], given: tuple[Batch, jax.Array, Array]) -> Any:
        gradient, stats = carry
        part, key, of_logits = given
        _, pull, stats = jax.vjp(
            lambda params: forward(params, stats, part, key), params, has_aux=True
        )
        (more,) = pull(of_logits)
        return (place(jax.tree.map(jnp.add, gradient, more)), stats), None

    start = place(jax.tree.map(jnp.zeros_like, params)), stats
    (gradient, stats), _ = jax.lax.scan(add, start, (cut, keys, wanted))
    return total, terms, stats, gradient
