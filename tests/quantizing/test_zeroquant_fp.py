"""Formats with a point against their definitions and PyTorch's casts; scales that are powers of two apart; inputs in
8 bits."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold
from rankfold.core.activations import rounded
from rankfold.core.packed import E3M0, FP4, PackedLinear, Scheme, decode, dequantise, encode
from rankfold.quantizers.gptq import GPTQ
from rankfold.quantizers.rtn import RTN
from rankfold.quantizers.zeroquant_fp import ZeroQuantFP, powers_of_two
from tests.methods.support import DOUBLE, close, draw
from tests.quantizing.test_gptq import correlated, error

CASTS = {"fp8": torch.float8_e4m3fn, "fp8-e5m2": torch.float8_e5m2}


def numbers(exponent: int, mantissa: int, bias: int, reserved: int) -> list[float]:
    """The numbers from 0 up that so many bits hold, with those below the smallest exponent; `reserved` at the top are
    none."""
    found = []
    for code in range(2 ** (exponent + mantissa) - reserved):
        e, m = code >> mantissa, (code & 2**mantissa - 1) / 2**mantissa
        found.append(2.0 ** (e - bias) * (1 + m) if e else 2.0 ** (1 - bias) * m)
    return found


def test_the_formats_are_what_their_names_say() -> None:
    assert numbers(2, 1, 1, 0) == list(FP4)
    assert numbers(3, 0, 3, 0)[1:] == list(E3M0[1:])
    for format, definition in (("fp8", numbers(4, 3, 7, 1)), ("fp8-e5m2", numbers(5, 2, 15, 4))):
        table = torch.tensor(Scheme(format=format).table)  # type: ignore[arg-type]
        assert sorted({abs(t) for t in table[table.isfinite()].tolist()}) == definition
    assert numbers(4, 3, 7, 1)[-1] == 448
    assert numbers(5, 2, 15, 4)[-1] == 57344


def test_numbers_of_4_bits_are_numbers_of_8() -> None:
    for cast in CASTS.values():
        values = torch.tensor([*FP4, *E3M0])
        assert torch.equal(values.to(cast).float(), values)


@pytest.mark.parametrize("format", ["fp8", "fp8-e5m2"])
def test_rounding_to_8_bits_is_the_nearest_and_pytorchs_cast(format: Any) -> None:
    scheme = Scheme(format=format, group="tensor", scales="float32")
    table = torch.tensor(scheme.table).double()
    M = torch.cat([draw(1, 500, seed=1) * 10.0 ** (draw(1, 500, seed=2) * 2), table[table.isfinite()][None]], 1)
    one = torch.ones(1, 1)
    found = decode(encode(M, one, None, scheme), one, None, scheme, DOUBLE)
    most = float(table[table.isfinite()].max())
    nearest = (M[..., None].clamp(-most, most) - table.nan_to_num(1e30, 1e30, -1e30)).abs().amin(-1)
    close((found - M.clamp(-most, most)).abs(), nearest, atol=1e-4)
    assert torch.equal(found.float(), M.float().clamp(-most, most).to(CASTS[format]).float())


def test_scales_by_hand() -> None:
    scales = torch.tensor([[1.0, 0.6, 0.3]])
    assert powers_of_two(scales, "m1").tolist() == [[1, 1, 0.5]]
    assert powers_of_two(scales, "m2").tolist() == [[1, 0.5, 0.25]]
    assert powers_of_two(scales, "m2-floor").tolist() == [[1, 1, 0.5]]
    assert torch.equal(powers_of_two(scales, "none"), scales)
    assert powers_of_two(scales.mT, "m2").flatten().tolist() == [1, 0.5, 0.25]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_powers_of_two_whatever_the_scales(dtype: torch.dtype) -> None:
    s = (draw(20, 9, seed=3).abs() * 10.0 ** draw(20, 9, seed=4)).clamp(min=1e-3).to(dtype)
    s[0, 0] = torch.finfo(dtype).tiny  # a group of zeros
    one, two, floor = (powers_of_two(s, kind).double() for kind in ("m1", "m2", "m2-floor"))  # type: ignore[arg-type]
    assert bool((one.log2() == one.log2().round()).all())
    assert bool((one >= s.double()).all() and (one < 2 * s.double()).all())
    for shared in (two, floor):
        ratio = (shared.amax(1, keepdim=True) / shared).log2()
        assert torch.equal(ratio, ratio.round())
        assert torch.equal(shared.amax(1), s.double().amax(1))
    rest = s > torch.finfo(dtype).tiny
    assert bool((two <= s.double())[rest].all() and (2 * two > s.double())[rest].all())
    assert bool((floor >= s.double())[rest].all())


@pytest.mark.parametrize("powers", ["none", "m1", "m2", "m2-floor"])
@pytest.mark.parametrize("group", [8, "channel"])
def test_it_is_gptq_with_those_scales(powers: Any, group: Any) -> None:
    scheme, W, H = Scheme(format="fp4", group=group), draw(12, 32, seed=5), correlated(32, seed=6)
    packed = ZeroQuantFP(powers=powers).rounded(W, H, scheme)
    if powers == "none":
        assert torch.equal(packed.codes, GPTQ().rounded(W, H, scheme).codes)
    else:
        s = packed.scales.double()
        s = s if group == 8 else s.mT
        ratio = (s.amax(1, keepdim=True) / s).log2()
        assert torch.equal(ratio, ratio.round())
    mine, theirs = dequantise(packed, (12, 32), scheme, DOUBLE), RTN().quantise(W, scheme, None, "")
    nearest = error(W, dequantise(theirs, (12, 32), scheme, DOUBLE), H)
    if powers == "m2":  # what is above the largest number of a group is cut off
        assert error(W, mine, H) > 2 * nearest
    else:
        assert error(W, mine, H) < 1.3 * nearest


def test_inputs_in_whole_numbers_by_hand() -> None:
    """Range widened to 0: [0, 2.55], step 0.01; and [-1, 1.55] with 100 for 0. Ties go to even."""
    x = torch.tensor([[0.004, 1.006, 2.55], [-1.0, 0.123, 1.55]], dtype=DOUBLE)
    close(rounded(x, "int8"), torch.tensor([[0, 1.01, 2.55], [-1, 0.12, 1.55]], dtype=DOUBLE))
    assert not rounded(torch.zeros(2, 3), "int8").any()


@pytest.mark.parametrize("kind", ["fp8", "fp8-e5m2"])
def test_inputs_with_a_point_are_pytorchs_casts(kind: Any) -> None:
    x = draw(5, 40, seed=7, dtype=torch.float32)
    s = x.abs().amax(-1, keepdim=True) / torch.finfo(CASTS[kind]).max
    assert torch.equal(rounded(x, kind), (x / s).to(CASTS[kind]).float() * s)


def test_outliers_cost_whole_numbers_more() -> None:
    x = draw(64, 128, seed=8)
    x[:, 5] *= 300
    rest = [i for i in range(128) if i != 5]
    errors = [float((rounded(x, kind) - x)[:, rest].norm()) for kind in ("fp8", "int8")]  # type: ignore[arg-type]
    assert errors[0] < 0.2 * errors[1]
    plain = draw(64, 128, seed=9)
    assert (rounded(plain, "int8") - plain).norm() < (rounded(plain, "fp8") - plain).norm()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_layer_rounds_its_inputs_and_lets_gradients_through(kind: Any) -> None:
    plain = nn.Linear(32, 6)
    scheme = Scheme(format="fp4", group=8, activations=kind)
    layer = PackedLinear.of(plain, RTN().quantise(plain.weight.detach(), scheme, None, ""), scheme)
    x = torch.randn(4, 32, requires_grad=True)
    y = layer(x)
    W = layer.dequantise()
    torch.testing.assert_close(y, nn.functional.linear(rounded(x, kind), W, plain.bias))
    assert not torch.equal(y, nn.functional.linear(x, W, plain.bias))
    y.sum().backward()
    torch.testing.assert_close(x.grad, W.sum(0).expand(4, -1))


def test_in_a_model_with_compensation(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    batches = [torch.randn(64, 32) @ (torch.eye(32) + 0.3 * torch.randn(32, 32)) for _ in range(3)]
    apart: dict[str, Tensor] = {}
    with torch.no_grad():
        expected = torch.cat([model(x) for x in batches])
        for name, repair in (("alone", None), ("lorc", rankfold.LoRC(rank=8))):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
            scheme = Scheme(format="fp4", group=16, activations="fp8")
            rankfold.quantize(model, scheme, "zeroquant-fp", targets=["0", "2"], calibration=batches, compensate=repair)
            apart[name] = (torch.cat([model(x) for x in batches]) - expected).norm() / expected.norm()
    assert apart["lorc"] < apart["alone"] < 0.5
