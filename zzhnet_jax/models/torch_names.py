"""The vocabulary in which a family of networks states its parameter names in PyTorch.

Plain data: `zzhnet_jax.conversion.rules` reads and writes state dicts by it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum


class Transform(Enum):
    """Named, invertible changes of layout, from PyTorch's to ours; the values appear in reports."""

    IDENTITY = "as is"
    COUNTER = "counter int64->int32"
    LINEAR = "linear (o,i)->(i,o)"
    POINTWISE = "pointwise (o,i,1,1)->(i,o)"
    CONV = "convolution (o,i,h,w)->(h,w,i,o)"
    DEPTHWISE = "depthwise (c,1,h,w)->(h,w,c)"
    IMAGE = "image (1,c,h,w)->(1,h,w,c)"
    ROUTES = "routes (4d,...)->(4,d,...)"
    SWAP_LAST = "(k,a,b)->(k,b,a)"
    LAST_FIRST = "(k,a,b)->(b,k,a)"


@dataclass(frozen=True)
class Rule:
    """Where tensors of one kind stand.

    Attributes:
      torch: PyTorch name, with `{i}` for a number.
      path: our path, joined by dots, with the same placeholders.
      transform: change of layout.
      aliases: other PyTorch names under which the tensor may be found; never written.
    """

    torch: str
    path: str
    transform: Transform = Transform.IDENTITY
    aliases: tuple[str, ...] = ()


def under(
    rules: Iterable[Rule], torch: str, path: str | None = None, *, aliases: Sequence[str] = ()
) -> tuple[Rule, ...]:
    """The rules of a submodule, seen from its parent.

    Args:
      rules: the submodule's.
      torch: its prefix in PyTorch, with the trailing dot; "" for none.
      path: its prefix here; None is the same as `torch`.
      aliases: other PyTorch prefixes that are accepted when reading.
    """
    prefix = torch if path is None else path
    placed = []
    for rule in rules:
        own = [torch + alias for alias in rule.aliases]
        other = [alias + name for alias in aliases for name in (rule.torch, *rule.aliases)]
        placed.append(
            replace(rule, torch=torch + rule.torch, path=prefix + rule.path, aliases=(*own, *other))
        )
    return tuple(placed)
