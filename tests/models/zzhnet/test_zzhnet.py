"""ZZHNet: what each switch does to the network, and the parts whose values are known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zzhnet_jax.errors import ConfigError
from zzhnet_jax.models import functional
from zzhnet_jax.models.registry import create_model, list_models, override, preset
from zzhnet_jax.models.vssm.config import BlockConfig, SS2DConfig
from zzhnet_jax.models.zzhnet.config import ZZHNetConfig
from zzhnet_jax.models.zzhnet.cssm import CSSM, CrossDateScan, arrange, separate
from zzhnet_jax.models.zzhnet.decoder import BilinearHead
from zzhnet_jax.models.zzhnet.fusion import AFF
from zzhnet_jax.models.zzhnet.layers import SubPixelUpsample, depth_to_space, norm_layer
from zzhnet_jax.models.zzhnet.zzhnet import ZZHNet

W = 8
# The scan that is traced fastest.
BLOCK = BlockConfig(ssm=SS2DConfig(ssm_ratio=1.0, scan_implementation="sequential"), mlp_ratio=1.0)
SMALL = ZZHNetConfig(
    width=W,
    depths=(1, 1, 1, 1),
    cssm_stages=(3,),
    block=BLOCK,
    decoder_width=8,
    drop_path_rate=0.0,
)


def count(config: ZZHNetConfig) -> int:
    _, params, _ = functional.abstract(lambda rngs: ZZHNet(config, rngs=rngs))
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def change(**fields) -> int:
    return count(dataclasses.replace(SMALL, **fields)) - count(SMALL)


def images(size: tuple[int, int] = (40, 33), seed: int = 0) -> tuple[jax.Array, jax.Array]:
    pre, post = jax.random.normal(jax.random.key(seed), (2, 1, *size, 3))
    return pre, post


def block_size(d: int, mlp_ratio: float = 1.0) -> int:
    """Parameters of one VSSBlock: two norms, SS2D at ratio 1 without gate or biases, MLP."""
    rank = -(-d // 16)
    ss2d = 2 * d * d + 9 * d + 4 * (d * (rank + 2) + rank * d + 3 * d) + 2 * d
    hidden = int(mlp_ratio * d)
    return 4 * d + ss2d + 2 * d * hidden + hidden + d


def stage_size(stage: int, depth: int = 1) -> int:
    d = W * 2**stage
    downsample = 9 * (d // 2) * d + d + 2 * d if stage else 0
    return downsample + depth * block_size(d)


def cssm_size(d: int, order_width: int = 1) -> int:
    """Two norms and scales, gated projections, the scan over `order_width` x d channels, MLP."""
    rank, s = -(-d // 16), order_width * d
    scan = 4 * (s * (rank + 2) + rank * s + 3 * s)
    return 6 * d + 2 * d * d + 9 * d + scan + 2 * d + d * d + 2 * d * d + 2 * d


def test_sharing_a_stage_saves_one_set_of_its_weights():
    for shared in range(4):
        assert change(num_shared_stages=shared) - change(num_shared_stages=shared + 1) == (
            stage_size(shared)
        )


def test_each_cssm_adds_its_block():
    for stage in range(3):
        assert change(cssm_stages=(stage, 3)) == cssm_size(W * 2**stage)
    assert change(cssm_stages=()) == -cssm_size(W * 8)


def test_token_order_changes_only_the_scan_over_channels():
    assert change(token_order="concat_width") == change(token_order="concat_height") == 0
    assert change(token_order="concat_channels") == cssm_size(W * 8, 2) - cssm_size(W * 8)


def test_depth_adds_blocks():
    assert change(depths=(1, 3, 1, 1)) == 2 * block_size(2 * W)
    assert change(depths=(1, 1, 1, 2)) == 2 * block_size(8 * W), "two sets of weights"


def test_decoder_switches():
    residual = 2 * 9 * 8 * 8 + 4 * 8
    assert change(decoder_blocks=2) == 4 * residual
    assert change(norm="group") == change(norm="batch") == 0
    widths, narrow = (8, 16, 32, 64), 0
    assert dataclasses.replace(SMALL, channel_schedule="progressive").decoder_widths == widths
    grown = 0
    for i, d in enumerate(widths):
        inputs = 3 * W * 2**i
        grown += (inputs * d + 2 * d + 18 * d * d + 4 * d) - (inputs * 8 + 2 * 8 + residual)
        narrow += d * 2 * d + 2 * d if i < 3 else 0
    assert change(channel_schedule="progressive") == grown + narrow


def test_head_and_embedding_switches():
    stem = W // 2
    half = 8
    learned = (8 * 4 * half + 4 * half) + (3 * stem * half + 2 * half)
    learned += (2 * 9 * half * half + 4 * half) + (half * 8 + 8)
    bilinear = 8 * 2 + 2
    assert change(head="bilinear") == bilinear - learned
    two_convs = (27 * stem + stem) + 2 * stem + (9 * stem * W + W) + 2 * W
    one_conv = (48 * W + W) + 2 * W
    assert change(head="bilinear", patch_embed_version=1) == (
        bilinear - learned + one_conv - two_convs
    )
    merging = sum(
        (8 * d + 4 * d * 2 * d - (18 * d * d + 2 * d + 4 * d)) * (1 if stage == 1 else 2)
        for stage, d in ((1, W), (2, 2 * W), (3, 4 * W))
    )
    assert change(downsample_version=1) == merging


def test_presets_grow_and_stay_what_they_are():
    names = [f"zzhnet_{size}" for size in ("nano", "tiny", "small", "base")]
    assert set(names) <= set(list_models())
    counts = [count(preset(name)) for name in names]
    assert counts == sorted(counts)
    assert counts[0] < 1_100_000 < 30_000_000 < counts[1] < 40_000_000


def test_traced_initialisation_draws_what_building_draws():
    def build(rngs: nnx.Rngs) -> ZZHNet:
        return ZZHNet(SMALL, rngs=rngs)

    key = jax.random.key(3)
    traced, _ = jax.jit(functional.initializer(build))(key)
    _, built, _ = functional.split(build(nnx.Rngs(key)))
    for one, other in zip(jax.tree.leaves(traced), jax.tree.leaves(built), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def network() -> ZZHNet:
    return create_model(
        "zzhnet_nano", rngs=nnx.Rngs(0), **dict(dataclasses.asdict(SMALL), block=BLOCK)
    )


@pytest.fixture(scope="module")
def forward(network):
    graphdef, params, stats = functional.split(network)
    run = jax.jit(lambda pre, post: functional.apply(graphdef, params, stats, pre, post)[0])
    return run


def test_any_size_gives_logits_of_that_size(forward):
    for size in ((40, 33), (32, 64)):
        logits = forward(*images(size))
        assert logits.shape == (1, *size, 2) and logits.dtype == jnp.float32
        assert np.isfinite(logits).all()


def test_padding_is_the_edge_repeated(forward):
    pre, post = images((40, 33))
    padded = [jnp.pad(x, ((0, 0), (0, 24), (0, 31), (0, 0)), mode="edge") for x in (pre, post)]
    whole = forward(*padded)
    np.testing.assert_allclose(forward(pre, post), whole[:, :40, :33], rtol=1e-4, atol=1e-5)


def test_images_that_do_not_match_are_refused(network):
    pre, post = images()
    with pytest.raises(ValueError, match="one shape"):
        network(pre, post[:, :-1])
    with pytest.raises(ValueError, match="one shape"):
        network(pre[..., :2], post[..., :2])


def test_convolutions_of_the_dates_are_not_grouped():
    """Of a grouped one, XLA for GPUs computes the weight gradient of the whole batch everywhere."""
    config = dataclasses.replace(SMALL, num_shared_stages=0)
    graphdef, params, stats = functional.abstract(lambda rngs: ZZHNet(config, rngs=rngs))
    pair = [jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)] * 2
    run = jax.jit(lambda params, stats, *pair: functional.apply(graphdef, params, stats, *pair)[0])
    text = run.lower(params, stats, *pair).as_text()  # of a CPU, where depthwise ones are shifts
    assert "feature_group_count = 1" in text and "feature_group_count = 2" not in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {
            **{"num_shared_stages": 4, "cssm_stages": (0, 2), "token_order": "concat_channels"},
            **{"head": "bilinear", "patch_embed_version": 1, "downsample_version": 1},
        },
        {"num_shared_stages": 0, "token_order": "concat_height", "norm": "batch"},
        {"token_order": "concat_width", "norm": "group", "channel_schedule": "progressive"},
        {
            **{"dtype": "bfloat16", "downsample_version": 2, "decoder_blocks": 2},
            **{"drop_path_rate": 0.5, "block": dataclasses.replace(BLOCK, remat=True)},
        },
    ],
    ids=["shared", "separate", "group_norm", "bfloat16"],
)
def test_every_switch_trains_a_step(fields):
    """The gradient reaches every parameter, and a step along it lowers the loss."""
    config = dataclasses.replace(SMALL, **fields)
    graphdef, params, stats = functional.split(ZZHNet(config, rngs=nnx.Rngs(0)))
    pre, post = images((64, 64))  # a single pixel in the last stage would leave its decay idle
    target = jnp.sign(jnp.sin(jnp.arange(64.0)))[None, :, None] * jnp.ones((1, 64, 64))

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        logits, _ = functional.apply(
            graphdef, params, stats, pre, post, train=True, key=jax.random.key(1)
        )
        return jnp.mean(jax.nn.softplus(-target * (logits[..., 1] - logits[..., 0])))

    before, gradient = loss(params)
    paths, _ = jax.tree_util.tree_flatten_with_path(gradient)
    # With drop path whole branches of the only sample are silent.
    silent = [path for path, leaf in paths if not np.abs(leaf).max() > 0]
    assert not silent or config.drop_path_rate, silent[:3]
    assert all(np.isfinite(leaf).all() for _, leaf in paths)
    square = sum(float(jnp.sum(leaf.astype(jnp.float32) ** 2)) for _, leaf in paths)
    moved = jax.tree.map(lambda p, g: p - 1e-2 * g / np.sqrt(square), params, gradient)
    after, _ = loss(moved)
    assert after < before


@pytest.mark.parametrize(
    "order", ["interleave", "concat_width", "concat_height", "concat_channels"]
)
def test_arranging_is_undone_by_separating(order):
    pre = np.arange(24.0).reshape(1, 2, 3, 4)
    post = -pre - 1
    both = arrange(pre, post, order)
    for one, other in zip(separate(both, order), (pre, post), strict=True):
        np.testing.assert_array_equal(one, other)


def test_interleaving_alternates_the_dates_column_by_column():
    pre, post = np.zeros((1, 2, 3, 1)), np.ones((1, 2, 3, 1))
    np.testing.assert_array_equal(
        arrange(pre, post, "interleave")[0, :, :, 0], [[0, 1, 0, 1, 0, 1]] * 2
    )


def test_a_cssm_starts_as_almost_nothing():
    block = CSSM(16, BLOCK, "interleave", rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 16))
    assert 0 < np.abs(block(x) - x).max() < 0.2


@pytest.mark.parametrize("order", ["interleave", "concat_channels"])
def test_the_cross_date_scan_lets_each_date_see_the_other(order):
    scan = CrossDateScan(16, BLOCK, order, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 16))
    for date, other in ((0, 1), (1, 0)):
        # Exactly 0 unless there is a path; a fresh block's coupling is too small to see in values.
        gradient = jax.jit(jax.grad(lambda x, other=other: jnp.sum(scan(x)[other] ** 2)))(x)
        assert np.abs(gradient[date]).max() > 0


def test_fusion_mixes_between_its_inputs():
    fusion = AFF(8, norm="layer", dtype=jnp.float32, rngs=nnx.Rngs(0))
    x, y = jax.random.normal(jax.random.key(0), (2, 1, 3, 3, 8))
    mixed = fusion(x, y)
    assert np.all(mixed >= np.minimum(x, y) - 1e-6) and np.all(mixed <= np.maximum(x, y) + 1e-6)
    np.testing.assert_allclose(fusion(x, x), x, rtol=1e-6)


def test_depth_to_space_places_channels_row_by_row():
    x = jnp.arange(4.0).reshape(1, 1, 1, 4)
    np.testing.assert_array_equal(depth_to_space(x)[0, :, :, 0], [[0, 1], [2, 3]])


def test_sub_pixel_upsampling_starts_as_nearest_neighbour():
    layer = SubPixelUpsample(3, 2, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 2, 2, 3))
    y = np.asarray(layer(x))
    assert y.shape == (1, 4, 4, 2) and np.abs(y).max() > 0
    np.testing.assert_array_equal(y, y[:, ::2, ::2].repeat(2, axis=1).repeat(2, axis=2))


def test_bilinear_head_keeps_a_constant_map():
    head = BilinearHead(4, 2, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jnp.broadcast_to(jnp.arange(4.0), (1, 3, 5, 4))
    logits = head(x)
    assert logits.shape == (1, 12, 20, 2)
    np.testing.assert_allclose(
        logits, jnp.broadcast_to(logits[:, :1, :1], logits.shape), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depths": (1, 2, 3)}, "depths"),
        ({"width": 0}, "width"),
        ({"num_shared_stages": 5}, "num_shared_stages"),
        ({"cssm_stages": (4,)}, "cssm_stages"),
        ({"token_order": "diagonal"}, "token_order"),
        ({"head": "learned", "patch_embed_version": 1}, "head"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"norm": "instance"}, "norm"),
        ({"wdith": 3}, "did you mean width"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        override(preset("zzhnet_nano"), fields)


@pytest.mark.parametrize(("channels", "count"), [(3, 1), (12, 3), (40, 8), (64, 8)])
def test_group_norm_is_over_pixels_and_groups_of_one_sample(channels, count):
    norm = norm_layer("group", channels, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = np.array(jax.random.normal(jax.random.key(0), (2, 3, 5, channels))) * 3 + 1
    groups = x.reshape(2, 15, count, channels // count)
    mean = groups.mean((1, 3), keepdims=True)
    deviation = np.sqrt(groups.var((1, 3), keepdims=True) + 1e-5)
    expected = ((groups - mean) / deviation).reshape(x.shape)
    np.testing.assert_allclose(norm(x), expected, rtol=1e-4, atol=1e-5)


def test_drop_path_rates_grow_linearly_over_all_stages():
    config = dataclasses.replace(SMALL, depths=(1, 2, 1, 1), drop_path_rate=0.4)
    model = nnx.eval_shape(lambda: ZZHNet(config, rngs=nnx.Rngs(0)))
    shared = [rate for stage in model.shared_stages for rate in stage.drop_path_rates]
    for own in (model.pre_stages, model.post_stages):
        rates = shared + [rate for stage in own for rate in stage.drop_path_rates]
        np.testing.assert_allclose(rates, [0.0, 0.1, 0.2, 0.3, 0.4])
