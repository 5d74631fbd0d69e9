"""Losses of networks with several outputs, weighted as ChangeMamba trains (Chen et al. 2024)."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from .losses import IGNORE, Labels, Logits, Scalar, cross_entropy, lovasz_softmax


def semantic_change_loss(
    logits: Mapping[str, Logits], change: Labels, before: Labels, after: Labels
) -> tuple[Scalar, dict[str, Scalar]]:
    """Change, land cover of both dates, and likeness of the two where nothing changed.

        CE_change + (CE_before + CE_after + similarity / 2) / 2
        + 3/4 (Lovasz_change + (Lovasz_before + Lovasz_after) / 2)

    Args:
      logits: outputs "change", "pre_semantic" and "post_semantic".
      change: 0 or 1.
      before: land cover of the earlier date; 0 means unchanged and counts in no land-cover term.
      after: likewise of the later date.

    Returns:
      The loss, and its terms unweighted.
    """
    pre, post = logits["pre_semantic"], logits["post_semantic"]
    before, after = (jnp.where(label == 0, IGNORE, label) for label in (before, after))
    terms = {
        "cross_entropy_change": cross_entropy(logits["change"], change),
        "cross_entropy_before": cross_entropy(pre, before),
        "cross_entropy_after": cross_entropy(post, after),
        "lovasz_change": lovasz_softmax(logits["change"], change),
        "lovasz_before": lovasz_softmax(pre, before),
        "lovasz_after": lovasz_softmax(post, after),
        "similarity": semantic_similarity(pre, post, before == IGNORE),
    }
    entropy = terms["cross_entropy_before"] + terms["cross_entropy_after"]
    lovasz = terms["lovasz_before"] + terms["lovasz_after"]
    total = (
        terms["cross_entropy_change"]
        + 0.5 * (entropy + 0.5 * terms["similarity"])
        + 0.75 * (terms["lovasz_change"] + 0.5 * lovasz)
    )
    return total, terms


def semantic_similarity(pre: Logits, post: Logits, unchanged: jax.Array) -> Scalar:
    """Squared difference of the class probabilities at unchanged pixels, mean over all elements."""
    difference = jax.nn.softmax(pre) - jax.nn.softmax(post)
    return jnp.mean(jnp.square(difference * unchanged[..., None]))


def damage_loss(
    logits: Mapping[str, Logits],
    building: Labels,
    damage: Labels,
    *,
    damage_weights: Sequence[float] | None = None,
) -> tuple[Scalar, dict[str, Scalar]]:
    """CE_building + CE_damage + Lovasz_building / 2 + 3/4 Lovasz_damage.

    Without a graded building the damage terms are 0 (the original's would be NaN: it skips such
    batches).

    Args:
      logits: outputs "building" and "damage".
      building: 0 or 1.
      damage: damage class, 255 off the buildings.
      damage_weights: weights of the damage classes in their cross entropy.

    Returns:
      The loss, and its terms unweighted.
    """
    terms = {
        "cross_entropy_building": cross_entropy(logits["building"], building),
        "cross_entropy_damage": cross_entropy(logits["damage"], damage, weights=damage_weights),
        "lovasz_building": lovasz_softmax(logits["building"], building),
        "lovasz_damage": lovasz_softmax(logits["damage"], damage),
    }
    total = (
        terms["cross_entropy_building"]
        + terms["cross_entropy_damage"]
        + 0.5 * terms["lovasz_building"]
        + 0.75 * terms["lovasz_damage"]
    )
    return total, terms
