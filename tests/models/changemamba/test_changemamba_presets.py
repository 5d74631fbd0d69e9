"""Presets against the parameter listings of ChangeMamba: names old and new, shapes and totals."""

import json
import os
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest

from zzhnet_jax.conversion.legacy_config import vssm_config
from zzhnet_jax.conversion.rules import flatten, join, match, torch_name
from zzhnet_jax.models import functional
from zzhnet_jax.models.changemamba import PRESETS, build
from zzhnet_jax.models.changemamba.torch_names import changemamba_rules

ROOT = os.environ.get("ZZHNET_GOLDENS")
FOLDER = Path(ROOT, "keys") if ROOT else None
TASKS = ("bcd", "scd", "bda", "mmbda")
LISTINGS = (
    [path for task in TASKS for path in sorted(FOLDER.glob(f"keys_{task}_*.json"))]
    if FOLDER
    else []
)
MILLIONS = {  # all parameters, as the facts of the published figures state them
    "mambabcd_mini": 20.228,
    "mambascd_mini": 23.946,
    "mambabda_mini": 22.087,
}
needs_listings = pytest.mark.skipif(
    not LISTINGS, reason="set ZZHNET_GOLDENS to a folder with keys/keys_<task>_*.json"
)


@cache
def shapes_of(name: str) -> tuple[dict, dict]:
    config = PRESETS[name]
    _, params, stats = functional.abstract(lambda rngs: build(config, rngs=rngs))
    return params, {join(p): leaf.shape for p, leaf in (flatten(params) | flatten(stats)).items()}


def total(params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@needs_listings
@pytest.mark.parametrize(
    "path", LISTINGS or [None], ids=lambda path: path.stem if path else "absent"
)
def test_preset_is_the_published_network(path):
    listing = json.loads(path.read_text())
    task, naming, size = listing["name"].split("_")
    name = f"mamba{task}_{size}"
    config = PRESETS[name]
    assert vssm_config(listing["config"], "changemamba") == config.encoder

    params, shapes = shapes_of(name)
    assert total(params) == listing["params"]
    tensors = {k: np.broadcast_to(np.float32(0), shape) for k, shape in listing["keys"].items()}
    rules = {naming: changemamba_rules(config, naming) for naming in ("new", "old")}
    for read_as in rules:  # either naming is read, whichever is written
        matching = match(tensors, shapes, rules[read_as])
        assert matching.exact, matching.problems()
    written = {torch_name(path, rules[naming])[0] for path in shapes}
    assert written == set(listing["keys"])


@needs_listings
@pytest.mark.parametrize("task", TASKS)
def test_old_and_new_names_are_each_other(task):
    """The map was made with one block in a stage, so it covers part of a preset's names."""
    renames = json.loads((FOLDER / f"keymap_old_to_new_{task}.json").read_text())
    config = PRESETS[f"mamba{task}_tiny"]
    _, shapes = shapes_of(f"mamba{task}_tiny")
    new, old = changemamba_rules(config, "new"), changemamba_rules(config, "old")
    ours = {torch_name(path, old)[0]: torch_name(path, new)[0] for path in shapes}
    known = {name: other for name, other in renames.items() if name in ours}
    assert len(known) > 300 and known == {name: ours[name] for name in known}


@pytest.mark.parametrize("name", MILLIONS)
def test_totals_of_mini(name):
    params, _ = shapes_of(name)
    assert round(total(params) / 1e6, 3) == MILLIONS[name]
