"""What every registered quantiser and compensation does, on a stack of blocks with a layer before and behind them."""

from typing import Any

import pytest
import torch
from torch import nn

import rankfold
from rankfold.core.component import components
from rankfold.core.packed import PackedLinear, Scheme
from rankfold.errors import RankfoldError, UnsupportedError
from rankfold.quantizers._quantizer import Compensation, Quantizer
from tests.quantizing.test_compensation import stack

QUICK: dict[str, dict[str, Any]] = {"cbq": {"epochs": 1}, "lrec": {"epochs": 1}}
FORMATS: dict[str, Any] = {"zeroquant-fp": "fp4"}
HOWS = [one.slug for one in components() if issubclass(one, Quantizer) and one.takes is Scheme]
REPAIRS = [one.slug for one in components() if issubclass(one, Compensation)]


def built(slug: str, **more: Any) -> Any:
    return rankfold.build(slug, **QUICK.get(slug, {}), **more)


def scheme(slug: str, **more: Any) -> Scheme:
    return Scheme(format=FORMATS.get(slug, "int4"), group=5, **more)  # 5 divides no width of these layers


def asked(rule: Any, batches: list[Any]) -> dict[str, Any]:
    reads = rule.needs() or rule.span[0]
    return {"calibration": batches} if reads else {}


def plain(model: nn.Module, before: dict[str, Any]) -> bool:
    now = model.state_dict()
    return list(now) == list(before) and all(torch.equal(now[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("along", ["in", "out"])
@pytest.mark.parametrize("how", HOWS)
def test_groups_that_divide_no_width_and_layers_that_load_again(how: str, along: Any) -> None:
    model, batches = stack()
    rule = built(how)
    with torch.no_grad():
        expected = model(batches[0])
        rankfold.quantize(model, scheme(how, along=along), rule, **asked(rule, batches))
        y = model(batches[0])
    assert 0 < float((y - expected).norm()) < 0.3 * float(expected.norm())
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert len(packed) == 8
    for layer in packed:
        again = PackedLinear(layer.in_features, layer.out_features, layer.scheme, True, torch.float32, "cpu")
        again.load_state_dict(layer.state_dict())
        assert torch.equal(again.dequantise(), layer.dequantise())
    assert model.training


@pytest.mark.parametrize("how", HOWS)
def test_bad_input_is_named_and_changes_nothing(how: str) -> None:
    rule = built(how)
    model, batches = stack()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if asked(rule, batches):
        with pytest.raises(RankfoldError, match=f"{how} needs statistics of the data"):
            rankfold.quantize(model, scheme(how), rule)
        with pytest.raises(RankfoldError, match="batches are empty"):
            rankfold.quantize(model, scheme(how), rule, calibration=[])
        with pytest.raises(RankfoldError, match="NaN or infinity in calibration batch 0"):
            rankfold.quantize(model, scheme(how), rule, calibration=[torch.full((4, 8), torch.nan)])
    else:
        with pytest.raises(RankfoldError, match="needs no statistics"):
            rankfold.quantize(model, scheme(how), rule, calibration=batches)
    assert plain(model, before)
    with torch.no_grad():
        model.last.weight[0, 0] = torch.inf
    with pytest.raises(RankfoldError, match="weight of last holds NaN or infinity"):
        rankfold.quantize(model, scheme(how), rule, **asked(rule, batches))
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


@pytest.mark.parametrize("how", HOWS)
def test_a_model_is_quantised_once(how: str) -> None:
    model, batches = stack()
    rule = built(how)
    rankfold.quantize(model, scheme(how), rule, **asked(rule, batches))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedError, match="quantised already"):
        rankfold.quantize(model, scheme(how), rule, **asked(rule, batches))
    assert plain(model, before)


@pytest.mark.parametrize("repair", REPAIRS)
def test_a_compensation_is_a_lora_of_its_rank(repair: str) -> None:
    model, batches = stack()
    mend = built(repair, rank=3)
    data = {"calibration": batches} if mend.needs() or mend.distils else {}
    rankfold.quantize(model, Scheme(format="int2", group=5), compensate=mend, **data)
    adapter = rankfold.adapters(model)["compensation"]
    assert isinstance(adapter.method, rankfold.LoRA)
    assert adapter.method.rank == 3
    with torch.no_grad():
        y = model(batches[0])
        with rankfold.using(model, None):
            assert not torch.equal(model(batches[0]), y)
