"""Structure read off the published listings agrees with the configurations they were made with."""

import json
import os
from pathlib import Path

import pytest

from zzhnet_jax.conversion.legacy_config import vssm_config
from zzhnet_jax.conversion.structure import differences, flat, hierarchy
from zzhnet_jax.errors import ConversionError
from zzhnet_jax.models.vssm.config import BlockConfig, SS2DConfig, VSSMConfig

KEYS = Path(os.environ.get("ZZHNET_GOLDENS", "")) / "keys"
LISTINGS = [
    path
    for family in ("vmamba", "bcd", "scd", "bda", "mmbda")
    for path in sorted(KEYS.glob(f"keys_{family}_*.json"))
]


def shapes_of(listing: dict, prefix: str) -> dict[str, tuple[int, ...]]:
    return {
        name.removeprefix(prefix): tuple(shape)
        for name, shape in listing["keys"].items()
        if name.startswith(prefix)
    }


@pytest.mark.skipif(not LISTINGS, reason="ZZHNET_GOLDENS is not set: it names the golden arrays")
@pytest.mark.parametrize("path", LISTINGS, ids=lambda path: path.stem)
def test_listings(path):
    listing = json.loads(path.read_text())
    vmamba = path.stem.startswith("keys_vmamba")
    prefix = "" if vmamba else "encoder_2." if "mmbda" in path.stem else "encoder."
    config = vssm_config(listing["config"], "vmamba" if vmamba else "changemamba")
    assert differences(config, hierarchy(shapes_of(listing, prefix))) == {}


BLOCK = {
    "norm.weight": (6,),
    "op.in_proj.weight": (24, 6),
    "op.out_proj.weight": (6, 12),
    "op.x_proj_weight": (4, 5, 12),
    "op.dt_projs_weight": (4, 12, 1),
    "op.A_logs": (48, 2),
    "op.Ds": (48,),
}


def listed(block: dict, **others: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    names = {f"layers.0.blocks.{i}.{name}": s for i in range(3) for name, s in block.items()}
    return {"patch_embed.0.weight": (6, 4, 2, 2)} | names | others


def changed(block: dict, config: VSSMConfig | None = None, **others: tuple[int, ...]) -> dict:
    return flat(differences(config or VSSMConfig(), hierarchy(listed(block, **others))))


def test_every_field_that_shapes_settle():
    assert changed(BLOCK) == {
        "depths": (3,),
        "dims": 6,
        "in_chans": 4,
        "patch_embed_version": 1,
        "patch_size": 2,
        "patch_norm": False,
        "block.mlp_ratio": 0.0,
        "block.ssm.d_conv": 1,
        "block.ssm.d_state": 2,
        "block.ssm.gate": "activated",
        "block.ssm.output_norm": "none",
    }


@pytest.mark.parametrize(
    ("extra", "field", "value"),
    [
        ({"norm.running_mean": (6,)}, "block.norm", "batch"),
        ({"op.conv2d.weight": (12, 1, 5, 5)}, "block.ssm.d_conv", 5),
        ({"op.conv2d.bias": (12,)}, "block.ssm.conv_bias", True),
        ({"op.in_proj.bias": (24,)}, "block.ssm.projection_bias", True),
        ({"op.out_norm.weight": (12, 1, 3, 3)}, "block.ssm.output_norm", "dwconv3"),
        ({"op.out_norm.1.weight": (12, 1, 3, 3)}, "block.ssm.output_norm", "dwconv3"),
        ({"op.out_norm.2.weight": (12, 1, 3, 3)}, "block.ssm.output_norm", "layer_dwconv3"),
        ({"op.dt_projs_weight": (4, 12, 3)}, "block.ssm.dt_rank", 3),
        ({"mlp.fc1.weight": (26, 6), "mlp.fc2.weight": (6, 13)}, "block.gated_mlp", True),
    ],
)
def test_single_fields(extra, field, value):
    assert changed(BLOCK | extra)[field] == value


@pytest.mark.parametrize(
    ("operator", "rows", "steps"), [("xv1a", 12 + 3 + 16, 3), ("xv3a", 12 + 12 + 16, 3)]
)
def test_fused_operators(operator, rows, steps):
    block = {name: shape for name, shape in BLOCK.items() if name != "op.x_proj_weight"}
    block |= {"op.in_proj.weight": (rows, 6, 1, 1), "op.dt_projs_weight": (4, 12, steps)}
    found = changed(block)
    assert found["block.ssm.operator"] == operator and found["block.ssm.dt_rank"] == steps


def test_ambiguous_fields_stay_as_the_preset_has_them():
    ssm = SS2DConfig(gate="linear", output_norm="softmax")
    found = changed(BLOCK, VSSMConfig(block=BlockConfig(ssm=ssm)))
    assert "block.ssm.gate" not in found and "block.ssm.output_norm" not in found


def test_ratios_that_were_rounded_down():
    config = VSSMConfig(block=BlockConfig(mlp_ratio=2.6))
    block = BLOCK | {"mlp.fc1.weight": (15, 6), "mlp.fc2.weight": (6, 15)}
    assert "block.mlp_ratio" not in changed(block, config)


def test_first_releases_names():
    block = {
        name.replace("op.", "self_attention.").replace("norm.w", "ln_1.w"): shape
        for name, shape in BLOCK.items()
    }
    assert changed(block) == changed(BLOCK)


def test_damaged_listings_are_refused():
    with pytest.raises(ConversionError, match=r"not numbered from 0"):
        hierarchy({"layers.1.blocks.0.norm.weight": (6,)})
    with pytest.raises(ConversionError, match=r"patch_embed.0.weight is missing"):
        hierarchy({f"layers.0.blocks.0.{name}": shape for name, shape in BLOCK.items()})
    with pytest.raises(ConversionError, match=r"'A_logs' is missing"):
        changed({name: shape for name, shape in BLOCK.items() if "A_logs" not in name})
