import dataclasses
import json

import numpy as np
import pytest

from zzhnet_jax.data.config import AugmentConfig, DataConfig
from zzhnet_jax.data.pairs import PairInfo
from zzhnet_jax.data.pipeline import fingerprint, training_batches
from zzhnet_jax.data.sources import FolderSource
from zzhnet_jax.errors import ConfigError, DataError

PLAIN = DataConfig(
    batch_size=4,
    crop_size=16,
    augmentation=AugmentConfig.off(),
    mean=(0.0, 1.0, 2.0),
    std=(1.0, 2.0, 4.0),
)
VARIED = DataConfig(batch_size=4, crop_size=12)


def take(stream, count):
    batches = [next(stream) for _ in range(count)]
    stream.close()
    return batches


def names(batches):
    return [name for batch in batches for name in batch["name"]]


def assert_equal(first, second):
    assert first["name"] == second["name"]
    for key in ("pre", "post", "label"):
        np.testing.assert_array_equal(first[key], second[key])


def test_a_batch_holds_normalised_crops(array_source):
    source = array_source(8)
    (batch,) = take(training_batches(source, PLAIN, seed=0), 1)
    assert batch["pre"].dtype == np.float32 and batch["label"].dtype == np.int32
    for row, name in enumerate(batch["name"]):
        pair = source[int(name.removeprefix("pair"))]
        expected = (pair["pre"].astype(float) - [0, 1, 2]) / [1, 2, 4]
        np.testing.assert_allclose(batch["pre"][row], expected, rtol=1e-6)
        expected = (pair["post"].astype(float) - [0, 1, 2]) / [1, 2, 4]
        np.testing.assert_allclose(batch["post"][row], expected, rtol=1e-6)
        np.testing.assert_array_equal(batch["label"][row], pair["label"])


def test_every_epoch_has_every_pair_once_in_its_own_order(array_source):
    order = names(take(training_batches(array_source(12), PLAIN, seed=0), 9))
    epochs = [order[:12], order[12:24], order[24:]]
    everything = {f"pair{index}" for index in range(12)}
    assert [set(epoch) for epoch in epochs] == [everything] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_epochs_that_the_batch_does_not_divide_lose_nothing(array_source):
    order = names(take(training_batches(array_source(10), PLAIN, seed=3), 5))
    assert sorted(order) == sorted([f"pair{index}" for index in range(10)] * 2)


def test_seeds_decide_order_and_augmentation(array_source):
    source = array_source(12)
    first, again, other = (
        take(training_batches(source, VARIED, seed=seed), 3) for seed in (1, 1, 2)
    )
    for one, two in zip(first, again, strict=True):
        assert_equal(one, two)
    assert names(first) != names(other)
    # Seed 1's second epoch is not seed 2's first.
    assert names(take(training_batches(source, VARIED, seed=1), 6))[12:] != names(other)


def test_a_pair_is_augmented_anew_in_every_epoch(array_source):
    batches = take(training_batches(array_source(4), VARIED, seed=0), 2)
    rows = [batch["pre"][batch["name"].index("pair0")] for batch in batches]
    assert not np.array_equal(rows[0], rows[1])


@pytest.mark.parametrize("consumed", [0, 1, 4, 7])
def test_resumes_exactly_mid_epoch(array_source, consumed):
    source = array_source(11)
    uninterrupted = take(training_batches(source, VARIED, seed=5), consumed + 3)
    first = training_batches(source, VARIED, seed=5)
    for _ in range(consumed):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    first.close()
    second = training_batches(source, VARIED, seed=5)
    next(second)
    second.set_state(state)
    assert second.get_state() == state
    for expected, found in zip(uninterrupted[consumed:], take(second, 3), strict=True):
        assert_equal(expected, found)


def test_processes_share_out_the_same_stream(array_source):
    source = array_source(12)
    whole = take(training_batches(source, VARIED, seed=4), 6)
    shares = [
        take(training_batches(source, VARIED, seed=4, process_index=p, process_count=2), 6)
        for p in (0, 1)
    ]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert batch["name"] == parts[0]["name"] + parts[1]["name"]
        for process, part in enumerate(parts):
            assert part["pre"].shape == (2, 12, 12, 3)
            mine = slice(2 * process, 2 * process + 2)
            np.testing.assert_array_equal(batch["post"][mine], part["post"])
    epoch = [set(names(share[:3])) for share in shares]
    assert not epoch[0] & epoch[1] and len(epoch[0] | epoch[1]) == 12


def test_a_run_may_go_on_with_another_number_of_processes(array_source):
    source = array_source(12)
    alone = training_batches(source, VARIED, seed=4)
    state = [next(alone), next(alone), alone.get_state()][-1]
    expected = take(alone, 1)[0]
    second = training_batches(source, VARIED, seed=4, process_index=1, process_count=2)
    second.set_state(state)
    assert take(second, 1)[0]["name"] == expected["name"][2:]


def test_batches_that_cannot_be_shared_out_are_refused(array_source):
    with pytest.raises(ConfigError, match=r"data\.batch_size = 4.*multiple of the 3 processes"):
        training_batches(array_source(4), PLAIN, seed=0, process_count=3)


def test_crop_larger_than_an_image_is_refused_before_training(array_source):
    config = dataclasses.replace(PLAIN, crop_size=17)
    with pytest.raises(ConfigError, match=r"data\.crop_size = 17: .*at most 16, since pair0"):
        training_batches(array_source(4), config, seed=0)
    padded = dataclasses.replace(AugmentConfig.off(), pad=True)
    config = dataclasses.replace(config, augmentation=padded)
    assert take(training_batches(array_source(4), config, seed=0), 1)[0]["pre"].shape[1] == 17


def test_state_of_another_run_is_refused(array_source):
    source = array_source(12)
    state = training_batches(source, VARIED, seed=1).get_state()
    with pytest.raises(DataError, match=r"seed is not the one.*1 then, 2 now"):
        training_batches(source, VARIED, seed=2).set_state(state)
    with pytest.raises(DataError, match="training data is not the one"):
        training_batches(array_source(13), VARIED, seed=1).set_state(state)
    larger = dataclasses.replace(VARIED, batch_size=5)
    with pytest.raises(DataError, match=r"data\.batch_size = 5 does not divide the 4 examples"):
        training_batches(source, larger, seed=1).set_state({**state, "examples": 4})


def test_fingerprint_tells_datasets_apart(array_source):
    base = fingerprint(array_source(3))
    assert base == fingerprint(array_source(3)) and len(base) == 16
    others = [array_source(4), array_source(3, size=17)]
    renamed, rewritten = array_source(3), array_source(3)
    renamed.info[1] = PairInfo("other", 16, 16, "")
    rewritten.info[1] = PairInfo("pair1", 16, 16, "99")
    prints = [fingerprint(source) for source in (*others, renamed, rewritten)]
    assert len({base, *prints}) == 5


@pytest.fixture
def damaged(tmp_path, write_pair):
    write_pair(tmp_path, "bad", size=(16, 16))
    path = tmp_path / "A" / "bad.png"
    path.write_bytes(path.read_bytes()[:200])
    return FolderSource(tmp_path, "test")


def test_a_damaged_file_stops_training_with_its_name(damaged):
    stream = training_batches(damaged, PLAIN, seed=0)
    with pytest.raises(DataError, match=r"A/bad\.png: the image is damaged"):
        next(stream)
    stream.close()


@pytest.mark.slow
def test_worker_processes_change_nothing(array_source, tmp_path, write_pair, damaged):
    for index in range(6):
        write_pair(tmp_path / "many", f"p{index}", size=(24, 24), seed=index)
    source = FolderSource(tmp_path / "many", "test")
    alone = take(training_batches(source, VARIED, seed=8), 9)
    config = dataclasses.replace(VARIED, workers=2)
    stream = training_batches(source, config, seed=8)
    found = [next(stream) for _ in range(5)]
    state = stream.get_state()
    stream.close()
    stream.set_state(state)
    found += take(stream, 4)
    for expected, batch in zip(alone, found, strict=True):
        assert_equal(expected, batch)
        assert type(batch["pre"]) is np.ndarray
    stream = training_batches(damaged, dataclasses.replace(PLAIN, workers=1), seed=0)
    with pytest.raises(DataError, match=r"A/bad\.png: the image is damaged"):
        next(stream)
    stream.close()
