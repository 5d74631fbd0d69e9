"""`zzhnet train --dry-run`: the step compiled and described, without data or arrays."""

import dataclasses
import importlib.util
import json
import math
import sys
from pathlib import Path

import jax
import pytest

from zzhnet_jax import cli
from zzhnet_jax.aot.chips import CHIPS
from zzhnet_jax.commands import dry_run
from zzhnet_jax.training.config import MeshConfig
from zzhnet_jax.training.program import Program

SCRIPT = Path(__file__).parents[1] / "training" / "small_run.py"
COMMAND = ["train", "--dry-run", "--data.root", "there/is/no/such/folder"]


@pytest.fixture(scope="module")
def small():
    """The small network of the training tests."""
    spec = importlib.util.spec_from_file_location("small_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["small_run"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def result(small):
    """Eight pairs of 32 x 32 on one CPU device; compiled once."""
    config = dataclasses.replace(small.experiment("runs/none"), mesh=MeshConfig(data=1))
    return dry_run.dry_run(config, None, build=small.build)


@pytest.fixture(scope="module")
def found(result):
    """What the command prints as JSON."""
    return json.loads(json.dumps(result.to_json()))


def test_it_describes_the_step_without_data(found):
    assert found["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1, "spatial": 1}
    assert found["target"] is None and found["fits"] is None and found["roofline_seconds"] is None
    assert found["batch_size"] == 8 and found["crop_size"] == 32
    assert set(found["collective_bytes"].values()) == {0.0} and found["sent_bytes"] == 0


def test_its_arguments_are_the_state_and_the_batch(found):
    """Parameters, two moments and the average, all float32, packed with few zeros; two images."""
    packed = sum(row["count"] * math.prod(row["shape"]) for row in found["shardings"])
    assert found["parameters"] <= packed < found["parameters"] + 2 * 1024
    images, labels = 2 * 8 * 32 * 32 * 3 * 4, 8 * 32 * 32 * 4
    arguments = found["memory_bytes"]["arguments"]
    assert 0 <= arguments - 4 * 4 * packed - images - labels < 4096


def test_the_products_of_a_step_are_those_of_its_layers_and_their_gradients(found):
    """Where windows overhang the image's edge, they meet fewer values."""
    first = (16 * 3 - 1) ** 2 * 6 * 48  # its input, the images, has no gradient
    second, head = (16 * 3 - 2) ** 2 * 48 * 48, 16**2 * 48 * 8
    assert found["flops_by_dtype"] == {"f32": 8 * 2 * (2 * first + 3 * second + 3 * head)}


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
    assert cli.main([*COMMAND, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["fits"] is False
    assert cli.main(COMMAND) == 1
    assert "it does NOT fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--target", "v5e:4x4"], "--target goes with --dry-run"),
        (["train", "--json"], "--json goes with --dry-run"),
        (["train", "--profile", "-1"], "--profile = -1"),
        ([*COMMAND, "--target", "v5e"], "target 'v5e': it must be one of v4:AxBxC"),
        ([*COMMAND, "--data.batch-size", "3", "--train.accumulation", "2"], "data.batch_size = 3"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("complaint", "found"),
    [
        ("RESOURCE_EXHAUSTED: Used 20.31G of 15.75G hbm. Exceeded\nmore", "needs 20.31G of 15.75G"),
        ("RESOURCE_EXHAUSTED: temporaries (43G) exceed HBM (15G)", "temporaries (43G) exceed"),
    ],
)
def test_what_the_compiler_finds_too_large_is_one_line(complaint, found, monkeypatch, capsys):
    def lower(self):
        raise jax.errors.JaxRuntimeError(complaint)

    monkeypatch.setattr(Program, "lower", lower)
    assert cli.main(COMMAND) == 2
    error = capsys.readouterr().err
    assert found in error and "train.remat" in error and error.count("\n") == 1


@pytest.mark.aot
@pytest.mark.parametrize(
    ("target", "compiler"), [("v5e:2x2", "libtpu"), ("cuda:h100:4", "jax_cuda12_plugin")]
)
def test_on_a_slice_parameters_are_split_and_gradients_exchanged(small, target, compiler):
    if importlib.util.find_spec(compiler) is None:
        pytest.skip(f"needs {compiler}: make test-aot has it")
    config = dataclasses.replace(small.experiment("runs/none"), mesh=MeshConfig(data=2, fsdp=2))
    found = dry_run.dry_run(config, target, build=small.build).to_json()
    assert found["fits"] and found["devices"] == 4
    assert any("fsdp" in axis for row in found["shardings"] for axis in row["axes"])
    exchanged = found["collective_bytes"]
    # Parameters are gathered at least once, gradients summed over both axes.
    assert exchanged["all-gather"] >= 2 * found["parameters"]
    assert exchanged["all-reduce"] + exchanged["reduce-scatter"] >= 2 * found["parameters"]
    assert found["roofline_seconds"]["step"] > 0
