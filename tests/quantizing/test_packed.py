"""Codes in bytes, the values they stand for, and the layer that multiplies by them."""

import io
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

import rankfold
from rankfold.core.packed import Packed, PackedLinear, Scheme, decode, dequantise, encode, grouped, pack, unpack
from rankfold.core.quantized import dense
from rankfold.errors import RankfoldError, UnsupportedError
from rankfold.quantizers._quantizer import quantize
from rankfold.quantizers.rtn import RTN, ranges
from tests.methods.support import draw

FORMATS = ("int8", "int4", "int3", "int2", "ternary", "nf4", "fp4", "fp4-e3m0", "fp8", "fp8-e5m2")


def scheme(**values: Any) -> Scheme:
    return Scheme(**{"scales": "float32", **values})


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def quantised(W: Tensor, kind: Scheme) -> Tensor:
    return dequantise(RTN().quantise(W, kind, None, ""), (W.shape[0], W.shape[1]), kind, W.dtype)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("n", [1, 7, 40])
def test_codes_come_back_from_bytes_and_take_their_bits(format: Any, n: int) -> None:
    kind = scheme(format=format)
    q = torch.randint(kind.levels, (3, n), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
    data = pack(q, kind)
    assert torch.equal(unpack(data, n, kind), q)
    bits = {"int8": 8, "int3": 3, "int2": 2, "ternary": 1.6, "fp8": 8, "fp8-e5m2": 8}.get(format, 4)
    assert data.shape == (3, kind.layout(3, n)[3])
    if n == 40:
        assert data.numel() * 8 == 3 * 40 * bits


def test_every_byte_is_a_code_of_three_values() -> None:
    kind = scheme(format="ternary")
    q = unpack(torch.arange(256, dtype=torch.uint8)[None], 5 * 256, kind)
    assert q.max() == 2


def test_asymmetric_by_hand() -> None:
    kind = scheme(format="int2", group="channel")
    W = row(-1, 0.2, 0.7, 2)
    scales, zeros = ranges(grouped(W, kind), kind)
    assert scales.item() == 1
    assert zeros is not None
    assert zeros.item() == 1
    assert encode(W, scales, zeros, kind).tolist() == [[0, 1, 2, 3]]
    assert quantised(W, kind).tolist() == [[-1, 0, 1, 2]]


def test_symmetric_by_hand() -> None:
    kind = scheme(format="int3", group="channel", symmetric=True)
    W = 1.5 * row(-1, 0.2, 0.7, 2)  # whose scale a float32 holds
    scales, zeros = ranges(grouped(W, kind), kind)
    assert zeros is None
    assert scales.item() == 1
    assert (encode(W, scales, None, kind).int() - 4).tolist() == [[-2, 0, 1, 3]]


def test_a_range_without_zero_does_not_saturate() -> None:
    """With z clamped into the grid and no wider range, [0.12, 0.2] would become [0.08, 0.08]."""
    kind = scheme(format="int2", group="channel")
    torch.testing.assert_close(quantised(row(0.12, 0.2), kind), row(2 / 15, 0.2), rtol=1e-6, atol=0)


def test_floats_of_four_bits_by_hand() -> None:
    kind = scheme(format="fp4", group="channel")
    assert quantised(row(-3, 0.4, 1.1, 2.2), kind).tolist() == [[-3, 0.5, 1, 2]]


def test_ternary_by_hand() -> None:
    kind = scheme(format="ternary", group="tensor")
    torch.testing.assert_close(quantised(row(0.1, -0.4, 0.7), kind), row(0, -0.4, 0.4), rtol=1e-6, atol=0)


def test_normal_floats_have_less_error_than_whole_numbers_on_normal_numbers() -> None:
    W = draw(32, 256, seed=1)
    errors = [
        float((quantised(W, scheme(format=format, symmetric=True)) - W).square().mean()) for format in ("nf4", "int4")
    ]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("along", ["in", "out"])
@pytest.mark.parametrize("group", [8, 5, "channel", "tensor"])
def test_no_number_that_is_in_range_is_off_by_more_than_half_a_step(symmetric: bool, along: Any, group: Any) -> None:
    kind = scheme(format="int3", group=group, along=along, symmetric=symmetric)
    W = draw(6, 16, seed=2)
    packed = RTN().quantise(W, kind, None, "")
    once = dequantise(packed, (6, 16), kind, W.dtype)
    rows, n = (W, 16) if along == "in" else (W.mT, 6)
    steps = torch.ones_like(rows)
    for g in range(n):
        place = 0 if isinstance(group, str) else g // group
        steps[:, g] = packed.scales[:, place].double()
    assert ((once - W).abs() <= 0.5001 * (steps if along == "in" else steps.mT)).all()
    again = decode(
        encode(once if along == "in" else once.mT, packed.scales, packed.zeros, kind),
        packed.scales,
        packed.zeros,
        kind,
        W.dtype,
    )
    torch.testing.assert_close(again if along == "in" else again.mT, once, rtol=0, atol=1e-12)


def test_groups_down_a_column_are_groups_along_the_transposed_row() -> None:
    W = draw(12, 8, seed=3)
    along = quantised(W, scheme(format="int2", group=4, along="out"))
    assert torch.equal(along, quantised(W.mT.contiguous(), scheme(format="int2", group=4)).mT)


def test_a_column_of_outliers_wipes_out_rows_and_not_columns() -> None:
    W = torch.tensor([[-0.1, 10.0], [0.2, -20.0]], dtype=torch.float64)
    assert quantised(W, scheme(format="int2", group=2))[:, 0].tolist() == [0, 0]
    torch.testing.assert_close(quantised(W, scheme(format="int2", group=2, along="out")), W, rtol=1e-6, atol=0)


def test_fewer_bits_and_wider_groups_cost_more() -> None:
    W = draw(16, 64, seed=4)

    def error(**values: Any) -> float:
        return float((quantised(W, scheme(**values)) - W).norm())

    assert error(format="int8") < error(format="int4") < error(format="int3") < error(format="int2")
    assert error(group=8) < error(group=32) < error(group="channel")


def test_zeros_stay_zero_and_small_numbers_are_not_lost() -> None:
    for format in FORMATS:
        kind = Scheme(format=format)
        assert not quantised(torch.zeros(2, 8), kind).any()
        assert quantised(torch.full((2, 8), 1e-4), kind).any()


def test_bits_count_scales_and_zeros() -> None:
    assert Scheme(format="int4", group=64).bits(128, 128) == pytest.approx(4 + 24 / 64)
    assert Scheme(format="ternary", group="tensor").bits(100, 100) == pytest.approx(1.6 + 16 / 1e4)
    assert scheme(format="nf4", group=64).bits(64, 64) == pytest.approx(4.5)


# ---- the layer


def layer_of(kind: Scheme, bias: bool = True) -> tuple[nn.Linear, PackedLinear]:
    torch.manual_seed(0)
    plain = nn.Linear(24, 10, bias)
    return plain, PackedLinear.of(plain, RTN().quantise(plain.weight.detach(), kind, None, ""), kind)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("along", ["in", "out"])
def test_the_layer_multiplies_by_what_it_dequantises(format: Any, along: Any) -> None:
    plain, layer = layer_of(Scheme(format=format, group=5, along=along))
    W = dense(layer.weight, layer)
    assert W.shape == (10, 24)
    x = torch.randn(3, 24, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, nn.functional.linear(x, W, plain.bias))
    y.square().sum().backward()
    again = x.detach().clone().requires_grad_()
    nn.functional.linear(again, W, plain.bias).square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad)


def test_nothing_dense_is_kept_for_the_backward_pass() -> None:
    _, layer = layer_of(Scheme(), bias=False)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel() * t.itemsize) or t, lambda t: t):
        layer(torch.randn(3, 24, requires_grad=True))
    assert 0 < sum(kept) < 10 * 24 * 2


def test_scales_get_the_gradient_that_the_formula_has() -> None:
    """∂L/∂s_i = Σ_j G_ij (q_ij − z_i), G the gradient by Ŵ."""
    kind = scheme(format="int4", group="channel")
    _, layer = layer_of(kind, bias=False)
    layer.scales.requires_grad_(True)
    x, c = torch.randn(7, 24), torch.randn(7, 10)
    (layer(x) * c).sum().backward()
    assert layer.zeros is not None
    whole = unpack(layer.weight, 24, kind).float() - layer.zeros.float()
    torch.testing.assert_close(layer.scales.grad, ((c.mT @ x) * whole).sum(1, keepdim=True))


@pytest.mark.parametrize("group", [5, "channel", "tensor"])
@pytest.mark.parametrize("along", ["in", "out"])
@pytest.mark.parametrize("format", ["int3", "nf4"])
def test_gradients_of_scales_are_those_of_the_whole_graph(format: Any, along: Any, group: Any) -> None:
    kind = scheme(format=format, along=along, group=group)
    _, layer = layer_of(kind)
    x, c = torch.randn(2, 7, 24), torch.randn(2, 7, 10)
    other = layer.scales.detach() * 1.5
    ours, whole = other.clone().requires_grad_(), other.clone().requires_grad_()
    (layer.multiply(x, ours) * c).sum().backward()
    W = dequantise(Packed(layer.weight, whole, layer.zeros), (10, 24), kind, torch.float32)
    y = torch.nn.functional.linear(x, W, layer.bias)
    (y * c).sum().backward()
    torch.testing.assert_close(layer.multiply(x, ours), y)
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, whole.grad)


def test_zeros_may_be_any_number() -> None:
    kind = scheme(format="int2", group="channel", zeros="float32")
    packed = Packed(pack(torch.tensor([[0, 1, 2, 3]]), kind), torch.tensor([[0.5]]), torch.tensor([[1.25]]))
    assert dequantise(packed, (1, 4), kind, torch.float32).tolist() == [[-0.625, -0.125, 0.375, 0.875]]
    assert kind.bits(1, 4) == 2 + 64 / 4
    whole = quantised(row(-1, 0.2, 0.7, 2), kind)
    assert torch.equal(whole, quantised(row(-1, 0.2, 0.7, 2), scheme(format="int2", group="channel")))


def test_a_state_dict_goes_through_a_file_bit_for_bit() -> None:
    _, layer = layer_of(Scheme(format="int3"))
    _, other = layer_of(Scheme(format="int3"))
    with torch.no_grad():
        other.weight.zero_()
    other.load_state_dict(load(save(layer.state_dict())))
    x = torch.randn(2, 24)
    assert torch.equal(other(x), layer(x))
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    assert buffer.tell() > 0


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16, bias=False), nn.Linear(16, 4))


def test_a_model_is_packed_and_told_about() -> None:
    model, x = net(), torch.randn(5, 16)
    before = model(x)
    report = quantize(model, Scheme(format="int8"), targets=["0", "2"])
    assert list(report) == ["0", "2"]
    assert isinstance(model[0], PackedLinear)
    assert type(model[3]) is nn.Linear
    assert (model(x) - before).norm() < 0.02 * before.norm()
    errors = [quantize(net(), Scheme(format=format), targets=["0"])["0"].error for format in ("int8", "int4", "int2")]
    assert 0 < errors[0] < errors[1] < errors[2] < 1


def test_a_layer_in_two_places_stays_one() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    quantize(model, Scheme(), targets=["a"])
    assert model["a"] is model["b"][0]  # type: ignore[index]
    assert isinstance(model["a"], PackedLinear)


def test_what_cannot_be_packed_is_refused_and_the_model_stays() -> None:
    broken = net()
    with torch.no_grad():
        broken[2].weight[0, 0] = math.nan  # type: ignore[index]
    with pytest.raises(RankfoldError, match="weight of 2 holds NaN"):
        quantize(broken, Scheme(), targets=["0", "2"])
    assert type(broken[0]) is nn.Linear
    twice = net()
    quantize(twice, Scheme(), targets=["0"])
    with pytest.raises(UnsupportedError, match="0 is quantised already"):
        quantize(twice, Scheme(), targets=["0"])
    adapted = net()
    rankfold.attach(adapted, rankfold.build("lora", rank=2), targets=["0"])
    with pytest.raises(RankfoldError, match="0 is adapted"):
        quantize(adapted, Scheme(), targets=["0"])
    with pytest.raises(RankfoldError, match="meta device"):
        quantize(net().to("meta"), Scheme(), targets=["0"])
    with pytest.raises(RankfoldError, match="'lora' quantises nothing"):
        quantize(net(), Scheme(), "lora", targets=["0"])
    with pytest.raises(UnsupportedError, match="Conv1d"):
        quantize(nn.Sequential(nn.Conv1d(2, 2, 1)), Scheme(), targets=["0"])
    with pytest.raises(RankfoldError, match=r"codes|weight of \(10, 3\)"):
        PackedLinear.of(
            nn.Linear(24, 10), Packed(torch.zeros(10, 3, dtype=torch.uint8), torch.ones(10, 1), None), Scheme()
        )


def test_shapes_can_be_had_without_numbers() -> None:
    _, layer = layer_of(Scheme())
    assert layer.to("meta")(torch.empty(2, 24, device="meta")).shape == (2, 10)


def test_a_model_that_casts_inputs_to_the_type_of_a_weight_gets_what_it_should():
    """T5 does so, unless the weight is int8."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    ids = torch.randint(1, 60, (2, 7))
    with torch.no_grad():
        exact = model(input_ids=ids, decoder_input_ids=ids[:, :5]).logits
        quantize(model, Scheme(format="int8"))
        packed = model(input_ids=ids, decoder_input_ids=ids[:, :5]).logits
    assert float((packed - exact).norm() / exact.norm()) < 0.02
