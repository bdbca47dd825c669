"""Reading a safetensors file that a stranger may have made, in one pass and into one block of memory.

The library of that name opens the file by its path and copies every tensor out. Adapters are loaded by the thousand and
from anywhere, so this reader takes an open file, checks the whole header against its size before a byte of data is
read, says what is wrong and how to mend it, and gives views of one storage.
"""

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from rankfold.core.files import MAX_JSON, parse_json
from rankfold.errors import AdapterFileError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_CHUNK = 1 << 20
_PICKLE = re.compile(rb"PK\x03\x04|\x80[\x02-\x05]")


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor as the header declares it; `begin` and `end` count bytes from where the data starts."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point


class TensorFile:
    """The checked header of an open file: `entries` by tensor name, `metadata`, and the data's `size` in bytes."""

    def __init__(self, handle: BinaryIO, what: str):
        self._handle, self._what = handle, what
        self._found = os.fstat(handle.fileno())
        length = self._header_length()
        self._start = 8 + length
        self.size = self._found.st_size - self._start
        header = parse_json(read_exactly(handle, length, what), f"{what}: the header")
        if not isinstance(header, dict):
            raise AdapterFileError(f"{what}: the header is no JSON object: it is no safetensors file")
        self.metadata = self._metadata(header.pop("__metadata__", {}))
        self.entries = {name: self._entry(name, value) for name, value in header.items()}
        self._check_layout()

    def _header_length(self) -> int:
        first = self._handle.read(8)
        if len(first) < 8:
            raise AdapterFileError(f"{self._what} is cut short at {len(first)} bytes: fetch or save it again")
        length, there = int.from_bytes(first, "little"), self._found.st_size - 8
        if length > there:
            if _PICKLE.match(first):
                raise AdapterFileError(
                    f"{self._what} is a pickle (what torch.save writes), which can run any code when it is opened; "
                    "Rankfold reads safetensors files only: ask for the adapter in that format"
                )
            raise AdapterFileError(
                f"{self._what} claims a header of {length:,} bytes and has {there:,} in all: it is no safetensors "
                "file, or cut short; fetch or save it again"
            )
        if length > MAX_JSON:
            raise AdapterFileError(
                f"{self._what} claims a header of {length:,} bytes, more than an adapter's ({MAX_JSON:,} at most)"
            )
        return length

    def _metadata(self, value: Any) -> dict[str, str]:
        if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
            raise AdapterFileError(f"{self._what}: the metadata in the header must map names to texts")
        return value

    def _entry(self, name: str, value: Any) -> Entry:
        at = f"{self._what}: tensor {name[:200]!r}"
        if not 0 < len(name) <= 1024 or not name.isprintable():
            raise AdapterFileError(f"{at} has an empty, overlong or unprintable name: the file is damaged or hostile")
        if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
            raise AdapterFileError(f"{at} must be described by dtype, shape and data_offsets, and nothing else")
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise AdapterFileError(f"{at} has dtype {str(dtype)[:40]!r}; an adapter's tensors are {', '.join(_DTYPES)}")
        if not _whole_numbers(shape) or len(shape) > 8:
            raise AdapterFileError(f"{at} has a shape that is no list of at most 8 whole numbers")
        if not _whole_numbers(offsets) or len(offsets) != 2:
            raise AdapterFileError(f"{at} has data_offsets that are no pair of whole numbers")
        entry = Entry(_DTYPES[dtype], tuple(shape), *offsets)
        needed = entry.numel * entry.dtype.itemsize
        if entry.end - entry.begin != needed:
            raise AdapterFileError(
                f"{at} of shape {list(shape)} needs {needed:,} bytes and has {entry.end - entry.begin:,}"
            )
        return entry

    def _check_layout(self) -> None:
        """The tensors must cover the data from its first byte to its last, each byte once."""
        end = 0
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin != end:
                trouble = "overlaps another tensor" if entry.begin < end else "leaves a gap before it"
                raise AdapterFileError(
                    f"{self._what}: tensor {name!r} {trouble} (it starts at byte {entry.begin:,}, not {end:,})"
                )
            end = entry.end
        if end != self.size:
            trouble = "is cut short" if end > self.size else "has bytes behind its last tensor"
            raise AdapterFileError(
                f"{self._what} {trouble}: {self.size:,} bytes of data where the header says {end:,}; fetch or save it "
                "again"
            )

    def tensors(self) -> dict[str, Tensor]:
        """Read the data once: CPU tensors by name, all views of one storage. Refuses NaN and infinity."""
        self._handle.seek(self._start)
        self._data = read_exactly(self._handle, self.size, self._what)
        self._check_unchanged(self._handle)
        data = torch.frombuffer(self._data, dtype=torch.uint8) if self.size else torch.empty(0, dtype=torch.uint8)
        tensors = {name: self._view(name, entry, data) for name, entry in self.entries.items()}
        for name, tensor in tensors.items():
            self._check_numbers(name, tensor)
        return tensors

    def _check_unchanged(self, handle: BinaryIO) -> None:
        now = os.fstat(handle.fileno())
        if (now.st_size, now.st_mtime_ns) != (self._found.st_size, self._found.st_mtime_ns):
            raise AdapterFileError(f"{self._what} changed while it was read: load it again when nothing writes to it")

    def _check_numbers(self, name: str, tensor: Tensor) -> None:
        if not all_finite(tensor):
            raise AdapterFileError(f"{self._what}: {name} holds NaN or infinity: it diverged or is damaged")

    def digest(self) -> str:
        """The `digest` of the tensors that were read, from their bytes as they lie in the file."""
        data = memoryview(self._data)
        return _digest((name, e.dtype, e.shape, [data[e.begin : e.end]]) for name, e in self.entries.items())

    def streamed_digest(self) -> str:
        """The `digest` of the tensors of a file that is still open, which are read through and not kept."""
        return _digest((n, e.dtype, e.shape, self._chunks(self._handle, e)) for n, e in self.entries.items())

    def _chunks(self, handle: BinaryIO, entry: Entry) -> Iterator[bytearray]:
        handle.seek(self._start + entry.begin)
        for begin in range(entry.begin, entry.end, _CHUNK):
            yield read_exactly(handle, min(_CHUNK, entry.end - begin), self._what)

    def some(self, handle: BinaryIO, names: Iterable[str]) -> dict[str, Tensor]:
        """A few of the tensors, from the file opened anew. Refuses NaN and infinity, and a file that was changed."""
        self._check_unchanged(handle)
        tensors = {}
        for name in names:
            entry = self.entries[name]
            handle.seek(self._start + entry.begin)
            data = read_exactly(handle, entry.end - entry.begin, self._what)
            flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
            tensors[name] = self._view(name, Entry(entry.dtype, entry.shape, 0, len(data)), flat)
            self._check_numbers(name, tensors[name])
        return tensors

    def _view(self, name: str, entry: Entry, data: Tensor) -> Tensor:
        if entry.begin == entry.end:
            return torch.empty(entry.shape, dtype=entry.dtype)
        part = data[entry.begin : entry.end]
        if entry.dtype == torch.bool and bool((part > 1).any()):
            raise AdapterFileError(f"{self._what}: tensor {name!r} of booleans holds other values than 0 and 1")
        if entry.begin % entry.dtype.itemsize:  # no file of ours: a view starts at a multiple of its numbers' size
            part = part.clone()
        return part.view(entry.dtype).view(entry.shape)


def all_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN or infinity. A finite sum says so at once; one that is not may have overflowed."""
    if not tensor.is_floating_point():
        return True
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return math.isfinite(total) or bool(torch.isfinite(tensor).all())


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of contiguous CPU tensors, in the order of the names."""
    return _digest((name, t.dtype, tuple(t.shape), [_raw(t)]) for name, t in tensors.items())


def _raw(tensor: Tensor) -> Any:
    """The bytes of a contiguous CPU tensor, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _digest(described: Iterable[tuple[str, torch.dtype, tuple[int, ...], Iterable[Any]]]) -> str:
    total = hashlib.sha256()
    for name, dtype, shape, chunks in sorted(described, key=lambda one: one[0]):
        total.update(f"{name} {dtype} {shape}\n".encode())
        for data in chunks:
            total.update(data)
    return total.hexdigest()


class TensorWriter:
    """A safetensors file that is written tensor by tensor: none is kept in memory, whatever their number.

    They go into an unnamed file in `folder`; `write` puts the header before them, once all are there.
    """

    def __init__(self, folder: Path):
        self._data = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # `close` does it
        self.entries: dict[str, Entry] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        begin = self._data.tell()
        self._data.write(_raw(tensor.detach().cpu().contiguous()))
        self.entries[name] = Entry(tensor.dtype, tuple(tensor.shape), begin, self._data.tell())

    def digest(self) -> str:
        """The `digest` of all the tensors."""
        return _digest((name, e.dtype, e.shape, self._chunks(e)) for name, e in self.entries.items())

    def _chunks(self, entry: Entry) -> Iterator[bytes]:
        self._data.seek(entry.begin)
        for begin in range(entry.begin, entry.end, _CHUNK):
            yield self._data.read(min(_CHUNK, entry.end - begin))

    def write(self, file: Path, metadata: Mapping[str, str]) -> None:
        """The whole file; the writer takes no more tensors."""
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        for name, e in self.entries.items():
            header[name] = {"dtype": _NAMES[e.dtype], "shape": list(e.shape), "data_offsets": [e.begin, e.end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._data.seek(0)
        with file.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(self._data, out, _CHUNK)

    def close(self) -> None:
        self._data.close()


def read_exactly(handle: BinaryIO, length: int, what: str) -> bytearray:
    data = bytearray(length)
    rest = memoryview(data)
    while rest:
        count = handle.readinto(rest)  # type: ignore[attr-defined]
        if not count:
            raise AdapterFileError(f"{what} became shorter while it was read: load it again when nothing writes to it")
        rest = rest[count:]
    return data


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 1 << 63 for number in value)


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and no two at one place in memory (tied weights of a module that is trained in full)."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        tensor = tensor.cpu().contiguous()
        apart[name] = tensor.clone() if tensor.numel() and tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return apart
