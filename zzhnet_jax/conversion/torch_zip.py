"""The zip layout of `torch.save`: `<name>/data.pkl`, and a stored `<name>/data/<key>` a storage."""

import zipfile
import zlib
from typing import BinaryIO

from zzhnet_jax.conversion.torch_file import TorchFile
from zzhnet_jax.conversion.torch_pickle import read_pickle
from zzhnet_jax.conversion.torch_records import StorageRef, printable
from zzhnet_jax.errors import ConversionError


def read_zip(file: BinaryIO, buffer: memoryview) -> TorchFile:
    """Reads the description in a zip checkpoint.

    Args:
      file: the open file, from which the zip directory is read.
      buffer: the same file, mapped.

    Raises:
      ConversionError: the zip is damaged, or is not what PyTorch writes.
    """
    entries = _entries(file)
    prefix = _prefix(entries)
    order = entries.get(f"{prefix}byteorder")
    if order is not None and _content(buffer, order).tobytes().strip() != b"little":
        raise ConversionError(
            "its tensors are big-endian; save it again on a little-endian machine"
        )
    content, _ = read_pickle(_content(buffer, entries[f"{prefix}data.pkl"]))

    def find_storage(ref: StorageRef) -> memoryview:
        entry = entries.get(f"{prefix}data/{ref.key}")
        if entry is None:
            raise ConversionError(f"its storage {printable(ref.key)} is missing from the zip")
        numbers = _content(buffer, entry)
        if len(numbers) != ref.size * ref.dtype.itemsize:
            raise ConversionError(
                f"its storage {printable(ref.key)} is said to have {ref.size} elements of "
                f"{ref.dtype}, but {len(numbers)} bytes are there"
            )
        return numbers

    return TorchFile(content, len(buffer), find_storage)


def _entries(file: BinaryIO) -> dict[str, zipfile.ZipInfo]:
    """The zip directory by name, without anything that PyTorch never writes."""
    try:
        with zipfile.ZipFile(file) as archive:
            listing = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError) as error:
        raise ConversionError(
            f"its zip directory is missing or damaged ({printable(error)}), as in a truncated "
            "file; copy or download it again"
        ) from error
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in listing:
        name, shown = entry.filename, printable(entry.filename)
        if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
            raise ConversionError(
                f"its zip entry {shown} leads outside the archive; get the file from a source "
                "you trust"
            )
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ConversionError(
                f"its zip entry {shown} is compressed ({entry.compress_size} bytes that claim to "
                f"become {entry.file_size}), which PyTorch never does; save it with torch.save"
            )
        if entry.flag_bits & 1:
            raise ConversionError(f"its zip entry {shown} is encrypted; decrypt it first")
        if name in entries:
            raise ConversionError(f"its zip entry {shown} is there twice; download it again")
        entries[name] = entry
    return entries


def _prefix(entries: dict[str, zipfile.ZipInfo]) -> str:
    """The archive's single top folder, with its slash."""
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise ConversionError(
            "it is a zip without data.pkl, so torch.save did not write it; check that this is the "
            "checkpoint"
        )
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in entries:
        raise ConversionError(
            "it is a TorchScript program; save the weights alone with "
            "torch.save(model.state_dict(), path)"
        )
    return prefix


def _content(buffer: memoryview, entry: zipfile.ZipInfo) -> memoryview:
    """An entry's bytes inside the mapped file, once their checksum is found right.

    A checksum of 0 is what PyTorch writes when told not to compute one.
    """
    shown, start = printable(entry.filename), entry.header_offset
    header = buffer[start : start + 30].tobytes()
    if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
        raise ConversionError(f"its zip entry {shown} is not where it should be; download it again")
    start += 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    content = buffer[start : start + entry.file_size]
    if len(content) < entry.file_size:
        raise ConversionError(f"its zip entry {shown} runs past the file's end; download it again")
    if entry.CRC and zlib.crc32(content) != entry.CRC:
        raise ConversionError(
            f"its zip entry {shown} fails its checksum: the file is damaged; download it again"
        )
    return content
