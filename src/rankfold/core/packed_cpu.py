"""Packed weights on a processor, compiled by Numba: a row's bytes become its numbers in the cache.

Of one token whole numbers not even there: codes are multiplied as they come out of their bytes.
"""

import functools
import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankfold.core.compiled import in_parts
from rankfold.core.packed import BITS, PACK, Packed, Scheme, unpack

numba: Any = importlib.import_module("numba")
ir: Any = importlib.import_module("llvmlite.ir")
cgutils: Any = importlib.import_module("numba.core.cgutils")
_compiled: Any = functools.partial(numba.njit, cache=True, nogil=True, error_model="numpy")
_SHARE = 2**21  # fewer numbers than this are not worth a thread
_LANES = 8
_NONE = np.empty((0, 0), np.float32)


@_compiled()
def _values(codes: Any, bits: int, table: Any, v: Any) -> None:
    """What the codes of a row's bytes stand for, before zero and scale.

    All of a byte's values are read before the first is written: only so the compiler joins them in one move.
    """
    if bits == 8 and table.shape[0] == 0:
        for j in range(codes.size):
            v[j] = codes[j]
    elif bits == 4 and table.shape[0] == 0:
        for j in range(codes.size):
            v[2 * j] = codes[j] & 15
            v[2 * j + 1] = codes[j] >> 4
    elif bits == 3:  # two codes at a time
        for j in range(codes.size // 3):
            word = np.uint32(codes[3 * j]) | np.uint32(codes[3 * j + 1]) << 8 | np.uint32(codes[3 * j + 2]) << 16
            for i in range(4):
                at = np.uint32(word >> 6 * i) & np.uint32(63)
                a, b = table[at, 0], table[at, 1]
                v[8 * j + 2 * i] = a
                v[8 * j + 2 * i + 1] = b
    elif table.shape[1] == 1:
        for j in range(codes.size):
            v[j] = table[codes[j], 0]
    elif table.shape[1] == 2:
        for j in range(codes.size):
            a, b = table[codes[j], 0], table[codes[j], 1]
            v[2 * j] = a
            v[2 * j + 1] = b
    elif table.shape[1] == 4:
        for j in range(codes.size):
            at = codes[j]
            a, b, c, d = table[at, 0], table[at, 1], table[at, 2], table[at, 3]
            v[4 * j], v[4 * j + 1], v[4 * j + 2], v[4 * j + 3] = a, b, c, d
    else:
        for j in range(codes.size):
            at = codes[j]
            a, b, c, d, e = table[at, 0], table[at, 1], table[at, 2], table[at, 3], table[at, 4]
            v[5 * j], v[5 * j + 1], v[5 * j + 2], v[5 * j + 3], v[5 * j + 4] = a, b, c, d, e


@_compiled()
def _scale(v: Any, z: Any, s: Any) -> None:
    for j in range(v.size):
        v[j] = (v[j] - z) * s


@_compiled(fastmath=True)
def _dot(a: Any, b: Any) -> Any:
    total = np.float32(0)
    for j in range(a.size):
        total += a[j] * b[j]
    return total


@_compiled()
def _rows(
    codes: Any, scales: Any, zeros: Any, offset: Any, bits: int, table: Any, group: int,
    x: Any, out: Any, first: int, last: int,
) -> None:  # fmt: skip
    """Rows first to last of `out` (rows, n); or, where x (tokens, n) has tokens, of products (tokens, rows)."""
    n = x.shape[1]
    v = np.empty(codes.shape[1] * 8, np.float32)
    for r in range(first, last):
        _values(codes[r], bits, table, v)
        for g in range(scales.shape[1]):
            _scale(v[g * group : min(g * group + group, n)], zeros[r, g] if zeros.size else offset, scales[r, g])
        if x.shape[0]:
            for t in range(x.shape[0]):
                out[t, r] = _dot(x[t], v)
        else:
            out[r] = v[:n]


@numba.extending.intrinsic(prefer_literal=True)
def _times(typing: Any, codes: Any, scales: Any, x: Any, bits: Any) -> Any:
    """`Σ_g s_g Σ_{j in g} q_j x_j` for the codes q of a row; x has what meets the first codes of all units, then the
    second ones, and so on.

    A unit is a byte, or three bytes for codes of 3 bits; with 32 "bits" it is a float, q itself. The groups are as long
    as one another, of a multiple of 8 units. What becomes of such a loop in Numba is for LLVM to guess: so it is
    written out, 8 units at a time.
    """
    b = bits.literal_value
    planes, size = PACK.get(b, (1, 1))
    i32, i64, f32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
    floats, ints = ir.VectorType(f32, _LANES), ir.VectorType(i32, _LANES)
    contract = ("contract",)

    def all_of(value: Any, kind: Any) -> Any:
        return ir.Constant(ir.VectorType(kind, _LANES), [value] * _LANES)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        given = [
            context.make_array(t)(context, builder, value=v) for t, v in zip(signature.args[:3], args, strict=False)
        ]
        groups = cgutils.unpack_tuple(builder, given[1].shape, 1)[0]
        units = builder.udiv(cgutils.unpack_tuple(builder, given[0].shape, 1)[0], i64(size))
        per_group = builder.udiv(units, groups)
        total, part = (cgutils.alloca_once_value(builder, all_of(0.0, f32)) for _ in range(2))

        def load(array: Any, at: Any, kind: Any, align: int) -> Any:
            place = builder.bitcast(builder.gep(array.data, [at]), kind.as_pointer())
            return builder.load(place, align=align)

        def add(place: Any, a: Any, b: Any) -> None:
            builder.store(builder.fadd(builder.load(place), builder.fmul(a, b, contract), contract), place)

        with cgutils.for_range(builder, groups) as group:
            builder.store(all_of(0.0, f32), part)
            first = builder.mul(group.index, per_group)
            with cgutils.for_range(builder, builder.udiv(per_group, i64(_LANES))) as run:
                at = builder.add(first, builder.mul(run.index, i64(_LANES)))
                kind = floats if b == 32 else ir.VectorType(ir.IntType(8), _LANES * size)
                data = load(given[0], builder.mul(at, i64(size)), kind, 4 if b == 32 else 1)
                word = data
                if b < 32 and size == 1:
                    word = builder.zext(data, ints)
                elif b < 32:  # a byte of zeros behind each three
                    places = [3 * lane + i if i < 3 else 3 * _LANES for lane in range(_LANES) for i in range(4)]
                    mask = ir.Constant(ir.VectorType(i32, len(places)), places)
                    word = builder.bitcast(builder.shuffle_vector(data, ir.Constant(data.type, None), mask), ints)
                for plane in range(planes):
                    if b < 32:
                        q = builder.and_(builder.lshr(word, all_of(b * plane, i32)), all_of(2**b - 1, i32))
                        data = builder.sitofp(q, floats)
                    add(part, data, load(given[2], builder.add(at, builder.mul(units, i64(plane))), floats, 4))
            s = builder.load(builder.gep(given[1].data, [group.index]))
            alike = builder.insert_element(ir.Constant(floats, ir.Undefined), s, i32(0))
            alike = builder.shuffle_vector(alike, ir.Constant(floats, ir.Undefined), all_of(0, i32))
            add(total, alike, builder.load(part))
        lanes = [builder.extract_element(builder.load(total), i32(lane)) for lane in range(_LANES)]
        return functools.reduce(builder.fadd, lanes)

    return numba.types.float32(codes, scales, x, bits), generate


@_compiled(fastmath=True)
def _product(
    codes: Any, scales: Any, zeros: Any, offset: Any, bits: int, table: Any, group: int,
    x: Any, out: Any, first: int, last: int,
) -> None:  # fmt: skip
    """Rows first to last of the product with one x: `Σ_g s_g (Σ_{j in g} q_j x_j − z_g X_g)`, X_g the sum of x in g."""
    whole = bits == 3 or bits == 2 or table.shape[0] == 0  # numbers, which codes are; others are looked up
    planes = 1 if not whole else 8 if bits == 3 else 8 // bits
    v = np.empty(codes.shape[1] * 8, np.float32)
    numbers = v[: x.shape[1]]
    units, groups = x.shape[1] // planes, scales.shape[1]
    sums, turned = np.zeros(groups, np.float32), np.empty(x.shape[1], np.float32)
    for g in range(groups):
        for j in range(g * group, g * group + group):
            sums[g] += x[0, j]
    for i in range(units):
        for plane in range(planes):
            turned[plane * units + i] = x[0, i * planes + plane]
    for r in range(first, last):
        q, s = codes[r], scales[r]
        if not whole:
            _values(q, bits, table, v)
            total = _times(numbers, s, turned, 32)
        elif bits == 8:
            total = _times(q, s, turned, 8)
        elif bits == 4:
            total = _times(q, s, turned, 4)
        elif bits == 3:
            total = _times(q, s, turned, 3)
        else:
            total = _times(q, s, turned, 2)
        less = np.float32(0)
        for g in range(groups):
            less += s[g] * (zeros[r, g] if zeros.size else offset) * sums[g]
        out[0, r] = total - less


@functools.lru_cache(maxsize=32)
def _table(scheme: Scheme) -> Any:
    """The values of all codes of a byte, (256, codes), or of two codes of 3 bits; none for whole numbers of 4 and 8."""
    if scheme.format in ("int8", "int4"):
        return _NONE
    byte = torch.arange(64 if scheme.format == "int3" else 256, dtype=torch.uint8)[:, None]
    q = (
        torch.cat([byte & 7, byte >> 3], 1)
        if scheme.format == "int3"
        else unpack(byte, PACK[BITS[scheme.format]][0], scheme)
    )
    return (q.float() if scheme.table is None else torch.tensor(scheme.table)[q.int()]).contiguous().numpy()


def rows(packed: Packed, n: int, scheme: Scheme, x: Tensor | None = None) -> Tensor:
    """Ŵ (rows, n), to the bit what `decode` gives; or x Ŵᵀ for x (tokens, n) of few tokens. All is in float32."""
    height, group = len(packed.codes), scheme.group if isinstance(scheme.group, int) else n
    out = torch.empty(height, n) if x is None else torch.empty(len(x), height)
    arguments = (
        packed.codes.detach().contiguous().numpy(),
        _floats(packed.scales, height),
        _NONE if packed.zeros is None else _floats(packed.zeros, height),
        np.float32(0 if scheme.table is not None else scheme.offset),
        int(BITS[scheme.format]),
        _table(scheme),  # type: ignore[arg-type]  # it is hashable
        group,
        np.empty((0, n), np.float32) if x is None else x.detach().contiguous().numpy(),
        out.numpy(),
    )
    lanes = _LANES * (PACK[BITS[scheme.format]][0] if scheme.format.startswith("int") else 1)
    run = _product if x is not None and len(x) == 1 and n % group == 0 == group % lanes else _rows
    parts = max(1, min(torch.get_num_threads(), height * n // _SHARE))
    in_parts(run, arguments, [height * part // parts for part in range(parts + 1)])
    return out


def _floats(per_group: Tensor, height: int) -> Any:
    """Scales or zeros (rows, groups) in float32; of a scheme per tensor the one for each row."""
    wide = per_group.detach().float()
    return (wide if len(wide) == height else wide.expand(height, -1)).contiguous().numpy()
