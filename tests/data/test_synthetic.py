import dataclasses

import numpy as np
import pytest

from zzhnet_jax.data.config import SyntheticConfig
from zzhnet_jax.data.landscape import invent_scene
from zzhnet_jax.data.render import Conditions, Painter
from zzhnet_jax.data.scene import CAR
from zzhnet_jax.data.synthetic import SyntheticSource

CONFIG = SyntheticConfig(size=64, train_pairs=40)


def painter(seed, change=1.0, size=96, cars=False):
    rng = np.random.default_rng(seed)
    scene = invent_scene(rng, size, change)
    if not cars:
        shapes = [shape for shape in scene.shapes if shape.material is not CAR]
        scene = dataclasses.replace(scene, shapes=shapes)
    return Painter(scene, rng)


@pytest.mark.parametrize("seed", range(8))
def test_the_label_is_where_the_rendered_dates_differ(seed):
    scene = painter(seed)
    label = scene.owners(0) != scene.owners(1)
    differs = (scene.paint(0, Conditions()) != scene.paint(1, Conditions())).any(axis=-1)
    assert not (differs & ~label).any()
    # Two things may happen to look alike here and there, but not over any area.
    assert (label & ~differs).sum() <= 0.01 * label.sum()


def test_cars_come_and_go_without_being_change():
    moved = 0
    for seed in range(6):
        scene = painter(seed, change=0.0, cars=True)
        assert (scene.owners(0) == scene.owners(1)).all()
        moved += (scene.paint(0, Conditions()) != scene.paint(1, Conditions())).any(axis=-1).sum()
    assert moved > 50


def test_a_pair_depends_on_seed_split_and_index_alone():
    source, again = SyntheticSource(CONFIG, "train"), SyntheticSource(CONFIG, "train")
    again[3]
    for key in ("pre", "post", "label"):
        np.testing.assert_array_equal(source[5][key], again[5][key])
    others = [
        SyntheticSource(CONFIG, "train")[6],
        SyntheticSource(CONFIG, "val")[5],
        SyntheticSource(CONFIG, "train", seed=1)[5],
    ]
    for other in others:
        assert not np.array_equal(other["pre"], source[5]["pre"])
    assert SyntheticSource(CONFIG, "train", seed=0)[5]["name"] == "train_00005"


def test_pairs_have_the_promised_form():
    source = SyntheticSource(CONFIG, "train")
    assert len(source) == 40
    pair = source[-1]
    assert pair["name"] == "train_00039" == source.info[39].name
    assert pair["pre"].shape == pair["post"].shape == (64, 64, 3)
    assert pair["pre"].dtype == pair["label"].dtype == np.uint8
    assert pair["label"].shape == (64, 64) and pair["label"].max() <= 1
    with pytest.raises(IndexError):
        source[40]


def test_how_much_changes_is_set():
    def shares(change):
        config = SyntheticConfig(size=96, train_pairs=40, change=change)
        return np.array([pair["label"].mean() for pair in SyntheticSource(config, "train")])

    assert (shares(0.0) == 0.0).all()
    usual = shares(SyntheticConfig.change)
    assert 0.08 < usual.mean() < 0.2
    assert (usual == 0.0).any()  # some pairs show no change at all
    assert shares(1.0).mean() > 1.8 * shares(0.3).mean() > 0.04


def test_unchanged_ground_differs_as_much_as_the_nuisances_are_strong():
    def difference(nuisance):
        config = SyntheticConfig(size=64, train_pairs=12, nuisance=nuisance)
        found = []
        for pair in SyntheticSource(config, "train"):
            kept = pair["label"] == 0
            gap = np.abs(pair["pre"].astype(float) - pair["post"])[kept]
            found.append(gap.mean())
        return np.mean(found)

    weak, usual, strong = difference(0.0), difference(1.0), difference(2.0)
    assert weak < 4.0 < 8.0 < usual < strong


def test_conditions_do_what_they_say():
    scene = painter(3, size=64)
    plain = scene.paint(0, Conditions()).astype(float)
    bright = scene.paint(0, Conditions(gain=(1.1, 1.0, 0.9))).astype(float)
    red = np.minimum(1.1 * plain[..., 0], 255)
    np.testing.assert_allclose(bright[..., 0], red, atol=2.1)
    np.testing.assert_allclose(bright[..., 2], 0.9 * plain[..., 2], atol=2.1)
    shifted = scene.paint(0, Conditions(shift=(2.0, 1.0))).astype(float)
    np.testing.assert_array_equal(shifted[:-1, :-2], plain[1:, 2:])
    noisy = scene.paint(0, Conditions(noise=5.0)).astype(float)
    assert (noisy - plain)[plain < 200].std() == pytest.approx(5.0, rel=0.1)
    shaded = scene.paint(0, Conditions(sun=(1.0, 0.0))).astype(float)
    assert (shaded < 0.6 * plain - 1).any()
    assert np.median(np.abs(shaded - plain)) == 0.0
    hazy = scene.paint(0, Conditions(haze=0.6)).astype(float)
    assert (hazy >= plain - 1).all() and hazy.mean() > plain.mean() + 10
