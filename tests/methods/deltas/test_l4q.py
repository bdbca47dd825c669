"""A weight that is rounded after the product is merged into it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import rankfold
from rankfold import L4Q
from rankfold.core.packed import Packed, PackedLinear, dequantise
from tests.methods.support import DOUBLE, attached, close, draw, linear, put


def trained(bits: int = 3, group: Any = 4, **hyper: Any) -> tuple[nn.Module, Any]:
    """A delta off its start, with clipped entries; steps and biases are exact in float32."""
    model, delta = attached(linear(draw(6, 10), draw(6)), L4Q(rank=2, alpha=3, bits=bits, group=group, **hyper))
    put(delta, B=0.3 * draw(6, 2, seed=1), A=draw(2, 10, seed=2))
    put(delta, step=torch.full_like(delta.step, 0.25), beta=(8 * draw(*delta.beta.shape, seed=3)).round() / 32)
    return model, delta


def formula(delta: Any, W: Tensor, **own: Tensor) -> Tensor:
    """The card's W_q, straight through."""
    B, A, step, beta = (own.get(name, getattr(delta, name)) for name in ("B", "A", "step", "beta"))
    size = delta.scheme.group if isinstance(delta.scheme.group, int) else W.shape[1]
    s, b = (v.repeat_interleave(size, 1)[:, : W.shape[1]] for v in (step, beta))
    w = ((W + 1.5 * B @ A - b) / s).clamp(delta.low, delta.high)
    return s * (w + (w.round() - w).detach()) + b


def test_worked_numbers() -> None:
    _, delta = attached(linear([[-1, 0.5]]), L4Q(rank=1, bits=3))
    assert (delta.low, delta.high) == (-4, 3)
    close(delta.step, [[0.25]])
    put(delta, step=[[0.5]], beta=[[0.25]], B=[[1]], A=[[1, -0.25]])  # W_c = [0, .25], w̃ = [-.5, 0]
    close(delta.transform(delta.W), [[0.25, 0.25]])
    put(delta, A=[[4, -4.5]])  # W_c = [3, -4]: both are cut off
    close(delta.transform(delta.W), [[1.75, -1.75]])


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("group", [4, 7, "channel"])
def test_starts_rounded_to_nearest_and_cuts_nothing_off(bits: Any, group: Any) -> None:
    W = draw(50, 40, dtype=torch.float32)
    _, delta = attached(linear(W).float(), L4Q(bits=bits, group=group))
    size = group if group != "channel" else 40
    w = W / delta.step.repeat_interleave(size, 1)[:, :40]
    assert w.min() >= delta.low
    assert w.max() <= delta.high
    close(delta.transform(W), w.round() * delta.step.repeat_interleave(size, 1)[:, :40], 1e-6)
    touched = torch.minimum((w - delta.low).abs(), (w - delta.high).abs()).split(size, 1)
    assert all((part.amin(1) < 1e-4).all() for part in touched), "a step is larger than it must be"


@pytest.mark.parametrize("group", [4, "channel"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_backward_is_that_of_the_straight_through_graph(bits: int, group: Any) -> None:
    model, delta = trained(bits, group)
    x, up = draw(3, 7, 10).requires_grad_(), draw(3, 7, 6, seed=9)
    names = ("B", "A", "step", "beta")
    y = F.linear(x, formula(delta, delta.W.detach()), model[0].bias)
    wanted = torch.autograd.grad((y * up).sum(), [x, *(getattr(delta, name) for name in names)])
    got = torch.autograd.grad((model(x) * up).sum(), [x, *(getattr(delta, name) for name in names)])
    whole = F.linear(x, delta.transform(delta.W.detach()), model[0].bias)
    composed = torch.autograd.grad((whole * up).sum(), [x, *(getattr(delta, name) for name in names)])
    close(model(x), y)
    for a, b, c in zip(wanted, got, composed, strict=True):
        assert a.any()
        close(b, a, 1e-11)
        close(c, a, 1e-11)


def test_steps_of_whole_codes_and_biases_of_unclipped_groups_have_no_gradient() -> None:
    W = torch.tensor([[-4.0, 3, 1, 0], [-4, 3, 0.7, 9]]) / 4
    model, delta = attached(linear(W), L4Q(rank=1, bits=3))
    put(delta, step=[[0.25], [0.25]])
    model(draw(5, 4)).square().sum().backward()
    assert delta.step.grad[0] == delta.beta.grad[0] == 0
    assert delta.step.grad[1] != 0
    assert delta.beta.grad[1] != 0


def test_the_gain_of_lsq() -> None:
    x, grads = draw(5, 10), []
    for gain in (False, True):
        model, delta = trained(lsq_gain=gain)
        model(x).square().sum().backward()
        whole = torch.autograd.grad((F.linear(x, delta.transform(delta.W), model[0].bias)).square().sum(), delta.step)[
            0
        ]
        close(delta.step.grad, whole, 1e-10)
        grads.append((delta.step.grad, delta.beta.grad))
    close(grads[1][0], grads[0][0] / (4 * 3) ** 0.5, 1e-10)
    close(grads[1][1], grads[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_packed_model_is_the_trained_one(bits: Any, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(20, 12), nn.GELU(), nn.Linear(12, 20)).to(dtype)
    x, target = draw(9, 20, dtype=dtype), draw(9, 20, seed=1, dtype=dtype)
    before = model(x)
    adapter = rankfold.attach(model, L4Q(bits=bits, group=8), targets=["0", "2"])
    optimizer = torch.optim.Adam(adapter.parameters(), lr=5e-3)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(model(x), target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    weights = {site: delta.transform(delta.W) for site, delta in adapter.deltas.items()}
    y = model(x)
    rankfold.merge(model)
    for site, W in weights.items():
        layer = model.get_submodule(site)
        assert isinstance(layer, PackedLinear)
        assert torch.equal(layer.dequantise(), W)
    close(model(x), y, 1e-6 if dtype == torch.float32 else 1e-14)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    packed = Packed(state["0.weight"], state["0.scales"], state["0.zeros"])
    close(dequantise(packed, (12, 20), adapter.deltas["0"].scheme, DOUBLE), weights["0"], 1e-6)
    assert "_unpacked" not in state
    rankfold.unmerge(model)
    assert torch.equal(model(x), y)
    rankfold.detach(model)
    assert torch.equal(model(x), before)
    assert type(model[0]) is nn.Linear
    assert not {"scheme", "scales", "zeros"} & (model[0].__dict__.keys() | model[0]._buffers.keys())


def test_merged_it_can_be_moved_copied_and_merged_with_others() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(3, 8)
    rankfold.attach(model, rankfold.LoRA(rank=2), targets=["0"], name="first")
    put(rankfold.adapters(model)["first"].deltas["0"], B=draw(8, 2))
    rankfold.attach(model, L4Q(), targets=["0"], name="second")
    rankfold.attach(model, rankfold.LoRA(rank=2), targets=["0"], name="third")
    rankfold.merge(model, "first")
    rankfold.merge(model, "second")
    with pytest.raises(rankfold.UnsupportedError, match="quantised"):
        rankfold.merge(model, "third")
    rankfold.unmerge(model, "first")
    with rankfold.using(model, None):
        merged = model(x)
    rankfold.unmerge(model)
    with rankfold.using(model, "second"):
        close(model(x), merged, 1e-6)
    rankfold.merge(model, "second")
    model.to(torch.bfloat16)
    rankfold.unmerge(model)
    assert model[0].weight.dtype == torch.bfloat16


def test_nothing_of_the_weights_size_is_kept_for_the_backward() -> None:
    model, _ = attached(nn.Linear(256, 256), L4Q())
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        model(torch.randn(8, 256))
    assert max(kept) <= 8 * 256


def test_counts_and_refusals() -> None:
    method = L4Q(group=8)
    _, delta = attached(linear(draw(6, 20)), method)
    assert sum(p.numel() for p in delta.parameters()) == method.count(delta.site) == 4 * 26 + 2 * 6 * 3
    with pytest.raises(rankfold.UnsupportedError, match="packed linear layer"):
        attached(nn.Conv2d(8, 8, 3), method)
    model = nn.Sequential(nn.Linear(64, 64))
    rankfold.quantize(model, rankfold.Scheme(), targets=["0"])
    with pytest.raises(rankfold.UnsupportedError, match="load the base in float"):
        rankfold.attach(model, method, targets=["0"])
