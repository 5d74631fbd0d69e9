"""Real networks on eight devices: every mesh gives the losses of one device."""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.mesh]

_SCRIPT = Path(__file__).with_name("mesh_losses.py")
MESHES = ["data=8", "fsdp=8", "data=2,fsdp=2,tensor=2", "data=4,spatial=2"]


@pytest.fixture(scope="module")
def started(start_small, tmp_path_factory):
    """All at once, those of a core alike in length, and behind the short runs of other tests.

    Eight devices wait for each other thousands of times a second: on a core of their own their
    threads are woken for a tenth less.
    """
    folder = tmp_path_factory.mktemp("losses")
    cores = itertools.cycle(getattr(os, "sched_getaffinity", lambda _: [])(0))
    started = {}
    for network, parts in [("zzhnet", 4), ("zzhnet", 1), ("mambabcd", 1), ("mambabcd", 4)]:
        out = folder / f"{network}_{parts}.json"
        process = start_small(out, network, parts, devices=8, script=_SCRIPT)
        os.setpriority(os.PRIO_PROCESS, process.pid, 10)
        if (core := next(cores, None)) is not None:
            os.sched_setaffinity(process.pid, {core})
        started[network, parts] = out, process
    return started


@pytest.fixture(scope="module")
def found(started):
    """What every mesh of a network gave, by its name and number of parts."""
    results = {}
    for (network, _), (out, process) in reversed(started.items()):
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-2000:]
        results[network] = results.get(network, {}) | json.loads(out.read_text())
    return results


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("network", ["mambabcd", "zzhnet"])
def test_every_mesh_trains_as_one_device_does(network, parts, found):
    one = found[network][f"one x{parts}"]["losses"]
    assert len(one) == 20 and one[-1] < one[0]
    for mesh in MESHES:
        np.testing.assert_allclose(found[network][f"{mesh} x{parts}"]["losses"], one, rtol=1e-5)


def test_batch_statistics_are_those_of_the_whole_batch(found):
    one = found["mambabcd"]["one x1"]["stats"]
    assert one
    for mesh in MESHES:
        for ours, theirs in zip(found["mambabcd"][f"{mesh} x1"]["stats"], one, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("network", ["mambabcd", "zzhnet"])
def test_a_device_holds_its_share_of_parameters_and_optimizer_state(network, found):
    held = {mesh: found[network][f"{mesh} x1"]["held"] for mesh in MESHES}
    assert held["fsdp=8"] < 1.05 / 8
    assert held["data=2,fsdp=2,tensor=2"] < 1.05 / 2
    assert held["data=8"] == 1
