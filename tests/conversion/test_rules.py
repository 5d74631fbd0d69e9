"""The rules that move weights: strictness, both directions, layouts."""

import numpy as np
import pytest

from zzhnet_jax.conversion.rules import (
    LAYOUTS,
    from_state_dict,
    match,
    to_jax,
    to_state_dict,
    to_torch,
)
from zzhnet_jax.errors import ConversionError
from zzhnet_jax.models.torch_names import Rule, Transform, under

RULES = (
    Rule("stem.weight", "stem.kernel", Transform.CONV, aliases=("proj.weight",)),
    *under(
        (
            Rule("fc.weight", "linear.kernel", Transform.LINEAR),
            Rule("norm.num_batches_tracked", "norm.count", Transform.COUNTER),
        ),
        "layers.{i}.",
        "stages.{i}.",
        aliases=("blocks.{i}.",),
    ),
)


def template():
    params = {
        "stem": {"kernel": np.zeros((2, 3, 4, 5), np.float32)},
        "stages": {i: {"linear": {"kernel": np.zeros((6, 7), np.float32)}} for i in range(2)},
    }
    stats = {"stages": {0: {"norm": {"count": np.zeros((), np.int32)}}}}
    return params, stats


def state_dict():
    rng = np.random.default_rng(0)
    return {
        "stem.weight": rng.normal(size=(5, 4, 2, 3)).astype(np.float32),
        "layers.0.fc.weight": rng.normal(size=(7, 6)).astype(np.float32),
        "layers.1.fc.weight": rng.normal(size=(7, 6)).astype(np.float32),
        "layers.0.norm.num_batches_tracked": np.asarray(12, np.int64),
    }


def test_there_and_back_is_the_same_bits():
    given = state_dict()
    params, stats, matching = from_state_dict(given, template(), RULES)
    assert matching.exact
    np.testing.assert_array_equal(
        params["stages"][1]["linear"]["kernel"], given["layers.1.fc.weight"].T
    )
    assert params["stem"]["kernel"][1, 2, 3, 4] == given["stem.weight"][4, 3, 1, 2]
    assert stats["stages"][0]["norm"]["count"] == 12
    back = to_state_dict(params, stats, RULES)
    assert set(back) == set(given)
    for name, value in given.items():
        assert back[name].dtype == value.dtype
        np.testing.assert_array_equal(back[name], value)


def test_aliases_are_read_and_never_written():
    given = state_dict()
    given["proj.weight"] = given.pop("stem.weight")
    given["blocks.0.fc.weight"] = given.pop("layers.0.fc.weight")
    params, stats, matching = from_state_dict(given, template(), RULES)
    assert matching.exact
    assert set(to_state_dict(params, stats, RULES)) == set(state_dict())


def test_half_precision_is_widened():
    given = {k: v.astype(np.float16) if v.ndim else v for k, v in state_dict().items()}
    params, _, _ = from_state_dict(given, template(), RULES)
    assert params["stem"]["kernel"].dtype == np.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("stem.weight"), r"missing \(1\):\n +stem.weight"),
        (
            lambda d: d.update({"layers.7.fc.weight": d["layers.0.fc.weight"]}),
            r"unexpected \(1\):\n +layers.7.fc.weight",
        ),
        (
            lambda d: d.update({"layers.0.fc.weigth": d.pop("layers.0.fc.weight")}),
            r"layers.0.fc.weight \(nearest: layers.0.fc.weigth\)",
        ),
        (
            lambda d: d.update({"layers.0.fc.weight": np.zeros((7, 5), np.float32)}),
            r"layers.0.fc.weight 7x5, wanted 7x6 for stages.0.linear.kernel",
        ),
        (
            lambda d: d.update({"stem.weight": np.zeros(3, np.float32)}),
            r"stem.weight 3, wanted 5x4x2x3",
        ),
        (
            lambda d: d.update({"proj.weight": d["stem.weight"]}),
            r"given twice \(1\):\n +proj.weight",
        ),
        (
            lambda d: d.update({"layers.0.norm.num_batches_tracked": np.asarray(2**40)}),
            "does not fit int32",
        ),
    ],
)
def test_whatever_does_not_fit_is_named(change, message):
    given = state_dict()
    change(given)
    with pytest.raises(ConversionError, match=message):
        from_state_dict(given, template(), RULES)


def test_long_listings_are_cut():
    given = {f"other.{i}": np.zeros(1, np.float32) for i in range(20)}
    text = match(given, {}, RULES).problems()
    assert "unexpected (20):" in text and "and 12 more" in text and text.count("\n") == 9


def test_what_is_allowed_keeps_its_initial_value():
    given = state_dict()
    del given["layers.1.fc.weight"]
    given["head.weight"] = np.zeros(3, np.float32)
    start = template()
    start[0]["stages"][1]["linear"]["kernel"] += 5
    params, _, matching = from_state_dict(given, start, RULES, allow=["layers.1.*", "head.weight"])
    assert not matching.exact and matching.unexpected == ("head.weight",)
    np.testing.assert_array_equal(params["stages"][1]["linear"]["kernel"], 5)
    with pytest.raises(ConversionError, match=r"head\.weight"):
        from_state_dict(given, start, RULES, allow=["layers.1.*"])


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(ConversionError, match=r"extra\.scale"):
        to_state_dict({"extra": {"scale": np.ones(1)}}, {}, RULES)


@pytest.mark.parametrize("transform", Transform)
def test_every_transform_has_an_inverse(transform):
    shapes = {
        Transform.DEPTHWISE: (5, 1, 3, 3),
        Transform.POINTWISE: (5, 4, 1, 1),
        Transform.CONV: (5, 4, 3, 3),
        Transform.IMAGE: (1, 5, 3, 4),
        Transform.LINEAR: (5, 4),
        Transform.ROUTES: (20, 3),
        Transform.COUNTER: (),
        Transform.IDENTITY: (2, 3),
    }
    shape = shapes.get(transform, (2, 3, 4))
    assert set(LAYOUTS) == set(Transform)
    array = np.arange(np.prod(shape), dtype=np.int64).reshape(shape)
    np.testing.assert_array_equal(to_torch(transform, to_jax(transform, array)), array)


def test_a_linear_layer_stored_as_a_convolution_is_read():
    array = np.arange(6.0).reshape(2, 3, 1, 1)
    np.testing.assert_array_equal(to_jax(Transform.LINEAR, array), array[:, :, 0, 0].T)
