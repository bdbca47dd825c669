"""Codes that tensors are stored in, as bytes: `ternary` (three values, most of them zero) and `levels` (b bits each).

A reader is given bytes that a stranger may have made and the dtypes and shapes that they are to fill, of which
`rankfold.core.coded` has seen to that the bytes can be so many numbers. It raises ValueError with the reason for bytes
that no writer made, and gives the tensors one at a time, always the same to the last bit.
"""

import math
import struct
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rankfold.core.levels import MOST_BITS, decode, encode
from rankfold.core.tensorfile import Entry

_HEAD = struct.Struct("<dBBQ")  # ternary: the scale, `low`, whether the numbers are listed or the zeros, how many
_LOW = 20  # the most bits of a gap that are stored as they are


class Reader(Protocol):
    def __init__(self, data: np.ndarray, entries: Sequence[Entry]): ...

    def tensor(self, i: int) -> Tensor: ...


def write_ternary(signs: np.ndarray, scale: float) -> bytes:
    """`scale · γ` for a vector γ of −1, 0 and 1 (int8), in about `d (H(k) + k)` bits where a share k is not zero.

    The signs come first, then the gaps between the numbers that are not zero (or between the zeros, where those are
    fewer) in Rice's code, which is Golomb's with a power of two: the lowest `low` bits of a gap are stored as they are,
    the rest of it is so many zeros and a one. The `low` that takes the fewest bits is found by trying.
    """
    there = np.flatnonzero(signs)
    sparse = 2 * len(there) <= len(signs)
    gaps = np.diff(there if sparse else np.flatnonzero(signs == 0), prepend=-1) - 1
    low = min(range(_LOW + 1), key=lambda low: len(gaps) * low + int((gaps >> low).sum()))
    ends = np.cumsum((gaps >> low) + 1)
    unary = np.zeros(ends[-1] if len(ends) else 0, np.uint8)
    unary[ends - 1] = 1
    lowest = (gaps[:, None] >> np.arange(low) & 1).astype(np.uint8).reshape(-1)
    bits = np.concatenate([(signs[there] > 0).astype(np.uint8), lowest, unary])
    return _HEAD.pack(scale, low, sparse, len(there)) + np.packbits(bits, bitorder="little").tobytes()


class Ternary:
    """What `write_ternary` wrote of several tensors, flattened one behind the other; one byte a number is kept."""

    def __init__(self, data: np.ndarray, entries: Sequence[Entry]):
        self._entries = entries
        if len(data) < _HEAD.size:
            raise ValueError("it is cut short before its first number")
        self._scale, low, sparse, count = _HEAD.unpack(data[: _HEAD.size].tobytes())
        sizes, rest = [entry.numel for entry in entries], 8 * (len(data) - _HEAD.size)
        total = sum(sizes)
        listed = count if sparse else total - count
        if sparse > 1 or low > _LOW or not 0 <= listed <= total or count + listed * (low + 1) > rest:
            raise ValueError(f"{count:,} of {total:,} numbers with {low} bits of each gap do not fit {rest:,} bits")
        bits = np.unpackbits(data[_HEAD.size :], bitorder="little")
        signs, lowest, unary = np.split(bits, [count, count + listed * low])
        ends = np.flatnonzero(unary)
        if len(ends) != listed or len(unary) - (int(ends[-1]) + 1 if listed else 0) > 7:
            raise ValueError(f"{len(ends):,} gaps are listed where {listed:,} belong, or bytes stand behind them")
        high = np.diff(ends, prepend=-1) - 1
        places = np.cumsum((high << low) + lowest.reshape(listed, low) @ (1 << np.arange(low)) + 1) - 1
        if listed and places[-1] >= total:
            raise ValueError(f"number {int(places[-1]):,} of {total:,} is listed")
        there = np.full(total, not sparse)
        there[places] = sparse
        self._signs = np.zeros(total, np.int8)
        self._signs[there] = 2 * signs.astype(np.int8) - 1
        self._starts = np.cumsum([0, *sizes])

    def tensor(self, i: int) -> Tensor:
        part = torch.from_numpy(self._signs[self._starts[i] : self._starts[i + 1]])
        return part.to(self._entries[i].dtype).mul_(self._scale).view(self._entries[i].shape)


def write_levels(tensors: Sequence[Tensor], bits: int) -> bytes:
    """Of each tensor μ and σ of its matrices, and `bits · numel` bits; the quantiser is that of `rankfold.core.levels`.

    The two numbers are float32, or float64 where the tensor is.
    """
    parts = [bytes([bits])]
    for tensor in tensors:
        codes, mean, std = encode(tensor.cpu(), bits)
        each = codes.numpy().reshape(-1, 1) >> np.arange(bits) & 1
        parts.append(torch.stack([mean, std]).to(_number(tensor.dtype)).numpy().tobytes())
        parts.append(np.packbits(each.astype(np.uint8), bitorder="little").tobytes())
    return b"".join(parts)


class Levels:
    """What `write_levels` wrote of several tensors."""

    def __init__(self, data: np.ndarray, entries: Sequence[Entry]):
        self._data, self._entries = data, entries
        self._bits = int(data[0]) if len(data) else 0
        if not 1 <= self._bits <= MOST_BITS:
            raise ValueError(f"{self._bits} bits a number are none of 1 to {MOST_BITS}")
        self._starts = [1]
        for entry in entries:
            self._starts.append(self._starts[-1] + _head(entry) + (entry.numel * self._bits + 7) // 8)
        if self._starts[-1] != len(data):
            raise ValueError(f"it has {len(data):,} bytes, and {self._starts[-1]:,} belong")

    def tensor(self, i: int) -> Tensor:
        entry, data = self._entries[i], self._data[self._starts[i] : self._starts[i + 1]]
        head = np.frombuffer(data[: _head(entry)].tobytes(), np.float64 if entry.dtype == torch.float64 else np.float32)
        mean, std = (
            torch.from_numpy(head.copy())
            .to(entry.dtype)
            .view(2, *((*entry.shape[:-2], 1, 1) if len(entry.shape) > 1 else (1,)))
        )
        each = np.unpackbits(data[_head(entry) :], count=entry.numel * self._bits, bitorder="little")
        codes = torch.from_numpy(each.reshape(-1, self._bits) @ (1 << np.arange(self._bits)))
        return decode(codes.view(entry.shape), mean, std, self._bits)


def _number(dtype: torch.dtype) -> torch.dtype:
    """The dtype that μ and σ of such tensors are stored in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _head(entry: Entry) -> int:
    """The bytes that the μ and σ of a tensor's matrices take."""
    return 2 * math.prod(entry.shape[:-2]) * _number(entry.dtype).itemsize


READERS: dict[str, type[Reader]] = {"ternary": Ternary, "levels": Levels}
