"""What a conversion did, tensor by tensor, as Markdown for people and JSON for programs."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zzhnet_jax.conversion.rules import Matching

MARKDOWN, JSON = "conversion.md", "conversion.json"


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """The account of one conversion.

    Attributes:
      source: the checkpoint's path, as given.
      sha256: of the checkpoint file.
      model: name of the network that was filled.
      overrides: fields of its config that differ from the preset's.
      num_classes: classes of its main output.
      naming: "new" or "old" names in the checkpoint.
      decisions: how network, fields and naming were settled, a sentence each.
      matching: where every tensor went, and what did not fit.
      dtypes: PyTorch name -> element type in the checkpoint.
      adapted: what was changed on request before placing, a sentence a tensor.
      allowed: patterns of names that were allowed not to fit.
      checksums: PyTorch name -> SHA-256 of the tensor read back from the result and found equal to
        the checkpoint's; empty when that was not asked for.
    """

    source: str
    sha256: str
    model: str
    overrides: Mapping[str, Any]
    num_classes: int
    naming: str
    decisions: Sequence[str]
    matching: Matching
    dtypes: Mapping[str, str]
    adapted: Sequence[str] = ()
    allowed: Sequence[str] = ()
    checksums: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def tensors(self) -> int:
        """Number of tensors placed."""
        return len(self.matching.placements)

    @property
    def parameters(self) -> int:
        """Number of values placed, running statistics and counters included."""
        return sum(math.prod(place.torch_shape) for place in self.matching.placements)

    def summary(self) -> str:
        """One line."""
        left = {
            "missing": len(self.matching.missing),
            "unexpected": len(self.matching.unexpected),
            "of another shape": len(self.matching.mismatched),
        }
        rest = ", ".join(f"{count} {what}" for what, count in left.items() if count)
        checked = f", {len(self.checksums)} checksums equal" if self.checksums else ""
        return (
            f"{self.source} -> {self.model}: {self.tensors} tensors, {self.parameters:,} values"
            f"{checked}{'; ' + rest if rest else ''}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain types."""
        matching = self.matching
        return {
            "source": {"path": self.source, "sha256": self.sha256, "naming": self.naming},
            "model": {
                "name": self.model,
                "overrides": dict(self.overrides),
                "num_classes": self.num_classes,
                "decisions": list(self.decisions),
            },
            "totals": {"tensors": self.tensors, "values": self.parameters},
            "tensors": [
                {
                    "torch": place.torch,
                    "torch_shape": list(place.torch_shape),
                    "torch_dtype": self.dtypes[place.torch],
                    "path": place.path,
                    "shape": list(place.shape),
                    "transform": place.transform.value,
                    "sha256": self.checksums.get(place.torch),
                }
                for place in matching.placements
            ],
            "missing": [
                {"path": path, "torch": name, "nearest": matching.nearest(name)}
                for path, name in matching.missing.items()
            ],
            "unexpected": [
                {"torch": name, "nearest": matching.nearest(name)} for name in matching.unexpected
            ],
            "mismatched": [
                {"torch": name, "shape": list(shape), "path": path, "wanted": list(wanted)}
                for name, shape, path, wanted in matching.mismatched
            ],
            "adapted": list(self.adapted),
            "allowed": list(self.allowed),
        }

    def to_json(self) -> str:
        """The report as JSON; its fields are those of `to_dict`."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    def to_markdown(self) -> str:
        """The report as Markdown: what was decided, what did not fit, and the table of tensors."""
        matching = self.matching
        lines = [
            f"# Conversion of {self.source}",
            "",
            f"- source: `{self.source}`, SHA-256 `{self.sha256}`, {self.naming} names",
            f"- model: `{self.model}`, {self.num_classes} classes",
            *(f"- {decision}" for decision in self.decisions),
            *(f"- adapted: {change}" for change in self.adapted),
            f"- {self.tensors} tensors with {self.parameters:,} values placed",
        ]
        if self.checksums:
            lines.append(f"- {len(self.checksums)} tensors read back and found equal bit for bit")
        if self.allowed:
            lines.append(f"- allowed not to fit: {', '.join(f'`{p}`' for p in self.allowed)}")
        lines += _section(
            "Missing",
            ["path", "PyTorch name", "nearest name in the file"],
            [[path, name, matching.nearest(name) or ""] for path, name in matching.missing.items()],
        )
        lines += _section(
            "Unexpected",
            ["PyTorch name", "nearest missing name"],
            [[name, matching.nearest(name) or ""] for name in matching.unexpected],
        )
        lines += _section(
            "Of another shape",
            ["PyTorch name", "shape", "path", "wanted shape"],
            [[name, _shape(s), path, _shape(w)] for name, s, path, w in matching.mismatched],
        )
        lines += _section(
            "Tensors",
            ["PyTorch name", "shape", "type", "path", "shape", "transform"],
            [
                [
                    place.torch,
                    _shape(place.torch_shape),
                    self.dtypes[place.torch],
                    place.path,
                    _shape(place.shape),
                    place.transform.value,
                ]
                for place in matching.placements
            ],
        )
        return "\n".join(lines) + "\n"

    def write(self, directory: Path) -> None:
        """Writes `conversion.md` and `conversion.json`."""
        (directory / MARKDOWN).write_text(self.to_markdown(), encoding="utf-8")
        (directory / JSON).write_text(self.to_json(), encoding="utf-8")


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _section(title: str, head: list[str], rows: list[list[str]]) -> list[str]:
    """A titled table; nothing when it has no rows."""
    if not rows:
        return []
    table = [head, ["---"] * len(head), *rows]
    return ["", f"## {title} ({len(rows)})", "", *("| " + " | ".join(r) + " |" for r in table)]
