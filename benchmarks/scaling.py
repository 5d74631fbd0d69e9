"""Memory, communication and least step time of training on slices that are not here.

  make scaling        compiles what is missing in benchmarks/scaling.json, writes docs/scaling.md

Every row is one `zzhnet train --dry-run --json` in a process of its own; what it found is kept in
the results file at once, so that an interrupted run goes on. Rows marked "formula" have the program
of a smaller slice with the same work for each device: more copies of the network change no array
that a device holds. Its gradients are summed over more devices, and an all-reduce over n of them
sends 2 (n - 1) / n of its bytes.
"""

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zzhnet_jax.aot.report import duration, quantity
from zzhnet_jax.aot.targets import parse_target

ROOT = Path(__file__).resolve().parents[1]
SLICES = {
    "v5e-4": "v5e:2x2",
    "v5e-8": "v5e:2x4",
    "v5e-16": "v5e:4x4",
    "v5e-64": "v5e:8x8",
    "v5e-256": "v5e:16x16",
    "v5p-64": "v5p:2x4x4",
    "8 x H100": "cuda:h100:8",
    "64 x H100": "cuda:h100:64",
}
_BEGIN, _END = "<!-- table: {} -->", "<!-- end of table: {} -->"


@dataclasses.dataclass(frozen=True)
class Case:
    """One training step on one slice.

    Attributes:
      slice: a key of `SLICES`.
      network: a preset.
      size: side of the images.
      batch: pairs, over all devices.
      mesh: axis -> size.
      options: further arguments of `zzhnet train`.
      like: slice of the case whose program this one repeats on more copies; None to compile it.
    """

    slice: str
    network: str
    size: int
    batch: int
    mesh: Mapping[str, int]
    options: tuple[str, ...] = ()
    like: str | None = None

    @property
    def key(self) -> str:
        """Its name in the results file."""
        mesh = " x ".join(f"{axis}={size}" for axis, size in self.mesh.items())
        named = f"{self.network} {self.size} batch {self.batch}, {mesh} on {self.slice}"
        return " ".join([named, *self.options])

    @property
    def command(self) -> list[str]:
        """Compiles it."""
        arguments = ["--model.name", self.network, "--data.crop-size", str(self.size)]
        arguments += ["--data.batch-size", str(self.batch)]
        for axis, size in self.mesh.items():
            arguments += [f"--mesh.{axis}", str(size)]
        program = [sys.executable, "-m", "zzhnet_jax.cli", "train", "--dry-run", "--json"]
        return [*program, "--target", SLICES[self.slice], *arguments, *self.options]


# What large images need: blocks recomputed, and everything but weights and scans in bfloat16.
LEAN = ("--model.compute-dtype", "bfloat16", "--train.remat", "blocks+scan")


def _family(
    network: str, size: int, each: int, axis: str, options: tuple[str, ...] = ()
) -> list[Case]:
    """A network on the five slices with the same pairs a device, split along one axis."""
    cases = []
    for name in ("v5e-8", "v5e-256", "v5p-64", "8 x H100", "64 x H100"):
        target = parse_target(SLICES[name])
        devices = math.prod(target.shape)
        smaller = {"v5e-256": "v5e-8", "64 x H100": "8 x H100"}.get(name)
        copies = devices // 8 if smaller else 1
        mesh = {axis: devices // copies}
        if smaller:
            mesh = {"data": devices} if axis == "data" else {"data": copies, axis: 8}
        cases.append(Case(name, network, size, each * devices, mesh, options, smaller))
    return cases


SCALING = [
    *_family("mambabcd_tiny", 256, 8, "data"),
    *_family("zzhnet_tiny", 256, 8, "data"),
    *_family("mambabcd_base", 512, 4, "fsdp", LEAN),
    *_family("zzhnet_base", 1024, 1, "fsdp", LEAN),
]
LARGE = [
    Case("v5e-16", "mambabcd_base", 512, 64, {"fsdp": 16}, LEAN),
    Case("v5e-16", "zzhnet_base", 1024, 16, {"fsdp": 16}, LEAN),
]
# Which network it is does not matter here, so it is one that compiles fast.
_SHALLOW = ("--model.overrides.depths", "1,1,1,1")
WEAK = [
    Case(name, "zzhnet_nano", 32, 2 * devices, {"data": devices}, _SHALLOW)
    for name, devices in (("v5e-4", 4), ("v5e-16", 16), ("v5e-64", 64), ("v5e-256", 256))
]
TABLES = {"weak": WEAK, "large": LARGE, "scaling": SCALING}


def compile_case(case: Case) -> dict[str, Any]:
    """What the dry run says, or {"error": why it says nothing}."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(case.command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if not done.stdout:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    return json.loads(done.stdout)


def repeated(case: Case, base: Case, found: dict[str, Any]) -> dict[str, Any]:
    """The figures of a smaller slice for more copies of the network, on a larger one."""
    chip = parse_target(SLICES[case.slice]).chip
    before, after = base.mesh.get("data", 1), case.mesh["data"]
    kinds = dict(found["collective_bytes"])
    if before == 1:
        # Each device now also sums its part of the gradients, float32, with the other copies.
        kinds["all-reduce"] += 4.0 * found["parameters"] / math.prod(base.mesh.values())
        summed = kinds["all-reduce"] - found["collective_bytes"]["all-reduce"]
    else:
        summed = kinds["all-reduce"]
    sent_before = 2.0 * summed * (before - 1) / before
    sent_after = 2.0 * summed * (after - 1) / after
    seconds = dict(found["roofline_seconds"])
    # Copies on other hosts are reached through the network, where there is one.
    rate = chip.link_rate if chip.network_rate is None else chip.network_rate
    seconds["communication"] += sent_after / rate - sent_before / chip.link_rate
    resources = {"compute": "compute", "memory": "memory bandwidth"}
    resources["communication"] = "communication"
    limit = max(resources, key=lambda name: seconds[name])
    seconds |= {"step": seconds[limit], "limit": resources[limit]}
    sent = found["sent_bytes"] + sent_after - sent_before
    return found | {"collective_bytes": kinds, "sent_bytes": sent, "roofline_seconds": seconds}


def row(case: Case, cases: list[Case], results: dict[str, Any]) -> list[str] | None:
    """One line of a table; None if nothing has been compiled for it."""
    found, source = results.get(case.key), "compiled"
    if found is None and case.like is not None:
        source = "formula"
        same = (case.network, case.size, case.options)
        base = next(
            c for c in cases
            if c.slice == case.like and (c.network, c.size, c.options) == same
        )  # fmt: skip
        found = results.get(base.key)
        if found is not None and "error" not in found:
            found = repeated(case, base, found)
    if found is None:
        return None
    mesh = " x ".join(f"{axis}={size}" for axis, size in case.mesh.items())
    start = [case.slice, case.network, str(case.size), str(case.batch), mesh]
    if "error" in found:
        return [*start, "does not compile", "", "", "", source]
    kinds = ", ".join(
        f"{kind} {quantity(size, 'B')}" for kind, size in found["collective_bytes"].items() if size
    )
    seconds = found["roofline_seconds"]
    memory = quantity(found["memory_bytes"]["peak"], "B")
    return [
        *start,
        memory if found["fits"] else f"{memory}, too much",
        kinds or "none",
        quantity(found["sent_bytes"], "B"),
        f"{duration(seconds['step'])} ({seconds['limit']})",
        source,
    ]


def table(cases: list[Case], results: dict[str, Any]) -> str:
    """A table in Markdown of what is known."""
    headings = (
        "slice", "network", "size", "batch", "mesh", "memory a device", "collectives", "sent",
        "least step time", "how",
    )  # fmt: skip
    rows = [line for case in cases if (line := row(case, cases, results)) is not None]
    if not rows:
        return "Nothing has been compiled for this table yet; `make scaling` does it."
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join([*lines, *("| " + " | ".join(line) + " |" for line in rows)])


def write_document(path: Path, results: dict[str, Any]) -> None:
    """Replaces the tables between their marks."""
    text = path.read_text()
    for name, cases in TABLES.items():
        begin, end = _BEGIN.format(name), _END.format(name)
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n{table(cases, results)}\n{end}{after}"
    path.write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="compile only cases whose name holds this")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "scaling.json")
    parser.add_argument("--document", type=Path, help="write the tables into this file")
    parser.add_argument("--no-compile", action="store_true", help="only write the document")
    options = parser.parse_args()
    results = json.loads(options.results.read_text()) if options.results.exists() else {}
    cases = [case for table in TABLES.values() for case in table if case.like is None]
    for case in cases:
        if options.no_compile or case.key in results or options.only not in case.key:
            continue
        print(case.key, flush=True)
        results[case.key] = found = compile_case(case)
        found.pop("shardings", None)
        print(f"  {found.get('error') or found['memory_bytes']['peak']}", flush=True)
        options.results.write_text(json.dumps(results, indent=1) + "\n")
    if options.document:
        write_document(options.document, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
