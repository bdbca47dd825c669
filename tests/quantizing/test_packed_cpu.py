"""Products with packed weights that Numba compiles: those of the formulas, to the bit where no sum is rounded."""

from typing import Any

import pytest
import torch
from torch import nn

from rankfold.core import packed as module
from rankfold.core.packed import Packed, PackedLinear, Scheme, decode, unpack
from rankfold.quantizers.rtn import RTN

packed_cpu: Any = pytest.importorskip("rankfold.core.packed_cpu", exc_type=ImportError)
FORMATS = ("int8", "int4", "int3", "int2", "ternary", "nf4", "fp4", "fp4-e3m0", "fp8", "fp8-e5m2")


def weight(kind: Scheme, out: int, in_: int) -> Packed:
    return RTN().quantise(torch.randn(out, in_), kind, None, "")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("group", [16, 7, "channel", "tensor"])
def test_rows_are_to_the_bit_what_the_formula_gives(format: Any, group: Any) -> None:
    for symmetric in (False, True):
        kind = Scheme(format=format, group=group, symmetric=symmetric)
        packed = weight(kind, 6, 45)
        expected = decode(unpack(packed.codes, 45, kind), packed.scales, packed.zeros, kind, torch.float32)
        assert torch.equal(packed_cpu.rows(packed, 45, kind), expected)
        x = torch.randn(3, 45)
        torch.testing.assert_close(packed_cpu.rows(packed, 45, kind, x), x @ expected.mT, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("group", [64, 128, "channel", "tensor"])
def test_one_token_is_multiplied_before_zeros_and_scales(
    format: Any, group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    product = packed_cpu._product
    monkeypatch.setattr(packed_cpu, "_product", lambda *a: calls.append(a) or product(*a))
    for zeros, symmetric in (("uint8", False), ("float32", False), ("uint8", True)):
        kind = Scheme(format=format, group=group, zeros=zeros, symmetric=symmetric)  # type: ignore[arg-type]
        packed = weight(kind, 6, 384)
        if packed.zeros is not None and zeros == "float32":
            packed.zeros.add_(0.3)
        expected = decode(unpack(packed.codes, 384, kind), packed.scales, packed.zeros, kind, torch.float64)
        x = torch.randn(1, 384)
        y = packed_cpu.rows(packed, 384, kind, x)
        size = x.double().abs() @ expected.abs().mT + 1
        assert ((y - x.double() @ expected.mT).abs() / size).max() < 1e-6
    assert len(calls) == 3


@pytest.mark.parametrize("group", [8, 16])
def test_threads_share_the_rows(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = Scheme(format="int4", group=group)
    packed, x = weight(kind, 13, 48), torch.randn(1, 48)
    alone = packed_cpu.rows(packed, 48, kind), packed_cpu.rows(packed, 48, kind, x)
    monkeypatch.setattr(packed_cpu, "_SHARE", 100)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(packed_cpu.rows(packed, 48, kind), alone[0])
    assert torch.equal(packed_cpu.rows(packed, 48, kind, x), alone[1])


@pytest.mark.parametrize("along", ["in", "out"])
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_the_layer_gives_the_same_with_and_without(along: Any, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, plain = Scheme(group=8, along=along), nn.Linear(40, 12)
    layer = PackedLinear.of(plain, RTN().quantise(plain.weight.detach(), kind, None, ""), kind)
    x = torch.randn(2, tokens, 40, requires_grad=True)
    expected = layer(x)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    monkeypatch.setattr(module, "_WORTH", 0)
    calls: list[Any] = []
    rows = packed_cpu.rows
    monkeypatch.setattr(packed_cpu, "rows", lambda *a: calls.append(a) or rows(*a))
    y = layer(x)
    assert len(calls) == 1
    assert len(calls[0]) == (4 if tokens == 1 and along == "in" else 3)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], wanted)
    layer.scales.requires_grad_(True)
    layer(x).square().sum().backward()
    assert layer.scales.grad is not None
    assert len(layer.dequantise().shape) == 2
    assert layer.dequantise().requires_grad
