"""What a run tells about the machine's use: traces of steps, and the share of the peak."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zzhnet_jax.data.config import DataConfig
from zzhnet_jax.models.cost import network_cost
from zzhnet_jax.training.config import ExperimentConfig, ModelSpec
from zzhnet_jax.training.profiling import Profiler
from zzhnet_jax.training.utilization import Utilization


@pytest.fixture
def traces(monkeypatch):
    """What the profiler is told, in order."""
    told = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: told.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: told.append("stop"))
    return told


def test_a_trace_holds_so_many_steps_after_the_first_two(traces, tmp_path):
    profiler, state = Profiler(tmp_path, 3), jnp.zeros(())
    lengths = []
    for _ in range(8):
        profiler.before_step(state)
        lengths.append(len(traces))
    assert traces == [str(tmp_path / "profile"), "stop"]
    assert lengths == [0, 0, 1, 1, 1, 2, 2, 2]  # begun before the third step, ended before the 6th


def test_a_run_that_ends_early_ends_its_trace(traces, tmp_path):
    profiler = Profiler(tmp_path, 5)
    for _ in range(4):
        profiler.before_step(jnp.zeros(()))
    profiler.close()
    profiler.close()
    assert traces == [str(tmp_path / "profile"), "stop"]


def test_without_steps_there_is_no_trace(traces, tmp_path):
    profiler = Profiler(tmp_path, 0)
    for _ in range(4):
        profiler.before_step(jnp.zeros(()))
    profiler.close()
    assert traces == []


def mesh_of(kind, count):
    devices = np.array([SimpleNamespace(device_kind=kind)] * count)
    return SimpleNamespace(devices=devices, size=count)


def test_the_share_of_the_peak_counts_forward_once_and_backward_twice():
    overrides = {"depths": (1, 1, 1, 1)}
    config = ExperimentConfig(
        model=ModelSpec("zzhnet_nano", overrides=overrides, compute_dtype="bfloat16"),
        data=DataConfig(source="synthetic", batch_size=8, crop_size=32),
    )
    macs = network_cost("zzhnet_nano", height=32, width=32, overrides=overrides).macs
    figures = Utilization(config, mesh_of("TPU v5 lite", 4)).figures(0.25)
    assert figures == {"model_flops_utilization": pytest.approx(8 * 6 * macs / (0.25 * 4 * 197e12))}


def test_where_the_peak_is_not_known_nothing_is_said():
    config = ExperimentConfig(data=DataConfig(source="synthetic"))
    assert Utilization(config, mesh_of("cpu", 1)).figures(0.1) == {}
