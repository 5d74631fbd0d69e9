"""Moves weights between PyTorch state dicts and parameter trees, by tables of rules, both ways.

A family of networks states its PyTorch names once, as a tuple of `Rule`; nothing here knows any
family. Reading places every tensor and fills every parameter, or says what is wrong; writing
inverts the same rules.
"""

import difflib
import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np

from zzhnet_jax.errors import ConversionError
from zzhnet_jax.models.torch_names import Rule, Transform

Tree = dict[Any, Any]
Path = tuple[str | int, ...]

_LISTED = 8
_ROUTES = 4


def _linear_to_jax(x: np.ndarray) -> np.ndarray:
    """(out, in) -> (in, out); a weight stored as a 1x1 convolution (out, in, 1, 1) will do."""
    if x.ndim == 4 and x.shape[2:] == (1, 1):
        x = x[:, :, 0, 0]
    return x.transpose(1, 0)


def _routes_to_jax(x: np.ndarray) -> np.ndarray:
    return x.reshape(_ROUTES, -1, *x.shape[1:])


Layout = Callable[[np.ndarray], np.ndarray]
# What each transform does, to our layout and back to PyTorch's.
LAYOUTS: dict[Transform, tuple[Layout, Layout]] = {
    Transform.IDENTITY: (lambda x: x, lambda x: x),
    Transform.COUNTER: (lambda x: x, lambda x: x.astype(np.int64)),
    Transform.LINEAR: (_linear_to_jax, lambda x: x.transpose(1, 0)),
    Transform.POINTWISE: (
        lambda x: x[:, :, 0, 0].transpose(1, 0),
        lambda x: x.transpose(1, 0)[:, :, None, None],
    ),
    Transform.CONV: (lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)),
    Transform.DEPTHWISE: (
        lambda x: x[:, 0].transpose(1, 2, 0),
        lambda x: x.transpose(2, 0, 1)[:, None],
    ),
    Transform.IMAGE: (lambda x: x.transpose(0, 2, 3, 1), lambda x: x.transpose(0, 3, 1, 2)),
    Transform.ROUTES: (_routes_to_jax, lambda x: x.reshape(-1, *x.shape[2:])),
    Transform.SWAP_LAST: (lambda x: x.transpose(0, 2, 1), lambda x: x.transpose(0, 2, 1)),
    Transform.LAST_FIRST: (lambda x: x.transpose(2, 0, 1), lambda x: x.transpose(1, 2, 0)),
}


def to_jax(transform: Transform, array: np.ndarray) -> np.ndarray:
    """PyTorch's layout to ours; ValueError or IndexError when the array has not the rank for it."""
    return LAYOUTS[transform][0](array)


def to_torch(transform: Transform, array: np.ndarray) -> np.ndarray:
    """Our layout to PyTorch's."""
    return LAYOUTS[transform][1](array)


@dataclass(frozen=True)
class Placement:
    """One tensor and its place: PyTorch name and shape, our path and shape, the transform."""

    torch: str
    torch_shape: tuple[int, ...]
    path: str
    shape: tuple[int, ...]
    transform: Transform


@dataclass(frozen=True)
class Matching:
    """The outcome of laying a state dict against a parameter tree.

    Attributes:
      placements: tensors with a place of the right shape.
      missing: paths without a tensor, each with the PyTorch name it should have.
      unexpected: PyTorch names without a place.
      mismatched: tensors whose shape, transformed, is not that of their place: name, its shape,
        path, the path's shape.
      duplicated: PyTorch names whose place is already taken by another.
    """

    placements: tuple[Placement, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, tuple[int, ...], str, tuple[int, ...]], ...] = ()
    duplicated: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether every tensor is placed and every parameter filled."""
        return not (self.missing or self.unexpected or self.mismatched or self.duplicated)

    def nearest(self, name: str) -> str | None:
        """The missing PyTorch name most like an unexpected one, or the other way round."""
        pool = self.missing.values() if name in self.unexpected else self.unexpected
        return next(iter(difflib.get_close_matches(name, list(pool), n=1)), None)

    def problems(self) -> str:
        """What is wrong, a line a tensor, at most eight of each sort."""
        lines = [
            *_listing("missing", list(self.missing.values()), self._hint),
            *_listing("unexpected", self.unexpected, self._hint),
            *_listing("given twice", self.duplicated, str),
            *_listing("wrong shape", self.mismatched, _wrong_shape),
        ]
        return "\n".join(lines)

    def _hint(self, name: str) -> str:
        near = self.nearest(name)
        return name if near is None else f"{name} (nearest: {near})"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _wrong_shape(found: tuple[str, tuple[int, ...], str, tuple[int, ...]]) -> str:
    name, shape, path, wanted = found
    return f"{name} {_shape(shape)}, wanted {_shape(wanted)} for {path}"


def _listing(title: str, entries: Sequence[Any], tell: Callable[[Any], str]) -> list[str]:
    """Only what is shown is told: looking for the nearest name takes long."""
    if not entries:
        return []
    rest = len(entries) - _LISTED
    more = [f"    and {rest} more"] if rest > 0 else []
    return [f"  {title} ({len(entries)}):", *(f"    {tell(e)}" for e in entries[:_LISTED]), *more]


def match(
    state_dict: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    rules: Sequence[Rule],
) -> Matching:
    """Lays a state dict against the shapes of a tree.

    Args:
      state_dict: PyTorch name -> array (only shapes are looked at).
      shapes: our path, joined by dots -> shape.
      rules: the network's; the first rule that leads to an existing path decides.
    """
    placements: dict[str, Placement] = {}
    unexpected, mismatched, duplicated = [], [], []
    for name, array in state_dict.items():
        found = _locate(name, shapes, rules)
        if found is None:
            unexpected.append(name)
            continue
        path, rule = found
        if path in placements:
            duplicated.append(name)
            continue
        got = _transformed_shape(rule.transform, array.shape)
        if got != shapes[path]:
            wanted = _torch_shape(rule.transform, shapes[path])
            mismatched.append((name, tuple(array.shape), path, wanted))
            continue
        placements[path] = Placement(name, tuple(array.shape), path, got, rule.transform)
    seen = {*placements, *(path for _, _, path, _ in mismatched)}
    missing = {path: torch_name(path, rules)[0] for path in shapes if path not in seen}
    return Matching(
        tuple(placements.values()), missing, tuple(unexpected), tuple(mismatched), tuple(duplicated)
    )


def from_state_dict(
    state_dict: Mapping[str, np.ndarray],
    template: tuple[Tree, Tree],
    rules: Sequence[Rule],
    *,
    allow: Sequence[str] = (),
) -> tuple[Tree, Tree, Matching]:
    """Fills a network's parameters and batch statistics from a PyTorch state dict.

    Args:
      state_dict: PyTorch name -> array of any floating type; counters are integers.
      template: the network's `(params, batch_stats)`; leaves are arrays or, when nothing may be
        missing, shapes with dtypes.
      rules: the network's.
      allow: shell patterns of PyTorch names that may be missing (the template's value stays),
        unexpected or of another shape.

    Returns:
      params and batch_stats of numpy arrays in the template's dtypes, and the matching.

    Raises:
      ConversionError: something is missing, unexpected, given twice or of another shape, and not
        allowed to be.
    """
    flat = [flatten(tree) for tree in template]
    shapes = {join(path): tuple(leaf.shape) for tree in flat for path, leaf in tree.items()}
    matching = match(state_dict, shapes, rules)
    strict = _without_allowed(matching, allow)
    if not strict.exact:
        raise ConversionError(f"the checkpoint does not fit the network:\n{strict.problems()}")
    places = {placement.path: placement for placement in matching.placements}
    filled = []
    for tree in flat:
        leaves = {}
        for path, leaf in tree.items():
            place = places.get(join(path))
            leaves[path] = (
                _keep(path, leaf)
                if place is None
                else _convert(state_dict[place.torch], place, leaf)
            )
        filled.append(unflatten(leaves))
    return filled[0], filled[1], matching


def to_state_dict(params: Tree, batch_stats: Tree, rules: Sequence[Rule]) -> dict[str, np.ndarray]:
    """The PyTorch state dict of a network: the inverse of `from_state_dict`.

    Raises:
      ConversionError: a parameter has no rule.
    """
    state_dict = {}
    for tree in (params, batch_stats):
        for path, leaf in flatten(tree).items():
            name, rule = torch_name(join(path), rules)
            state_dict[name] = np.array(to_torch(rule.transform, np.asarray(leaf)), order="C")
    return state_dict


def torch_name(path: str, rules: Sequence[Rule]) -> tuple[str, Rule]:
    """The PyTorch name of a path, and the rule that gives it.

    Raises:
      ConversionError: no rule covers the path.
    """
    for rule in rules:
        found = _pattern(rule.path).fullmatch(path)
        if found:
            return rule.torch.format(**found.groupdict()), rule
    raise ConversionError(f"no rule gives a PyTorch name to parameter {path}")


def flatten(tree: Tree) -> dict[Path, Any]:
    """Nested dicts to a dict of paths."""
    leaves: dict[Path, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= {(key, *rest): leaf for rest, leaf in flatten(value).items()}
        else:
            leaves[(key,)] = value
    return leaves


def unflatten(leaves: Mapping[Path, Any]) -> Tree:
    """Inverse of `flatten`."""
    tree: Tree = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def join(path: Path) -> str:
    """A path as rules write it."""
    return ".".join(map(str, path))


def _locate(
    name: str, shapes: Mapping[str, tuple[int, ...]], rules: Sequence[Rule]
) -> tuple[str, Rule] | None:
    for rule in rules:
        for pattern in (rule.torch, *rule.aliases):
            found = _pattern(pattern).fullmatch(name)
            if found:
                path = rule.path.format(**found.groupdict())
                if path in shapes:
                    return path, rule
    return None


@cache
def _pattern(text: str) -> re.Pattern[str]:
    """`layers.{i}.norm` as a regular expression with a group of digits for each placeholder."""
    parts = re.split(r"\{(\w+)\}", text)
    return re.compile(
        "".join(f"(?P<{p}>[0-9]+)" if i % 2 else re.escape(p) for i, p in enumerate(parts))
    )


def _transformed_shape(transform: Transform, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Shape after the transform, None when it does not apply; costs no memory."""
    try:
        return tuple(to_jax(transform, np.broadcast_to(np.float32(0), shape)).shape)
    except (ValueError, IndexError):
        return None


def _torch_shape(transform: Transform, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(to_torch(transform, np.broadcast_to(np.float32(0), shape)).shape)


def _without_allowed(matching: Matching, allow: Sequence[str]) -> Matching:
    def strict(name: str) -> bool:
        return not any(fnmatch.fnmatchcase(name, pattern) for pattern in allow)

    return replace(
        matching,
        missing={path: name for path, name in matching.missing.items() if strict(name)},
        unexpected=tuple(filter(strict, matching.unexpected)),
        mismatched=tuple(entry for entry in matching.mismatched if strict(entry[0])),
    )


def _convert(array: np.ndarray, place: Placement, leaf: Any) -> np.ndarray:
    if np.issubdtype(leaf.dtype, np.integer) and array.size:
        limits = np.iinfo(leaf.dtype)
        if array.min() < limits.min or array.max() > limits.max:
            raise ConversionError(f"{place.torch} = {array}: it does not fit {leaf.dtype}")
    return np.array(to_jax(place.transform, array), dtype=leaf.dtype, order="C")


def _keep(path: Path, leaf: Any) -> Any:
    if not hasattr(leaf, "__array__"):
        raise ConversionError(f"{join(path)} is missing and has no initial value to keep")
    return np.asarray(leaf)
