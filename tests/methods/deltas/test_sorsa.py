import pytest
import torch
from torch import nn

import rankfold
from rankfold import SORSA, Orthogonality
from tests.methods.support import attached, change, close, draw, linear, perturb, put


def regulariser(model: nn.Module, weight: float = 1.0) -> Orthogonality:
    callback = Orthogonality(weight=weight)
    callback.on_attach(rankfold.adapters(model)["default"], model)
    return callback


def test_worked_numbers():
    W = torch.diag(torch.tensor([3.0, 2, 1], dtype=torch.float64))
    _, delta = attached(linear(W), SORSA(rank=1))
    close(delta.lam, [3])
    close(delta.B @ torch.diag(delta.lam) @ delta.A, torch.diag(torch.tensor([3.0, 0, 0])))
    put(delta, lam=[0])
    close(delta.adapted_weight(W), torch.diag(torch.tensor([0.0, 2, 1])))  # W_r


@pytest.mark.parametrize("alpha", [None, 1.0, 12.0])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_starts_at_the_leading_triples_and_as_the_base_for_every_scale(shape: tuple[int, int], alpha: float | None):
    W = draw(*shape)
    model, delta = attached(linear(W), SORSA(rank=3, alpha=alpha))
    U, S, Vt = torch.linalg.svd(W)
    close(delta.lam, S[:3])
    close((delta.B * delta.lam) @ delta.A, U[:, :3] * S[:3] @ Vt[:3])
    x = draw(4, shape[1], seed=1)
    close(model(x), x @ W.T)
    perturb(delta)
    s = 1.0 if alpha is None else alpha / 3
    residual = W - s * U[:, :3] * S[:3] @ Vt[:3]
    expected = residual + s * (delta.B * delta.lam) @ delta.A
    close(delta.adapted_weight(W), expected.detach())
    close(model(x), x @ expected.T.detach(), 1e-11)


def test_every_part_has_a_gradient_from_the_first_step():
    model, delta = attached(linear(draw(6, 5)), SORSA(rank=2, alpha=6))
    x, up = draw(4, 5, seed=1), draw(4, 6, seed=2)
    model(x).backward(up)
    G, B, lam, A = up.T @ x, delta.B.detach(), delta.lam.detach(), delta.A.detach()
    close(delta.B.grad, 3 * G @ A.T * lam, 1e-11)
    close(delta.A.grad, 3 * (B * lam).T @ G, 1e-11)
    close(delta.lam.grad, 3 * (B.T @ G @ A.T).diagonal(), 1e-11)


def test_the_regulariser_is_zero_at_start_and_its_gradient_finite():
    model, delta = attached(nn.Linear(30, 20), SORSA(rank=8))
    penalty = regulariser(model).penalty()
    assert 0 <= penalty < 1e-5
    penalty.backward()
    assert all(torch.isfinite(factor.grad).all() for factor in (delta.A, delta.B))
    # B = (2, 0)ᵀ and A = (1, 0): terms 3 and 0, the latter's norm at exactly zero
    model, delta = attached(linear([[1, 0], [0, 2]]), SORSA(rank=1))
    put(delta, B=[[2], [0]], A=[[1, 0]])
    penalty = regulariser(model).penalty()
    close(penalty, 1.5)
    penalty.backward()
    close(delta.A.grad, [[0, 0]])
    close(delta.B.grad, [[0.5 * 2 * 2], [0]])  # d|b² − 1|/db = 2b, halved by the mean
    assert delta.lam.grad is None


def test_with_the_regulariser_the_vectors_stay_orthonormal_while_lambda_moves():
    departures, moved = {}, {}
    for weight in (0.0, 13.3):
        model, delta = attached(linear(draw(12, 10)), SORSA(rank=4))
        callback, start = regulariser(model, weight), delta.lam.detach().clone()
        optimizer = torch.optim.SGD(delta.parameters(), lr=3e-3)
        x, y = draw(64, 10, seed=1), draw(64, 12, seed=2)
        for _ in range(60):
            optimizer.zero_grad()
            (0.1 * (model(x) - y).square().mean(0).sum() + callback.penalty()).backward()
            optimizer.step()
        departures[weight] = regulariser(model).penalty().item()
        moved[weight] = (delta.lam - start).norm().item()
    assert departures[13.3] < 0.1 * departures[0.0]
    assert moved[13.3] > 0.1


def test_saves_its_offset_and_detaches_to_the_bit(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 8))
    before, x = model[0].weight.clone(), torch.randn(2, 9)
    adapter = rankfold.attach(model, SORSA(rank=3), targets=["0"])
    perturb(adapter.deltas["0"])
    expected = model(x)
    rankfold.save(model, tmp_path / "a")
    rankfold.detach(model)
    assert torch.equal(model[0].weight, before)
    rankfold.load(model, tmp_path / "a")
    assert torch.equal(model(x), expected)


def test_exports_as_a_lora_of_rank_2r_on_the_whole_base():
    model, delta = attached(linear(draw(9, 8)), SORSA(rank=2))
    perturb(delta)
    lora, report = rankfold.as_lora(model)
    B, A = lora.deltas["0"].factors()
    assert A.shape[-2] == 4
    assert report["0"] < 1e-7
    close(lora.deltas["0"].scale * B @ A, change(delta), 1e-10)


def test_counts_scale_and_refusals():
    adapter = rankfold.attach(nn.Sequential(nn.Linear(10, 7)), SORSA(rank=3), targets=["0"])
    assert adapter.num_parameters() == 3 * (10 + 7 + 1)
    assert SORSA().scale == 1
    assert SORSA(rank=4, alpha=2).scale == 0.5
    with pytest.raises(rankfold.UnsupportedError, match="at most 7"):
        attached(nn.Linear(10, 7), SORSA(rank=8))
