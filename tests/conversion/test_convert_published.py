"""Checkpoints of the published networks: full-size listings, and goldens as PyTorch saves them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from zzhnet_jax.conversion import (
    convert_checkpoint,
    load_torch_state_dict,
    save_torch_state_dict,
    to_torch_state_dict,
)
from zzhnet_jax.models import functional
from zzhnet_jax.models.io import load_model

GOLDENS = Path(os.environ.get("ZZHNET_GOLDENS", ""))
# Without the middle size, which has the depths of the largest and the widths of the smallest.
LISTINGS = [
    path
    for family in ("vmamba", "bcd", "scd", "bda", "mmbda")
    for path in sorted(GOLDENS.glob(f"keys/keys_{family}_*.json"))
    if "_small" not in path.name
]
NETWORKS = [
    path
    for kind in ("vssm", "bcd", "scd", "bda", "mmbda")
    for path in sorted(GOLDENS.glob(f"change_detection/{kind}_*.npz"))
]
needs_goldens = pytest.mark.skipif(
    not LISTINGS, reason="ZZHNET_GOLDENS is not set: it names the golden arrays"
)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def random_state(listing: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)

    def value(name: str, shape: list[int]) -> np.ndarray:
        if name.endswith("num_batches_tracked"):
            return np.array(rng.integers(0, 2**31), np.int64)
        return rng.random(shape, np.float32) - np.float32(0.5)

    keys = json.loads(listing.read_text())["keys"]
    return {name: value(name, shape) for name, shape in keys.items()}


@needs_goldens
@pytest.mark.slow
@pytest.mark.parametrize("listing", LISTINGS, ids=lambda path: path.stem)
def test_full_size_listings(tmp_path, listing):
    save_torch_state_dict(random_state(listing), tmp_path / "in.pth")
    report = convert_checkpoint(tmp_path / "in.pth", tmp_path / "out")
    assert report.matching.exact and not report.overrides
    back = to_torch_state_dict(load_model(tmp_path / "out"), naming=report.naming)
    assert_same(back, load_torch_state_dict(tmp_path / "in.pth"))


_MEASURE = """
import resource, sys
from zzhnet_jax.conversion import convert_checkpoint
def peak(): return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
convert_checkpoint(sys.argv[1], sys.argv[2])
print(peak() - before)
"""


@needs_goldens
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is measured as Linux does")
def test_memory_of_a_base_network(tmp_path):
    path = tmp_path / "in.pth"
    save_torch_state_dict(random_state(GOLDENS / "keys" / "keys_bcd_new_base.json"), path)
    command = [sys.executable, "-c", _MEASURE, str(path), str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(run.stdout) < 3 * path.stat().st_size


@needs_goldens
@pytest.mark.parametrize("path", NETWORKS, ids=lambda path: path.stem)
def test_small_networks(tmp_path, path):
    """Sizes that no preset has: the fields are found from the shapes."""
    with np.load(path) as file:
        state = {name[3:]: file[name] for name in file.files if name.startswith("sd/")}
    save_torch_state_dict(state, tmp_path / "in.safetensors")
    report = convert_checkpoint(tmp_path / "in.safetensors", tmp_path / "out", verify=True)
    assert report.matching.exact and len(report.checksums) == len(state)


@pytest.fixture(scope="module")
def golden():
    """The golden BCD network: config, state dict under its new names, and the map to old ones."""
    with np.load(GOLDENS / "change_detection" / "bcd_new_h32_ln2d_v3noz.npz") as file:
        arrays = dict(file)
    state = {name[3:]: array for name, array in arrays.items() if name.startswith("sd/")}
    old_to_new = json.loads((GOLDENS / "keys" / "keymap_old_to_new_bcd.json").read_text())
    old = {new: name for name, new in old_to_new.items()}
    return arrays, state, {name: old[name] for name in state if name in old}


@pytest.fixture(scope="module")
def run():
    """The network as one function, compiled once."""
    compiled = {}

    def call(model, arrays):
        graphdef, params, stats = functional.split(model)
        images = [np.moveaxis(arrays[f"in/{name}"], 1, -1) for name in ("pre", "post")]
        if graphdef not in compiled:
            compiled[graphdef] = jax.jit(
                lambda params, stats, *images: functional.apply(graphdef, params, stats, *images)[0]
            )
        return np.moveaxis(np.asarray(compiled[graphdef](params, stats, *images)), -1, 1)

    return call


@needs_goldens
@pytest.mark.torch
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("naming", ["new", "old"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_pytorchs_files_reproduce_the_golden_output(tmp_path, golden, run, dtype, naming, legacy):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    arrays, state, old = golden
    tensors = {
        old.get(name, name) if naming == "old" else name: torch.from_numpy(array).to(
            getattr(torch, dtype) if array.dtype.kind == "f" else torch.int64
        )
        for name, array in state.items()
    }
    path = tmp_path / "in.pth"
    torch.save({"model": tensors}, path, _use_new_zipfile_serialization=not legacy)
    report = convert_checkpoint(path, tmp_path / "out")
    assert report.naming == naming and report.model.startswith("mambabcd")

    model = load_model(tmp_path / "out")
    for name, array in to_torch_state_dict(model, naming).items():
        expected = tensors[name].float() if array.dtype.kind == "f" else tensors[name]
        np.testing.assert_array_equal(array, expected.numpy(), err_msg=name)
    reference = arrays["out/change"]
    error = np.abs(run(model, arrays) - reference).max() / np.abs(reference).max()
    noise = json.loads(str(arrays["config"]))["noise_rel_max"]
    assert error <= {"float32": max(20 * noise, 1e-5), "float16": 2e-3, "bfloat16": 2e-2}[dtype]
