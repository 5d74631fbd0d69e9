"""Every published listing is recognised as the preset it was made with."""

import json
import os
from pathlib import Path

import pytest

from zzhnet_jax.conversion.detect import FAMILIES, detect, family_of
from zzhnet_jax.errors import ConfigError, ConversionError

KEYS = Path(os.environ.get("ZZHNET_GOLDENS", "")) / "keys"
LISTINGS = [
    path
    for family in ("vmamba", "bcd", "scd", "bda", "mmbda")
    for path in sorted(KEYS.glob(f"keys_{family}_*.json"))
]


def preset_of(listing: str) -> str:
    """For example keys_bcd_old_tiny -> mambabcd_tiny, keys_vmamba_vanilla_base -> its preset."""
    _, family, kind, *rest = listing.split("_")
    if family != "vmamba":
        return f"mamba{family}_{rest[0]}"
    return f"vmamba_{rest[0]}_vanilla" if kind == "vanilla" else f"vmamba_{kind}_{rest[0]}"


@pytest.mark.skipif(not LISTINGS, reason="ZZHNET_GOLDENS is not set: it names the golden arrays")
@pytest.mark.parametrize("path", LISTINGS, ids=lambda path: path.stem)
def test_listings(path):
    listing = json.loads(path.read_text())
    found = detect({name: tuple(shape) for name, shape in listing["keys"].items()})
    assert found.model == preset_of(path.stem) and found.overrides == {}
    assert found.num_classes == (1000 if "vmamba" in path.stem else 2)
    assert found.naming == ("old" if "_old_" in path.stem else "new")


BLOCK = {
    "norm.weight": (6,),
    "op.in_proj.weight": (12, 6),
    "op.out_proj.weight": (6, 12),
    "op.x_proj_weight": (4, 3, 12),
    "op.dt_projs_weight": (4, 12, 1),
    "op.A_logs": (48, 1),
    "op.Ds": (48,),
    "op.out_norm.weight": (12,),
}
HIERARCHY = {
    "patch_embed.0.weight": (3, 3, 3, 3),
    "patch_embed.2.weight": (3,),
    "patch_embed.5.weight": (6, 3, 3, 3),
    **{f"layers.0.blocks.0.{name}": shape for name, shape in BLOCK.items()},
}


def test_fields_that_no_preset_has_are_changed_and_told():
    found = detect({**HIERARCHY, "head.weight": (7, 6)})
    assert found.family.prefix == "vmamba" and found.num_classes == 7
    assert found.overrides["dims"] == 6 and found.overrides["depths"] == (1,)
    assert found.config.block.ssm.d_conv == 1 and found.config.block.mlp_ratio == 0
    told = "\n".join(found.decisions)
    for part in ("a VMamba classifier, known by head.weight", "dims = 6", "7 classes", "pattern"):
        assert part in told


def test_change_decoders_are_read_under_both_names():
    encoder = {f"encoder.{name}": shape for name, shape in HIERARCHY.items()}
    head = {"main_clf.weight": (2, 24, 1, 1)}
    new = {"decoder.stage_blocks.0.split.0.weight": (24, 6, 1, 1)}
    old = {"decoder.st_block_13.0.weight": (24, 6, 1, 1)}
    for branch, naming in ((new, "new"), (old, "old")):
        found = detect({**encoder, **branch, **head})
        assert found.family.prefix == "mambabcd" and found.naming == naming
        assert found.overrides["arrangements"] == ("split",)
        assert found.overrides["scan_finest"] is False and found.overrides["decoder_width"] == 24


def test_what_the_user_says_wins():
    shapes = {**HIERARCHY, "head.weight": (7, 6)}
    found = detect(
        shapes,
        model="vmamba_tiny_s2l5",
        num_classes=3,
        forward_type="v052d",
        overrides={"in_chans": 5},
    )
    assert found.model == "vmamba_tiny_s2l5" and found.num_classes == 3
    assert found.overrides == {
        "in_chans": 5,
        "block.ssm.pattern": "bidirectional",
        "block.ssm.gate": "activated",
    }


def test_unknown_checkpoints_and_networks_are_refused():
    with pytest.raises(ConversionError, match=r"no network known here \(the first is conv.weight"):
        detect({"conv.weight": (3, 3)})
    with pytest.raises(ConversionError, match=r"backbone without a head; .* --adapt encoder"):
        detect({**HIERARCHY, "outnorm0.weight": (6,)})
    with pytest.raises(ConversionError, match=r"zzhnet_nano has no PyTorch original"):
        family_of("zzhnet_nano")
    with pytest.raises(ConfigError, match=r"did you mean mambabcd_tiny"):
        family_of("mambabcd_tinny")
    with pytest.raises(ConversionError, match=r"no classifier.head.weight"):
        detect(HIERARCHY, model="vmamba_tiny_s2l5")
    with pytest.raises(ConversionError, match=r"'v05noz'"):
        detect({**HIERARCHY, "head.weight": (7, 6)}, forward_type="v05noz")


def test_every_family_has_presets():
    assert all(family.presets() for family in FAMILIES)
