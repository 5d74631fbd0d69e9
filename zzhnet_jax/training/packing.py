"""Many small parameters as two vectors.

A network has hundreds of norm scales, biases and the like. An optimizer that handles each of them
alone compiles, and launches, a dozen kernels for every one; most of the compilation of a training
step used to be that. Two vectors, one that decays and one that does not, take their place in the
training state. Arrays large enough to be worth splitting over devices stay as they are.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

# Arrays of this many elements or more stay alone.
LARGE = 2**14
# Vectors end in zeros up to a multiple of this, so that any usual number of devices can split them.
_MULTIPLE = 2**10

Packed = dict[str, Any]


@dataclass(frozen=True)
class _Slot:
    """Where one parameter lies: in which part, and from which element on."""

    part: str
    start: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Packing:
    """The layout of a network's parameters in the training state.

    `pack` and `unpack` turn trees of the network's structure (parameters, gradients, averages) into
    the packed form and back. The packed form has up to two vectors, "decayed" and "undecayed", and
    the large arrays under their paths.
    """

    def __init__(self, params: Any, decays: Any) -> None:
        """Lays out a network.

        Args:
          params: its parameters, or their shapes.
          decays: tree of the same structure; whether weight decay acts on each.
        """
        leaves, self._structure = jax.tree_util.tree_flatten_with_path(params)
        ends = {"decayed": 0, "undecayed": 0}
        self.decay_mask: dict[str, bool] = {}
        self._slots = []
        for (path, leaf), decay in zip(leaves, jax.tree.leaves(decays), strict=True):
            size = math.prod(leaf.shape)
            part = "decayed" if decay else "undecayed"
            if size >= LARGE:
                part, start = jax.tree_util.keystr(path, simple=True, separator="."), 0
            else:
                start = ends[part]
                ends[part] += size
            self.decay_mask[part] = decay
            self._slots.append(_Slot(part, start, tuple(leaf.shape)))
        self._paths = [jax.tree_util.keystr(p, simple=True, separator=".") for p, _ in leaves]

        # Differentiating slices would add up as many padded vectors; the transpose is just `pack`.
        self._unpack = jax.custom_vjp(self._parts)
        self._unpack.defvjp(
            lambda packed: (self._parts(packed), None), lambda _, g: (self.pack(g),)
        )

    def pack(self, tree: Any) -> Packed:
        """The packed form of a tree of jax arrays."""
        small: dict[str, list[jax.Array]] = {}
        packed: Packed = {}
        for slot, leaf in zip(self._slots, jax.tree.leaves(tree), strict=True):
            if slot.size >= LARGE:
                packed[slot.part] = leaf
            else:
                small.setdefault(slot.part, []).append(leaf.reshape(-1))
        for part, pieces in small.items():
            missing = -sum(piece.size for piece in pieces) % _MULTIPLE
            packed[part] = jnp.concatenate([*pieces, jnp.zeros(missing, pieces[0].dtype)])
        return packed

    def map_paths(self, function: Callable[[str, tuple[int, ...]], Any]) -> Any:
        """A tree of the network's structure: `function(path, shape)` of each parameter."""
        slots = zip(self._paths, self._slots, strict=True)
        return jax.tree.unflatten(
            self._structure, [function(path, slot.shape) for path, slot in slots]
        )

    def unpack(self, packed: Packed) -> Any:
        """The tree again, of jax arrays; its gradient comes out packed."""
        return self._unpack(packed)

    def unpack_on_host(self, packed: Packed) -> Any:
        """The tree of numpy arrays, without compiling anything; `packed` is on this host."""
        packed = jax.device_get(packed)
        return self._shaped(self._cut(packed), packed)

    def _parts(self, packed: Packed) -> Any:
        # Else XLA for TPUs gives the whole vector the shape of a part, and then cuts that: it takes
        # lanes of 128 for a last axis of 2, and a minute to compile.
        return self._shaped(jax.lax.optimization_barrier(self._cut(packed)), packed)

    def _cut(self, packed: Packed) -> list[Any]:
        """The elements of each small parameter."""
        return [
            packed[slot.part][slot.start : slot.start + slot.size]
            for slot in self._slots
            if slot.size < LARGE
        ]

    def _shaped(self, small: list[Any], packed: Packed) -> Any:
        """All parameters, from the elements of the small ones and the packed form of the rest."""
        pieces = iter(small)
        leaves = [
            next(pieces).reshape(slot.shape) if slot.size < LARGE else packed[slot.part]
            for slot in self._slots
        ]
        return jax.tree.unflatten(self._structure, leaves)
