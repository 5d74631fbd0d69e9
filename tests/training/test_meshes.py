"""Real networks on eight devices: every mesh gives the losses of one device."""

import json
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.mesh]

_SCRIPT = Path(__file__).with_name("mesh_losses.py")
MESHES = ["data=8", "fsdp=8", "data=2,fsdp=2,tensor=2", "data=4,spatial=2"]


@pytest.fixture(scope="module", params=["mambabcd", "zzhnet"])
def results(request, start_small, tmp_path_factory):
    """For each mesh and number of parts: losses, share held by a device, batch statistics."""
    out = tmp_path_factory.mktemp("meshes") / "losses.json"
    process = start_small(out, request.param, devices=8, script=_SCRIPT)
    _, err = process.communicate(timeout=560)
    assert process.returncode == 0, err[-2000:]
    return request.param, json.loads(out.read_text())


def test_every_mesh_has_the_losses_of_one_device(results):
    _, found = results
    for parts in (1, 4):
        one = found[f"one x{parts}"]["losses"]
        assert len(one) == 20 and one[-1] < one[0]
        for mesh in MESHES:
            np.testing.assert_allclose(found[f"{mesh} x{parts}"]["losses"], one, rtol=1e-5)


def test_parts_of_a_batch_are_the_whole_where_nothing_is_normalised_over_it(results):
    network, found = results
    whole, parts = (found[f"one x{n}"]["losses"] for n in (1, 4))
    if network == "zzhnet":  # layer norms alone
        np.testing.assert_allclose(parts, whole, rtol=1e-5)
    else:
        assert np.abs(np.subtract(parts, whole)).max() > 1e-4


def test_batch_statistics_are_those_of_the_whole_batch(results):
    network, found = results
    one = found["one x1"]["stats"]
    assert bool(one) == (network == "mambabcd")
    for mesh in MESHES:
        for ours, theirs in zip(found[f"{mesh} x1"]["stats"], one, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_fsdp_leaves_each_device_its_share_of_the_state(results):
    _, found = results
    assert found["fsdp=8 x1"]["held"] < 1.05 / 8
    assert found["data=2,fsdp=2,tensor=2 x1"]["held"] < 1.05 / 2
    assert found["data=8 x1"]["held"] == 1
