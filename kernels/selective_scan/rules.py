"""Which implementation runs where nobody names one: a table of rules, and the choice they make.

The platform is the one that a program is compiled for, which tracing may not know; so the choice is
one name a platform, of which `by_platform` keeps the right one.
"""

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from .base import Implementation, Tile

_log = logging.getLogger("zzhnet_jax")

# Runs everywhere, and on CPUs is the fastest to run and to compile at every shape in
# benchmarks/selective_scan.py.
DEFAULT_IMPLEMENTATION = "chunked"


@dataclass(frozen=True)
class Rule:
    """A platform on which an implementation is preferred to those in later rules.

    Attributes:
      platform: as `lax.platform_dependent` names it.
      implementation: a name in `IMPLEMENTATIONS`.
      reason: where the rule comes from.
      shortest: least length that it is for.
    """

    platform: Literal["cpu", "cuda", "rocm", "tpu"]
    implementation: str
    reason: str
    shortest: int = 1


# The first rule of a platform that fits decides; without one it is the default.
RULES: tuple[Rule, ...] = (
    Rule(
        "tpu",
        "pallas_tpu",
        "reads and writes every value once, where XLA's prefix makes log2(chunk) passes over values"
        " x d_state; below 8 steps, the rows of a register, there is no pass to save",
        shortest=8,
    ),
    Rule(
        "cuda",
        "pallas_gpu",
        "the same count of memory traffic; below 8 steps XLA fuses the whole scan",
        shortest=8,
    ),
)


class Chosen(NamedTuple):
    """An implementation with its block sizes, None for its own choice of them."""

    name: str
    tile: Tile | None = None


class Choice(NamedTuple):
    """What to run: `default`, except on the platforms named.

    A platform is named only if something else than the default runs there, so that programs for
    a choice without platforms have no branches even while they are traced.
    """

    default: Chosen
    on_platform: tuple[tuple[str, Chosen], ...] = ()


def choose(implementations: Mapping[str, Implementation], operands: tuple[Any, ...]) -> Choice:
    """The best implementation on every platform that takes the operands.

    Args:
      implementations: what there is, by name.
      operands: the eight operands, or anything with their shapes and dtypes.
    """
    chosen: dict[str, Chosen] = {}
    refused: list[str] = []
    length = operands[0].shape[1]
    for rule in RULES:
        if rule.platform in chosen or length < rule.shortest:
            continue
        reason = implementations[rule.implementation].unsupported(*operands)
        if reason is None:
            chosen[rule.platform] = Chosen(rule.implementation)
        else:
            refused.append(f"not {rule.implementation} on {rule.platform}: {reason}")
    choice = Choice(Chosen(DEFAULT_IMPLEMENTATION), tuple(chosen.items()))
    _tell(choice, tuple(refused))
    return choice


@functools.cache
def _tell(choice: Choice, refused: tuple[str, ...]) -> None:
    """Logs a choice, the first time it is made."""
    names = [f"{chosen.name} on {platform}" for platform, chosen in choice.on_platform]
    default = choice.default.name + (" on other platforms" if names else "")
    _log.info("selective_scan runs %s", "; ".join([", ".join([*names, default]), *refused]))
