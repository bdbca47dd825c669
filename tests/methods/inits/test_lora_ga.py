"""LoRA-GA's card: worked numbers, Gram matrices, the first step, and what its choices of directions and scale mean."""

import pytest
import torch

import rankfold
from rankfold.core.calibration import MeanGradient, calibrate
from rankfold.core.linalg import svd
from rankfold.errors import RankfoldError
from rankfold.inits.lora_ga import LoRAGA
from tests.methods.inits.tiny import answer, tiny_llama, tokens
from tests.methods.support import DOUBLE, attached, change, close, draw, linear


def started(G, rank, W=None, alpha=None, rslora=False, seed=0, **options):
    """The delta that starts from the gradient G, in float64."""
    G = torch.as_tensor(G, dtype=DOUBLE)
    layer = linear(draw(*G.shape, seed=5) if W is None else W)
    method = rankfold.LoRA(rank=rank, alpha=alpha, rslora=rslora)
    found = answer(MeanGradient(), G)
    return attached(layer, method, init=LoRAGA(**options), calibration=found, seed=seed, dtype=DOUBLE)[1]


def test_worked_numbers():
    delta = started(torch.diag(torch.tensor([4.0, 3, 2, 1])), 1)
    c2 = 4**0.5 / 16
    close(delta.A.T @ delta.A, torch.diag(torch.tensor([c2, 0, 0, 0])))
    close(delta.B @ delta.B.T, torch.diag(torch.tensor([0, c2, 0, 0])))
    close((delta.B @ delta.A).abs(), [[0, 0, 0, 0], [0.125, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    G = torch.diag(torch.tensor([4.0, 3, 2, 1], dtype=DOUBLE))
    close(G @ delta.A.T @ delta.A + delta.B @ delta.B.T @ G, torch.diag(torch.tensor([0.5, 0.375, 0, 0])))


@pytest.mark.parametrize("shape", [(12, 10), (10, 12)])
@pytest.mark.parametrize("directions", ["ArB2r", "A2rBr", "ArBr", "random"])
def test_each_choice_takes_the_first_2r_triples_once(directions, shape):
    r, G = 3, draw(*shape)
    delta = started(G, r, directions=directions, scale="unit")
    U, _, Vt = svd(G)
    in_A = (Vt @ delta.A.T).square().sum(1)  # 1 where A has the direction
    in_B = (U.T @ delta.B).square().sum(1)
    taken = {"ArB2r": [0, 1, 2], "A2rBr": [3, 4, 5], "ArBr": [1, 3, 5]}.get(
        directions, [i for i in range(10) if in_A[i] > 0.5]
    )
    if directions == "random":
        others = [started(G, r, directions="random", scale="unit", seed=seed) for seed in range(4)]
        assert any(not torch.allclose(other.A.T @ other.A, delta.A.T @ delta.A) for other in others)
    wanted = torch.zeros(10, dtype=DOUBLE)
    wanted[taken] = 1
    assert wanted.sum() == r
    close(in_A, wanted, atol=1e-10)
    close(in_B, torch.tensor([1.0] * 6 + [0] * 4) - wanted, atol=1e-10)


def test_the_first_step_is_along_the_best_approximation():
    r, G, lr = 2, draw(9, 8), 1e-7
    delta = started(G, r, alpha=4)
    before = (delta.scale * delta.B @ delta.A).detach()
    loss = (delta.scale * (delta.B @ delta.A) * G).sum()  # its gradient in ΔW is G
    gB, gA = torch.autograd.grad(loss, [delta.B, delta.A])
    assert gB.any()
    assert gA.any()
    moved = delta.scale * (delta.B - lr * gB) @ (delta.A - lr * gA) - before
    U, S, Vt = svd(G, 2 * r)
    best = U * S @ Vt
    assert torch.cosine_similarity(moved.flatten(), -best.flatten(), dim=0) > 1 - 1e-9
    c2 = 9**0.5 / 16
    torch.testing.assert_close(moved.detach() / lr, -(delta.scale**2) * c2 * best, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "squared"),
    [
        ({}, 12**0.5 / 16),
        ({"gamma": 64}, 12**0.5 / 64),
        ({"scale": "unit"}, 1.0),
        ({"scale": "gd"}, 1 / 9),  # α/√r = 6/2
    ],
)
def test_scales(options, squared):
    delta = started(draw(12, 10), 4, alpha=6, rslora=True, **options)
    assert delta.scale == 3
    close(delta.A @ delta.A.T, squared * torch.eye(4, dtype=DOUBLE), atol=1e-10)
    close(delta.B.T @ delta.B, squared * torch.eye(4, dtype=DOUBLE), atol=1e-10)
    close(change(delta), torch.zeros(12, 10), atol=1e-10)


def test_the_scale_of_the_weight():
    W = torch.zeros(6, 6)
    W[range(6), range(6)] = torch.tensor([16.0, 4, 1, 1, 1, 1])
    delta = started(draw(6, 6), 2, W=W, alpha=8, scale="weightS")
    close(delta.A @ delta.A.T, (2.0 + 1) ** 2 / 4 * torch.eye(2), atol=1e-9)  # √(16/4), √(4/4)


def test_clip_keeps_the_offset_below_the_weight():
    W, G = 0.01 * draw(8, 8), draw(8, 8)
    free, clipped = started(G, 2, W=W), started(G, 2, W=W, clip=True)
    assert (free.B @ free.A).abs().max() > W.abs().max()
    close((clipped.B @ clipped.A).abs().max(), W.abs().max(), atol=1e-12)
    root = (W.abs().max() / (free.B @ free.A).abs().max()).sqrt()
    close(clipped.A, root * free.A.detach())
    close(clipped.B, root * free.B.detach())
    wide = started(G, 2, W=100 * W, clip=True)
    close(wide.A, free.A.detach())


def test_a_model_end_to_end():
    model, batch = tiny_llama(), tokens()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        plain = model(**batch).logits
    method = rankfold.LoRA(rank=4, alpha=8, rslora=True)
    adapter = rankfold.attach(model, method, init=LoRAGA(), calibration=[batch, tokens(1)])
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, plain, atol=1e-5, rtol=1e-5)
    model(**batch).loss.backward()
    assert all(delta.A.grad.any() and delta.B.grad.any() for delta in adapter.deltas.values())
    found = calibrate(model, [batch, tokens(1)], [MeanGradient()])
    for name, delta in adapter.deltas.items():
        U, _, Vt = svd(found.get(MeanGradient(), name), 8)
        c2 = delta.site.out**0.5 / 16
        torch.testing.assert_close(delta.A.T @ delta.A, c2 * Vt[:4].T @ Vt[:4], atol=1e-3, rtol=0)
        torch.testing.assert_close(delta.B @ delta.B.T, c2 * U[:, 4:] @ U[:, 4:].T, atol=1e-3, rtol=0)
    rankfold.detach(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_experts_start_one_by_one():
    from rankfold.core import Site

    G, W = draw(3, 8, 6), draw(3, 8, 6, seed=1)
    site = Site("experts", "experts", (3, 8, 6), False, DOUBLE)
    for options in ({}, {"scale": "weightS"}, {"clip": True, "gamma": 0.01}):
        B, A, *_ = LoRAGA(**options).factors(
            site, W, 2, 1.0, answer(MeanGradient(), G, "experts"), torch.Generator().manual_seed(0)
        )
        one = started(G[1], 2, W=W[1], **options)
        close(B[1] @ B[1].mT, one.B @ one.B.mT, atol=1e-10)
        close(A[1].mT @ A[1], one.A.mT @ one.A, atol=1e-10)


def test_what_cannot_be():
    with pytest.raises(RankfoldError, match=r"2r = 6 singular triples.*\(4×9\) has 4: rank 2 fits"):
        started(draw(4, 9), 3)
    for scale in ("gd", "weightS"):
        with pytest.raises(RankfoldError, match="divides by α/r"):
            started(draw(6, 6), 2, alpha=0, scale=scale)
    with pytest.raises(RankfoldError, match="directions"):
        rankfold.build("lora-ga", directions="ArAr")
    with pytest.raises(RankfoldError, match="needs statistics of the data"):
        rankfold.attach(tiny_llama(), rankfold.LoRA(rank=2), init=LoRAGA())
