"""Two real processes as one run: the same figures, safe ends, and going on in other numbers."""

import json
import shutil
import signal
import time

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.mesh]

STEPS = 12
PLAN = ["--steps", STEPS, "--checkpoint-every", 4]


def rows(run_dir, split="train"):
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if row["split"] == split]


def losses(run_dir):
    return {row["step"]: row["loss"] for row in rows(run_dir)}


def wait_for_step(run_dir, step, processes):
    while max(losses(run_dir), default=0) < step:
        if any(process.poll() is not None for process in processes):
            pytest.fail(f"ended before step {step}: {output_of(processes)}")
        time.sleep(0.1)


def output_of(processes):
    """Exit code, output and errors of each process."""
    ends = []
    for process in processes:
        out, err = process.communicate(timeout=300)
        ends.append((process.returncode, out, err))
    return ends


@pytest.fixture(scope="module")
def alone(run_small, tmp_path_factory):
    """The run in one process with eight devices."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    process = run_small(run_dir, *PLAN, devices=8)
    assert process.returncode == 0, process.stderr
    return run_dir


@pytest.fixture(scope="module")
def stopped(start_pair, tmp_path_factory):
    """The run in two processes with four devices each, the second of which got a SIGTERM."""
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    processes = start_pair(run_dir, *PLAN, "--pause", 0.5, devices=4)
    wait_for_step(run_dir, 3, processes)
    processes[1].send_signal(signal.SIGTERM)
    return run_dir, output_of(processes)


def test_sigterm_to_one_process_saves_and_ends_all_with_exit_code_0(stopped):
    run_dir, ((code, out, err), (other_code, other_out, other_err)) = stopped
    assert (code, other_code) == (0, 0), err + other_err
    assert "8 cpu device(s) in 2 processes" in out
    assert "asked to stop (SIGTERM): step" in out and "run the same command to go on" in out
    assert "step" not in other_out  # only the first process prints
    last = max(losses(run_dir))
    newest = max(int(p.name) for p in (run_dir / "checkpoints").iterdir() if p.name.isdigit())
    assert 3 < last <= newest <= last + 1 < STEPS


def test_two_processes_have_the_losses_of_one(stopped, alone):
    ours, theirs = losses(stopped[0]), losses(alone)
    assert len(ours) >= 4
    for step, loss in ours.items():
        assert loss == pytest.approx(theirs[step], rel=1e-5)


@pytest.mark.parametrize("devices", ["1x8", "1x2", "1x1", "2x2"])
def test_the_run_goes_on_in_any_number_of_processes_and_devices(
    stopped, alone, run_small, run_pair, tmp_path, devices
):
    run_dir = shutil.copytree(stopped[0], tmp_path / "run")
    processes, each = map(int, devices.split("x"))
    ends = (
        [run_small(run_dir, *PLAN, devices=each)]
        if processes == 1
        else run_pair(run_dir, *PLAN, devices=each)
    )
    assert [end.returncode for end in ends] == [0] * processes, ends[0].stderr
    assert "going on from step" in ends[0].stdout
    assert losses(run_dir) == pytest.approx(losses(alone), rel=1e-5)


def test_figures_of_two_processes_are_exactly_those_of_one(run_small, run_pair, tmp_path):
    ends = [
        *run_pair(tmp_path, "--validate", devices=4),
        run_small(tmp_path, "--validate", devices=8),
        run_small(tmp_path, "--validate", devices=1),
    ]
    assert all(end.returncode == 0 for end in ends), ends[0].stderr
    found = [line for end in ends for line in end.stdout.splitlines() if "figures" in line]
    assert len(found) == 4 and len(set(found)) == 1
    assert 0 < json.loads(found[0].removeprefix("figures"))["f1"] < 1


def test_a_lost_process_ends_the_other_within_a_minute(start_pair, tmp_path):
    processes = start_pair(tmp_path, *PLAN, "--pause", 0.5, devices=4)
    wait_for_step(tmp_path, 2, processes)
    processes[1].kill()
    began = time.monotonic()
    (code, _, err), _ = output_of(processes)
    assert time.monotonic() - began < 60
    assert code not in (0, -signal.SIGKILL)
    assert "another process of this run has ended" in err or "another task died" in err
