import math

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import rankfold
from rankfold import RandLoRA
from rankfold.deltas.randlora import Gained
from tests.methods.support import DOUBLE, attached, change, close, draw, linear, perturb, put


def test_worked_numbers():
    _, delta = attached(linear(torch.zeros(3, 2)), RandLoRA(rank=1, alpha=1, scaling="rank"))
    delta.shared.A.copy_(torch.tensor([[1.0, 2.0]]))
    delta.shared.B.copy_(torch.tensor([[1.0, 0], [0, 1], [1, 1]]))
    put(delta, Lambda=[[2], [1]], Gamma=[[1, 1], [1, -1]])
    close(change(delta), [[2, 4], [1, -2], [3, 2]])


@pytest.mark.parametrize("shape", [(10, 8), (8, 10), (9, 9)])
def test_definition_on_either_orientation(shape: tuple[int, int]):
    _, delta = attached(linear(draw(*shape)), RandLoRA(rank=3, alpha=6, scaling="rank"))
    perturb(delta)
    A, B, d = delta.shared.A.double(), delta.shared.B.double(), min(shape)
    n = math.ceil(d / 3)
    gained = [torch.diag(delta.Lambda[j]) @ A @ torch.diag(delta.Gamma[j]) for j in range(n)]
    M = 2 * sum(B[:, 3 * j : 3 * j + 3] @ gained[j] for j in range(n))
    close(change(delta), (M if shape[1] <= shape[0] else M.T).detach(), 1e-10)


def test_rank_is_r_while_the_rows_of_gamma_are_equal_and_full_once_they_differ():
    _, delta = attached(linear(draw(10, 8)), RandLoRA(rank=2))
    put(delta, Lambda=draw(4, 2))
    assert torch.linalg.matrix_rank(change(delta), rtol=1e-9) == 2
    perturb(delta)
    assert torch.linalg.matrix_rank(change(delta), rtol=1e-9) == 8


def test_start_first_gradient_and_count():
    model, delta = attached(linear(draw(6, 4)), RandLoRA(rank=2))
    assert not change(delta).any()
    assert (delta.Gamma == 1 / 4).all()
    model(draw(3, 4)).square().sum().backward()
    assert not delta.Gamma.grad.any()
    assert (delta.Lambda.grad != 0).any()
    assert sum(p.numel() for p in delta.parameters()) == RandLoRA(rank=2).count(delta.site) == 12


def test_scales():
    def scale(**hyper: object) -> float:
        return attached(linear(draw(10, 8)), RandLoRA(rank=2, **hyper))[1].scale

    assert scale() == 2 / math.sqrt(4)
    assert scale(alpha=5) == 2.5 / math.sqrt(4)
    assert scale(scaling="rank") == 20
    assert scale(scaling="rank", alpha=5) == 2.5


@pytest.mark.parametrize("basis", ["uniform", "sparse", "very-sparse"])
def test_bases_are_shared_seeded_and_of_unit_deviation(basis: str):
    def attach() -> rankfold.Adapter:
        model = nn.Sequential(nn.Linear(64, 100), nn.Linear(100, 36))
        return rankfold.attach(model, RandLoRA(rank=16, basis=basis), targets=["0", "1"], seed=2)

    adapter = attach()
    A, B = adapter.shared.A, adapter.shared.B
    assert A.shape == (16, 64)
    assert B.shape == (100, 4 * 16)
    assert A.std().item() == pytest.approx(1, abs=1e-6)
    assert B.std().item() == pytest.approx(1, abs=1e-6)
    assert torch.equal(attach().shared.B, B)
    assert set(adapter.state_dict()) == {f"deltas.{i}.{name}" for i in (0, 1) for name in ("Lambda", "Gamma")}
    if basis != "uniform":
        nonzero = {"sparse": 1 / 3, "very-sparse": 1 / 8}[basis]
        assert len(B.unique()) == 3
        assert (B != 0).float().mean().item() == pytest.approx(nonzero, abs=0.02)


def test_the_gained_product_differentiates_and_keeps_no_copy_of_the_basis():
    A, Lambda, Gamma = draw(3, 5), draw(2, 4, 3).requires_grad_(), draw(2, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda one, two: Gained.apply(one, A, two), (Lambda, Gamma))
    assert torch.autograd.gradgradcheck(lambda one, two: Gained.apply(one, A, two), (Lambda, Gamma))
    total = torch.func.grad(lambda one: Gained.apply(one, A, Gamma.detach()).square().sum())(Lambda.detach())
    close(total, torch.autograd.grad(Gained.apply(Lambda, A, Gamma).square().sum(), Lambda)[0])
    kept: list[int] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
        Gained.apply(Lambda, A, Gamma)
    assert sum(kept) == A.numel() + Lambda.numel() + Gamma.numel()


def test_another_rank_for_one_layer_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(rankfold.RankfoldError, match="shared bases have 2"):
        rankfold.attach(model, RandLoRA(rank=2), targets=["0", "1"], overrides={"1": {"rank": 4}})


def test_experts_share_the_bases_and_have_gains_of_their_own():
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.up = nn.Parameter(draw(3, 4, 8))
    delta = rankfold.attach(model, RandLoRA(rank=2), targets=["up"]).deltas["experts.up"]
    perturb(delta)
    together = change(delta)
    for e in range(3):
        _, alone = attached(linear(draw(3, 4, 8)[e]), RandLoRA(rank=2))
        put(alone, Lambda=delta.Lambda[e], Gamma=delta.Gamma[e])
        close(together[e], change(alone), 1e-10)
    assert delta.Lambda.dtype == DOUBLE
