import pytest
import torch
from torch import nn

import rankfold
from rankfold import LoRA, LoRAGGPO
from tests.methods.support import attached, close, draw, perturb


def layer(method, rank=2, alpha=3.0):
    model, delta = attached(nn.Linear(6, 4, dtype=torch.float64), LoRA(rank=rank, alpha=alpha))
    perturb(delta)
    method.on_attach(rankfold.adapters(model)["default"], model)
    return model, delta


def backward(model, method):
    model(draw(5, 6)).square().sum().backward()
    method.before_step(0)


def test_the_cards_number():
    rho = LoRAGGPO().rho(torch.full((4,), 5.0).double(), torch.full((4,), 4.0).double())
    close(rho, torch.full((4,), 0.095, dtype=torch.float64))


def test_rho_from_the_definition():
    method = LoRAGGPO(sigma=0.2, beta=0.3)
    model, delta = layer(method)
    backward(model, method)
    mean = delta.W.norm(dim=1).mean()
    BA = delta.scale * delta.B @ delta.A
    gradient = delta.scale * (delta.B @ delta.A.grad + delta.B.grad @ delta.A)
    weight = (mean**2 + BA.norm(dim=1) ** 2).sqrt()
    close(method._rho["0"], (0.2 * weight + 0.3 * gradient.norm(dim=1) ** 2) / 2, atol=1e-7)
    assert delta.scale == 1.5


def test_noise_has_mean_zero_and_the_variance_of_rho_and_x():
    method = LoRAGGPO()
    model, _delta = layer(method)
    x = draw(1, 6)
    plain = model(x).detach()
    backward(model, method)
    torch.manual_seed(0)
    with torch.no_grad():
        outputs = torch.cat([model(x) for _ in range(4000)])
    std = method._rho["0"] * x.norm()
    assert ((outputs.mean(0) - plain[0]).abs() < 4 * std / 4000**0.5).all()
    torch.testing.assert_close(outputs.std(0), std, rtol=0.05, atol=0)
    assert (std > 0).all()


def test_the_first_forward_eval_and_another_route_are_not_perturbed():
    method = LoRAGGPO()
    model, _delta = layer(method)
    x = draw(3, 6)
    plain = model(x)
    with rankfold.using(model, None):
        base = model(x)
    backward(model, method)
    assert not torch.equal(model(x), plain)
    with rankfold.using(model, None):
        assert torch.equal(model(x), base)
    model.eval()
    assert torch.equal(model(x), plain)


def test_without_sigma_and_beta_it_is_lora_bit_for_bit():
    method = LoRAGGPO(sigma=0, beta=0)
    model, _ = layer(method)
    x = draw(3, 6)
    plain = model(x)
    backward(model, method)
    assert torch.equal(model(x), plain)


def test_the_gradient_for_x_sees_the_noise_and_the_factors_gradients_do_not():
    method = LoRAGGPO(sigma=0.5)
    model, delta = layer(method)
    backward(model, method)
    x = draw(3, 6).requires_grad_()
    clean = (delta.W + delta.scale * delta.B @ delta.A).detach()
    delta.B.grad = None
    model(x).sum().backward()
    assert not torch.allclose(x.grad, clean.sum(0).expand(3, 6))
    close(delta.B.grad, delta.scale * torch.ones(4, 3).double() @ (x @ delta.A.T))


def test_noise_goes_on_after_a_resume():
    method, again = LoRAGGPO(), LoRAGGPO()
    model, _delta = layer(method)
    backward(model, method)
    other, _ = layer(again)
    other.load_state_dict(model.state_dict())
    again.on_load(method.on_save())
    outputs = []
    for net in (model, other):
        torch.manual_seed(3)
        outputs.append(net(draw(3, 6)))
    assert torch.equal(*outputs)


def test_needs_a_linear_layer_with_both_factors():
    model = nn.Sequential(nn.Embedding(9, 6))
    adapter = rankfold.attach(model, LoRA(rank=2), targets=["0"])
    with pytest.raises(rankfold.RankfoldError, match="linear"):
        LoRAGGPO().on_attach(adapter, model)
