"""Whole runs: what they leave behind, how they go on, and how they end badly."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from zzhnet_jax.errors import CheckpointError, DataError
from zzhnet_jax.training import loop
from zzhnet_jax.training.config import MeshConfig


def rows(run_dir, split="train"):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


def losses(run_dir):
    return [(row["step"], row["loss"], row["gradient_norm"]) for row in rows(run_dir)]


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """A run of 12 steps, and its summary."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    summary = loop.train(small.experiment(run_dir), build=small.build)
    return run_dir, summary


def test_what_a_run_leaves_behind(finished):
    run_dir, summary = finished
    assert [row["step"] for row in rows(run_dir)] == list(range(1, 13))
    validations = rows(run_dir, "val")
    assert [row["step"] for row in validations] == [10, 12]
    best = max(validations, key=lambda row: row["f1"])
    assert summary == json.loads((run_dir / "metrics.json").read_text())
    assert summary["val"]["f1"] == best["f1"] and summary["val"]["step"] == best["step"]
    assert 0 <= best["threshold"] <= 1 and best["f1"] >= best["f1_at_half"]
    assert summary["steps"] == 12 and summary["parameters"] == 23912 and summary["seconds"] > 0
    config = json.loads((run_dir / "config.json").read_text())
    assert config["train"]["steps"] == 12 and config["data"]["synthetic"]["train_pairs"] == 20
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["seed"] == 0 and environment["versions"]["jax"] == jax.__version__
    assert environment["data"]["train"]["pairs"] == 20
    assert list((run_dir / "tensorboard").glob("events*"))
    picture = np.asarray(Image.open(run_dir / "predictions.png"))
    assert picture.ndim == 3 and picture.std() > 10
    description = json.loads((run_dir / "model" / "config.json").read_text())
    assert description["card"]["threshold"] == best["threshold"]
    assert (run_dir / "model" / "model.safetensors").stat().st_size > 4 * 23912


def test_checkpoints_are_the_newest_and_the_best(finished):
    run_dir, summary = finished
    kept = sorted(int(p.name) for p in (run_dir / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == [10, 12] and summary["val"]["step"] in kept


def test_the_loss_falls(finished):
    values = [row["cross_entropy"] for row in rows(finished[0])]
    assert np.mean(values[-3:]) < np.mean(values[:3]) - 0.05


def test_a_finished_run_says_so_and_stays_as_it_is(finished, small, capsys):
    run_dir, summary = finished
    before = (run_dir / "metrics.jsonl").read_bytes()
    assert loop.train(small.experiment(run_dir), build=small.build) == summary
    assert "is finished: it has done 12 steps" in capsys.readouterr().out
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_a_longer_run_goes_on_and_says_what_changed(finished, small, tmp_path, capsys):
    run_dir = shutil.copytree(finished[0], tmp_path / "longer")
    config = small.experiment(run_dir, steps=14)
    loop.train(config, build=small.build)
    out = capsys.readouterr().out
    assert "going on from step 12" in out and "train.steps: 12 -> 14" in out
    assert [row["step"] for row in rows(run_dir)] == list(range(1, 15))
    assert losses(run_dir)[:12] == losses(finished[0])


@pytest.fixture
def elsewhere(small, finished, tmp_path):
    """An experiment that starts from the finished run's model and hardly moves."""
    config = small.experiment(tmp_path / "tuned", steps=1)
    optim = dataclasses.replace(config.optim, learning_rate=1e-12)
    return dataclasses.replace(config, init_from=str(finished[0]), optim=optim)


def test_a_run_starts_from_a_saved_model(elsewhere, finished, small):
    loop.train(elsewhere, build=small.build)
    given, got = (
        safetensors.numpy.load_file(Path(folder) / "model" / "model.safetensors")
        for folder in (finished[0], elsewhere.run_dir)
    )
    assert given.keys() == got.keys()
    for name, array in given.items():
        if name.startswith("params"):
            np.testing.assert_allclose(got[name], array, rtol=1e-6, atol=1e-9, err_msg=name)


def test_a_saved_model_of_another_network_starts_no_run(elsewhere, small):
    wider = small.SmallConfig(width=32)
    with pytest.raises(CheckpointError, match="belongs to another network"):
        loop.train(elsewhere, build=lambda rngs: small.build(rngs, wider))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"width": 32}, "width: 48 -> 32"),
        ({"drop": 0.1}, "drop: 0.2 -> 0.1"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(finished, small, change, said):
    other = dataclasses.replace(small.SmallConfig(), **change)
    with pytest.raises(CheckpointError, match=f"belongs to another network .*{said}") as caught:
        loop.train(small.experiment(finished[0]), build=lambda rngs: small.build(rngs, other))
    assert "\n" not in str(caught.value)


def test_other_data_seed_or_averaging_is_refused(finished, small):
    config = small.experiment(finished[0], steps=20)
    with pytest.raises(DataError, match="the seed is not the one"):
        loop.train(dataclasses.replace(config, seed=1), build=small.build)
    optim = dataclasses.replace(config.optim, ema_decay=0.0)
    with pytest.raises(CheckpointError, match=r"optim\.ema_decay: 0\.9 -> 0\.0"):
        loop.train(dataclasses.replace(config, optim=optim), build=small.build)


def test_nothing_is_made_when_the_data_is_wrong(small, tmp_path):
    config = small.experiment(tmp_path / "run")
    data = dataclasses.replace(config.data, source="folder", root=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="no such folder"):
        loop.train(dataclasses.replace(config, data=data), build=small.build)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_images(
    finished, small, tmp_path, monkeypatch
):
    run_dir = shutil.copytree(finished[0], tmp_path / "diverging")
    put_batch, seen = loop.put_batch, []

    def spoil(batch, mesh, **options):
        seen.append(batch)
        if len(seen) == 3:
            batch = batch | {"pre": np.full_like(batch["pre"], np.inf)}
        return put_batch(batch, mesh, **options)

    names = []
    monkeypatch.setattr(loop, "put_batch", spoil)
    real = loop.training_batches

    def recorded(*arguments, **options):
        batches = real(*arguments, **options)
        following = type(batches).__next__

        def remember(self):
            batch = following(self)
            names.append(batch["name"])
            return batch

        monkeypatch.setattr(type(batches), "__next__", remember)
        return batches

    monkeypatch.setattr(loop, "training_batches", recorded)
    with pytest.raises(loop.NonFiniteLossError, match="step 15: loss nan") as caught:
        loop.train(small.experiment(run_dir, steps=20), build=small.build)
    assert ", ".join(names[2]) in str(caught.value)
    assert "the checkpoint of step 12 is good" in str(caught.value)
    assert [row["step"] for row in rows(run_dir)] == list(range(1, 15))


def test_killed_and_rerun_the_losses_are_the_same_bits(finished, small, run_small, tmp_path):
    # 8 pairs a step of 20: step 7 is in the middle of the third epoch.
    assert run_small(tmp_path, "--kill-at", 7).returncode == -9
    assert rows(tmp_path)[-1]["step"] == 7 and not rows(tmp_path, "val")
    loop.train(small.experiment(tmp_path), build=small.build)
    check_same_run(tmp_path, finished[0])


@pytest.mark.slow
def test_killed_and_rerun_nano_has_the_same_losses_too(run_small, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_small(whole, "--nano").returncode == 0
    assert run_small(parts, "--nano", "--kill-at", 7).returncode == -9
    rerun = run_small(parts, "--nano")
    assert rerun.returncode == 0 and "going on from step 5" in rerun.stdout, rerun.stderr
    check_same_run(parts, whole)


def check_same_run(run_dir, other):
    assert losses(run_dir) == losses(other)
    assert [row["f1"] for row in rows(run_dir, "val")] == [row["f1"] for row in rows(other, "val")]


def test_eight_devices_give_the_losses_of_one(run_small, tmp_path):
    meshes = ["data=1", "data=8", "data=1,fsdp=8", "data=2,fsdp=4"]
    process = run_small(tmp_path, "--steps", 6, "--meshes", *meshes, devices=8)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("8 cpu device(s)") == 3
    for mesh in meshes[1:]:
        for ours, theirs in zip(losses(tmp_path / mesh), losses(tmp_path / "data=1"), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays_good(
    finished, small, tmp_path, monkeypatch, capsys
):
    run_dir = shutil.copytree(finished[0], tmp_path / "run")
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(
            CheckpointError, match=r"checkpoints: the disk is full, .* 0\.1 are left"
        ):
            loop.train(small.experiment(run_dir, steps=20), build=small.build)
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["10", "12"]
    loop.train(small.experiment(run_dir, steps=20), build=small.build)
    assert "going on from step 12" in capsys.readouterr().out
    assert [row["step"] for row in rows(run_dir)] == list(range(1, 21))


def test_a_disk_that_fills_up_while_writing_is_one_line_too(finished, run_small, tmp_path):
    run_dir = shutil.copytree(finished[0], tmp_path / "run")
    options = ["--steps", 16, "--checkpoint-every", 3]
    full = run_small(run_dir, *options, "--file-limit", 60_000)
    assert full.returncode == 2
    assert "Traceback" not in full.stderr
    lines = [line for line in full.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "the disk is full" in lines[0], full.stderr
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["10", "12"]


def test_a_truncated_newest_checkpoint_is_put_aside_and_the_one_before_used(
    finished, small, tmp_path, capsys
):
    run_dir = shutil.copytree(finished[0], tmp_path / "run")
    files = [p for p in (run_dir / "checkpoints" / "12" / "state").rglob("*") if p.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    loop.train(small.experiment(run_dir), build=small.build)
    out = capsys.readouterr().out
    assert "warning: " in out and "12 cannot be restored" in out
    assert "going on from step 10" in out and (run_dir / "damaged-checkpoint-12").is_dir()
    assert losses(run_dir) == losses(finished[0])
    kept = sorted(int(p.name) for p in (run_dir / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == [10, 12]


def test_without_a_readable_checkpoint_a_run_does_not_begin_anew(finished, small, tmp_path):
    run_dir = shutil.copytree(finished[0], tmp_path / "run")
    for folder in (run_dir / "checkpoints").glob("1*"):
        (folder / "progress" / "metadata").write_text("{")
    with pytest.raises(CheckpointError, match="there is no other checkpoint") as caught:
        loop.train(small.experiment(run_dir), build=small.build)
    assert "\n" not in str(caught.value)


def test_too_few_devices_are_refused(small, tmp_path):
    config = small.experiment(tmp_path / "run")
    with pytest.raises(ValueError, match=r"mesh = 'data=3000 x .* visible devices can form"):
        loop.train(dataclasses.replace(config, mesh=MeshConfig(data=3000)), build=small.build)
