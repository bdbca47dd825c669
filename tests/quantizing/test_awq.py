"""AWQ against rounding to nearest, which is one of the scales that it tries, and the layer that keeps its scales."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold
from rankfold.core.calibration import InputCovariance, InputMagnitude, calibrate
from rankfold.core.packed import Packed, PackedLinear, Scheme, dequantise
from rankfold.quantizers.awq import AWQ
from rankfold.quantizers.rtn import RTN, nearest
from tests.methods.support import DOUBLE, draw

KINDS = [
    {"group": 8},
    {"group": 7, "symmetric": True},
    {"group": "channel"},
    {"group": "tensor"},
    {"group": 4, "along": "out"},
    {"format": "nf4", "group": 8},
    {"format": "ternary", "group": "channel"},
]


def layer_and_data(seed: int = 0) -> tuple[nn.Sequential, list[Tensor]]:
    """A few inputs are 20 times as large as the others."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 12, dtype=DOUBLE))
    X = draw(300, 20, seed=seed + 1)
    X[:, [2, 11]] *= 20
    return model, list(X.split(100))


def found(seed: int = 0, **options: Any) -> tuple[Tensor, Any, Tensor]:
    model, batches = layer_and_data(seed)
    statistics = calibrate(model, batches, [InputMagnitude(), InputCovariance()], ["0"])
    return model[0].weight.detach(), statistics, torch.cat(batches)


def value(packed: Packed, scheme: Scheme) -> Tensor:
    return dequantise(packed, (12, 20), scheme, DOUBLE)


def test_the_statistic_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    batches = [torch.tensor([[1.0, -2], [3, 0]]), torch.tensor([[-5.0, 1]])]
    seen = calibrate(model, batches, [InputMagnitude()], ["0"]).get(InputMagnitude(), "0")
    torch.testing.assert_close(seen.mean, torch.tensor([3.0, 1.0]))
    assert seen.largest.tolist() == [5, 2]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_layer_is_nearer_than_rounded_to_nearest_and_no_row_loses_by_its_ranges(kind: dict[str, Any]) -> None:
    scheme = Scheme(**{"format": "int3", "scales": "float32", **kind})
    W, statistics, X = found()
    mine = AWQ().quantise(W, scheme, statistics, "0")
    errors, theirs = (
        (X @ (W - value(p, scheme)).mT).square().sum(0) for p in (mine, RTN().quantise(W, scheme, None, ""))
    )
    assert float(errors.sum()) < float(theirs.sum())
    scales_only = AWQ(clips=1).quantise(W, scheme, statistics, "0")
    plain = (X @ (W - value(scales_only, scheme)).mT).square()
    assert float(errors.sum()) <= float(plain.sum()) * (1 + 1e-9)
    if scheme.along == "in" and scheme.group != "tensor":
        assert bool((errors <= plain.sum(0) * (1 + 1e-9)).all())


def test_without_scales_it_is_rounding_to_nearest() -> None:
    """Where all inputs are of one size every α gives t = 1."""
    W, scheme = draw(12, 20, seed=3), Scheme(format="int3", group=8)
    model = nn.Sequential(nn.Linear(20, 12, dtype=DOUBLE))
    signs = draw(64, 20, seed=4).sign()
    statistics = calibrate(model, [signs], [InputMagnitude(), InputCovariance()], ["0"])
    mine, theirs = AWQ(clips=1).quantise(W, scheme, statistics, "0"), RTN().quantise(W, scheme, None, "")
    assert mine.balance is not None
    assert mine.balance.tolist() == [1] * 20
    assert torch.equal(mine.codes, theirs.codes)
    assert torch.equal(mine.scales, theirs.scales)


def test_the_scales_are_those_of_the_formula() -> None:
    """Of the 3 values of α the best is 0.5 or 1, and t is what the card says for it."""
    W, statistics, _ = found()
    t = AWQ(grid=3, clips=1).quantise(W, Scheme(format="int3", group=8), statistics, "0").balance
    assert t is not None
    sizes = statistics.get(InputMagnitude(), "0").mean
    expected = [s / (s.max() * s.min()).sqrt() for s in (sizes**0.5, sizes)]
    assert any(torch.allclose(t.double(), one, rtol=1e-5) for one in expected)
    assert float(t.max() * t.min()) == pytest.approx(1, rel=1e-5)
    assert {int(i) for i in t.topk(2).indices} == {2, 11}


def test_a_smaller_range_is_taken_where_a_far_weight_meets_small_inputs() -> None:
    """By hand: 1 bit of the range is spent on a weight whose input is nearly 0."""
    W = torch.tensor([[0.3, -0.4, 0.35, 4.0]], dtype=DOUBLE)
    C = torch.diag(torch.tensor([1, 1, 1, 1e-6], dtype=DOUBLE))
    scheme = Scheme(format="int3", group=4, scales="float32")
    packed = AWQ().clipped(W, C, scheme)
    plain = nearest(W, scheme)
    assert packed.scales[0, 0] == pytest.approx(0.55 * float(plain.scales[0, 0]))
    E = W - dequantise(packed, (1, 4), scheme, DOUBLE)
    F = W - dequantise(plain, (1, 4), scheme, DOUBLE)
    assert float((E @ C * E).sum()) < float((F @ C * F).sum())


def test_the_layer_divides_its_inputs_and_stands_for_the_weight_as_it_was(tmp_path: Any) -> None:
    model, batches = layer_and_data()
    model, batches = model.float(), [x.float() for x in batches]
    before = model[0]
    report = rankfold.quantize(model, Scheme(format="int4", group=8), "awq", targets=["0"], calibration=batches)
    layer: Any = model[0]
    assert isinstance(layer, PackedLinear)
    assert layer.scheme.balanced
    assert layer.balance is not None
    with torch.no_grad():
        y = layer(batches[0])
        torch.testing.assert_close(y, batches[0] @ layer.dequantise().mT + layer.bias, rtol=1e-4, atol=1e-4)
        assert (y - before(batches[0])).norm() < 0.1 * y.norm()
    size = sum(t.numel() * t.itemsize for name, t in layer.state_dict().items() if name != "bias")
    assert report["0"].bits * 12 * 20 == pytest.approx(8 * size)
    other = PackedLinear(20, 12, layer.scheme, True, torch.float32, "cpu")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(batches[0]), layer(batches[0]))
    x = batches[0][:5].clone().requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantise().sum(0).expand(5, -1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("slug", ["lora", "peqa"])
def test_adapters_train_over_it_and_a_change_of_scales_leaves_it_packed(slug: str) -> None:
    model, batches = layer_and_data()
    model, x = model.float(), batches[0].float()
    rankfold.quantize(model, Scheme(group=8), "awq", targets=["0"], calibration=[x])
    adapter = rankfold.attach(model, rankfold.build(slug, **({"rank": 2} if slug == "lora" else {})), targets=["0"])
    before = model(x).detach()
    torch.testing.assert_close(before, x @ model[0].dequantise().mT + model[0].bias, rtol=1e-4, atol=1e-3)  # type: ignore[operator,union-attr]
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1e-3)
    model(x).square().mean().backward()
    optimizer.step()
    after = model(x).detach()
    assert not torch.equal(after, before)
    if slug == "peqa":
        rankfold.merge(model)
        assert isinstance(model[0], PackedLinear)
        torch.testing.assert_close(model(x).detach(), after, rtol=1e-4, atol=1e-3)


def test_a_compensation_sees_the_weight_as_it_was() -> None:
    model, batches = layer_and_data()
    with torch.no_grad():
        y = model(batches[0])
        repair = rankfold.EoRA(rank=12)
        rankfold.quantize(model, Scheme(format="int2"), "awq", targets=["0"], calibration=batches, compensate=repair)
        torch.testing.assert_close(model(batches[0]), y, rtol=1e-3, atol=1e-3)


def test_a_balanced_scheme_is_refused_by_rules_that_balance_nothing() -> None:
    model, _ = layer_and_data()
    with pytest.raises(rankfold.RankfoldError, match="takes inputs as they are"):
        rankfold.quantize(model, Scheme(balanced=True), targets=["0"])
