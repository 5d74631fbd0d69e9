"""Segmentation losses as pure functions of logits (b, h, w, c) and labels (b, h, w), in float32.

Pixels labelled `IGNORE` count in none of them; when every pixel is ignored each loss is 0, with
zero gradient.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .config import LossConfig

IGNORE = 255

Logits = Float[Array, "b h w c"]
Labels = Int[Array, "b h w"]
Scalar = Float[Array, ""]


def segmentation_loss(
    logits: Logits, labels: Labels, config: LossConfig
) -> tuple[Scalar, dict[str, Scalar]]:
    """The weighted sum of the terms that have a weight, and each of them alone, unweighted."""
    available: dict[str, Callable[[Logits, Labels], Scalar]] = {
        "cross_entropy": partial(cross_entropy, weights=config.class_weights),
        "lovasz": lovasz_softmax,
        "dice": dice,
        "focal": partial(focal, gamma=config.focal_gamma),
    }
    weights = {name: getattr(config, name) for name in available}
    terms = {name: term(logits, labels) for name, term in available.items() if weights[name]}
    total = sum((weights[name] * term for name, term in terms.items()), jnp.float32(0))
    return total, terms


def label_weights(labels: Labels, config: LossConfig) -> dict[str, Scalar]:
    """What the terms that are weighted means over pixels divide by, for those in use."""
    valid = (labels != IGNORE).astype(jnp.float32).sum()
    weights = {}
    if config.cross_entropy:
        weights["cross_entropy"] = valid
        if config.class_weights is not None:
            one_hot = _targets(labels, len(config.class_weights))[1]
            weights["cross_entropy"] = (one_hot @ jnp.asarray(config.class_weights)).sum()
    return weights | ({"focal": valid} if config.focal else {})


def cross_entropy(
    logits: Logits, labels: Labels, *, weights: Sequence[float] | None = None
) -> Scalar:
    """Mean of -log p(label), each pixel weighted by its label's entry of `weights` (c,)."""
    valid, one_hot = _targets(labels, logits.shape[-1])
    pixel = -(one_hot * jax.nn.log_softmax(logits)).sum(-1)
    weight = valid if weights is None else one_hot @ jnp.asarray(weights, jnp.float32)
    return _mean(pixel * weight, weight)


def focal(logits: Logits, labels: Labels, *, gamma: float = 2.0) -> Scalar:
    """Mean of -(1 - p)^gamma log p, p the label's probability (Lin et al. 2017, without alpha)."""
    valid, one_hot = _targets(labels, logits.shape[-1])
    log_p = (one_hot * jax.nn.log_softmax(logits)).sum(-1)
    # 1 - p as the sum of the other probabilities, which stays exact where p rounds to 1.
    others = ((1 - one_hot) * jax.nn.softmax(logits)).sum(-1)
    return _mean(-valid * others**gamma * log_p, valid)


def dice(logits: Logits, labels: Labels) -> Scalar:
    """Mean of 1 - 2 |p y| / (|p| + |y|) over the classes present (Milletari et al. 2016)."""
    valid, one_hot = _targets(labels, logits.shape[-1])
    probability = jax.nn.softmax(logits) * valid[..., None]
    axes = (0, 1, 2)
    overlap = (probability * one_hot).sum(axes)
    size, count = probability.sum(axes), one_hot.sum(axes)
    present = (count > 0).astype(jnp.float32)
    return _mean(present * (1 - 2 * overlap / jnp.maximum(size + count, 1.0)), present)


def lovasz_softmax(logits: Logits, labels: Labels) -> Scalar:
    """Lovasz extension of 1 - IoU, mean over the classes present (Berman et al. 2018).

    The errors |y - p| of a class are sorted, largest first, and each is weighted by how much it
    adds to the Jaccard loss.
    """
    classes = logits.shape[-1]
    valid, one_hot = _targets(labels, classes)
    pixels = jnp.abs(one_hot - jax.nn.softmax(logits)) * valid[..., None]
    errors, foreground = pixels.reshape(-1, classes).T, one_hot.reshape(-1, classes).T
    # Two classes have the same errors, since their probabilities add up to 1: one sort serves both,
    # and sorts take most of the time.
    keys = errors[:1] if classes == 2 else errors
    order = jnp.argsort(jax.lax.stop_gradient(keys), axis=1, descending=True)
    losses = jax.vmap(_lovasz_extension)(errors, foreground, jnp.broadcast_to(order, errors.shape))
    present = (foreground.sum(1) > 0).astype(jnp.float32)
    return _mean(present * losses, present)


def _lovasz_extension(
    errors: Float[Array, " p"], foreground: Float[Array, " p"], order: Int[Array, " p"]
) -> Scalar:
    """Sorted errors dotted with the gradient of the Jaccard loss, a constant within one order."""
    hits = foreground[order]
    total = hits.sum()
    intersection = total - jnp.cumsum(hits)
    union = total + jnp.cumsum(1 - hits)
    jaccard = 1 - intersection / union
    return errors[order] @ jnp.diff(jaccard, prepend=0.0)


def _targets(labels: Labels, classes: int) -> tuple[Float[Array, "b h w"], Float[Array, "b h w c"]]:
    """Which pixels count, as 0 and 1, and their labels as one-hot vectors (zero where ignored)."""
    valid = (labels != IGNORE).astype(jnp.float32)
    return valid, jax.nn.one_hot(jnp.where(labels == IGNORE, -1, labels), classes)


def _mean(values: Array, weights: Array) -> Scalar:
    """sum(values) / sum(weights), 0 where nothing has weight; `values` are weighted already."""
    total = weights.sum()
    return values.sum() / jnp.where(total > 0, total, 1.0)
