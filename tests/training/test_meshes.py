"""Real networks on eight devices: every mesh gives the losses of one device."""

import json
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.mesh]

_SCRIPT = Path(__file__).with_name("mesh_losses.py")
MESHES = ["data=8", "fsdp=8", "data=2,fsdp=2,tensor=2", "data=4,spatial=2"]


@pytest.mark.parametrize("network", ["mambabcd", "zzhnet"])
def test_every_mesh_trains_as_one_device_does(network, start_small, tmp_path):
    outs = {parts: tmp_path / f"{parts}.json" for parts in (1, 4)}
    started = [
        start_small(out, network, parts, devices=8, script=_SCRIPT) for parts, out in outs.items()
    ]
    ends = [(process.communicate()[1], process.returncode) for process in started]
    assert all(code == 0 for _, code in ends), [errors[-2000:] for errors, _ in ends]
    found = {}
    for out in outs.values():
        found |= json.loads(out.read_text())
    for parts in (1, 4):
        # Layer norms know nothing of the batch: parts of it must have the losses of the whole.
        one = found["one x1" if network == "zzhnet" else f"one x{parts}"]["losses"]
        assert len(one) == 20 and one[-1] < one[0]
        for mesh in MESHES:
            np.testing.assert_allclose(found[f"{mesh} x{parts}"]["losses"], one, rtol=1e-5)
    check_batch_statistics(network, found)
    assert found["fsdp=8 x1"]["held"] < 1.05 / 8
    assert found["data=2,fsdp=2,tensor=2 x1"]["held"] < 1.05 / 2
    assert found["data=8 x1"]["held"] == 1


def check_batch_statistics(network, found):
    """They are those of the whole batch, or of a whole part, which makes a difference."""
    one = found["one x1"]["stats"]
    assert bool(one) == (network == "mambabcd")
    if one:
        whole, parts = (found[f"one x{n}"]["losses"] for n in (1, 4))
        assert np.abs(np.subtract(parts, whole)).max() > 1e-4
    for mesh in MESHES:
        for ours, theirs in zip(found[f"{mesh} x1"]["stats"], one, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
