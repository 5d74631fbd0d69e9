"""What PyTorch recorded: written by the shipped script, and read back as cases."""

import json
import subprocess
import sys

import numpy as np
import pytest

from zzhnet_jax.comparison import dump_torch_scan
from zzhnet_jax.comparison.accuracy import compare_all
from zzhnet_jax.comparison.oracle import reference
from zzhnet_jax.comparison.torch_dump import read_torch_dump
from zzhnet_jax.errors import DataError

SHAPE = (1, 9, 4, 3, 2)


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    """A file that the script wrote, as a user runs it, with PyTorch's own operations."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    path = tmp_path_factory.mktemp("dump") / "scans.npz"
    shape = ["--shapes", ",".join(map(str, SHAPE)), "--repeats", "1"]
    command = [sys.executable, dump_torch_scan.__file__, path, "--kernel", "loop", *shape]
    done = subprocess.run(command, capture_output=True, text=True, cwd=path.parent)
    assert done.returncode == 0, done.stderr
    assert "loop on CPU" in done.stdout
    return path


@pytest.mark.torch
def test_torch_is_within_the_bound(dump):
    """PyTorch's operators and gradients against the oracle: the layouts are understood."""
    cases = read_torch_dump(dump)
    assert [case.dtype for case in cases] == ["float32", "bfloat16"]
    for case in cases:
        assert case.shape[1:] == (1, 9, 4, 2, 3) and "loop on CPU" in case.note
        recorded = case.recorded["torch"]
        assert set(recorded.outputs) == {"y", *case.arguments}
        assert set(recorded.timings) == {"forward", "gradient"}
        figures = compare_all(recorded.outputs, reference(case, gradients=True))
        assert {name: e.of_bound for name, e in figures.items() if not e.passed} == {}


@pytest.mark.torch
def test_a_wrong_record_leaves_the_bound(dump):
    case = read_torch_dump(dump)[0]
    y = case.recorded["torch"].outputs["y"]
    figures = compare_all({"y": y * np.float32(1 + 1e-5)}, reference(case, gradients=False))
    assert not figures["y"].passed


def written(path, **changes):
    """A file of one scan in the script's format, without PyTorch, with some entries changed."""
    drawn = {k: np.asarray(x, np.float32) for k, x in dump_torch_scan.draw(SHAPE).items()}
    arrays = {f"0/in/{k}": x for k, x in drawn.items() if k != "cot"} | {"0/cot": drawn["cot"]}
    arrays |= {f"0/grad/{k}": x for k, x in drawn.items() if k != "cot"}
    arrays["0/out/y"] = drawn["u"]
    times = {"forward": 1.0, "gradient": 2.0}
    scan = {"shape": SHAPE, "dtype": "float32", "y_dtype": "float32", "milliseconds": times}
    meta = {"format": dump_torch_scan.FORMAT, "kernel": "k", "torch": "2", "device": "GPU"}
    arrays["meta"] = json.dumps(meta | {"scans": [scan]})
    np.savez(path, **{k: x for k, x in (arrays | changes).items() if x is not None})
    return path


def test_a_whole_file_is_read(tmp_path):
    (case,) = read_torch_dump(written(tmp_path / "x.npz"))
    assert case.recorded["torch"].timings == {"forward": 1.0, "gradient": 2.0}
    np.testing.assert_array_equal(case.recorded["torch"].outputs["y"], case.arguments["u"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"0/out/y": None}, "0/out/y"),
        ({"0/grad/A": np.zeros((2, 2), np.float32)}, "0/grad/A has shape"),
        ({"meta": "{}"}, "not a file of recorded scans"),
        ({"meta": None}, "not a file of recorded scans"),
        ({"meta": json.dumps({"format": dump_torch_scan.FORMAT})}, "damaged"),
    ],
)
def test_a_damaged_file_is_told_in_one_line(tmp_path, changes, said):
    with pytest.raises(DataError, match=said) as caught:
        read_torch_dump(written(tmp_path / "x.npz", **changes))
    assert "x.npz" in str(caught.value) and "dump_torch_scan.py" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"no zip file", b"PK\x03\x04 cut"])
def test_what_is_no_such_file_is_told_in_one_line(tmp_path, content):
    path = tmp_path / "x.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read") as caught:
        read_torch_dump(path)
    assert "\n" not in str(caught.value)
