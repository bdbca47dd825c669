"""Scales trained over codes that stay."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankfold
from rankfold import PEQA, Scheme
from rankfold.core.delta import Site
from rankfold.core.packed import PackedLinear, unpack
from tests.methods.support import DOUBLE, close, draw, linear, perturb, put


def over(W: Tensor, b: Tensor | None = None, **scheme: Any) -> tuple[nn.Sequential, Any]:
    """A packed layer with PEQA on it."""
    model = nn.Sequential(linear(W, b))
    rankfold.quantize(model, Scheme(**{"format": "int4", "group": "channel", **scheme}), targets=["0"])
    adapter = rankfold.attach(model, PEQA(), targets=["0"])
    return model, adapter.deltas["0"]


def codes(layer: PackedLinear) -> Tensor:
    """W̄₀, in whole numbers."""
    q = unpack(layer.weight, layer.in_features, layer.scheme).to(DOUBLE)
    return q - (layer.scheme.offset if layer.zeros is None else layer.zeros.to(DOUBLE))


def test_worked_numbers() -> None:
    """Symmetric 3 bits of [-3, .6, 2.1, 6] have the codes [-2, 0, 1, 3] at s = 2, asymmetric 2 bits [-1, 0, 1, 2]."""
    W = torch.tensor([[-3, 0.6, 2.1, 6]])
    model, delta = over(W, format="int3", symmetric=True, scales="float32")
    close(codes(model[0]), [[-2, 0, 1, 3]])
    put(delta, ds=[[0.25]])
    close(model(torch.eye(4, dtype=DOUBLE))[:, 0], [-4.5, 0, 2.25, 6.75])
    model, delta = over(W, format="int2")
    put(delta, ds=[[-0.5]])
    close(model(torch.eye(4, dtype=DOUBLE))[:, 0], [-2.5, 0, 2.5, 5])


def test_twice_the_scale_is_twice_the_channel() -> None:
    model, delta = over(draw(5, 12), draw(5))
    x = draw(7, 12)
    before = model(x) - model[0].bias
    with torch.no_grad():
        delta.ds[2] = model[0].scales[2]
    close(model(x) - model[0].bias, before * torch.tensor([1, 1, 2, 1, 1]), 1e-12)


@pytest.mark.parametrize("group", [4, "channel", "tensor"])
@pytest.mark.parametrize("along", ["in", "out"])
def test_the_gradient_of_a_scale_is_the_sum_of_G_times_the_codes(along: str, group: Any) -> None:
    model, delta = over(draw(6, 8), draw(6), along=along, group=group)
    perturb(delta, size=0.01)
    x, up = draw(3, 8), draw(3, 6, seed=4)
    (model(x) * up).sum().backward()
    rows = lambda M: M if along == "in" else M.mT  # noqa: E731
    q = unpack(model[0].weight, rows(draw(6, 8)).shape[1], model[0].scheme).to(DOUBLE)
    zeros = model[0].zeros.to(DOUBLE)
    wide = zeros.repeat_interleave(4, 1)[:, : q.shape[1]] if group == 4 else zeros
    each = rows(up.mT @ x) * (q - wide)
    sums = {"channel": lambda: each.sum(1, keepdim=True), "tensor": lambda: each.sum().view(1, 1)}
    wanted = sums[group]() if group in sums else torch.stack([part.sum(1) for part in each.split(4, 1)], 1)
    close(delta.ds.grad, wanted, 1e-10)


def test_codes_stay_and_a_merged_model_is_packed_and_gives_the_same_bits() -> None:
    """Scales of 16 bits, trained in 32: what is kept of them is what the training saw."""
    model = nn.Sequential(nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 24))
    rankfold.quantize(model, Scheme(format="int3", group=8), targets=["0", "2"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter, x = rankfold.attach(model, PEQA(), targets=["0", "2"]), torch.randn(9, 24)
    optimizer, target = torch.optim.AdamW(adapter.parameters(), lr=3e-3, weight_decay=0.0), torch.randn(9, 24)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(model(x), target)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    trained = model(x)
    rankfold.merge(model)
    assert torch.equal(model(x), trained)
    state = model.state_dict()
    assert state.keys() == before.keys()
    for name, tensor in state.items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name]) == (not name.endswith("scales"))
    other = nn.Sequential(nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 24))
    rankfold.quantize(other, Scheme(format="int3", group=8), targets=["0", "2"])
    other.load_state_dict(state)
    assert torch.equal(other(x), trained)


def test_rows_of_a_batch_have_scales_of_their_own() -> None:
    model, delta = over(draw(6, 8), draw(6), group=4, symmetric=True)
    base, x = codes(model[0]), draw(3, 8)
    second = rankfold.attach(model, PEQA(), targets=["0"], name="second").deltas["0"]
    perturb(delta, 1, 0.02)
    perturb(second, 2, 0.02)
    with rankfold.using(model, ["second", None, "default"]):
        y = model(x)
    for row, change in zip(range(3), (second.ds, torch.zeros_like(delta.ds), delta.ds), strict=True):
        s = (model[0].scales + change).to(torch.float16).to(DOUBLE)
        close(y[row], (base.unflatten(1, (2, 4)) * s[..., None]).flatten(1) @ x[row] + model[0].bias)


def test_counts() -> None:
    """A scale for each output of LLaMA-7B's seven projections, 32 times."""
    total = 0
    for out, in_ in [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]:
        site = Site("", "linear", (out, in_), False, torch.float32)
        site.layer = PackedLinear(in_, out, Scheme(group="channel"), False, torch.float32, "meta")
        total += 32 * PEQA().count(site)
        assert PEQA().delta(site, None).ds.numel() == PEQA().count(site)
    assert total == 32 * (4 * 4096 + 2 * 11008 + 4096) == 1_359_872


def test_a_base_that_is_not_packed_is_told_how_to_become_one() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(rankfold.UnsupportedError, match=r"peqa cannot adapt 0 .*`rankfold quantize`"):
        rankfold.attach(model, PEQA(), targets=["0"])
    rankfold.quantize(model, Scheme(double=True), targets=["0"])
    with pytest.raises(rankfold.UnsupportedError, match=r"\(double\).*quantise it without"):
        rankfold.attach(model, PEQA(), targets=["0"])


def test_scales_that_are_not_finite_are_not_merged() -> None:
    model, delta = over(draw(6, 8))
    before = model[0].scales.clone()
    put(delta, ds=torch.full((6, 1), 1e6))  # over the largest float16
    with pytest.raises(rankfold.RankfoldError, match="NaN or infinity"):
        rankfold.merge(model)
    assert torch.equal(model[0].scales, before)
