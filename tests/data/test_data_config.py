import subprocess
import sys

import pytest

from zzhnet_jax.data.config import (
    AugmentConfig,
    DataConfig,
    JitterConfig,
    SyntheticConfig,
    check_split,
)
from zzhnet_jax.errors import ConfigError


@pytest.mark.parametrize(
    ("make", "field", "value", "allowed"),
    [
        (lambda: DataConfig(source="web"), "data.source", "web", "folder, synthetic"),
        (lambda: DataConfig(batch_size=0), "data.batch_size", 0, "at least 1"),
        (lambda: DataConfig(batch_size=True), "data.batch_size", True, "whole number"),
        (lambda: DataConfig(crop_size=2.5), "data.crop_size", 2.5, "whole number"),
        (lambda: DataConfig(workers=-1), "data.workers", -1, "at least 0"),
        (lambda: DataConfig(mean=(1.0, 2.0)), "data.mean", (1.0, 2.0), "three numbers"),
        (lambda: DataConfig(std=(1.0, 0.0, 1.0)), "data.std", (1.0, 0.0, 1.0), "0.001 to 255"),
        (lambda: AugmentConfig(crop="best"), "data.augmentation.crop", "best", "balanced"),
        (
            lambda: AugmentConfig(scale=(1.2, 0.8)),
            "data.augmentation.scale",
            (1.2, 0.8),
            "smaller first",
        ),
        (
            lambda: AugmentConfig(flip_vertical=1.5),
            "data.augmentation.flip_vertical",
            1.5,
            "from 0 to 1",
        ),
        (
            lambda: JitterConfig(noise=float("nan")),
            "data.augmentation.jitter.noise",
            None,
            "from 0 to 128",
        ),
        (lambda: SyntheticConfig(size=8), "data.synthetic.size", 8, "at least 32"),
        (lambda: SyntheticConfig(change=-0.1), "data.synthetic.change", -0.1, "from 0 to 1"),
    ],
)
def test_a_wrong_field_is_named_with_what_is_allowed(make, field, value, allowed):
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.field == field
    assert value is None or caught.value.value == value
    assert allowed in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_split_is_refused():
    with pytest.raises(ConfigError, match="train, val, test"):
        check_split("validation")


def test_the_changemamba_preset_augments_as_the_original_does():
    preset = AugmentConfig.changemamba()
    assert (preset.crop, preset.crop_tries, preset.max_class_share) == ("balanced", 10, 0.75)
    assert (preset.pad, preset.rotation, preset.scale) == (True, "always", (1.0, 1.0))
    assert (preset.flip_horizontal, preset.flip_vertical, preset.exchange_dates) == (0.5, 0.5, 0.0)
    assert preset.jitter.probability == 0.0


def test_importing_data_imports_neither_jax_nor_grain():
    code = (
        "import sys, zzhnet_jax.data, zzhnet_jax.data.checks\n"
        "print(sorted(m for m in ('jax', 'grain', 'flax') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
