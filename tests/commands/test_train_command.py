"""`zzhnet train` and train.py: which experiment a command line means, and its mistakes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from zzhnet_jax import cli
from zzhnet_jax.commands.train import read_experiment
from zzhnet_jax.errors import UserError
from zzhnet_jax.training.config import ExperimentConfig, load_config

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "configs" / "zzhnet_nano_synthetic.py")


def read(*argv):
    return read_experiment(argv, prog="zzhnet train")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_file_gives_an_experiment(path):
    config = load_config(str(path))
    assert isinstance(config, ExperimentConfig)
    from zzhnet_jax.models.registry import override, preset

    override(preset(config.model.name), config.model.overrides)
    assert config.to_json()["train"]["steps"] == config.train.steps


def test_any_field_is_replaced_by_its_path():
    base = load_config(DEMO)
    config = read(
        "--config", DEMO, "--train.steps", "40", "--data.batch-size", "16", "--mesh.data", "8",
        "--run-dir", "runs/x", "--optim.clip-norm", "None", "--train.loss.lovasz=0.25",
        "--data.augmentation.jitter.blur", "0.5", "--seed", "3",
    )  # fmt: skip
    assert config.train.steps == 40 and config.data.batch_size == 16 and config.mesh.data == 8
    assert config.run_dir == "runs/x" and config.optim.clip_norm is None and config.seed == 3
    assert config.train.loss.lovasz == 0.25 and config.data.augmentation.jitter.blur == 0.5
    assert config.model == base.model and config.data.crop_size == base.data.crop_size
    assert type(config) is ExperimentConfig


def test_without_overrides_the_file_decides_everything():
    assert read("--config", DEMO) == load_config(DEMO)


def test_fields_of_the_network_are_overridden_by_their_types():
    config = read(
        "--config", DEMO, "--model.overrides.depths", "1,1,1,1", "--model.overrides.width=24",
        "--train.steps", "7", "--model.overrides.block.ssm.d-state", "4",
    )  # fmt: skip
    overrides = config.model.overrides
    assert set(overrides) >= {"depths", "width", "block"} and config.train.steps == 7
    assert overrides["depths"] == (1, 1, 1, 1) and overrides["width"] == 24
    assert overrides["block"].ssm.d_state == 4


def test_a_config_file_may_override_the_network_too(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from zzhnet_jax.training.config import ExperimentConfig, ModelSpec\n"
        "def get_config():\n"
        "    return ExperimentConfig(model=ModelSpec('zzhnet_nano', overrides={'width': 24}))\n"
    )
    config = read("--config", str(path), "--model.overrides.decoder-width", "8")
    assert config.model.overrides == {"width": 24, "decoder_width": 8}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--train.step", "4"], r"no option --train\.step; did you mean --train\.steps"),
        (
            ["--model.overrides.depth", "1"],
            r"--model\.overrides\.depth; did you mean --model",
        ),
        (["--model.overrides.depths", "2,2"], r"model\.overrides\.depths = \(2, 2\): it must be 4"),
        (["--model.overrides.width", "x"], r"--model\.overrides\.width.*'x'"),
        (["--model.name", "zzhnet_nan"], r"model\.name = 'zzhnet_nan'.*zzhnet_nano"),
        (["--mesh.tensor", "2"], r"mesh = 'data=-1 x fsdp=1 x tensor=2 x spatial=1'"),
        (["--mesh.tensor", "0"], r"mesh\.tensor = 0: it must be positive"),
        (["--mesh.spatial", "-1"], r"mesh\.spatial = -1: .*mesh\.data is -1 too"),
        (["--train.accumulation", "3", "--mesh.data", "1"], r"data\.batch_size = 8: .* = 3"),
        (["--train.remat", "offload", "--mesh.data", "1"], r"train\.remat = 'offload'"),
        (["--distributed.coordinator", "x"], r"distributed\.coordinator = 'x'"),
        (["--distributed.process-id", "0"], r"distributed = .*all three"),
        (["--model.name", "mambascd_tiny"], r"model\.name = 'mambascd_tiny'"),
        (["--mesh.data", "-1", "--mesh.fsdp", "-1"], r"mesh\.fsdp = -1"),
        (["--optim.learning-rate", "0"], r"optim\.learning_rate = 0\.0: it must be positive"),
        (["--optim.schedule", "linear"], r"--optim\.schedule.*cosine.*constant"),
        (["--train.steps", "0"], r"train\.steps = 0"),
        (["--train.loss.class-weights", "1", "2", "3"], r"train\.loss\.class_weights.* 2 weights"),
        (["--data.crop-size", "512"], r"data\.crop_size = 512.*128"),
        (["--data.batch-size", "5", "--mesh.data", "1", "--data.source", "folder"], r"data\.root"),
        (["--config", "nowhere.py"], r"--config = 'nowhere\.py'"),
        (["--config", str(ROOT / "pyproject.toml")], "a Python file"),
        (["--config"], "--config"),
        (["stray"], "unexpected argument 'stray'"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(argv, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = cli.main(["train", "--config", DEMO, *argv])
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: ")
    import re

    assert re.search(said, err), err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "get_config"),
        ("def get_config(): return 3", "ExperimentConfig"),
        ("import nowhere_to_be_found", "nowhere_to_be_found"),
        ("def get_config(:", "file that runs"),
    ],
)
def test_a_file_that_is_no_experiment_is_refused(text, said, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        load_config(str(path))


def test_train_py_is_the_same_command():
    command = [sys.executable, "train.py", "--config", DEMO, "--train.step", "4"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""}
    )
    assert done.returncode == 2
    # XLA's plugin for GPUs says so where it finds none, before its log can be set.
    others = ("WARNING: All log messages before absl", "I0000 ")
    (line,) = [x for x in done.stderr.splitlines() if not x.startswith(others)]
    assert line.startswith("error: no option --train.step; did you mean --train.steps")
