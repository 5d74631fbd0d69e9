"""Presets against the parameter listings of the published networks: names, shapes and totals."""

import json
import os
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from zzhnet_jax.conversion.legacy_config import vssm_config
from zzhnet_jax.conversion.rules import flatten, join, match
from zzhnet_jax.models import functional
from zzhnet_jax.models.vssm import PRESETS, VSSM
from zzhnet_jax.models.vssm.torch_names import vssm_rules

ROOT = os.environ.get("ZZHNET_GOLDENS")
LISTINGS = sorted(Path(ROOT, "keys").glob("keys_vmamba_*.json")) if ROOT else []


def preset_name(listing: str) -> str:
    family, *rest = listing.split("_")
    size = next(part for part in rest if part in ("tiny", "small", "base"))
    (version,) = set(rest) - {size}
    return f"{family}_{size}_{version}"


@pytest.mark.skipif(
    not LISTINGS, reason="set ZZHNET_GOLDENS to a folder with keys/keys_vmamba_*.json"
)
@pytest.mark.parametrize(
    "path", LISTINGS or [None], ids=lambda path: path.stem if path else "absent"
)
def test_preset_is_the_published_network(path):
    listing = json.loads(path.read_text())
    config = PRESETS[preset_name(listing["name"])]
    legacy = vssm_config(listing["config"], "vmamba")
    assert replace(legacy, drop_path_rate=config.drop_path_rate) == config

    classes = listing["config"]["num_classes"]
    _, params, stats = functional.abstract(lambda rngs: VSSM(config, classes, rngs=rngs))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == listing["params"]
    tensors = {k: np.broadcast_to(np.float32(0), shape) for k, shape in listing["keys"].items()}
    shapes = {join(p): leaf.shape for p, leaf in (flatten(params) | flatten(stats)).items()}
    matching = match(tensors, shapes, vssm_rules(config))
    assert matching.exact, matching.problems()
