"""A tensor file that stores some of its tensors as codes, seen as the file of what they stand for."""

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, BinaryIO, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from rankfold.core.codecs import READERS, Reader
from rankfold.core.tensorfile import Entry, TensorFile, all_finite
from rankfold.errors import AdapterFileError

CODED = "coded"  # the tensor of bytes that holds all codes, one behind the other
# Codes may not stand for more numbers than so many a byte, and a first few: no small file asks for terabytes.
_NUMBERS_A_BYTE, _FREE = 4096, 1 << 24


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class CodedTensor(_Strict):
    dtype: Literal["float64", "float32", "float16", "bfloat16"]
    shape: Annotated[list[Annotated[int, Field(ge=0, lt=1 << 48)]], Field(min_length=1, max_length=8)]


class Code(_Strict):
    """So many bytes, which a codec reads as these tensors."""

    codec: str
    bytes: Annotated[int, Field(ge=0, lt=1 << 48)]
    tensors: dict[Annotated[str, Field(min_length=1, max_length=1024)], CodedTensor]


class Encoding(_Strict):
    """How tensors of a file are stored. `by` is the compression, as a component describes itself; with `from_start`
    the codes are of the differences to where a new adapter from the same seed starts."""

    by: dict[str, str | float | int | bool | None]
    from_start: bool
    codes: list[Code]


class CodedFile:
    """What `TensorFile` is, of the tensors that the codes of `file` stand for and of those beside them.

    `starts` makes what the codes are differences to. Everything is checked before memory is asked for; raises
    AdapterFileError as `TensorFile` does.
    """

    def __init__(
        self, file: TensorFile, encoding: Encoding, what: str, starts: Callable[["CodedFile"], Mapping[str, Tensor]]
    ):
        self._file, self.encoding, self._what, self._starts = file, encoding, what, starts
        self.metadata, self.size = file.metadata, file.size
        stored = file.entries.get(CODED)
        claimed = sum(code.bytes for code in encoding.codes)
        if stored is None or stored.dtype != torch.uint8 or stored.shape != (claimed,):
            raise AdapterFileError(f"{what}: it holds no tensor {CODED!r} of {claimed:,} bytes: it is damaged")
        self.entries = {name: entry for name, entry in file.entries.items() if name != CODED}
        self._places: dict[str, tuple[Code, int]] = {}
        for code in encoding.codes:
            if code.codec not in READERS:
                raise AdapterFileError(
                    f"{what}: it is coded by {code.codec[:40]!r}, and this Rankfold reads {', '.join(READERS)}: upgrade"
                )
            for i, (name, tensor) in enumerate(code.tensors.items()):
                if name in self.entries or not name.isprintable():
                    raise AdapterFileError(f"{what}: tensor {name[:200]!r} is there twice, or has no name")
                self.entries[name] = Entry(getattr(torch, tensor.dtype), tuple(tensor.shape), 0, 0)
                self._places[name] = code, i
        total = sum(self.entries[name].numel for name in self._places)
        if total > _FREE + _NUMBERS_A_BYTE * claimed:
            raise AdapterFileError(
                f"{what}: {claimed:,} bytes are to be {total:,} numbers, which no code of ours is: it is hostile"
            )
        self._readers: dict[int, Reader] = {}

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, on the CPU. Refuses NaN and infinity."""
        stored = self._file.tensors()
        return self._decoded(stored.pop(CODED), self._places) | stored

    def some(self, handle: BinaryIO, names: Iterable[str]) -> dict[str, Tensor]:
        """A few of them, as `TensorFile.some`. Of the codes a byte a number is kept."""
        names = set(names)
        plain = self._file.some(handle, names - self._places.keys())
        coded = names & self._places.keys()
        if not coded:
            return plain
        data = torch.empty(0, dtype=torch.uint8) if self._readers else self._file.some(handle, [CODED])[CODED]
        return self._decoded(data, coded) | plain

    def digest(self) -> str:
        """Of the tensors as they are stored, once they were read."""
        return self._file.digest()

    def streamed_digest(self) -> str:
        return self._file.streamed_digest()

    def _decoded(self, data: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
        if not self._readers:
            self._read(data.numpy())
        starts = self._starts(self) if self.encoding.from_start else {}
        tensors = {}
        for name in names:
            code, i = self._places[name]
            tensor = self._readers[id(code)].tensor(i)
            if self.encoding.from_start:
                if name not in starts or starts[name].shape != tensor.shape:
                    raise AdapterFileError(f"{self._what}: {name} has no start of its shape: it is damaged")
                tensor = starts[name] + tensor
            if not all_finite(tensor):
                raise AdapterFileError(f"{self._what}: {name} is coded with NaN or infinity: it is damaged")
            tensors[name] = tensor
        return tensors

    def _read(self, data: np.ndarray) -> None:
        begin = 0
        for code in self.encoding.codes:
            entries = [self.entries[name] for name in code.tensors]
            try:
                self._readers[id(code)] = READERS[code.codec](data[begin : begin + code.bytes], entries)
            except ValueError as error:
                raise AdapterFileError(
                    f"{self._what}: the {code.codec} code of {len(entries)} tensors: {error}"
                ) from None
            begin += code.bytes
