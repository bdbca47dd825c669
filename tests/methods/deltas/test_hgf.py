"""Ternary weights with a gated low-rank path."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankfold
from rankfold import HGF
from rankfold.core.activations import rounded
from rankfold.core.packed import PackedLinear
from rankfold.deltas.hgf import backbone
from tests.methods.support import DOUBLE, attached, close, draw, linear, perturb, put


def bitnet(V: Tensor) -> Tensor:
    gamma = V.abs().mean().float().double()  # as it is kept
    return gamma * (V / gamma).round().clamp(-1, 1)


def test_worked_numbers() -> None:
    """W = [.1, -.4, .7] has γ = .4 and the codes [0, -1, 1]."""
    _, delta = attached(linear([[0.1, -0.4, 0.7]]), HGF(rank=1))
    close(delta.ternary(delta.W), [[0, -0.4, 0.4]], 1e-7)
    put(delta, B=[[2]], A=[[1, 0, -1]], g=0.5)
    close(delta.transform(delta.W), [[1, -0.4, -0.6]], 1e-7)
    put(delta, D=[[0.5, 0.4, -0.7]])  # V = [.6, 0, 0], γ = .2
    close(delta.ternary(delta.W), [[0.2, 0, 0]], 1e-7)


@pytest.mark.parametrize("activations", ["int8", "fp8", None])
def test_without_the_gate_or_the_path_it_is_bitnet(activations: Any) -> None:
    W, b, x = draw(6, 10), draw(6), draw(3, 4, 10)
    expected = F.linear(rounded(x, activations), bitnet(W), b)
    model, delta = attached(linear(W, b), HGF(rank=2, activations=activations))
    close(model(x), expected)  # B = 0
    put(delta, B=draw(6, 2))
    assert (model(x) - expected).abs().max() > 1e-3
    put(delta, g=0)
    close(model(x), expected)


@pytest.mark.parametrize("gate_fn", ["none", "tanh"])
def test_gradients_go_straight_through(gate_fn: Any) -> None:
    model, delta = attached(linear(draw(6, 10), draw(6)), HGF(rank=2, gate_fn=gate_fn, gate_init=0.7))
    perturb(delta)
    x, up = draw(7, 10).requires_grad_(), draw(7, 6, seed=5)
    y, q = model(x), rounded(x, "int8").detach()
    y.backward(up)
    V = (model[0].weight + delta.D).detach()
    phi = delta.g.detach().tanh() if gate_fn == "tanh" else delta.g.detach()
    slope = 1 - phi**2 if gate_fn == "tanh" else 1
    close(y, q @ bitnet(V).mT + phi * x @ delta.A.mT @ delta.B.mT + model[0].bias)
    close(delta.D.grad, up.mT @ q)
    close(delta.B.grad, phi * up.mT @ (x @ delta.A.mT))
    close(delta.g.grad, (slope * (up * (x @ delta.A.mT @ delta.B.mT)).sum()).view(1), 1e-11)
    close(x.grad, up @ (bitnet(V) + phi * delta.B @ delta.A))


def test_a_path_of_full_rank_can_be_any_weight() -> None:
    W = draw(5, 8)
    _, delta = attached(linear(W), HGF(rank=5, gate_init=1, activations=None))
    put(delta, B=torch.eye(5), A=W - bitnet(W))
    close(delta.transform(delta.W), W)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("activations", ["int8", None])
def test_the_packed_model_with_its_lora_is_the_trained_one(activations: Any, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(20, 12), nn.GELU(), nn.Linear(12, 20)).to(dtype)
    x, target = draw(9, 20, dtype=dtype), draw(9, 20, seed=1, dtype=dtype)
    adapter = rankfold.attach(
        model, HGF(rank=3, activations=activations), targets=["0", "2"], overrides={"2": {"rank": 2}}
    )
    optimizer, losses = torch.optim.Adam(adapter.parameters(), lr=1e-2), []
    for _ in range(20):
        loss = F.mse_loss(model(x), target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    y = model(x)
    lora = backbone(adapter)
    assert lora.method.slug == "lora"
    assert {site: delta.A.shape[0] for site, delta in lora.deltas.items()} == {"0": 3, "2": 2}
    assert all(isinstance(model[i], PackedLinear) and model[i].scheme.format == "ternary" for i in (0, 2))
    close(model(x), y, 1e-5 if dtype == torch.float32 else 1e-6)  # the LoRA's factors are what they were, in float32
    with rankfold.using(model, None):
        assert (model(x) - y).abs().max() > 1e-3


def test_counts_and_refusals() -> None:
    whole, path = HGF(rank=3), HGF(rank=3, latent=False)
    for method in (whole, path):
        model, delta = attached(linear(draw(6, 20)), method)
        assert sum(p.numel() for p in delta.parameters()) == method.count(delta.site)
        model(draw(2, 20)).sum().backward()
    assert path.count(delta.site) == 3 * 26 + 1
    assert whole.count(delta.site) == 3 * 26 + 1 + 120
    with pytest.raises(rankfold.UnsupportedError, match="packed linear layer"):
        attached(nn.Conv2d(8, 8, 3), whole)
    with pytest.raises(rankfold.UnsupportedError, match="not by a ΔW"):
        rankfold.merge(attached(linear(draw(6, 20)), whole)[0])


def test_without_rounded_inputs_it_merges_into_a_float_weight() -> None:
    model, delta = attached(linear(draw(6, 10), draw(6)), HGF(rank=2, activations=None))
    perturb(delta)
    y = model(x := draw(3, 10))
    rankfold.merge(model)
    close(model(x), y)
    close(model[0].weight, bitnet(draw(6, 10) + delta.D) + delta.g * delta.B @ delta.A)
