"""ChangeMamba's networks: arrangements, outputs, sizes, and what the two dates share."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zzhnet_jax.errors import ConfigError
from zzhnet_jax.models import functional
from zzhnet_jax.models.changemamba import ChangeMambaConfig, build
from zzhnet_jax.models.changemamba.decoders import arrange, dates, resize
from zzhnet_jax.models.vssm import BlockConfig, SS2DConfig, VSSMConfig

# Stages without scans: what is tested here is everything around them.
ENCODER = VSSMConfig(
    depths=(1, 1), dims=8, block=BlockConfig(ssm=SS2DConfig(ssm_ratio=0.0), mlp_ratio=1.0)
)
CONFIG = ChangeMambaConfig(encoder=ENCODER, decoder_width=8)
PRE, POST = jax.random.normal(jax.random.key(0), (2, 1, 24, 40, 3))


@partial(jax.jit, static_argnums=0)
def apply(graphdef, params, stats, pre, post):
    return functional.apply(graphdef, params, stats, pre, post)[0]


def run(model, pre, post):
    return apply(*functional.split(model), pre, post)


def test_arrangements_and_their_inverse():
    pre, post = jnp.arange(24.0).reshape(2, 1, 3, 4), -jnp.arange(24.0).reshape(2, 1, 3, 4)
    interleaved = arrange(pre, post, "interleave")
    np.testing.assert_array_equal(interleaved[:, :, 0::2], pre)
    np.testing.assert_array_equal(interleaved[:, :, 1::2], post)
    np.testing.assert_array_equal(arrange(pre, post, "split")[:, :, :3], pre)
    np.testing.assert_array_equal(arrange(pre, post, "cat")[..., 4:], post)
    for arrangement in ("interleave", "split"):
        first, second = dates(arrange(pre, post, arrangement), arrangement)
        np.testing.assert_array_equal(first, pre)
        np.testing.assert_array_equal(second, post)


def test_resize_interpolates_between_pixel_centres():
    row = resize(jnp.asarray([0.0, 4.0]).reshape(1, 1, 2, 1), (1, 4))
    np.testing.assert_allclose(row.ravel(), [0, 1, 3, 4])


@pytest.mark.parametrize(
    ("config", "classes", "expected"),
    [
        (CONFIG, 3, {"change": 3}),
        (
            replace(CONFIG, task="scd", semantic_classes=5),
            2,
            {"change": 2, "pre_semantic": 5, "post_semantic": 5},
        ),
        (replace(CONFIG, task="bda", damage_classes=4), 2, {"building": 2, "damage": 4}),
    ],
)
def test_outputs_have_the_size_of_the_input(config, classes, expected):
    """Which need be no multiple of the stride."""
    outputs = run(build(config, classes, rngs=nnx.Rngs(0)), PRE[:, :23], POST[:, :23])
    outputs = outputs if isinstance(outputs, dict) else {"change": outputs}
    assert {name: y.shape[-1] for name, y in outputs.items()} == expected
    for y in outputs.values():
        assert y.shape[:3] == (1, 23, 40) and y.dtype == jnp.float32
        assert np.std(y) > 0


def test_land_cover_is_of_one_date_and_one_head():
    model = build(replace(CONFIG, task="scd"), rngs=nnx.Rngs(0))
    plain, other = run(model, PRE, POST), run(model, PRE, POST + 1)
    np.testing.assert_array_equal(plain["pre_semantic"], other["pre_semantic"])
    for name in ("change", "post_semantic"):
        assert np.abs(plain[name] - other[name]).max() > 1e-3
    swapped = run(model, POST, PRE)
    assert np.abs(plain["pre_semantic"] - swapped["post_semantic"]).max() > 1e-3


def test_buildings_are_of_the_first_date():
    model = build(replace(CONFIG, task="bda"), rngs=nnx.Rngs(0))
    plain, other = run(model, PRE, POST), run(model, PRE, POST + 1)
    np.testing.assert_array_equal(plain["building"], other["building"])
    assert np.abs(plain["damage"] - other["damage"]).max() > 1e-3


def test_switches_change_the_parameters_as_they_should():
    def count(config):
        _, params, _ = functional.abstract(lambda rngs: build(config, rngs=rngs))
        return {k: sum(x.size for x in jax.tree.leaves(v)) for k, v in params.items()}

    base = count(CONFIG)
    separate = count(replace(CONFIG, separate_encoders=True))
    assert separate == base | {"encoders": 2 * base["encoders"]}
    one = count(replace(CONFIG, arrangements=("cat",)))
    assert one["encoders"] == base["encoders"] and one["decoder"] < base["decoder"]
    assert count(replace(CONFIG, scan_finest=False))["decoder"] < base["decoder"]
    assert count(replace(CONFIG, decoder_width=16))["decoder"] > base["decoder"]


def test_batch_norm_in_the_encoder_sees_one_date_at_a_time():
    block = replace(ENCODER.block, norm="batch")
    encoder = replace(ENCODER, block=block, drop_path_rate=0.0)
    model = build(replace(CONFIG, encoder=encoder, decoder_drop_path=0.0), rngs=nnx.Rngs(0))
    graphdef, params, stats = functional.split(model)
    _, stats = functional.apply(graphdef, params, stats, PRE, POST, train=True)
    assert stats["encoders"]["pre"]["patch_embed"]["norms"][0]["count"] == 2
    assert stats["decoder"]["stages"][0]["fuse"]["norm"]["count"] == 1


def test_impossible_fields_are_named():
    with pytest.raises(ConfigError, match="arrangements"):
        ChangeMambaConfig(arrangements=("cat", "stack"))
    with pytest.raises(ConfigError, match="task = 'cd'"):
        ChangeMambaConfig(task="cd")
