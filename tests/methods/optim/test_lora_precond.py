import pytest
import torch
from torch import nn

import rankfold
from rankfold import LoRA, LoRAPrecond, LoRARite, VeRA
from tests.methods.support import attached, close, draw, put


def trained(M=None, rank=2):
    """A LoRA layer whose product is the same for every invertible M, and its adapter."""
    model, delta = attached(nn.Linear(4, 5, dtype=torch.float64), LoRA(rank=rank))
    M = torch.eye(rank, dtype=torch.float64) if M is None else M
    put(delta, B=draw(5, rank) @ M, A=torch.linalg.inv(M) @ draw(rank, 4, seed=1))
    return model, delta, rankfold.adapters(model)["default"]


def backward(delta, G=None):
    """Gradients as a loss with ∂L/∂ΔW = G gives them."""
    G = draw(5, 4, seed=2) if G is None else G
    delta.B.grad, delta.A.grad = (G @ delta.A.T).detach(), (delta.B.T @ G).detach()


SHEAR = torch.tensor([[2.0, 1.5], [-0.3, 0.4]], dtype=torch.float64)


def test_gradients_by_hand():
    _, delta, adapter = trained(rank=1)
    put(delta, B=[[1], [0], [2], [0], [0]], A=[[3, 0, 4, 0]])
    delta.B.grad, delta.A.grad = torch.full((5, 1), 13.0).double(), torch.full((1, 4), 6.0).double()
    method = LoRAPrecond(delta=1.0)
    method.on_attach(adapter, None)
    method.before_step(0)
    close(delta.A.grad, torch.ones(1, 4))  # 6 / (5 + 1)
    close(delta.B.grad, torch.full((5, 1), 0.5))  # 13 / (25 + 1)


def test_a_step_of_sgd_does_not_depend_on_the_factors():
    products = []
    for M in (None, SHEAR):
        _, delta, adapter = trained(M)
        start = (delta.B @ delta.A).detach()
        method = LoRAPrecond(delta=0.0)
        method.on_attach(adapter, None)
        backward(delta)
        method.before_step(0)
        torch.optim.SGD(adapter.parameters(), lr=0.1).step()
        products.append((delta.B @ delta.A).detach() - start)
    close(products[0], products[1], atol=1e-13)
    assert products[0].norm() > 0.1


def test_experts_and_a_zero_B():
    _, delta, adapter = trained()
    put(delta, B=torch.zeros(5, 2))
    method = LoRAPrecond()
    method.on_attach(adapter, None)
    backward(delta)
    g = delta.B.grad.clone()
    method.before_step(0)
    close(delta.A.grad, torch.zeros(2, 4))
    close(delta.B.grad @ (delta.A @ delta.A.T + 1e-6 * torch.eye(2)), g, atol=1e-10)
    F, g = draw(3, 2, 6), draw(3, 2, 4, seed=1)
    for i, solved in enumerate(LoRAPrecond()._solve(F, g)):
        close(solved, LoRAPrecond()._solve(F[i], g[i]))


@pytest.mark.parametrize("method", [LoRAPrecond(), LoRARite()])
def test_methods_without_a_trained_pair_are_refused(method):
    model, _ = attached(nn.Linear(6, 5), VeRA(rank=2))
    adapter = rankfold.adapters(model)["default"]
    with pytest.raises(rankfold.RankfoldError, match="B and A"):
        method.on_attach(adapter, model) if method.slug == "lora-precond" else method.parameter_groups(adapter, 1, 0)


# ---- LoRA-RITE


def rite(adapter, lr=0.1, weight_decay=0.0, **options):
    method = LoRARite(**options)
    return method.optimizer(method.parameter_groups(adapter, lr, weight_decay), lr, weight_decay)


def test_steps_of_rite_do_not_depend_on_the_factors():
    runs = []
    for M in (None, SHEAR):
        _, delta, adapter = trained(M)
        optimizer, products = rite(adapter, lr=0.02), []
        for step in range(5):
            backward(delta, draw(5, 4, seed=20 + step))
            optimizer.step()
            products.append((delta.B @ delta.A).detach())
        runs.append(torch.stack(products))
    close(runs[0], runs[1], atol=1e-5)


def test_two_steps_of_rite_at_rank_one_by_hand():
    _, delta, adapter = trained(rank=1)
    put(delta, B=[[2], [0], [0], [0], [0]], A=[[0, 4, 0, 0]])
    optimizer = rite(adapter, lr=0.1, eps=1e-12, clip=0, betas=(0.5, 0.5))
    # U_B = e1 and R_B = 2, up to a common sign, so ḡ_A = g / 2, V = |ḡ|² / 4, S = ḡ / √V; A moves by η S / R_B.
    delta.B.grad, delta.A.grad = torch.zeros(5, 1).double(), torch.tensor([[6.0, 0, 8, 0]]).double()
    optimizer.step()
    close(delta.A, [[-0.06, 4, -0.08, 0]], atol=1e-9)  # S = (6, 0, 8, 0) / 5
    # β' = ½ · ½ / ¾ = ⅓: V = ⅓ 25/4 + ⅔ 9/4 = 43/12; M = ⅓ (1.2, 0, 1.6, 0) + ⅔ (0, 0, 3, 0) / √V.
    delta.A.grad = torch.tensor([[0.0, 0, 6, 0]]).double()
    optimizer.step()
    m = 1.6 / 3 + 2 / (43 / 12) ** 0.5
    close(delta.A, [[-0.06 - 0.1 * 0.4 / 2, 4, -0.08 - 0.1 * m / 2, 0]], atol=1e-9)
    close(delta.B, [[2], [0], [0], [0], [0]], atol=1e-9)


def test_rite_starts_from_a_zero_B_and_keeps_out_what_is_not_finite():
    _, delta, adapter = trained()
    put(delta, B=torch.zeros(5, 2))
    A = delta.A.detach().clone()
    optimizer = rite(adapter)
    backward(delta)
    optimizer.step()
    close(delta.A, A)
    assert delta.B.norm() > 0
    delta.B.grad[0, 0] = torch.nan
    state = {name: value.clone() for name, value in optimizer.state[delta.B].items() if name != "t"}
    with pytest.raises(rankfold.RankfoldError, match="NaN"):
        optimizer.step()
    for name, value in state.items():
        assert torch.equal(optimizer.state[delta.B][name], value)


def test_rite_clips_over_all_factors():
    _, delta, adapter = trained()
    backward(delta)
    optimizer = rite(adapter, clip=1e-3, betas=(0.9, 0.5))
    optimizer.step()
    traces = [optimizer.state[p]["V"].trace() * max(p.shape) for p in (delta.B, delta.A)]
    assert sum(traces).sqrt().item() == pytest.approx(1e-3)


def test_the_first_step_of_rite_does_not_depend_on_the_clip():
    steps = []
    for clip in (0, 1e-3):
        _, delta, adapter = trained()
        backward(delta)
        rite(adapter, clip=clip, eps=1e-14).step()
        steps.append((delta.B @ delta.A).detach())
    close(*steps, atol=1e-8)


def test_rite_resumes_bit_for_bit_and_counts_its_state():
    def steps(delta, optimizer, first):
        for step in range(first, first + 3):
            backward(delta, draw(5, 4, seed=20 + step))
            optimizer.step()

    _, delta, adapter = trained()
    optimizer = rite(adapter, weight_decay=0.1)
    assert optimizer.state_bytes() == 8 * sum(2 * p.numel() + 4 for p in (delta.A, delta.B))
    steps(delta, optimizer, 0)
    _, other, again = trained()
    put(other, B=delta.B.detach(), A=delta.A.detach())
    resumed = rite(again, weight_decay=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    steps(delta, optimizer, 3)
    steps(other, resumed, 3)
    assert torch.equal(delta.B, other.B)
    assert torch.equal(delta.A, other.A)


def test_rite_steps_the_rest_by_adamw():
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    adapter = rankfold.attach(model, LoRA(rank=2), targets=["0"], modules_to_save=["1"])
    optimizer = rite(adapter, weight_decay=0.1)
    head = [p for group in optimizer.param_groups if not group["pair"] for p in group["params"]]
    twins = [nn.Parameter(p.detach().clone()) for p in head]
    adamw = torch.optim.AdamW(twins, lr=0.1, weight_decay=0.1)
    for _ in range(3):
        for p, twin in zip(head, twins, strict=True):
            p.grad = draw(*p.shape, dtype=torch.float32)
            twin.grad = p.grad.clone()
        optimizer.step()
        adamw.step()
    for p, twin in zip(head, twins, strict=True):
        torch.testing.assert_close(p, twin, atol=1e-6, rtol=1e-6)


def test_rite_needs_pairs():
    with pytest.raises(rankfold.RankfoldError, match="parameter_groups"):
        LoRARite().optimizer([{"params": [nn.Parameter(torch.ones(2, 2))]}], 0.1, 0.0)
