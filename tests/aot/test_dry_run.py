"""`zzhnet train --dry-run`: the step compiled and described, without data or arrays."""

import dataclasses
import importlib.util
import json
import math

import pytest

from zzhnet_jax import cli
from zzhnet_jax.aot.chips import CHIPS
from zzhnet_jax.commands import dry_run
from zzhnet_jax.commands.train import read_experiment

SMALL = [
    "train", "--dry-run", "--model.name", "zzhnet_nano", "--model.overrides.depths", "1,1,1,1",
    "--model.overrides.width", "8", "--model.overrides.decoder-width", "8",
    "--data.root", "there/is/no/such/folder", "--data.crop-size", "32",
]  # fmt: skip


@pytest.fixture(scope="module")
def result():
    """For one CPU device; compiled once."""
    arguments = [*SMALL[2:], "--data.batch-size", "2", "--mesh.data", "1"]
    return dry_run.dry_run(read_experiment(arguments, prog="zzhnet train"), None)


@pytest.fixture(scope="module")
def found(result):
    """What the command prints as JSON."""
    return json.loads(json.dumps(result.to_json()))


def test_it_describes_the_step_without_data(found):
    assert found["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1, "spatial": 1}
    assert found["target"] is None and found["fits"] is None and found["roofline_seconds"] is None
    assert found["batch_size"] == 2 and found["crop_size"] == 32
    assert set(found["collective_bytes"].values()) == {0.0} and found["sent_bytes"] == 0


def test_its_arguments_are_the_state_and_the_batch(found):
    """Parameters, two moments and the average, all float32, packed with few zeros; two images."""
    packed = sum(row["count"] * math.prod(row["shape"]) for row in found["shardings"])
    assert found["parameters"] <= packed < found["parameters"] + 2 * 1024
    images, labels = 2 * 2 * 32 * 32 * 3 * 4, 2 * 32 * 32 * 4
    arguments = found["memory_bytes"]["arguments"]
    assert 0 <= arguments - 4 * 4 * packed - images - labels < 4096


def test_a_step_has_three_times_the_products_of_the_forward_pass(found):
    from zzhnet_jax.models.cost import network_cost

    overrides = {"depths": (1, 1, 1, 1), "width": 8, "decoder_width": 8}
    cost = network_cost("zzhnet_nano", height=32, width=32, overrides=overrides)
    # The images have no gradient, padding is not counted here, and CPUs compute some small
    # convolutions as something else.
    assert 0.6 < found["flops"] / (3 * 2 * 2 * cost.macs) < 1.2


def test_its_tables_are_for_people_too(result, capsys):
    dry_run.print_dry_run(result)
    text = capsys.readouterr().out
    for part in ("split over", "per device and step:", "collectives    none", "memory traffic"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_step_that_does_not_fit_ends_with_code_1(result, monkeypatch, capsys):
    small = dataclasses.replace(CHIPS[0], memory_bytes=result.description.memory.peak - 1)
    description = dataclasses.replace(result.description, chip=small)
    too_large = dataclasses.replace(result, description=description)
    monkeypatch.setattr(dry_run, "dry_run", lambda config, target: too_large)
    assert cli.main([*SMALL, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["fits"] is False
    assert cli.main(SMALL) == 1
    assert "it does NOT fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--target", "v5e:4x4"], "--target goes with --dry-run"),
        (["train", "--json"], "--json goes with --dry-run"),
        (["train", "--profile", "-1"], "--profile = -1"),
        ([*SMALL, "--target", "v5e"], "target 'v5e': it must be one of v4:AxBxC"),
        ([*SMALL, "--data.batch-size", "3", "--train.accumulation", "2"], "data.batch_size = 3"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_for_a_tpu_slice_parameters_are_split_and_gradients_exchanged(capsys):
    arguments = ["--json", "--target", "v5e:2x2", "--mesh.data", "2", "--mesh.fsdp", "2"]
    assert cli.main([*SMALL, *arguments, "--data.batch-size", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["devices"] == 4
    assert any("fsdp" in axis for row in found["shardings"] for axis in row["axes"])
    exchanged = found["collective_bytes"]
    # Parameters are gathered at least once, gradients summed over both axes.
    assert exchanged["all-gather"] >= 2 * found["parameters"]
    assert exchanged["all-reduce"] + exchanged["reduce-scatter"] >= 2 * found["parameters"]
    assert found["roofline_seconds"]["step"] > 0
