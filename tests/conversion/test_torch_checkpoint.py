"""Reading checkpoints written by hand, honest and hostile, and reading back what is written."""

import argparse
import datetime
import gc
import io
import json
import os
import pickle
import resource
import struct
import sys
import time
import types
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from zzhnet_jax.conversion.torch_checkpoint import load_torch_state_dict
from zzhnet_jax.conversion.torch_legacy import MAGIC, VERSION
from zzhnet_jax.conversion.torch_write import save_torch_state_dict
from zzhnet_jax.errors import ConversionError

ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x0a" + value.to_bytes(10, "little", signed=True)


def numbers(values) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(key: str, size: int, offset: int, shape, strides, kind: str = "FloatStorage") -> bytes:
    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cuda:0")
    storage += number(size) + b"tQ"
    layout = number(offset) + numbers(shape) + numbers(strides)
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + layout + b"\x89" + ORDERED_DICT + b"tR"
    )


def mapping(**values: bytes) -> bytes:
    return ORDERED_DICT + b"(" + b"".join(text(k) + v for k, v in values.items()) + b"u"


def write_zip(path: Path, body: bytes, storages=None, compression=zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
        for key, content in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", content)
        archive.writestr("archive/version", "3\n")
    return path


def write_legacy(path: Path, body: bytes, storages: dict[str, np.ndarray]) -> Path:
    parts = [pickle.dumps(value, 2) for value in (MAGIC, VERSION, {"little_endian": True})]
    parts += [b"\x80\x02" + body + b".", pickle.dumps(list(storages), 2)]
    for array in storages.values():
        parts += [struct.pack("<q", array.size), array.tobytes()]
    path.write_bytes(b"".join(parts))
    return path


NUMBERS = np.arange(12, dtype=np.float32)


@pytest.fixture(params=["zip", "legacy"])
def write(request, tmp_path):
    def zipped(body, **storages):
        contents = {key: array.tobytes() for key, array in storages.items()}
        return write_zip(tmp_path / "model.pth", body, contents)

    def legacy(body, **storages):
        return write_legacy(tmp_path / "model.pth", body, storages)

    return zipped if request.param == "zip" else legacy


def test_strides_offsets_and_shared_storages(write):
    body = mapping(
        transposed=tensor("s", 12, 0, (4, 3), (1, 4)),
        slice=tensor("s", 12, 5, (2, 2), (4, 2)),
        expanded=tensor("s", 12, 3, (5, 2), (0, 1)),
        scalar=tensor("s", 12, 11, (), ()),
        empty=tensor("s", 12, 0, (0, 3), (3, 1)),
    )
    found = load_torch_state_dict(write(body, s=NUMBERS))
    grid = NUMBERS.reshape(3, 4)
    np.testing.assert_array_equal(found["transposed"], grid.T)
    np.testing.assert_array_equal(found["slice"], grid[1:, 1::2])
    np.testing.assert_array_equal(found["expanded"], np.broadcast_to([3.0, 4.0], (5, 2)))
    assert found["scalar"].shape == () and found["scalar"] == 11
    assert found["empty"].shape == (0, 3)
    assert all(
        array.flags.c_contiguous and not array.flags.writeable
        for array in found.values()
        if array.size
    )


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("DoubleStorage", np.float64),
        ("HalfStorage", np.float16),
        ("BFloat16Storage", ml_dtypes.bfloat16),
        ("LongStorage", np.int64),
        ("BoolStorage", np.bool_),
    ],
)
def test_element_types(write, kind, dtype):
    values = np.array([0, 1, 1, 0, 1], dtype)
    found = load_torch_state_dict(
        write(mapping(x=tensor("0", 5, 0, (5,), (1,), kind)), **{"0": values})
    )
    assert found["x"].dtype == dtype
    np.testing.assert_array_equal(found["x"], values)


@pytest.mark.parametrize(
    ("names", "entry", "expected"),
    [
        (("model_ema", "model"), None, "model"),
        (("model_ema", "state_dict"), None, "state_dict"),
        (("model_ema",), None, "model_ema"),
        (("model", "model_ema"), "model_ema", "model_ema"),
        (("generator", "critic"), "critic", "critic"),
    ],
)
def test_which_entry_holds_the_weights(write, names, entry, expected):
    body = mapping(epoch=number(3), **{n: mapping(w=tensor(n, 1, 0, (1,), (1,))) for n in names})
    storages = {name: np.float32([index]) for index, name in enumerate(names)}
    found = load_torch_state_dict(write(body, **storages), entry=entry)
    assert found["w"][0] == names.index(expected)


def test_nested_twice_and_prefixed(write):
    weights = {
        "module.a": tensor("s", 12, 0, (1,), (1,)),
        "module._orig_mod.b": tensor("s", 12, 1, (1,), (1,)),
        "n_averaged": number(7),
    }
    found = load_torch_state_dict(
        write(mapping(model=mapping(state_dict=mapping(**weights))), s=NUMBERS)
    )
    assert {name: array[0] for name, array in found.items()} == {"a": 0, "b": 1}


def test_unclear_entry_lists_the_choices(write):
    body = mapping(generator=mapping(w=tensor("s", 12, 0, (1,), (1,))))
    with pytest.raises(ConversionError, match=r"no state dict was found; choose .*: generator"):
        load_torch_state_dict(write(body, s=NUMBERS))
    with pytest.raises(ConversionError, match=r"entry ema has no tensors; choose .*: generator"):
        load_torch_state_dict(write(body, s=NUMBERS), entry="ema")


def test_data_only_classes_are_inert(write, monkeypatch):
    node = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    module = types.ModuleType("yacs.config")
    module.CfgNode = node
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    cfg = node(depths=[2, 2])
    cfg.frozen = True
    config = {
        "config": cfg,
        "args": argparse.Namespace(lr=1e-4, when=datetime.date(2024, 1, 1)),
        "score": np.float64(0.5),
        "root": Path("/data"),
        "seen": {1, 2},
        ("a", 1): frozenset([3]),
    }
    for protocol in (2, 4, 5):
        extra = pickle.dumps(config, protocol)[:-1]
        body = mapping(extra=extra, model=mapping(w=tensor("s", 12, 0, (1,), (1,))))
        assert list(load_torch_state_dict(write(body, s=NUMBERS))) == ["w"]


# files that are not what they seem


class System:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def pickled_call(tmp_path: Path) -> bytes:
    return pickle.dumps(System(tmp_path / "executed"), 2)[2:-1]


def refused(path: Path, *words: str) -> str:
    """Loads the file, expecting a one-line refusal within a second and within 64 MiB."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    listing = sorted(path.parent.iterdir())
    gc.disable()  # going through what other tests left in memory can take a second by itself
    try:
        with pytest.raises(ConversionError) as caught:
            load_torch_state_dict(path)
    finally:
        gc.enable()
    assert time.process_time() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024
    assert sorted(path.parent.iterdir()) == listing
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    for word in words:
        assert word in message
    return message


def test_refuses_a_call_in_every_container(tmp_path):
    call = pickled_call(tmp_path)
    name = f"{os.system.__module__}.system"
    bad = tmp_path / "bad.pth"
    refused(write_zip(bad, mapping(model=call)), name, "torch.save(model.state_dict()")
    refused(write_legacy(bad, mapping(model=call), {}), name)
    for protocol in range(6):
        bad.write_bytes(pickle.dumps(System(tmp_path / "executed"), protocol))
        refused(bad, name)
    bad.write_bytes(b"(S'touch executed'\nios\nsystem\n.")
    refused(bad, "os.system")
    bad.write_bytes(b"\x80\x02c" + b"torch.hub\nload\n.")
    refused(bad, "torch.hub.load")
    assert not (tmp_path / "executed").exists()


def test_refuses_calls_hidden_behind_allowed_names(tmp_path):
    """A harmless name may be called, but nothing happens; a string is no function."""
    bad = tmp_path / "bad.pth"
    inert = b"cbuiltins\nslice\n" + b"(" + text("touch x") + b"tR"
    assert refused(write_zip(bad, inert), "no dict")
    refused(write_zip(bad, text("os.system") + b"(" + text("true") + b"tR"), "damaged")
    builtin = b"cbuiltins\ngetattr\n"
    refused(write_zip(bad, builtin), "builtins.getattr")
    refused(write_zip(bad, b"\x8c\x08builtins\x8c\x04eval\x93"), "builtins.eval")


def test_refuses_escape_sequences_in_names(tmp_path):
    message = refused(write_zip(tmp_path / "bad.pth", b"cevil\x1b[2J\nrun\n"), "evil")
    assert "\x1b" not in message


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ((0, (10**12,), (1,)), ["claim 4000000000000 bytes"]),
        ((0, (10**12,), (0,)), ["claim 4000000000000 bytes"]),
        ((0, (2**40, 2**40), (0, 0)), ["claim"]),
        ((10, (3,), (1,)), ["reach element 12 of a storage that has 12"]),
        ((0, (3, 4), (5, 1)), ["reach element 13"]),
        ((2**62, (1,), (1,)), ["reach element"]),
        ((-1, (2,), (1,)), ["damaged"]),
        ((11, (2,), (-1,)), ["damaged"]),
        ((0, (-3,), (1,)), ["damaged"]),
        ((0, (2**70,), (1,)), ["damaged"]),
        ((0, (2,), (1, 1)), ["damaged"]),
        ((0, (1,) * 70, (1,) * 70), ["tensor x"]),
    ],
)
def test_refuses_tensors_outside_their_storage(write, layout, words):
    refused(write(mapping(x=tensor("s", 12, *layout)), s=NUMBERS), *words)


def test_refuses_storages_that_the_file_does_not_hold(tmp_path):
    bad = tmp_path / "bad.pth"
    huge = mapping(x=tensor("s", 10**12, 0, (2,), (1,)))
    refused(write_zip(bad, huge, {"s": bytes(48)}), "1000000000000 elements", "48 bytes")
    refused(write_zip(bad, huge), "missing")
    refused(write_zip(bad, mapping(x=tensor("../version", 1, 0, (1,), (1,)))), "missing")
    refused(write_legacy(bad, huge, {"s": NUMBERS}), "not as its tensors describe it")
    body = mapping(x=tensor("s", 12, 0, (2,), (1,)))
    legacy = write_legacy(bad, body, {"s": NUMBERS}).read_bytes()
    bad.write_bytes(legacy[:-5])
    refused(bad, "truncated")


def test_refuses_zips_that_pytorch_does_not_write(tmp_path):
    bad = tmp_path / "bad.pth"
    body = mapping(x=tensor("0", 2**26, 0, (2**26,), (1,)))
    refused(write_zip(bad, body, {"0": bytes(2**28)}, zipfile.ZIP_DEFLATED), "compressed")
    write_zip(bad, mapping(x=tensor("s", 12, 0, (12,), (1,))), {"s": NUMBERS.tobytes()})
    whole = bad.read_bytes()
    with zipfile.ZipFile(bad, "a") as archive:
        archive.writestr("archive/../../escaped", "x")
    refused(bad, "leads outside the archive")
    for length in (len(whole) - 1, len(whole) // 2, 10):
        bad.write_bytes(whole[:length])
        refused(bad, "truncated")
    bad.write_bytes(whole.replace(NUMBERS.tobytes(), NUMBERS[::-1].tobytes()))
    refused(bad, "checksum")
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("readme.txt", "x")
    refused(bad, "without data.pkl")
    with zipfile.ZipFile(bad, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "version"):
            archive.writestr(f"m/{name}", b"")
    refused(bad, "TorchScript")


def test_refuses_a_zip_directory_that_lies_about_sizes(tmp_path):
    bad = tmp_path / "bad.pth"
    content = NUMBERS.tobytes()
    write_zip(bad, mapping(x=tensor("s", 2**28, 0, (12,), (1,))), {"s": content})
    data = bytearray(bad.read_bytes())
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"archive/data/s"))
    data[entry + 20 : entry + 28] = struct.pack("<II", 2**30, 2**30)
    bad.write_bytes(data)
    refused(bad, "runs past the file's end")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\n<!DOCTYPE html><html><body>404</body></html>", ["web page", "download it again"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ["git lfs pull"]),
        (b"\x1f\x8b\x08" + bytes(20), ["gunzip"]),
        (bytes(257) + b"ustar" + bytes(200), ["tar layout"]),
        (b"", ["empty"]),
        (b'{"error": "gone"}', ["begins with", "error"]),
        (b"\x80\x02}.", ["plain pickle"]),
        (b"\x80\x02", ["damaged"]),
        (b"\x80\x02" + b"\x85." * 9, ["damaged"]),
        (b"\x80\x02" + b"e" + b".", ["damaged"]),
        (b"\x80\x02r\xff\xff\xff\xff.", ["damaged"]),
        (b"\x80\x02X\xff\xff\xff\xffabc", ["damaged"]),
        (b"\x80\x05\x8e" + b"\xff" * 7 + b"\x00abc", ["damaged"]),
        (b"\x80\x02)" + b"\x85" * 100_000 + b"}\x86}q\x00h\x00h\x00s.", ["damaged"]),
    ],
)
def test_refuses_other_files(tmp_path, content, words):
    bad = tmp_path / "bad.pth"
    bad.write_bytes(content)
    refused(bad, *words)


def test_refuses_what_is_missing(tmp_path):
    refused(tmp_path / "none.pth", "no such file")
    refused(tmp_path, "cannot be read")


def write_safetensors(path: Path, header, content: bytes = b"", length=None) -> Path:
    encoded = json.dumps(header).encode()
    path.write_bytes(
        struct.pack("<Q", len(encoded) if length is None else length) + encoded + content
    )
    return path


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]},
        {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-4, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        {"dtype": "OBJECT", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32"},
        [],
    ],
)
def test_refuses_safetensors_headers_that_lie(tmp_path, fields):
    refused(write_safetensors(tmp_path / "bad.safetensors", {"x": fields}, bytes(8)), "header")


def test_refuses_a_safetensors_header_longer_than_the_file(tmp_path):
    refused(write_safetensors(tmp_path / "bad.safetensors", {}, length=10**15), "begins with")


# writing


def every_dtype() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {
        np.dtype(dtype).name: rng.normal(size=(2, 3)).astype(dtype)
        for dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)
    }
    for dtype in (np.int64, np.int32, np.int16, np.int8, np.uint8, np.bool_):
        arrays[np.dtype(dtype).name] = rng.integers(0, 2, size=(2, 3)).astype(dtype)
    return arrays | {
        "encoder.scalar": np.array(3, np.int64),
        "transposed": np.asfortranarray(rng.normal(size=(3, 4, 5))).astype(np.float32),
        "reversed": np.arange(6.0)[::-1],
        "empty": np.zeros((2, 0, 3), np.float32),
        "ünïcode.☃": np.ones(1, np.float32),
    }


@pytest.mark.parametrize("ending", [".pth", ".pt", ".safetensors"])
def test_written_files_read_back(tmp_path, ending):
    path = tmp_path / f"out{ending}"
    arrays = every_dtype()
    save_torch_state_dict(arrays, path)
    found = load_torch_state_dict(path)
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()
    assert os.listdir(tmp_path) == [path.name]


def test_written_storages_are_aligned_and_mapped(tmp_path):
    save_torch_state_dict(every_dtype(), tmp_path / "out.pth")
    data = (tmp_path / "out.pth").read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        for entry in archive.infolist():
            name, extra = struct.unpack_from("<HH", data, entry.header_offset + 26)
            assert (entry.header_offset + 30 + name + extra) % 64 == 0
    assert all(
        not array.flags.owndata
        for array in load_torch_state_dict(tmp_path / "out.pth").values()
        if array.size
    )


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "out.pth"
    save_torch_state_dict({"x": NUMBERS}, path)
    with pytest.raises(ConversionError, match=r"x: PyTorch's .pth format has no float8_e5m2"):
        save_torch_state_dict({"x": NUMBERS.astype(ml_dtypes.float8_e5m2)}, path)
    with pytest.raises(ConversionError, match=r"use .pth, .pt or .safetensors"):
        save_torch_state_dict({"x": NUMBERS}, tmp_path / "out.npz")
    assert os.listdir(tmp_path) == ["out.pth"]
    np.testing.assert_array_equal(load_torch_state_dict(path)["x"], NUMBERS)
