"""Names of accelerators that are not here, and their published peaks."""

import importlib.util

import pytest

from zzhnet_jax.aot.chips import CHIPS, chip_named
from zzhnet_jax.aot.targets import TargetError, parse_target


@pytest.mark.parametrize(
    ("text", "platform", "chip", "shape"),
    [
        ("v5e:4x4", "tpu", "v5e", (4, 4)),
        ("v5p:2x4x4", "tpu", "v5p", (2, 4, 4)),
        ("tpu7x:2x2x1", "tpu", "tpu7x", (2, 2, 1)),
        ("cuda:h100:8", "cuda", "h100", (1, 8)),
        ("cuda:h100:64", "cuda", "h100", (8, 8)),
        ("cuda:a100", "cuda", "a100", (1, 1)),
    ],
)
def test_targets_are_read(text, platform, chip, shape):
    target = parse_target(text)
    assert (target.platform, target.chip.name, target.shape) == (platform, chip, shape)


@pytest.mark.parametrize(
    "text",
    ["", "v5e", "v5e:4", "v5e:4x4x4", "v5p:4x4", "v9:2x2", "cuda:h100:12", "cuda:v5e:8",
     "cuda:h100:0", "h100:8", "v5e:0x4"],
)  # fmt: skip
def test_what_is_no_target_is_told_what_there_is(text):
    with pytest.raises(TargetError) as error:
        parse_target(text)
    message = str(error.value)
    assert repr(text) in message and "\n" not in message
    assert "v5e:AxB" in message and "v5p:AxBxC" in message and "cuda:h100:N" in message


def test_the_figures_of_a_chip_are_those_of_one_device_and_one_direction():
    v5e, h100, tpu7x = chip_named("v5e"), chip_named("h100"), chip_named("tpu7x")
    assert (v5e.narrow_flops, v5e.memory_bytes, v5e.memory_rate) == (197e12, 16e9, 819e9)
    assert v5e.link_rate == 1600e9 / 8  # gigabits a second in the older form of the same page
    assert h100.link_rate == 450e9 and h100.network_rate == 50e9
    assert tpu7x.narrow_flops == 2307e12 / 2
    assert all(chip.source for chip in CHIPS)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_a_tpu_target_names_the_remedy():
    with pytest.raises(TargetError, match="needs libtpu, which is not installed: pip install"):
        _ = parse_target("v5e:4x4").devices


@pytest.mark.aot
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: make test-aot has it"
)
def test_libtpu_gives_as_many_devices_as_the_slice_has_and_refuses_others():
    assert len(parse_target("v5e:4x4").devices) == 16
    assert len(parse_target("tpu7x:2x2x1").devices) == 8
    with pytest.raises(TargetError, match="libtpu has no such slice"):
        _ = parse_target("v5e:3x5").devices
