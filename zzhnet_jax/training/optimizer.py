"""AdamW with a schedule, clipping, and a mask that keeps weight decay off what it harms."""

from typing import Any, Literal

import jax
import optax

from .config import OptimConfig

# Parameters of two or more axes that are no linear maps: state-space parameters and biases, stacked
# with a row for each scan route. Norm scales, biases and per-channel scales have fewer axes.
_UNDECAYED = frozenset({"A_log", "A_logs", "D", "Ds", "dt_bias", "dt_projs_bias"})


def decay_mask(params: Any, decayed: Literal["weights", "all"] = "weights") -> Any:
    """Which parameters decay: a tree of booleans, true for weights of linear maps and filters.

    Args:
      params: the network's parameters, or their shapes.
      decayed: "all" for every parameter.
    """

    def decays(path: tuple[Any, ...], leaf: Any) -> bool:
        if decayed == "all":
            return True
        names = {str(getattr(part, "key", part)) for part in path}
        return leaf.ndim >= 2 and not names & _UNDECAYED

    return jax.tree_util.tree_map_with_path(decays, params)


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate of each step: a linear rise from 0, then as `config.schedule` says."""
    warmup = round(config.warmup_fraction * steps)
    peak = config.learning_rate
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif config.schedule == "step":
        after = optax.exponential_decay(peak, config.step_every, config.step_factor, staircase=True)
    else:
        after = optax.cosine_decay_schedule(peak, max(steps - warmup, 1), config.final_fraction)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(
    config: OptimConfig, schedule: optax.Schedule, mask: Any
) -> optax.GradientTransformation:
    """Clipping by global norm, if asked for, then AdamW (Loshchilov & Hutter 2019).

    Args:
      config: rates and limits.
      schedule: the learning rate of each step.
      mask: which parameters decay, in the structure of those that are updated.
    """
    clip = optax.identity()
    if config.clip_norm is not None:
        clip = optax.clip_by_global_norm(config.clip_norm)
    adamw = optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=mask,
    )
    return optax.chain(clip, adamw)
