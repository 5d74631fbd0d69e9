"""Legacy `forward_type` strings, against what the originals make of them."""

import pytest

from zzhnet_jax.conversion.forward_type import explain, parse, parse_initialization
from zzhnet_jax.errors import ConversionError
from zzhnet_jax.models.vssm import SS2DConfig

BASE = SS2DConfig(d_state=4, activation="relu", d_conv=5, conv_bias=False)


def fields(text, dialect, *names):
    config = parse(text, dialect=dialect, base=BASE)
    return tuple(getattr(config, name) for name in names)


@pytest.mark.parametrize(
    ("text", "dialect", "gate", "norm", "pattern"),
    [
        ("v05_noz", "vmamba", "none", "layer", "cross"),
        ("v3noz", "changemamba", "none", "layer", "cross"),
        ("v2", "changemamba", "activated", "layer", "cross"),
        ("v2nozact", "changemamba", "linear", "layer", "cross"),
        ("v05_nozact", "vmamba", "linear", "layer", "cross"),
        ("v2softmaxnozact", "changemamba", "linear", "softmax", "cross"),
        ("v4sigmoidnoz", "changemamba", "none", "sigmoid", "cross"),
        ("v1none", "changemamba", "activated", "none", "cross"),
        ("v2nozno32", "changemamba", "none", "layer", "cross"),
        ("v03_ondwconv3_noz_no32", "vmamba", "none", "dwconv3", "cross"),
        ("v05_oncnorm_noz", "vmamba", "none", "layer_dwconv3", "cross"),
        ("v31dnoz", "changemamba", "none", "layer", "unidirectional"),
        ("v051d_noz", "vmamba", "none", "layer", "unidirectional"),
        ("v32d", "changemamba", "activated", "layer", "bidirectional"),
        ("v052dc_noz", "vmamba", "none", "layer", "cascade"),
    ],
)
def test_plain_families(text, dialect, gate, norm, pattern):
    names = ("operator", "gate", "output_norm", "pattern", "activation", "d_conv")
    assert fields(text, dialect, *names) == ("selective", gate, norm, pattern, "relu", 5)


@pytest.mark.parametrize(
    ("text", "dialect"),
    [
        ("v0", "vmamba"),
        ("v0seq", "changemamba"),
        ("v05_noz", "changemamba"),
        ("v01", "changemamba"),
    ],
)
def test_v0_fixes_everything(text, dialect):
    """And in ChangeMamba whatever starts with "v0" is v0, the gate that "_noz" denies included."""
    names = ("gate", "activation", "d_conv", "conv_bias", "initialization", "d_state")
    assert fields(text, dialect, *names) == ("activated", "silu", 3, True, "mamba", 4)


@pytest.mark.parametrize(
    ("text", "operator", "activation", "multiply", "norm"),
    [
        ("xv1a", "xv1a", "none", False, "layer"),
        ("xv1aactmul", "xv1a", "gelu", True, "layer"),
        ("xv2aact", "xv2a", "gelu", False, "layer"),
        ("xv3amuldwconv3", "xv3a", "none", True, "dwconv3"),
    ],
)
def test_xv(text, operator, activation, multiply, norm):
    names = ("operator", "output_activation", "multiply_input", "output_norm", "gate")
    found = fields(text, "changemamba", *names)
    assert found == (operator, activation, multiply, norm, "none")


def test_mamba2_and_output_activation():
    assert fields("m0_noz", "vmamba", "operator", "gate") == ("ssd", "none")
    names = ("gate", "output_activation", "output_norm")
    assert fields("v05_onnone_noz_oact", "vmamba", *names) == ("none", "gelu", "none")


@pytest.mark.parametrize(
    ("text", "dialect", "reason"),
    [
        ("v2", "vmamba", "assertion rejects"),
        ("v2_noz", "vmamba", "assertion rejects"),
        ("m0", "vmamba", "never set"),
        ("xv1a", "vmamba", "dialect 'changemamba'"),
        ("v052d3", "vmamba", "no base"),
        ("v31d", "vmamba", "no base"),
        ("v0_noz", "vmamba", "no base"),
        ("v3noz", "vmamba", "written like '_noz'"),
        ("v3_noz", "changemamba", "written like 'noz'"),
        ("v5noz", "changemamba", "no base"),
        ("v2noznone", "changemamba", "no base"),  # the output norm stands before noz
        ("m0_noz", "changemamba", "no base"),
        ("xv4a", "changemamba", "no base"),
        ("", "vmamba", "no base"),
    ],
)
def test_what_the_originals_cannot_run_is_refused_with_the_reason(text, dialect, reason):
    with pytest.raises(ConversionError, match=reason):
        parse(text, dialect=dialect)


def test_explanations_say_where_the_dialects_differ():
    text = explain("v05_noz")
    assert "vmamba: selective scan along rows and columns, forward and backward; no gate" in text
    assert 'Whatever starts with "v0" builds v0 here' in text
    assert "gate ('none' in vmamba, 'activated' in changemamba)" in text
    assert "Both dialects mean the same function" in explain("v3")
    assert "changemamba: cannot run" in explain("v3_noz")
    assert "dialects" not in explain("v3_noz")
    assert "half precision" in explain("v03_no32")


@pytest.mark.parametrize(
    ("text", "dialect", "operator", "expected"),
    [
        ("v0", "vmamba", "selective", "mamba"),
        ("v1", "vmamba", "selective", "small_normal"),
        ("v1", "changemamba", "selective", "normal"),
        ("v1", "changemamba", "xv2a", "normal"),
        ("v1", "vmamba", "ssd", "small_normal"),
        ("v2", "changemamba", "selective", "uniform"),
    ],
)
def test_initialisation(text, dialect, operator, expected):
    assert parse_initialization(text, dialect=dialect, operator=operator) == expected


@pytest.mark.parametrize(("text", "operator"), [("v3", "selective"), ("v0", "ssd")])
def test_initialisation_that_does_not_exist(text, operator):
    with pytest.raises(ConversionError, match=f"initialize = '{text}'"):
        parse_initialization(text, dialect="vmamba", operator=operator)
