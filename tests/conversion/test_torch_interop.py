"""What PyTorch writes is read here bit for bit, and what is written here PyTorch reads."""

import argparse
import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from zzhnet_jax.conversion.torch_checkpoint import load_torch_state_dict
from zzhnet_jax.conversion.torch_write import save_torch_state_dict
from zzhnet_jax.errors import ConversionError

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytestmark = pytest.mark.torch


def assert_same_bits(array: np.ndarray, tensor) -> None:
    assert str(array.dtype) == str(tensor.dtype).removeprefix("torch.")
    assert array.shape == tuple(tensor.shape)
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert array.tobytes() == raw


def save(content, path: Path, **options) -> Path:
    torch.save(content, path, **options)
    return path


DTYPES = (
    "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128"
).split()
NEW_DTYPES = "uint16 uint32 uint64 float8_e4m3fn float8_e5m2".split()


@pytest.fixture(params=["zip", "zip4", "legacy"])
def options(request):
    return {
        "zip": {},
        "zip4": {"pickle_protocol": 4},
        "legacy": {"_use_new_zipfile_serialization": False},
    }[request.param]


@pytest.mark.parametrize("dtype", [*DTYPES, *NEW_DTYPES])
def test_every_element_type(tmp_path, options, dtype):
    if dtype in NEW_DTYPES and "_use_new_zipfile_serialization" in options:
        pytest.skip(f"PyTorch does not write {dtype} in its legacy format")
    tensor = (torch.randn(3, 5) * 3).abs().to(getattr(torch, dtype))
    found = load_torch_state_dict(save({"x": tensor}, tmp_path / "x.pth", **options))
    assert_same_bits(found["x"], tensor)


def test_layouts_and_parameters(tmp_path, options):
    base = torch.randn(4, 6, 5)
    parameter = torch.nn.Parameter(torch.randn(3))
    parameter._no_weight_decay = True
    state = OrderedDict(
        whole=base,
        part=base[1:3, ::2],
        transposed=base.permute(2, 0, 1),
        expanded=torch.randn(3, 1).expand(3, 7),
        channels_last=torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        scalar=torch.tensor(2.5),
        empty=torch.zeros(0, 4),
        parameter=parameter,
    )
    found = load_torch_state_dict(save(state, tmp_path / "x.pt", **options))
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert_same_bits(found[name], tensor)


def test_a_training_checkpoint(tmp_path, options):
    """Optimizer, scheduler, scaler and configuration stay behind; the weights come out."""
    model = torch.nn.DataParallel(
        torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    )
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "max_accuracy": np.float64(0.5),
        "confusion": np.eye(2),
        "rng": torch.get_rng_state(),
        "args": argparse.Namespace(lr=1e-4, device=torch.device("cpu"), size=torch.Size([2])),
        "dtype": torch.float16,
    }
    found = load_torch_state_dict(save(content, tmp_path / "x.pth", **options))
    state = model.module.state_dict()
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert_same_bits(found[name], tensor)


def test_a_whole_pickled_model_is_refused_by_name(tmp_path, options):
    path = save(torch.nn.Linear(2, 2), tmp_path / "x.pth", **options)
    with pytest.raises(ConversionError, match=r"asks for torch.nn.modules.linear.Linear, .*state"):
        load_torch_state_dict(path)


def test_files_written_without_checksums(tmp_path):
    computes = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = save({"x": torch.arange(9)}, tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(computes)
    np.testing.assert_array_equal(load_torch_state_dict(path)["x"], np.arange(9))


@pytest.mark.parametrize("options_of_load", [{}, {"mmap": True}])
def test_pytorch_reads_what_is_written(tmp_path, options_of_load):
    tensors = {dtype: (torch.randn(3, 5) * 3).abs().to(getattr(torch, dtype)) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(7), "empty": torch.zeros(2, 0), "ünï.☃": torch.ones(1)}
    source = save(tensors, tmp_path / "source.pth")
    save_torch_state_dict(load_torch_state_dict(source), tmp_path / "x.pth")
    found = torch.load(tmp_path / "x.pth", weights_only=True, **options_of_load)
    assert isinstance(found, OrderedDict) and list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        assert found[name].is_contiguous() and not found[name].requires_grad


def test_a_published_checkpoint():
    """TinyCD's LEVIR-CD weights: 279 tensors, as their authors saved them."""
    if "ZZHNET_DATA" not in os.environ:
        pytest.skip("ZZHNET_DATA is not set: it names the folder of sample data")
    path = Path(os.environ["ZZHNET_DATA"]) / "weights_tinycd" / "levir_best.pth"
    expected = torch.load(path, weights_only=True, map_location="cpu")
    found = load_torch_state_dict(path)
    assert list(found) == list(expected) and len(found) == 279
    for name, tensor in expected.items():
        assert_same_bits(found[name], tensor)
