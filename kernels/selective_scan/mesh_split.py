"""How the arrays of a scan lie on a mesh: which mesh axes split the batch, which the channels.

batch     any number of parts
channels  whole groups to a part, or several parts to one group, which then share its B and C
the rest  whole on every device
"""

import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

OPERANDS = ("u", "delta", "A", "B", "C", "D", "delta_bias", "initial_state")

# The axes of each array, also of its gradient.
AXES = {
    **{"u": "bld", "delta": "bld", "A": "dn", "B": "blgn", "C": "blgn", "D": "d"},
    **{"delta_bias": "d", "initial_state": "bdn", "y": "bld", "state": "bdn", "kept": "bknd"},
}


class MeshAxes(NamedTuple):
    """Names of mesh axes, major first.

    Attributes:
      batch: those that split the batch.
      channels: those that split the channels.
    """

    batch: tuple[str, ...]
    channels: tuple[str, ...]


_declared = jax.make_user_context(None)


def split_over(
    *, batch: Sequence[str] = (), channels: Sequence[str] = ()
) -> AbstractContextManager[None]:
    """Within this context, a kernel on several TPUs is split over these axes of the mesh.

    It is for programs that XLA splits, traced in this context; inside `shard_map`, and on other
    platforms, there is nothing to declare. Without it the first axes of the mesh split the batch,
    as far as they divide it, and the others the channels. A wrong guess costs communication, no
    more.

    Args:
      batch: mesh axes that split the batch, major first.
      channels: mesh axes that split the channels.
    """
    return _declared(MeshAxes(tuple(batch), tuple(channels)))


def declared_axes() -> MeshAxes | None:
    """What `split_over` says, if anything does."""
    return _declared.value


@dataclass(frozen=True)
class Split:
    """Mesh axes over which a scan is split.

    Attributes:
      mesh: the mesh.
      batch: axes that split the batch.
      groups: axes that split channels into whole groups.
      within: axes that split further the channels of one group, who share its B and C.
    """

    mesh: Mesh
    batch: tuple[str, ...]
    groups: tuple[str, ...]
    within: tuple[str, ...]

    def sharding(self, name: str) -> NamedSharding:
        """How an array lies on the mesh."""
        of_letter = {"b": self.batch, "d": self.groups + self.within, "g": self.groups}
        spec = (of_letter.get(letter) or None for letter in AXES[name])
        return NamedSharding(self.mesh, PartitionSpec(*spec))


def plan_split(mesh: Mesh, axes: MeshAxes, arrays: dict[str, Any]) -> Split:
    """Uses the axes as far as all devices get equally much and whole groups, or parts of one each.

    Args:
      mesh: the mesh.
      axes: axes to use.
      arrays: the arrays of a scan by name, or anything with their shapes.
    """
    (b, _, d), groups = arrays["u"].shape, arrays["B"].shape[2]
    batch, channels = axes

    def parts(axes: tuple[str, ...]) -> int:
        return math.prod(mesh.shape[x] for x in axes)

    while b % parts(batch):
        batch = batch[:-1]
    while d % parts(channels):
        channels = channels[:-1]
    whole = next(i for i in range(len(channels), -1, -1) if groups % parts(channels[:i]) == 0)
    within = channels[whole:] if parts(channels[:whole]) == groups else ()
    return Split(mesh, batch, channels[:whole], within)


def axes_of(mesh: Mesh, u: Any) -> MeshAxes:
    """The mesh axes that split u, given with its sharding; none if it is split in some other way.

    XLA tells only which device holds what: a mesh axis splits the array's axis along which a step
    on the mesh moves the slice, the major one moving it furthest.
    """
    held = u.sharding.devices_indices_map(u.shape)

    def starts(step_along: str | None) -> list[int]:
        device = mesh.devices[tuple(int(x == step_along) for x in mesh.axis_names)]
        return [x.start or 0 for x in held[device]]

    split: list[list[tuple[int, str]]] = [[] for _ in u.shape]
    for name in (x for x in mesh.axis_names if mesh.shape[x] > 1):
        for found, here, there in zip(split, starts(None), starts(name), strict=True):
            if there != here:
                found.append((there - here, name))
    axes = [tuple(name for _, name in sorted(found, reverse=True)) for found in split]
    whole_axes = NamedSharding(mesh, PartitionSpec(*(x or None for x in axes)))
    if not whole_axes.is_equivalent_to(u.sharding, len(u.shape)):
        return MeshAxes((), ())
    return MeshAxes(axes[0], axes[2])


def guess_axes(mesh: Mesh, batch: int) -> MeshAxes:
    """The first mesh axes for the batch, as far as they divide it, the others for the channels."""
    of_batch: tuple[str, ...] = ()
    parts = 1
    for name in mesh.axis_names:
        if batch % (parts * mesh.shape[name]) == 0:
            of_batch += (name,)
            parts *= mesh.shape[name]
    return MeshAxes(of_batch, tuple(x for x in mesh.axis_names if x not in of_batch))


def sharding_rule(
    arrays: dict[str, Array], results: dict[str, jax.ShapeDtypeStruct]
) -> tuple[str, dict[str, Any]]:
    """Shardy's rule for a half of a kernel: batch and channels may be split, other axes may not.

    Channels are groups x channels of a group where there are several of both.

    Args:
      arrays: what the half is given, by name.
      results: what it returns.

    Returns:
      The rule, and the keyword arguments that go with it.
    """
    groups = arrays["B"].shape[2]
    of_group = arrays["u"].shape[2] // groups
    both = groups > 1 and of_group > 1
    channels = "(g p)" if both else "g" if groups > 1 else "p"
    factors = {"d": channels, "g": "g" if groups > 1 else "one"}

    def describe(given: dict[str, Any]) -> str:
        """Axes of the arrays in the order in which JAX flattens them."""
        return ", ".join(" ".join(factors.get(x, x) for x in AXES[k]) for k in sorted(given))

    text = f"{describe(arrays)} -> {describe(results)}"
    # Shardy wants them in the order in which they first appear.
    in_order = dict.fromkeys(re.findall(r"\w+", text))
    whole = tuple(x for x in in_order if x not in ("b", "g", "p"))
    sizes = {"p": of_group} if both else {}  # a size is given where no axis has it
    return text, sizes | {"need_replication_factors": whole}
