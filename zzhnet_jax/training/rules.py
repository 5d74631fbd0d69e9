"""Which axes of which parameter and activation are split over which axes of the mesh: one table.

A parameter is found by the end of its path, an activation by the names that networks give to the
axes of what they compute (see `zzhnet_jax.models.placement`). All three families are built of the
same blocks and share the table; a family that needs other rules adds its own to `FAMILY_RULES`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Axis = str | None


@dataclass(frozen=True)
class Rule:
    """One line of the table.

    Attributes:
      pattern: regular expression for the end of a parameter's path, as "mlp.fc1.kernel".
      axes: mesh axis of each of its axes; None is whole. Missing ones at the end are whole, those
        too many are dropped.
    """

    pattern: str
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class ShardingRules:
    """The table of one family of networks.

    Attributes:
      parameters: the first rule that matches counts. In the training state, what no rule splits
        over `fsdp` is split over it along its longest axis that divides evenly.
      activations: name of an axis -> mesh axes that share it out; other axes are whole.
    """

    parameters: tuple[Rule, ...]
    activations: Mapping[str, tuple[str, ...]]

    def of(self, path: str) -> Rule | None:
        """The rule for the parameter at a path, if there is one."""
        for rule in self.parameters:
            if re.search(rf"(^|\.){rule.pattern}$", path):
                return rule
        return None

    def rows(self) -> list[tuple[str, str, str]]:
        """The table as text: kind, pattern or name, axes."""
        kinds: list[tuple[str, str, Sequence[Axis]]] = [
            ("parameter", rule.pattern, rule.axes) for rule in self.parameters
        ]
        kinds.append(("parameter", "anything else", ("fsdp on the longest axis",)))
        kinds += [("activation", name, axes) for name, axes in self.activations.items()]
        return [(kind, name, ", ".join(axis or "-" for axis in axes)) for kind, name, axes in kinds]


# The projections into the inner channels of a scan or MLP are split by column, those back by row:
# between the two every device works on channels of its own.
_BLOCKS = (
    Rule(r"in_proj\.kernel", ("fsdp", "tensor")),
    Rule(r"in_proj\.bias", ("tensor",)),
    Rule(r"out_proj\.kernel", ("tensor", "fsdp")),
    Rule(r"mlp\.fc1\.kernel", ("fsdp", "tensor")),
    Rule(r"mlp\.fc1\.bias", ("tensor",)),
    Rule(r"mlp\.fc2\.kernel", ("tensor", "fsdp")),
    Rule(r"(op|scan)\.conv\.kernel", (None, None, "tensor")),
    Rule(r"(op|scan)\.conv\.bias", ("tensor",)),
    Rule(r"scan\.x_proj", ("tensor", None, "fsdp")),
    Rule(r"scan\.dt_proj", (None, "fsdp", "tensor")),
    Rule(r"scan\.(dt_bias|A_log|D)", (None, "tensor")),
    Rule(r"out_norm\.norm\.(scale|bias)", ("tensor",)),
)

_ACTIVATIONS = {
    "batch": ("data", "fsdp"),
    "rows": ("spatial",),
    "inner": ("tensor",),
    "hidden": ("tensor",),
    "scanned": ("tensor", "spatial"),
}

DEFAULT_RULES = ShardingRules(_BLOCKS, _ACTIVATIONS)
FAMILY_RULES: dict[str, ShardingRules] = {
    "zzhnet": DEFAULT_RULES,
    "mamba": DEFAULT_RULES,
    "vmamba": DEFAULT_RULES,
}


def rules_for(network: str) -> ShardingRules:
    """The rules of the family that a network's name begins with; the default for any other."""
    for family, rules in FAMILY_RULES.items():
        if network.startswith(family):
            return rules
    return DEFAULT_RULES
